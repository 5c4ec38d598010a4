"""A folder that timm itself opens, for networks of timm whose new widths timm's own means can say.

timm builds a network narrower in two ways. A transformer whose blocks all keep the same share of hidden neurons is a
matter of one argument, ``mlp_ratio``, which the folder's ``config.json`` carries; blocks that lack a few neurons, as
``allocation=uniform`` leaves them to meet its target, get neurons of zeros. Convolutions, batch norms and the
input of a classifier are rebuilt from a list of shapes, timm's own format of pruned networks, which lies in
``pruned.txt``. What neither can say, heads removed or transformers of unequal blocks, is refused by name.
"""

import copy
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import UnsupportedModelError
from modhifi_cli.files.exports.written import ExportReport, Graph, Intent, Way, first_line, written
from modhifi_cli.models.timm import BUILDER
from modhifi_cli.records import LoadedModel, Preprocess

_LIST, _WEIGHTS = "pruned.txt", "model.safetensors"
# A step above the ratio itself: timm cuts `width * ratio` down to a whole number, and the product may fall just below.
_ABOVE = 1e-9
_FEW = 32  # neurons that a block may lack: two steps of the widths that run fast


@dataclass(frozen=True)
class Timm(Graph):
    """``timm/`` with ``config.json``, ``model.safetensors`` and, where widths are a list, ``pruned.txt``.

    Attributes:
        tolerance: Largest difference of a logit allowed, as a share of the largest logit, > 0.
    """

    def foresee(self, loaded: LoadedModel, intent: Intent) -> None:
        """Refuse networks of others, layers that timm's list has no word for, and transformers whose blocks will differ.

        Raises:
            UnsupportedModelError: If it is so.
        """
        _require(loaded)
        if not _hidden(loaded.model):
            odd = _apart(_listed(loaded.model, loaded)[1], loaded.model)
            if odd:
                raise UnsupportedModelError(
                    f"export.timm: timm's list of widths cannot say {odd}; choose export=[plain], which PyTorch opens."
                )
        elif not intent.even:
            raise UnsupportedModelError(
                f"export.timm: timm builds all blocks of {loaded.name} with one mlp_ratio, and this run gives each its own "
                "width; add allocation=uniform, or choose export=[plain], which PyTorch opens."
            )

    def __call__(self, loaded: LoadedModel, *, example: Tensor, path: Path, facts: Mapping[str, str]) -> ExportReport:
        """Write the folder, open it by timm alone, and compare; errors as `written`.

        Raises:
            UnsupportedModelError: If the network is not of timm, or timm cannot say its widths.
        """
        _require(loaded)
        model, listed, arguments = _expressed(loaded)

        def write(network: nn.Module, images: Tensor, folder: Path) -> None:
            from timm.models import save_for_hf

            more: dict[str, Any] = {"modhifi": {"weights": loaded.weights, **facts}}
            if loaded.classes is not None:
                more["label_names"] = list(loaded.classes)
            reads = _data_config(loaded)
            save_for_hf(network, str(folder), more, arguments, safe_serialization=True, data_config=reads)
            if listed:
                (folder / _LIST).write_text(listed + "\n", encoding="utf-8")

        def run(folder: Path, images: Tensor) -> Tensor:
            with torch.inference_mode():
                return opened(folder)(images)

        import timm

        way = Way("timm", "timm", write, run, f"timm {timm.__version__}", _opening(bool(listed)))
        return written(model, example, path, way, tolerance=self.tolerance)


def opened(folder: Path) -> nn.Module:
    """The network of a written folder, by timm's own functions.

    Args:
        folder: With timm's ``config.json``, the weights and, where widths differ, the list of them.

    Returns:
        In evaluation mode, on the CPU.

    Raises:
        RuntimeError, ValueError, OSError: As timm raises them, if it does not open the folder.
    """
    import timm
    from timm.models import adapt_model_from_string, load_checkpoint

    if not (folder / _LIST).is_file():
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model = timm.create_model(f"local-dir:{folder}")
    model = adapt_model_from_string(model, (folder / _LIST).read_text(encoding="utf-8").strip())
    load_checkpoint(model, str(folder / _WEIGHTS))
    return model.eval()


def _opening(listed: bool) -> str:
    if not listed:
        return 'timm.create_model("local-dir:timm", pretrained=True)'
    return (
        'timm.models.adapt_model_from_string(timm.create_model("local-dir:timm"), open("timm/pruned.txt").read().strip()), '
        'then timm.models.load_checkpoint(model, "timm/model.safetensors")'
    )


def _require(loaded: LoadedModel) -> None:
    if loaded.architecture.get("builder") != BUILDER:
        raise UnsupportedModelError(
            f"export.timm: {loaded.name} is no network of timm (model=timm model.name=…); choose export=[plain], which "
            "PyTorch opens."
        )
    if _hidden(loaded.model) and "mlp_ratio" not in inspect.signature(type(loaded.model).__init__).parameters:
        raise UnsupportedModelError(
            f"export.timm: timm has no argument for the hidden widths of {loaded.name} ({type(loaded.model).__name__}); choose "
            "export=[plain], which PyTorch opens."
        )


