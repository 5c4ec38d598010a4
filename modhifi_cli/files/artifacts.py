"""Files of a run: its folder, each edit as it is made, the saved network, and reading all of them back.

A run works in ``NAME.incomplete`` and takes its name when it is finished, so a folder with a plain name is whole. Every
file is written beside its place and then moved there. Nothing is pickled: tensors are safetensors, the rest is JSON.
"""

import dataclasses
import json
import os
import platform
import shutil
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from modhifi_cli.errors import DataError, ModHiFiError
from modhifi_cli.evaluation.latency_table import LatencyTable
from modhifi_cli.records import Edit, LoadedModel, Measurement, ModuleEdit, Preprocess, TextInput

FORMAT_VERSION = 1
INCOMPLETE = ".incomplete"
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
    return changed_code(_read_json(path, "a saved model")) if path.is_file() else None


def load_saved(directory: str | os.PathLike[str]) -> LoadedModel:
    """As `load_model`, with name, preprocessing, classes and the recipe of the dense network."""
    from modhifi_cli.graph.surgery import restore_widths_
    from modhifi_cli.models import build_architecture

    folder = Path(directory)
    if (folder / "model").is_dir():
        folder = folder / "model"
    described = _read_json(folder / "architecture.json", "a saved model")
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
    state = _read_tensors(folder / "weights.safetensors")
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

        with _disk(directory):
            native, shapes = hf.save(model, directory, loaded.preprocess)
        write_json(directory / "architecture.json", described | {"reads": "text", "native": native} | shapes)
        return
    described |= {
        "widths": describe_widths(model),
        "preprocess": dataclasses.asdict(loaded.preprocess),
        "classes": None if loaded.classes is None else list(loaded.classes),
    }
    write_bytes(directory / "weights.safetensors", _to_bytes(model.state_dict()))
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
    return bool(_read_json(run / "model" / "architecture.json", "a saved model").get("native", False))


def save_verification(path: Path, inputs: Tensor, answers: Mapping[str, Tensor]) -> None:
    """Keep a few inputs and what the network makes of them for `verify`.

    Args:
        path: The file.
        inputs: Images ``[batch, channels, height, width]``, or token ids ``[batch, length]`` int64.
        answers: As `answers_of`.
    """
    write_bytes(path, _to_bytes({"inputs": inputs, **answers}))


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
    stored = _read_tensors(Path(run) / "verification.safetensors")
    try:
        return stored["inputs"], stored["logits"]
    except KeyError as error:
        raise DataError(
            f"{run}/verification.safetensors: damaged, {error} is missing; restore the run folder."
        ) from error


def answer(run: str, path: str) -> None:
    """Reload a saved run, run its stored inputs and write the logits to `path`; `verify` calls it in a new process."""
    inputs, _ = load_verification(Path(run))
    write_bytes(Path(path), _to_bytes(answers_of(load_model(run), inputs)))


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
    return _read_tensors(path)


class RunDirectory:
    """The folder of one run, under a temporary name until `finish`.

    Attributes:
        final: Where the folder will be.
        path: Where it is now.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = final.with_name(final.name + INCOMPLETE)

    @classmethod
    def create(cls, final: Path) -> "RunDirectory":
        """Make a new, empty run folder.

        Raises:
            DataError: If it exists already or cannot be made.
        """
        run = cls(final)
        if final.exists() or run.path.exists():
            raise DataError(f"{final}: exists already; choose another output_dir or remove it.")
        make_folder(run.path)
        make_folder(run.path / "edits")
        return run

    @classmethod
    def reopen(cls, directory: str | os.PathLike[str]) -> "RunDirectory":
        """Open an interrupted run, named with or without ``.incomplete``.

        Raises:
            DataError: If there is no such run, or it is finished already.
        """
        given = Path(directory)
        run = cls(given.with_name(given.name.removesuffix(INCOMPLETE)))
        if run.final.is_dir():
            raise DataError(f"resume={given}: this run is finished; there is nothing to resume.")
        if not run.path.is_dir():
            raise DataError(f"resume={given}: no such folder; give the folder of an interrupted run (…{INCOMPLETE}).")
        return run

    def log(self, text: str) -> None:
        """Add a line with the time to ``run.log``."""
        with _disk(self.path / "run.log"), open(self.path / "run.log", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def save_edit(self, edit: Edit, dense_hash: str) -> None:
        """Put one edit on disk, numbered in order; it is whole or absent, never half."""
        tensors, described = _pack_edit(edit)
        number = len(list((self.path / "edits").glob("*.safetensors")))
        metadata = {"edit": json.dumps(described), "dense_sha256": dense_hash, "format_version": str(FORMAT_VERSION)}
        write_bytes(self.path / "edits" / f"{number:04d}.safetensors", _to_bytes(tensors, metadata))

    def load_edits(self) -> tuple[tuple[Edit, ...], str | None]:
        """Edits saved so far, in order, and the hash of the dense weights they belong to (None without edits)."""
        return load_edits(self.path)

    def inside(self, name: str) -> "RunDirectory":
        """A place for edits of its own inside this folder, such as a trial's; it goes when this run is finished."""
        inner = RunDirectory(self.path / name)
        inner.path = inner.final
        make_folder(inner.path / "edits")
        return inner

    def discard_if_empty(self) -> None:
        """Remove the folder of a run that ended before its first edit: nothing in it is worth resuming."""
        if not any(self.path.glob("**/edits/*.safetensors")):
            self.discard()

    def discard(self) -> None:
        """Remove the folder of a run that has come to nothing."""
        shutil.rmtree(self.path, ignore_errors=True)

    def finish(self, *, edits: bool = True) -> Path:
        """Gather the edits into one file and give the folder its name.

        Args:
            edits: False for a run that edits nothing.

        Returns:
            The folder under its final name.
        """
        if edits:
            self._gather_edits()
        with _disk(self.final):
            for passing in ("edits", "trials"):
                shutil.rmtree(self.path / passing, ignore_errors=True)
            os.replace(self.path, self.final)
        self.path = self.final
        return self.final

    def _gather_edits(self) -> None:
        edits, dense_hash = self.load_edits()
        tensors: dict[str, Tensor] = {}
        described = []
        for index, edit in enumerate(edits):
            own, about = _pack_edit(edit)
            tensors |= {f"{index}/{key}": value for key, value in own.items()}
            described.append(about)
        write_bytes(self.path / "edits.safetensors", _to_bytes(tensors))
        write_json(
            self.path / "edits.json",
            {"format_version": FORMAT_VERSION, "dense_sha256": dense_hash, "edits": described},
        )


