"""The network inside the package: small, trained and offline, so that every verb works before anything is downloaded.

A CIFAR-style residual network of depth 14 with 1×1-convolution shortcuts over 8 × 8 grey digits. Its weights were made
by ``scripts/train_embedded.py``, which can make them again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from modhifi_cli.errors import ConfigError, nearest
from modhifi_cli.models import cifar_resnet
from modhifi_cli.models.preprocessing import adjusted
from modhifi_cli.models.weights import load_weights_, seeded_initialisation
from modhifi_cli.records import LoadedModel, Preprocess

NAMES = ("embedded",)
WEIGHTS = Path(__file__).with_name("embedded.safetensors")
# Mean and standard deviation of the training digits' pixels.
PREPROCESS = Preprocess(size=(8, 8), mean=(0.304,), std=(0.375,))


def build(*, num_classes: int = 10) -> nn.Module:
    """The untrained network in evaluation mode.

    Args:
        num_classes: Number of logits, at least 1.

    Raises:
        ConfigError: If `num_classes` is out of range.
    """
    return cifar_resnet.build(depth=14, num_classes=num_classes, widths=(16, 32, 64), in_channels=1, shortcut="B")


def load(
    *,
    name: str = "embedded",
    weights: str = "default",
    seed: int = 0,
    num_classes: int | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """The network with the package's weights, random ones, or a file's.

    Args:
        name: ``"embedded"``.
        weights: ``"default"`` (inside the package), ``"random"``, or a file.
        seed: Of random weights.
        num_classes: Number of logits; None means 10.
        preprocess: Fields of the preprocessing to replace.

    Raises:
        ConfigError: If the name is unknown, or `num_classes` contradicts the package's weights.
        DataError: If the file cannot be read or does not fit.
    """
    if name not in NAMES:
        raise ConfigError(f"model.name: unknown embedded network '{name}', {nearest(name, NAMES)}")
    if weights == "default" and num_classes not in (None, 10):
        raise ConfigError(
            f"model.num_classes: the embedded weights have 10 classes, got {num_classes}; set model.num_classes=null, "
            "or model.weights=FILE or random."
        )
    classes = 10 if num_classes is None else num_classes
    with seeded_initialisation(seed):
        model = build(num_classes=classes)
    if weights == "random":
        account = f"random (seed {seed})"
    elif weights == "default":
        load_weights_(model, WEIGHTS)
        account = "inside the package, made by scripts/train_embedded.py"
    else:
        account = load_weights_(model, weights)
    return LoadedModel(
        model=model,
        name=name,
        preprocess=adjusted(PREPROCESS, preprocess),
        architecture={"builder": "modhifi_cli.models.embedded.build", "kwargs": {"num_classes": classes}},
        weights=account,
        classes=tuple(str(digit) for digit in range(10)) if classes == 10 else None,
    )
