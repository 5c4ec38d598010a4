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

from modhifi_cli.errors import DataError, ModHiFiError, is_number, is_whole
from modhifi_cli.files import manifest
from modhifi_cli.files.disk import (
    FORMAT_VERSION,
    as_tensors,
    disk,
    make_folder,
    read_bytes,
    read_object,
    to_bytes,
    write_bytes,
    write_json,
)
from modhifi_cli.records import LoadedModel, Preprocess, TextInput, without_folders

_ARCHITECTURE, _WEIGHTS, _VERIFICATION = "architecture.json", "weights.safetensors", "verification.safetensors"
_LARGEST_SIDE = 2**14  # pixels
_CONTINUED = 16  # tokens of the greedy continuation that is kept for `verify`


def load_model(
    directory: str | os.PathLike[str], *, allow: str | bool = False, unverified: bool = False
) -> nn.Module:
    """The network that a run saved: an ordinary module of its original class with smaller layers, on the CPU.

    A folder runs no code: where the network is made by code of the user's own (``model=module``), that code is imported
    only if the caller names it.

    Args:
        directory: A run folder, or its ``model`` folder.
        allow: ``"package.module:function"``, the user's own code that makes this network, exactly as the folder names
            it; True for whatever it names.
        unverified: Whether a folder without checksums, as older versions wrote them, may be read.

    Returns:
        The network in evaluation mode.

    Raises:
        DataError: If the folder is no saved model, is damaged or not what was written, names code that was not allowed,
            or was written by a newer format.
    """
    saved = load_saved(directory, allow=allow, unverified=unverified)
    changed = code_changed(directory, allow=allow)
    if changed is not None:
        warnings.warn(changed, stacklevel=2)
    return saved.model


def code_changed(directory: str | os.PathLike[str], *, allow: str | bool = False) -> str | None:
    """A warning if the user's own code that makes a saved network (``model=module``) is no longer what it was.

    Args:
        directory: A run folder, or its ``model`` folder.
        allow: As in `load_model`; code that is not allowed is not looked at, since that would import it.

    Returns:
        The sentence, or None; also where nothing is saved there.
    """
    from modhifi_cli.models.module import changed_code

    path = _model_folder(directory) / _ARCHITECTURE
    if allow is False or not os.path.lexists(path):
        return None
    described = read_object(path, "a saved model")
    kwargs = described.get("kwargs")
    named = kwargs.get("factory") if isinstance(kwargs, Mapping) else None
    return changed_code(described) if named is not None and allow in (True, named) else None


def load_saved(
    directory: str | os.PathLike[str],
    *,
    allow: str | bool = False,
    unverified: bool = False,
    replaced: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """As `load_model`, with name, preprocessing, classes and the recipe of the dense network.

    Args:
        replaced: A file of weights that the caller puts on top; where it is the saved one itself, trained since, it need
            not be what was written.
    """
    folder = _model_folder(directory)
    if not os.path.lexists(folder / _ARCHITECTURE):
        raise DataError(f"{folder}: not a saved model, {_ARCHITECTURE} is missing.")
    files = manifest.checked(folder, unverified=unverified, replaced=replaced)
    described = files.object(_ARCHITECTURE)
    if described.get("reads") == "text":
        return _load_text(files, described)
    try:
        account = _described(described)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder / _ARCHITECTURE}: damaged, {' '.join(str(error).split())[:200]} is missing or of the wrong type; "
            "restore the run folder."
        ) from error
    model = _filled(files, account.architecture, described["widths"], allow)
    return dataclasses.replace(account, model=model)


def _model_folder(directory: str | os.PathLike[str]) -> Path:
    folder = Path(directory)
    inner = folder / "model"
    if inner.is_symlink():
        raise DataError(f"{inner}: a link, and no link in a run folder is followed; put the folder itself there.")
    return inner if inner.is_dir() else folder


def _described(told: Mapping[str, Any]) -> LoadedModel:
    """Everything that ``architecture.json`` says of a network that reads images, without the network.

    Raises:
        KeyError, TypeError, ValueError: If something is missing or wrong.
    """
    seen = told["preprocess"]
    size, mean, std = (tuple(seen[key]) for key in ("size", "mean", "std"))
    if len(size) != 2 or not all(is_whole(side) and 0 < side <= _LARGEST_SIDE for side in size):
        raise ValueError(f"preprocess.size {size!r:.60}")
    if len(mean) != len(std) or not all(is_number(one) for one in (*mean, *std)):
        raise ValueError("preprocess.mean or preprocess.std")
    if not (seen["resize"] is None or (is_number(seen["resize"]) and 0 < seen["resize"] <= _LARGEST_SIDE)):
        raise ValueError("preprocess.resize")
    if not all(isinstance(one, str) for one in (told["name"], told["weights"], seen["interpolation"])):
        raise TypeError("name, weights or preprocess.interpolation")
    classes = told["classes"]
    if not isinstance(told["widths"], Mapping) or not isinstance(classes, list | None):
        raise TypeError("widths or classes")
    return LoadedModel(
        model=nn.Identity(),
        name=told["name"],
        preprocess=Preprocess(
            size=size,
            mean=mean,
            std=std,
            resize=None if seen["resize"] is None else int(seen["resize"]),
            interpolation=seen["interpolation"],
        ),
        architecture={"builder": told["builder"], "kwargs": told["kwargs"]},
        weights=told["weights"],
        classes=None if classes is None else tuple(str(one) for one in classes),
        license=_license(told),
    )


