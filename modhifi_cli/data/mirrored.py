"""Every image a second time, mirrored left to right: twice the rows for statistics, where few images say too little."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from modhifi_cli.records import ImageSource

_TOGETHER = 5  # images, then their mirrors: what holds out every fifth sample holds out both or neither


class Mirrored:
    """Images and their mirrors: five and their five by turns; a few last ones stand alone.

    Attributes:
        protocol: That of the images, with ``mirrored`` true.
    """

    def __init__(self, images: ImageSource) -> None:
        self._images = images
        self.protocol: Mapping[str, Any] = {**images.protocol, "mirrored": True}

    def __len__(self) -> int:
        count = len(self._images)
        return 2 * (count - count % _TOGETHER) + count % _TOGETHER

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches of at most `batch_size`, as `ImageSource` gives them."""
        at_once = _TOGETHER * max(1, batch_size // (2 * _TOGETHER))
        for images, labels in self._images.batches(at_once):
            yield from zip(
                _paired(images, images.flip(-1)).split(batch_size),
                _labels(labels, batch_size, len(images)),
                strict=True,
            )


def _labels(labels: Tensor | None, batch_size: int, count: int) -> list[Tensor] | list[None]:
    if labels is not None:
        return list(_paired(labels, labels).split(batch_size))
    whole = count - count % _TOGETHER
    return [None] * -(-(whole + count) // batch_size)


def _paired(one: Tensor, other: Tensor) -> Tensor:
    whole = len(one) - len(one) % _TOGETHER
    sides = zip(one[:whole].split(_TOGETHER), other[:whole].split(_TOGETHER), strict=True)
    return torch.cat([side for both in sides for side in both] + [one[whole:]])
