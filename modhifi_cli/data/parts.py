"""A set of images in two parts, by their number: one to fit to, one to judge the fit by."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from modhifi_cli.errors import DataError
from modhifi_cli.records import ImageSource


class Part:
    """Some of another source's images, in their order; an `ImageSource`.

    Every n-th image is held out, whatever the order of the source: a sorted folder gives both parts all classes.

    Args:
        source: All images.
        share: Of the images that are held out, in (0, 0.5].
        held_out: Whether this is the part that is held out, or the other.

    Raises:
        DataError: If one of the parts would be empty.
    """

    def __init__(self, source: ImageSource, *, share: float, held_out: bool) -> None:
        self._source, self._every, self._held_out = source, max(2, round(1 / share)), held_out
        self._count = len(source) // self._every
        if self._count == 0:
            raise DataError(
                f"data.num_samples: {len(source)} calibration images cannot be parted into those that are fitted to and "
                f"those that judge (every {self._every}th); give at least {self._every}."
            )
        if not held_out:
            self._count = len(source) - self._count
        told = f"every {self._every}th image" if held_out else f"all but every {self._every}th image"
        self.protocol: Mapping[str, Any] = {**source.protocol, "part": told, "part_samples": self._count}

    def __len__(self) -> int:
        """Number of images."""
        return self._count

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """As `ImageSource.batches`: whole batches, whatever share of the source's batches is left."""
        images: list[Tensor] = []
        labels: list[Tensor] = []
        number, waiting = 0, 0
        for batch, own in self._source.batches(batch_size):
            numbers = torch.arange(number, number + len(batch))
            number += len(batch)
            chosen = (numbers % self._every == self._every - 1) == self._held_out
            if not bool(chosen.any()):
                continue
            images.append(batch[chosen])
            waiting += len(images[-1])
            if own is not None:
                labels.append(own[chosen])
            while waiting >= batch_size:
                joined, named = torch.cat(images), torch.cat(labels) if labels else None
                yield joined[:batch_size], None if named is None else named[:batch_size]
                images = [joined[batch_size:]]
                labels = [] if named is None else [named[batch_size:]]
                waiting -= batch_size
        if waiting:
            yield torch.cat(images), torch.cat(labels) if labels else None