def _expressed(loaded: LoadedModel) -> tuple[nn.Module, str, dict[str, float]]:
    """The network to write, and the list of shapes, or "" and arguments, by which timm builds it.

    Raises:
        UnsupportedModelError: If neither gives it; the sentence names the first layer that stands in the way.
    """
    from modhifi_cli.models.timm import build

    kwargs = dict(loaded.architecture["kwargs"])
    ratio = max((width / size for size, width in _hidden(loaded.model)), default=0.0)
    arguments = {"mlp_ratio": ratio + _ABOVE} if ratio else {}
    found = build(**kwargs | {"options": {**(kwargs.get("options") or {}), **arguments}})
    model, text = (_padded(loaded, ratio), "") if ratio else (loaded.model, "")
    if not ratio:
        text, found = _listed(found, loaded)
    odd = _apart(found, model)
    if odd:
        raise UnsupportedModelError(
            f"export.timm: timm cannot build {odd}; leave that layer and its like as they are with "
            f"exclude=[{odd.partition(' ')[0]},…], or choose export=[plain], which PyTorch opens."
        )
    return model, text, arguments


def _padded(loaded: LoadedModel, ratio: float) -> nn.Module:
    """A copy in which every MLP has so many hidden neurons a width; what is added reads and writes nothing.

    Raises:
        UnsupportedModelError: If that adds many, or a norm stands between them.
    """
    model = copy.deepcopy(loaded.model)
    wanted = {name: int(module.fc1.in_features * (ratio + _ABOVE)) for name, module in _mlps(model)}
    have = {name: module.fc1.out_features for name, module in _mlps(model)}
    if any(wanted[name] - have[name] > max(_FEW, wanted[name] // 20) for name in wanted):
        raise UnsupportedModelError(
            f"export.timm: timm builds all blocks of {loaded.name} with one mlp_ratio, and here they keep "
            f"{min(have.values())} to {max(have.values())} hidden neurons; prune with allocation=uniform, or choose "
            "export=[plain], which PyTorch opens."
        )
    for name, module in _mlps(model):
        more = wanted[name] - have[name]
        if not more:
            continue
        if any(True for _ in module.norm.parameters()):
            raise UnsupportedModelError(
                f"export.timm: {name} keeps {have[name]} hidden neurons and timm would build {wanted[name]}, and its norm "
                "sees all of them; choose export=[plain], which PyTorch opens."
            )
        module.fc1.weight = nn.Parameter(nn.functional.pad(module.fc1.weight.detach(), (0, 0, 0, more)))
        if module.fc1.bias is not None:
            module.fc1.bias = nn.Parameter(nn.functional.pad(module.fc1.bias.detach(), (0, more)))
        module.fc2.weight = nn.Parameter(nn.functional.pad(module.fc2.weight.detach(), (0, more)))
    return model


def _listed(dense: nn.Module, loaded: LoadedModel) -> tuple[str, nn.Module]:
    """The shapes of the network as timm's list, and what timm makes of the dense one by it."""
    from timm.models import adapt_model_from_string

    shapes = ((name, ",".join(map(str, tensor.shape))) for name, tensor in loaded.model.state_dict().items())
    text = "***".join(f"{name}:[{shape}]" for name, shape in shapes)
    try:
        return text, adapt_model_from_string(dense, text)
    except Exception as error:  # it takes shapes on trust, and breaks anywhere
        raise UnsupportedModelError(
            f"export.timm: timm's list of widths cannot say those of {loaded.name} ({first_line(error)}); choose "
            "export=[plain], which PyTorch opens."
        ) from error


def _apart(found: nn.Module, model: nn.Module) -> str:
    """The first layer in which two networks differ, in words, or ""."""
    theirs = dict(found.named_modules())
    for name, module in model.named_modules():
        own = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items() if "." not in key}
        other = theirs.get(name)
        built = {key: tuple(tensor.shape) for key, tensor in other.state_dict().items() if "." not in key} if other else {}
        if own != built:
            key = next(key for key in (*own, *built) if own.get(key) != built.get(key))
            return f"{name or 'the network'} with {key} {list(own.get(key, ()))} (it makes {list(built.get(key, ()))})"
        if own and not isinstance(other, type(module)):
            return f"{name or 'the network'} as {type(module).__name__} (it makes {type(other).__name__})"
    return ""


def _mlps(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The MLPs of a transformer of timm, whose layers carry no types."""
    from timm.layers import Mlp

    for name, module in model.named_modules():
        if isinstance(module, Mlp) and isinstance(module.fc1, nn.Linear):
            yield name, module


def _hidden(model: nn.Module) -> list[tuple[int, int]]:
    """Width and hidden width of every MLP."""
    return [(module.fc1.in_features, module.fc1.out_features) for _, module in _mlps(model)]


def _data_config(loaded: LoadedModel) -> dict[str, object]:
    """The preprocessing in timm's words."""
    own = loaded.preprocess
    assert isinstance(own, Preprocess)
    told: dict[str, object] = {"mean": own.mean, "std": own.std, "interpolation": own.interpolation}
    told["input_size"] = (len(own.mean), *own.size)
    told["crop_pct"] = 1.0 if own.resize is None else min(own.size) / own.resize
    told["crop_mode"] = "squash" if own.resize is None else "center"
    return json.loads(json.dumps(told))
