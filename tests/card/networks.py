"""Tiny networks and data that every test of the card shares."""

import torch
from torch import Tensor, nn

from modhifi_cli.settings import config
from modhifi_cli.verbs import pieces
from tests.graph import transformers


class Residual(nn.Module):
    """Two convolutions beside a stream, with or without BatchNorm."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.inner = nn.Sequential(nn.Conv2d(8, 16, 1), norm(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), norm(8))

    def forward(self, images: Tensor) -> Tensor:
        stream = self.stem(images)
        return self.head((stream + self.inner(stream)).mean((2, 3)))


def network(kind: str) -> nn.Module:
    """``"batchnorm"``, ``"no norm"``, ``"embedded"`` or a family of `tests.graph.transformers`, on the processor."""
    torch.manual_seed(0)
    if kind == "embedded":
        return config.build(config.compose("prune", [])["model"]).model
    if kind == "batchnorm":
        return Residual(nn.BatchNorm2d).eval()
    if kind == "no norm":
        return Residual(lambda width: nn.Identity()).eval()
    return transformers.build(kind).eval()


def labelled_images(kind: str, count: int = 60) -> list[tuple[Tensor, Tensor]]:
    """Two batches of images that differ by class, five classes in turn; digits for the embedded network."""
    if kind == "embedded":
        return _digits()
    side = 32 if kind in {*transformers.FAMILIES, *transformers.APART} else 8
    labels = torch.arange(count) % 5
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    images = images + 0.5 * labels[:, None, None, None] * images[:1]
    return list(zip(images.split(count // 2), labels.split(count // 2), strict=True))


def _digits() -> list[tuple[Tensor, Tensor]]:
    settings = config.compose("prune", ["data.num_samples=200", "scoring=discedit_sp"])
    source = pieces.image_source(settings, "data", config.build(settings["model"]), labelled=True)
    return [(images, labels) for images, labels in source.batches(100)]
