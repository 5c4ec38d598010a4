"""EfficientNet-Lite of timm, with its weights' own preprocessing; files with the names of another library fit, too."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from modhifi_cli.models import timm
from modhifi_cli.models.weights import load_weights_
from modhifi_cli.records import LoadedModel

# (pixel − 127) / 128 on the 0..1 scale.
_PREPROCESS = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}
# The package efficientnet_lite_pytorch counts blocks through; timm numbers them within seven stages.
_STAGES = (1, 2, 2, 3, 3, 4, 1)
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHERS = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip


def load(
    *,
    name: str = "tf_efficientnet_lite0",
    weights: str = "default",
    seed: int = 0,
    num_classes: int | None = None,
    preprocess: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """An EfficientNet-Lite network.

    Args:
        name: timm's name.
        weights: ``"default"`` (timm's), ``"random"``, or a file with timm's names or those of the package
            efficientnet_lite_pytorch.
        seed: Of random weights.
        num_classes: Number of logits; None means the library's, 1,000.
        preprocess: Fields of the preprocessing to replace.
        options: Further arguments of ``timm.create_model``.

    Raises:
        ConfigError, DataError: As `modhifi_cli.models.timm.load`.
    """
    settings: dict[str, Any] = {"name": name, "seed": seed, "num_classes": num_classes, "options": options}
    settings["preprocess"] = {**_PREPROCESS, **(preprocess or {})}
    if weights in ("default", "random"):
        return timm.load(weights=weights, **settings)
    loaded = timm.load(weights="random", **settings)
    account = load_weights_(loaded.model, weights, rename=_timm_names)
    return dataclasses.replace(loaded, weights=account)


def _timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under timm's names; those that have them already are left alone."""
    return {_timm_name(name): tensor for name, tensor in tensors.items()}


def _timm_name(name: str) -> str:
    block = re.match(r"_blocks\.(\d+)\.(\w+)\.(.+)$", name)
    if block is None:
        part, _, rest = name.partition(".")
        return f"{_OUTER.get(part, part)}.{rest}"
    number, part, rest = int(block[1]), block[2], block[3]
    inner = (_FIRST if number == 0 else _OTHERS).get(part, part)
    stage = 0
    while stage < len(_STAGES) - 1 and number >= _STAGES[stage]:
        number -= _STAGES[stage]
        stage += 1
    return f"blocks.{stage}.{number}.{inner}.{rest}"
