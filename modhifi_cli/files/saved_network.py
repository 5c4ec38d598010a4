"""A saved network: its weights, how to build it, what it must answer, and reading all of them back."""

import dataclasses
import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import DataError, ModHiFiError
from modhifi_cli.files.disk import (
    FORMAT_VERSION,
    disk,
    make_folder,
    read_json,
    read_tensors,
    to_bytes,
    write_bytes,
    write_json,
)
from modhifi_cli.records import LoadedModel, Preprocess, TextInput

_CONTINUED = 16  # tokens of the greedy continuation that is kept for `verify`


def load_model(directory: str | os.PathLike[str]) -> nn.Module:
    """The network that a run saved: an ordinary module of its original class with smaller layers, on the CPU.

    Args:
        directory: A run folder, or its ``model`` folder.

    Returns:
        The network in evaluation mode.

    Raises:
        DataError: If the folder is no saved model, is damaged, or was written by a newer format.
    """
    saved = load_saved(directory)
    changed = code_changed(directory)
    if changed is not None:
        warnings.warn(changed, stacklevel=2)
    return saved.model


def code_changed(directory: str | os.PathLike[str]) -> str | None:
    """A warning if the user's own code that makes a saved network (``model=module``) is no longer what it was.

    Args:
        directory: A run folder, or its ``model`` folder.

    Returns:
        The sentence, or None; also where nothing is saved there.
    """
    from modhifi_cli.models.module import changed_code

    folder = Path(directory)
    described = folder / "model" / "architecture.json"
    path = described if described.is_file() else folder / "architecture.json"
    return changed_code(read_json(path, "a saved model")) if path.is_file() else None


def load_saved(directory: str | os.PathLike[str]) -> LoadedModel:
    """As `load_model`, with name, preprocessing, classes and the recipe of the dense network."""
    from modhifi_cli.graph.surgery import restore_widths_
    from modhifi_cli.models import build_architecture

    folder = Path(directory)
    if (folder / "model").is_dir():
        folder = folder / "model"
    described = read_json(folder / "architecture.json", "a saved model")
    if described.get("reads") == "text":
        return _load_text(folder, described)
    try:
        architecture = {"builder": described["builder"], "kwargs": described["kwargs"]}
        preprocess = Preprocess(
            size=tuple(described["preprocess"]["size"]),
            mean=tuple(described["preprocess"]["mean"]),
            std=tuple(described["preprocess"]["std"]),
            resize=described["preprocess"]["resize"],
            interpolation=described["preprocess"]["interpolation"],
        )
        widths, name, weights = described["widths"], described["name"], described["weights"]
        classes = None if described["classes"] is None else tuple(described["classes"])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{folder / 'architecture.json'}: damaged, {error} is missing or of the wrong type; restore the run folder."
        ) from error
    state = read_tensors(folder / "weights.safetensors")
    model = build_architecture(architecture)
    restore_widths_(model, widths)
    floating = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    model.to(floating[0] if floating else torch.float32)  # load_state_dict would round to the built dtype
    # Some classes ask for the versions that a state_dict of their own carries (torchvision's MNASNet).
    versioned = OrderedDict(state)
    versioned._metadata = model.state_dict()._metadata
    try:
        model.load_state_dict(versioned)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise DataError(
            f"{folder}: weights.safetensors does not fit architecture.json ({detail}); the run folder is damaged."
        ) from error
    return LoadedModel(
        model=model.eval(),
        name=name,
        preprocess=preprocess,
        architecture=architecture,
        weights=weights,
        classes=classes,
    )


def save_model(directory: Path, loaded: LoadedModel, model: nn.Module) -> None:
    """Write an edited network: ``weights.safetensors`` and ``architecture.json``.

    Args:
        directory: Folder to write into; made if absent.
        loaded: The dense network's description (its `model` is not used).
        model: The edited network.

    Raises:
        DataError: If the folder cannot be written.
    """
    from modhifi_cli.graph.surgery import describe_widths

    described = {
        "format_version": FORMAT_VERSION,
        "name": loaded.name,
        "builder": loaded.architecture["builder"],
        "kwargs": dict(loaded.architecture["kwargs"]),
        "weights": loaded.weights,
    }
    make_folder(directory)
    if isinstance(loaded.preprocess, TextInput):
        from modhifi_cli.models import hf

        with disk(directory):
            native, shapes = hf.save(model, directory, loaded.preprocess)
        write_json(directory / "architecture.json", described | {"reads": "text", "native": native} | shapes)
        return
    described |= {
        "widths": describe_widths(model),
        "preprocess": dataclasses.asdict(loaded.preprocess),
        "classes": None if loaded.classes is None else list(loaded.classes),
    }
    write_bytes(directory / "weights.safetensors", to_bytes(model.state_dict()))
    write_json(directory / "architecture.json", described)


def _load_text(folder: Path, described: Mapping[str, Any]) -> LoadedModel:
    from modhifi_cli.models import hf

    try:
        architecture = {"builder": described["builder"], "kwargs": described["kwargs"]}
        name, weights = described["name"], described["weights"]
    except KeyError as error:
        raise DataError(
            f"{folder / 'architecture.json'}: damaged, {error} is missing; restore the run folder."
        ) from error
    model = hf.restore(folder, architecture, described)
    return LoadedModel(
        model=model,
        name=name,
        preprocess=hf.text_input_of(folder, model),
        architecture=architecture,
        weights=weights,
    )


def opens_natively(run: Path) -> bool:
    """Whether plain transformers opens the saved network's folder (of a language model)."""
    return bool(read_json(run / "model" / "architecture.json", "a saved model").get("native", False))


def save_verification(path: Path, inputs: Tensor, answers: Mapping[str, Tensor]) -> None:
    """Keep a few inputs and what the network makes of them for `verify`.

    Args:
        path: The file.
        inputs: Images ``[batch, channels, height, width]``, or token ids ``[batch, length]`` int64.
        answers: As `answers_of`.
    """
    write_bytes(path, to_bytes({"inputs": inputs, **answers}))


def answers_of(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """What a saved network must answer again: its ``logits``, and of a language model a greedy ``continuation``."""
    from modhifi_cli.graph.answers import respond

    with torch.inference_mode():
        answers = {"logits": respond(model, inputs)}
    if not inputs.is_floating_point():
        from modhifi_cli.models import hf

        answers["continuation"] = hf.continuation(model, inputs[:1], _CONTINUED)
    return answers


def load_verification(run: Path) -> tuple[Tensor, Tensor]:
    """The inputs and logits that `save_verification` wrote into a run folder."""
    stored = read_tensors(Path(run) / "verification.safetensors")
    try:
        return stored["inputs"], stored["logits"]
    except KeyError as error:
        raise DataError(
            f"{run}/verification.safetensors: damaged, {error} is missing; restore the run folder."
        ) from error


def answer(run: str, path: str) -> None:
    """Reload a saved run, run its stored inputs and write the logits to `path`; `verify` calls it in a new process."""
    inputs, _ = load_verification(Path(run))
    write_bytes(Path(path), to_bytes(answers_of(load_model(run), inputs)))


def answer_process(run: str, path: str) -> int:
    """`answer` as a process: 0, or 1 with one sentence on standard error."""
    import sys

    try:
        answer(run, path)
    except ModHiFiError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


def read_answer(path: Path) -> dict[str, Tensor]:
    """What `answer` wrote."""
    return read_tensors(path)