def load_edits(run: str | os.PathLike[str]) -> tuple[tuple[Edit, ...], str | None]:
    """Edits of a finished or interrupted run, in order, and the hash of the dense weights that they apply to.

    Raises:
        DataError: If files are missing or damaged.
    """
    folder = Path(run)
    if (folder / "edits.json").exists():
        described = _read_json(folder / "edits.json", "a saved run")
        tensors = _read_tensors(folder / "edits.safetensors")
        edits = []
        if not isinstance(described.get("edits"), list):
            raise DataError(f"{folder / 'edits.json'}: damaged, it has no list of edits; restore the run folder.")
        for index, about in enumerate(described["edits"]):
            prefix = f"{index}/"
            own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            edits.append(_unpack_edit(own, about, folder / "edits.safetensors"))
        return tuple(edits), described.get("dense_sha256")
    if not (folder / "edits").is_dir():
        raise DataError(f"{folder}: not a run folder (it has neither edits.json nor edits/).")
    edits, dense_hash = [], None
    for path in sorted((folder / "edits").glob("*.safetensors")):
        tensors, metadata = _read_tensors(path), _read_metadata(path)
        try:
            about = json.loads(metadata["edit"])
            dense_hash = metadata["dense_sha256"]
        except (KeyError, json.JSONDecodeError) as error:
            raise DataError(f"{path}: damaged ({error}); remove it and what follows it to resume before it.") from error
        edits.append(_unpack_edit(tensors, about, path))
    return tuple(edits), dense_hash


def run_folder(
    directory: str | os.PathLike[str],
    *,
    needs: Sequence[str] = ("config.yaml", "results.json", "edits.json", "edits.safetensors", "model"),
) -> Path:
    """Check that a folder holds a finished run with the files that are needed.

    Raises:
        DataError: If it does not exist, is interrupted, or lacks files.
    """
    folder = Path(directory)
    if folder.name.endswith(INCOMPLETE) or folder.with_name(folder.name + INCOMPLETE).is_dir():
        raise DataError(f"run={folder}: this run was interrupted; finish it with the same command and resume={folder}.")
    if not folder.is_dir():
        raise DataError(f"run={folder}: no such folder; give the folder that a run named at its end.")
    for name in needs:
        if not (folder / name).exists():
            raise DataError(f"run={folder}: not a whole run, {name} is missing; restore the folder or run again.")
    return folder


def read_text(path: Path) -> str:
    """Text of a file of a run.

    Raises:
        DataError: If it is missing or unreadable.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore the run folder.") from error


def read_results(run: Path) -> dict[str, Any]:
    """The content of a run's ``results.json``."""
    return _read_json(run / "results.json", "a saved run")


def save_latency_table(path: Path, table: LatencyTable) -> None:
    """Write a latency table as JSON."""
    write_json(path, {"format_version": FORMAT_VERSION, **table.to_json()})


