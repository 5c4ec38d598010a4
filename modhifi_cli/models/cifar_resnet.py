"""The residual networks that He et al. (2016, arXiv:1512.03385, section 4.2) trained on CIFAR.

A 3×3 stem, three stages of basic blocks with 16, 32 and 64 channels, each stage at half the former's resolution, global
average pooling and one linear layer. At a stage change the shortcut is either their option A (every second pixel, new
channels zero: no parameters) or option B (a 1×1 convolution with BatchNorm).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, nearest
from modhifi_cli.graph.modules import ChannelPadShortcut
from modhifi_cli.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, adjusted
from modhifi_cli.models.weights import load_weights_, seeded_initialisation
from modhifi_cli.records import LoadedModel, Preprocess

NAMES = ("resnet20_cifar", "resnet32_cifar", "resnet44_cifar", "resnet56_cifar", "resnet110_cifar")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PREPROCESS = Preprocess(size=(32, 32), mean=IMAGENET_MEAN, std=IMAGENET_STD)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm beside a shortcut, ReLU after the sum.

    Args:
        in_channels: Channels of the input stream.
        out_channels: Channels of the output stream and between the convolutions.
        stride: Of the first convolution and of the shortcut.
        shortcut: ``"A"`` or ``"B"``; used where the shape changes.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = ChannelPadShortcut.centred(in_channels, out_channels, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, in_channels, height, width]`` to ``[batch, out_channels, height / stride, width / stride]``."""
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return F.relu(branch + self.shortcut(x))


class CifarResNet(nn.Module):
    """A CIFAR residual network of depth 6n + 2.

    Args:
        depth: Number of layers with weights, 6n + 2.
        num_classes: Number of logits.
        widths: Channels of the three stages.
        in_channels: Channels of the image.
        shortcut: ``"A"`` (zero-padded identity) or ``"B"`` (1×1 convolution) at the two stage changes.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        widths: Sequence[int] = (16, 32, 64),
        in_channels: int = 3,
        shortcut: str = "A",
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        first, second, third = widths
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = _stage(first, first, blocks=blocks, stride=1, shortcut=shortcut)
        self.layer2 = _stage(first, second, blocks=blocks, stride=2, shortcut=shortcut)
        self.layer3 = _stage(second, third, blocks=blocks, stride=2, shortcut=shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[batch, in_channels, height, width]`` to logits ``[batch, num_classes]``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.pool(x), 1))


def build(
    *,
    depth: int,
    num_classes: int = 10,
    widths: Sequence[int] = (16, 32, 64),
    in_channels: int = 3,
    shortcut: str = "A",
) -> CifarResNet:
    """An untrained network in evaluation mode.

    Args:
        depth: 6n + 2, at least 8.
        num_classes: Number of logits, at least 1.
        widths: Channels of the three stages, not falling.
        in_channels: Channels of the image.
        shortcut: ``"A"`` or ``"B"``.

    Raises:
        ConfigError: If an argument is out of range.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ConfigError(f"depth: a CIFAR ResNet has 6n + 2 layers (8, 14, 20, 32, 56 …), got {depth}.")
    if num_classes < 1:
        raise ConfigError(f"model.num_classes: expected a whole number above 0, got {num_classes}.")
    if len(widths) != 3 or min(widths) < 1 or list(widths) != sorted(widths):
        raise ConfigError(f"widths: expected the channels of three stages, not falling, got {list(widths)}.")
    if shortcut not in ("A", "B"):
        raise ConfigError(f"shortcut: expected 'A' (zero-padded identity) or 'B' (1×1 convolution), got {shortcut!r}.")
    model = CifarResNet(
        depth, num_classes=num_classes, widths=tuple(widths), in_channels=in_channels, shortcut=shortcut
    )
    return model.eval()


def load(
    *,
    name: str,
    weights: str,
    seed: int = 0,
    num_classes: int | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """A CIFAR ResNet (option A) with weights from a file, or random.

    Args:
        name: One of `NAMES`.
        weights: A file, or ``"random"``. No library publishes weights for these networks, so there is no default.
        seed: Of random weights.
        num_classes: Number of logits; None means 10.
        preprocess: Fields of the preprocessing to replace. Ours is x/255 with ImageNet's mean and std at 32 × 32, as
            the widely used weights of these networks were trained.

    Raises:
        ConfigError: If the name is unknown or ``weights=default`` was asked for.
        DataError: If the file cannot be read or does not fit.
    """
    if name not in NAMES:
        raise ConfigError(f"model.name: unknown CIFAR ResNet '{name}', {nearest(name, NAMES)}")
    if weights == "default":
        raise ConfigError(
            f"model.weights: {name} has no default weights, no library publishes them; set model.weights=FILE "
            "(safetensors or a checkpoint), or model.weights=random for speed studies."
        )
    kwargs: dict[str, Any] = {
        "depth": int(re.findall(r"\d+", name)[0]),
        "num_classes": 10 if num_classes is None else num_classes,
    }
    with seeded_initialisation(seed):
        model = build(**kwargs)
    account = f"random (seed {seed})" if weights == "random" else load_weights_(model, weights)
    return LoadedModel(
        model=model,
        name=name,
        preprocess=adjusted(PREPROCESS, preprocess),
        architecture={"builder": "modhifi_cli.models.cifar_resnet.build", "kwargs": kwargs},
        weights=account,
        classes=CIFAR10_CLASSES if kwargs["num_classes"] == 10 else None,
    )


def _stage(in_channels: int, out_channels: int, *, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride=stride, shortcut=shortcut)
    rest = [BasicBlock(out_channels, out_channels, stride=1, shortcut=shortcut) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
