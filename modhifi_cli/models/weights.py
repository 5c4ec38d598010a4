"""Weights from files: read without executing anything, unwrapped, checked to be finite and to fit before they are used.

Checkpoints in the wild nest the tensors (``{"state_dict": ..., "epoch": ...}``) and prefix their names
(``module.conv1.weight``); both are undone here, and only where that makes the names fit the network.
"""

import contextlib
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modhifi_cli.errors import DataError, reason

# Where training scripts put the tensors, most specific first; averaged weights only if there is nothing else.
_NESTS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "state_dict_ema", "model_ema",
          "ema_state_dict", "ema")  # fmt: skip
_PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.", "backbone.", "ema_model.", "ema.")
# What training keeps beside the network: counters of averaging (`AveragedModel`), losses and metrics of Lightning.
_OF_TRAINING = ("n_averaged", "criterion.", "loss.", "loss_fn.", "train_", "val_", "valid_", "test_", "metric", "ema_")
# Saved by newer versions than many checkpoints: the batch counter is not used in evaluation, and an option-A
# shortcut's channel map is fixed by the architecture.
_MAY_BE_MISSING = (".num_batches_tracked", ".shortcut.source")


@contextlib.contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Seeds the CPU generator that module constructors draw from, and puts its former state back afterwards.

    Args:
        seed: Seed of every random initial weight made inside the block.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class undrawn_weights(TorchFunctionMode):  # noqa: N801 (a context, used like a function)
    """Gives weights one value where constructors would draw them: for whoever fills them all afterwards.

    Drawing the weights of a large network costs more than running it. The value is one that may be drawn (the mean, or
    the lower end), since truncated draws go on until nothing lies outside.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Fill a tensor instead of drawing it; everything else is done as ever."""
        given = kwargs or {}
        if func is Tensor.normal_:
            return args[0].fill_(given.get("mean", args[1] if len(args) > 1 else 0.0))
        if func is Tensor.uniform_:
            return args[0].fill_(given.get("from", args[1] if len(args) > 1 else 0.0))
        if func is Tensor.erfinv_:
            return args[0]
        return func(*args, **given)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file or a torch checkpoint, on the CPU, as stored.

    Checkpoints are read with ``weights_only=True``: nothing in the file is executed.

    Args:
        path: File; ``~`` is expanded. Safetensors is recognised by its suffix, everything else is a checkpoint. A folder
            stands for the files that its ``*.index.json`` names, or for the one file of weights that it holds.

    Raises:
        DataError: If the file is missing, unreadable, holds other objects than tensors, or holds no tensors.
    """
    file = Path(os.path.expanduser(path))
    if file.is_dir():
        parts = weights_files(file)
        return {name: tensor for part in parts for name, tensor in read_weights(part).items()}
    form = "safetensors" if file.suffix == ".safetensors" else "a torch checkpoint"
    if not file.is_file():
        raise DataError(
            f"model.weights: no file at {file}; give the path of a .safetensors file or a torch checkpoint, "
            "or one of 'default' and 'random'."
        )
    try:
        if file.suffix == ".safetensors":
            import safetensors.torch

            content: Any = safetensors.torch.load_file(file)
        elif _is_scripted(file):
            raise DataError(
                f"model.weights: {file} is a TorchScript archive, which holds code; save its tensors alone with "
                "torch.save(torch.jit.load(FILE).state_dict(), OTHER) and give that file."
            )
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except pickle.UnpicklingError as error:
        raise DataError(
            f"model.weights: {file} is damaged or holds Python objects, and only tensors are read from it; "
            "save model.state_dict() with torch.save or safetensors and give that file."
        ) from error
    # safetensors and torch raise many types of their own on damaged bytes (SafetensorError, EOFError, KeyError …).
    except Exception as error:
        raise DataError(
            f"model.weights: {file} cannot be read as {form} ({type(error).__name__}: "
            f"{reason(error)}); copy the file again."
        ) from error
    tensors = _unwrap(content)
    if not tensors:
        raise DataError(
            f"model.weights: {file} holds no tensors by name, expected a state_dict (or one under "
            f"{', '.join(_NESTS[:4])}); save model.state_dict() and give that file."
        )
    return tensors


def weights_files(folder: Path) -> list[Path]:
    """The files of weights of a folder: those of its index, or the only one, safetensors first.

    Raises:
        DataError: If there is none, several without an index, or the index names a file that is missing or elsewhere.
    """
    for suffix in (".safetensors", ".bin", ".pt", ".pth"):
        index = next(iter(sorted(folder.glob(f"*{suffix}.index.json"))), None)
        if index is not None:
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"model.weights: {index} cannot be read as an index of weights; copy it again.") from error
            for name in names:
                if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                    raise DataError(f"model.weights: {index} names {name}, which is not in the folder; copy all files.")
            return [folder / name for name in names]
        found = sorted(folder.glob(f"*{suffix}"))
        if len(found) == 1:
            return found
        if found:
            raise DataError(
                f"model.weights: {folder} holds {len(found)} files of weights and no index ({found[0].name}, "
                f"{found[1].name} …); give one of them."
            )
    raise DataError(f"model.weights: {folder} holds no file of weights (.safetensors, .bin, .pt, .pth); give a file.")


def _is_scripted(file: Path) -> bool:
    """Whether a file is an archive of TorchScript: it holds code beside its tensors."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())


