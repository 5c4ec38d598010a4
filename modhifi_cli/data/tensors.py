"""Batches that somebody has in memory already, as an `ImageSource`: what the Python functions are given."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
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
        digest = hashlib.sha256(images.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        self.protocol: Mapping[str, Any] = {"source": "batches", "num_samples": len(images), "sha256": digest}

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    @property
    def labels(self) -> list[int] | None:
        """Labels of the images, or None."""
        return None if self._labels is None else self._labels.tolist()

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """As `ImageSource.batches`."""
        for start in range(0, len(self._images), batch_size):
            labels = None if self._labels is None else self._labels[start : start + batch_size]
            yield self._images[start : start + batch_size], labels


def from_batches(
    batches: Iterable[Any] | Tensor,
    *,
    part: Callable[[Any], tuple[Any, Tensor | None]],
    most: int | None = None,
) -> TensorImages:
    """Inputs as the network wants them, collected from whatever holds them.

    Args:
        batches: One tensor ``[samples, …]``; or anything that gives batches one after the other (a list, a
            ``DataLoader``), each such a tensor, or a tuple of it, labels ``[batch]``, and whatever else (paths).
        part: Takes a batch apart into what the network reads, as one tensor, and labels or None.
        most: Stop after so many samples; None takes all.

    Raises:
        DataError: If there is no sample, or something is no batch of finite floating numbers of one shape.
    """
    images: list[Tensor] = []
    labels: list[Tensor | None] = []
    count = 0
    for number, batch in enumerate([batches] if isinstance(batches, Tensor) else batches):
        found, truth = part(batch)
        if not isinstance(found, Tensor):
            raise DataError(
                f"batches: expected a tensor of images, or images and labels, got {_told(batch)} in batch {number}; "
                "take both out of it first, or name what is read (inputs=)."
            )
        pixels = found.detach().cpu()
        if pixels.dim() < 2 or not pixels.is_floating_point() or (images and pixels.shape[1:] != images[0].shape[1:]):
            raise DataError(
                "batches: expected preprocessed images [batch, channels, height, width] (or other inputs [batch, …]) of "
                f"floats, all of one shape, got {_told(found)} in batch {number}."
            )
        if not bool(torch.isfinite(pixels).all()):
            raise DataError(f"batches: batch {number} holds NaN or infinite values; look at what prepares the images.")
        if truth is not None and truth.shape != (len(pixels),):
            raise DataError(
                f"batches: expected one label for each of {len(pixels)} images, got {_told(truth)} in batch {number}."
            )
        left = len(pixels) if most is None else min(len(pixels), most - count)
        images.append(pixels[:left])
        labels.append(None if truth is None else truth[:left].detach().cpu().to(torch.int64))
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
