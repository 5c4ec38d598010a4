"""Batches that somebody has in memory already, as an `ImageSource`: what the Python functions are given."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from modhifi_cli.errors import DataError


class TensorImages:
    """Preprocessed images in memory; an `ImageSource`.

    Args:
        images: ``[images, channels, height, width]``, floating.
        labels: ``[images]`` int64, or None.

    Attributes:
        protocol: As `ImageSource`.
    """

    def __init__(self, images: Tensor, labels: Tensor | None) -> None:
        self._images, self._labels = images, labels
        digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
        self.protocol: Mapping[str, Any] = {"source": "batches", "num_samples": len(images), "sha256": digest}

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """As `ImageSource.batches`."""
        for start in range(0, len(self._images), batch_size):
            labels = None if self._labels is None else self._labels[start : start + batch_size]
            yield self._images[start : start + batch_size], labels


def from_batches(batches: Iterable[Any] | Tensor, *, most: int | None = None) -> TensorImages:
    """Images as the network wants them, collected from whatever holds them.

    Args:
        batches: One tensor ``[images, channels, height, width]``; or anything that gives batches one after the other
            (a list, a ``DataLoader``), each such a tensor or a pair of it and labels ``[batch]``.
        most: Stop after so many images; None takes all.

    Raises:
        DataError: If there is no image, or something is no batch of finite floating images of one shape.
    """
    images: list[Tensor] = []
    labels: list[Tensor | None] = []
    count = 0
    for number, batch in enumerate([batches] if isinstance(batches, Tensor) else batches):
        pair = list(batch) if isinstance(batch, list | tuple) else [batch]
        if not 1 <= len(pair) <= 2 or not all(isinstance(one, Tensor) for one in pair):
            raise DataError(
                f"batches: expected a tensor of images, or images and labels, got {_told(batch)} in batch {number}; "
                "take both out of it first."
            )
        pixels = pair[0].detach().cpu()
        if pixels.dim() != 4 or not pixels.is_floating_point() or (images and pixels.shape[1:] != images[0].shape[1:]):
            raise DataError(
                "batches: expected preprocessed images [batch, channels, height, width] of floats, all of one shape, "
                f"got {_told(pair[0])} in batch {number}."
            )
        if not bool(torch.isfinite(pixels).all()):
            raise DataError(f"batches: batch {number} holds NaN or infinite values; look at what prepares the images.")
        truth = pair[1].detach().cpu().to(torch.int64) if len(pair) == 2 else None
        if truth is not None and truth.shape != (len(pixels),):
            raise DataError(
                f"batches: expected one label for each of {len(pixels)} images, got {_told(pair[1])} in batch {number}."
            )
        left = len(pixels) if most is None else min(len(pixels), most - count)
        images.append(pixels[:left])
        labels.append(None if truth is None else truth[:left])
        count += left
        if most is not None and count >= most:
            break
    if not count:
        raise DataError("batches: expected at least one image, got none.")
    if any(one is None for one in labels) and not all(one is None for one in labels):
        raise DataError("batches: some come with labels and some without; label all of them, or none.")
    known = [one for one in labels if one is not None]
    return TensorImages(torch.cat(images), torch.cat(known) if known else None)


def _told(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"{len(value)} values"
    return f"a {type(value).__name__}"