def load_weights_(
    model: nn.Module, path: str | Path, *, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
) -> str:
    """Reads a file into the network and returns the account of it for reports.

    Args:
        model: The network; its parameters and buffers are overwritten in place, in their own dtype.
        path: File as in `read_weights`.
        rename: Gives the file's tensors the network's names, where another library wrote it.

    Returns:
        ``"FILE (sha256 0123456789ab)"``.

    Raises:
        DataError: As `read_weights` and `fit_weights_`.
    """
    file = Path(os.path.expanduser(path))
    tensors = read_weights(file)
    fit_weights_(model, tensors if rename is None else rename(tensors), source=str(file))
    hashed = hashlib.sha256()
    for part in weights_files(file) if file.is_dir() else [file]:
        with part.open("rb") as stream:
            while piece := stream.read(2**24):
                hashed.update(piece)
    digest = hashed.hexdigest()
    return f"{file} (sha256 {digest[:12]})"


def fit_weights_(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str, ignored: Iterable[str] = ()) -> None:
    """Copies tensors into the network after checking that names, shapes and numbers fit; nothing is copied otherwise.

    Args:
        model: The network, changed in place.
        tensors: By name; common prefixes are stripped where that makes more names fit.
        source: What to call them in messages.
        ignored: Beginnings of names that may be there although the network has no such part.

    Raises:
        DataError: If tensors are missing, unexpected, of another shape or kind, or hold NaN or infinite values. The
            first three names of each are given.
    """
    wanted = model.state_dict()
    tensors = _without_prefixes(tensors, wanted)
    # A tensor that bears no name of the network is left over only where all of the network's own are there.
    tensors = {name: _alike(tensor, wanted.get(name)) for name, tensor in tensors.items()}
    missing = [name for name in wanted if name not in tensors and not f".{name}".endswith(_MAY_BE_MISSING)]
    may_be_left_over = tuple(ignored) + (() if missing else _OF_TRAINING)
    unexpected = [
        name
        for name in tensors
        if name not in wanted and not name.endswith("num_batches_tracked") and not name.startswith(may_be_left_over)
    ]
    misshapen = [
        f"{name} is {_describe(tensor)} instead of {_describe(wanted[name])}"
        for name, tensor in tensors.items()
        if name in wanted
        and (tensor.shape != wanted[name].shape or tensor.is_floating_point() != wanted[name].is_floating_point())
    ]
    problems = [
        f"{title} {_first_three(names)}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape:", misshapen))
        if names
    ]
    if problems:
        raise DataError(
            f"model.weights: {source} does not fit {type(model).__name__}: {'; '.join(problems)}; choose the model "
            "that these weights were trained for, and set model.num_classes if its classifier differs."
        )
    for name, tensor in tensors.items():
        if name in wanted and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DataError(
                f"model.weights: {name} in {source} holds NaN or infinite values, expected finite weights; "
                "train again or take an earlier checkpoint."
            )
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name in wanted}, strict=False)


def library_weights_missing(*, library: str, name: str, error: Exception) -> DataError:
    """The one sentence for weights that a library could not fetch, naming the alternatives.

    Args:
        library: ``"torchvision"`` or ``"timm"``.
        name: The weights or model that was asked for.
        error: What the library raised.
    """
    return DataError(
        f"model.weights=default: {library} could not fetch the weights of {name} "
        f"({type(error).__name__}: {reason(error)}); connect to the network once, or set model.weights=FILE "
        "(safetensors or a checkpoint), or model.weights=random for speed studies."
    )


def _unwrap(content: Any) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        nest = next((key for key in _NESTS if isinstance(content.get(key), Mapping)), None)
        if nest is None:
            return {name: value for name, value in content.items() if isinstance(value, Tensor)}
        content = content[nest]
    return {}


def _without_prefixes(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    best = dict(tensors)
    fitting = len(best.keys() & wanted.keys())
    # A wrapper in a wrapper ("module.model.conv1.weight") takes one round each; the prefixes of a parameter's own
    # module ("model." of a network that calls a part so) are left alone because removing them makes fewer names fit.
    for _ in range(len(_PREFIXES)):
        stripped = [{name.removeprefix(prefix): t for name, t in best.items()} for prefix in _PREFIXES]
        rounds = [(len(candidate.keys() & wanted.keys()), candidate) for candidate in stripped]
        # Two wrappers fit no name until both are gone, so an equal count is worth a step where nothing fits yet.
        now, candidate = max(rounds, key=lambda pair: (pair[0], pair[1].keys() != best.keys()))
        if now < fitting or candidate.keys() == best.keys() or (now == fitting and fitting > 0):
            break
        best, fitting = candidate, now
    return best if fitting else dict(tensors)


def _alike(tensor: Tensor, wanted: Tensor | None) -> Tensor:
    """Counters that were cast to half precision with the weights, as the whole numbers that they are."""
    if wanted is None or wanted.is_floating_point() or not tensor.is_floating_point():
        return tensor
    whole = tensor.float().round()
    return whole.to(wanted.dtype) if torch.equal(whole, tensor.float()) else tensor


def _describe(tensor: Tensor) -> str:
    shape = "×".join(str(size) for size in tensor.shape) or "scalar"
    return shape if tensor.is_floating_point() else f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def _first_three(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