def _license(told: Mapping[str, Any]) -> str | None:
    license = told.get("license")
    return license if isinstance(license, str) else None


def license_of(run: Path) -> str:
    """The licence that the base of a run's network states, or ""."""
    return _license(read_object(run / "model" / _ARCHITECTURE, "a saved model")) or ""


def _filled(files: manifest.Checked, architecture: Mapping[str, Any], widths: Any, allow: str | bool) -> nn.Module:
    """The network that a description stands for, with its saved widths and weights."""
    with files.tensors_meanwhile(_WEIGHTS) as state:
        return _built(files.folder, architecture, widths, state, allow)


def _built(
    folder: Path, architecture: Mapping[str, Any], widths: Any, state: Mapping[str, Tensor], allow: str | bool
) -> nn.Module:
    from modhifi_cli.graph.surgery import restore_widths_
    from modhifi_cli.models import build_architecture

    # A dense network is some times as wide as what was saved of it, not a thousand times. An empty tensor may claim any
    # width.
    widest = max((max(tensor.shape, default=1) for tensor in state.values() if tensor.numel()), default=1)
    model = build_architecture(architecture, allow=allow, largest=max(8192, 8 * widest))
    try:
        restore_widths_(model, widths)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise DataError(
            f"{folder / _ARCHITECTURE}: damaged, its widths do not fit ({type(error).__name__}: {error}); restore "
            "the run folder."
        ) from error
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
    return model.eval()


def save_model(directory: Path, loaded: LoadedModel, model: nn.Module) -> None:
    """Write an edited network: ``weights.safetensors`` and ``architecture.json``, and their checksums.

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
        "weights": without_folders(loaded.weights),
        **({} if loaded.license is None else {"license": loaded.license}),
    }
    make_folder(directory)
    if isinstance(loaded.preprocess, TextInput):
        from modhifi_cli.models import hf

        with disk(directory):
            native, shapes = hf.save(model, directory, loaded.preprocess)
        write_json(directory / _ARCHITECTURE, described | {"reads": "text", "native": native} | shapes)
        manifest.write(directory)
        return
    described |= {
        "widths": describe_widths(model),
        "preprocess": dataclasses.asdict(loaded.preprocess),
        "classes": None if loaded.classes is None else list(loaded.classes),
    }
    write_bytes(directory / _WEIGHTS, to_bytes(model.state_dict()))
    write_json(directory / _ARCHITECTURE, described)
    manifest.write(directory)


def _load_text(files: manifest.Checked, described: Mapping[str, Any]) -> LoadedModel:
    from modhifi_cli.files.language_folder import refuse_reaching
    from modhifi_cli.models import hf

    folder = files.folder
    weight_files = {name for name in files.digests or () if name.endswith(".safetensors")}
    files.check(name for name in files.digests or () if name not in weight_files)
    refuse_reaching(files)
    try:
        architecture = {"builder": described["builder"], "kwargs": described["kwargs"]}
        name, weights = described["name"], described["weights"]
        if architecture["builder"] != hf.BUILDER or not isinstance(architecture["kwargs"].get("config"), Mapping):
            raise TypeError("builder or kwargs")
        if not isinstance(name, str) or not isinstance(weights, str):
            raise TypeError("name or weights")
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder / _ARCHITECTURE}: damaged, {error} is missing or of the wrong type; restore the run folder."
        ) from error
    with files.checked_meanwhile(weight_files):
        model = hf.restore(folder, architecture, described)
    return LoadedModel(
        model=model,
        name=name,
        preprocess=hf.text_input_of(folder, model),
        architecture=architecture,
        weights=weights,
        license=_license(described),
    )


def opens_natively(run: Path) -> bool:
    """Whether plain transformers opens the saved network's folder (of a language model)."""
    return bool(read_object(run / "model" / _ARCHITECTURE, "a saved model").get("native", False))


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


def stored_answers(run: Path, *, unverified: bool = False) -> dict[str, Tensor]:
    """The ``inputs`` that `save_verification` wrote into a run folder and what the network made of them.

    Args:
        run: The folder.
        unverified: Whether a folder without checksums may be read.

    Raises:
        DataError: If they are missing or damaged.
    """
    stored = manifest.checked(Path(run), unverified=unverified).tensors(_VERIFICATION)
    missing = next((key for key in ("inputs", "logits") if key not in stored), None)
    if missing is not None:
        raise DataError(f"{run}/{_VERIFICATION}: damaged, {missing} is missing; restore the run folder.")
    return stored


def answer(run: str, path: str, *, allow: bool = False, unverified: bool = False) -> None:
    """Reload a saved run, run its stored inputs and write the logits to `path`; `verify` calls it in a new process."""
    inputs = stored_answers(Path(run), unverified=unverified)["inputs"]
    model = load_model(run, allow=allow, unverified=unverified)
    write_bytes(Path(path), to_bytes(answers_of(model, inputs)))


def answer_process(run: str, path: str, *words: str) -> int:
    """`answer` as a process, told ``allow`` and ``unverified``: 0, or 1 with one sentence on standard error."""
    import sys

    try:
        answer(run, path, allow="allow" in words, unverified="unverified" in words)
    except ModHiFiError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


def read_answer(path: Path) -> dict[str, Tensor]:
    """What `answer` wrote."""
    return as_tensors(read_bytes(path), path)