def load_latency_table(path: str | os.PathLike[str]) -> LatencyTable:
    """The latency table that a run kept.

    Raises:
        DataError: If there is no such file, or it is no latency table.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(
            f"target.table={file}: no such file; give the latency_table.json of a run with target=latency, or leave "
            "target.table out to measure one."
        )
    return LatencyTable.from_json(_read_json(file, "a latency table"), str(file))


def read_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON object that a run wrote.

    Args:
        path: The file.
        what: What it should be, for messages.

    Raises:
        DataError: If it is missing or damaged.
    """
    return _read_json(path, what)


def report_material(folder: Path) -> dict[str, Any]:
    """Everything in a run's folder that its page is made of; what a run does not have is absent.

    Returns:
        ``results``, ``settings`` (the text of config.yaml), ``environment``, ``charts`` (JSON objects), ``sheet``.

    Raises:
        DataError: If there are no results, or a file is damaged or of a newer format.
    """
    results = read_results(folder)
    found: dict[str, Any] = {"results": results}
    if (folder / "config.yaml").is_file():
        found["settings"] = read_text(folder / "config.yaml")
    if (folder / "environment.json").is_file():
        found["environment"] = _read_json(folder / "environment.json", "a saved run")
    found["charts"] = [_read_json(folder / f"{Path(str(n)).name}.json", "a study") for n in results.get("charts") or ()]
    if (folder / "calibration.png").is_file():
        found["sheet"] = (folder / "calibration.png").read_bytes()
    return found


def measurements_to_json(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Measurements as JSON-able dictionaries."""
    return [dataclasses.asdict(measurement) for measurement in measurements]


def environment(command: str, device: str) -> dict[str, Any]:
    """What the run ran on: versions of the libraries, the processor and the device, the command."""
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in ("modhifi", "torch", "torchvision", "timm", "transformers", "torch-pruning", "safetensors", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    cuda = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return {
        "command": command,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(torch.device(device)) if cuda else device,
        "packages": packages,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        DataError: If that is not possible.
    """
    with _disk(path):
        path.mkdir(parents=True, exist_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent: beside its place, flushed, then moved there.

    Raises:
        DataError: If the disk is full or the place cannot be written.
    """
    temporary = path.with_name(path.name + ".writing")
    with _disk(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, for text."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As `write_bytes`, for a JSON object."""
    write_text(path, json.dumps(content, indent=2, default=_plain) + "\n")


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot be written ({reason}); free the place or set output_dir=FOLDER.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if hasattr(value, "item"):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset, Mapping)):
        return dict(value) if isinstance(value, Mapping) else sorted(value)
    return str(value)


def _to_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    # clone: safetensors refuses tensors that share memory (tied weights, slices of one storage).
    apart = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    return tensors_to_bytes(apart, metadata)


def _read_json(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path.parent}: not {what}, {path.name} is missing.")
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: damaged, not JSON ({error}); restore the run folder.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: damaged, expected a JSON object; restore the run folder.")
    if content.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise DataError(
            f"{path}: written in format {content['format_version']}, this version reads up to {FORMAT_VERSION}; "
            "install a newer modhifi."
        )
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); restore the run folder.") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{path}: damaged, not a whole safetensors file ({error}); restore the run folder.") from error


def _read_metadata(path: Path) -> Mapping[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return file.metadata() or {}


def _pack_edit(edit: Edit) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An edit as named tensors and a JSON-able description."""
    tensors = {"kept": edit.kept, "removed": edit.removed}
    modules = []
    for index, module in enumerate(edit.modules):
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(module):
            value = getattr(module, field.name)
            if isinstance(value, Tensor):
                tensors[f"{index}.{field.name}"] = value
            elif field.name == "tensors":
                tensors |= {f"{index}.tensors.{name}": tensor for name, tensor in value.items()}
            elif value is not None:
                plain[field.name] = value
        modules.append(plain)
    facts = json.loads(json.dumps(dict(edit.facts), default=_plain))
    return tensors, {"name": edit.name, "iteration": edit.iteration, "modules": modules, "facts": facts}


def _unpack_edit(tensors: Mapping[str, Tensor], described: Mapping[str, Any], path: Path) -> Edit:
    try:
        modules = []
        for index, plain in enumerate(described["modules"]):
            given: dict[str, Any] = dict(plain)
            replaced: dict[str, Tensor] = {}
            prefix = f"{index}."
            for key, value in tensors.items():
                if key.startswith(prefix):
                    rest = key[len(prefix) :]
                    if rest.startswith("tensors."):
                        replaced[rest[len("tensors.") :]] = value
                    else:
                        given[rest] = value
            modules.append(ModuleEdit(**given, tensors=replaced))
        return Edit(
            name=described["name"],
            iteration=described["iteration"],
            modules=tuple(modules),
            kept=tensors["kept"],
            removed=tensors["removed"],
            facts=described["facts"],
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged edit ({error}); restore the run folder.") from error
