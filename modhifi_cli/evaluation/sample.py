"""What the dense network makes of a sample of unlabelled images: whether it is sure, and of how many classes."""

import hashlib
import math

import torch
from torch import nn

from modhifi_cli.evaluation.forward import logits_of_batches, ready_to_measure
from modhifi_cli.records import ImageSource


def sample_quality(
    model: nn.Module, source: ImageSource, *, device: torch.device, batch_size: int
) -> dict[str, float | int]:
    """Quality of a calibration sample, without labels.

    Args:
        model: The dense network; given back as it was.
        source: The images.
        device: Where to run.
        batch_size: Images a forward.

    Returns:
        ``images``; ``distinct_images`` (by their bytes); ``classes_predicted`` and ``classes``;
        ``share_of_largest_class_percent``; ``mean_confidence_percent``, the mean largest probability; and
        ``effective_classes``, exp of the entropy of the predicted classes: all classes where they are even, 1 where
        every image falls into one.
    """
    hashes: set[bytes] = set()
    counts, confidence, images = None, 0.0, 0
    watched = _Watched(source, hashes)
    with ready_to_measure({"dense": model}, device):
        for logits, _ in logits_of_batches(
            {"dense": model},
            watched,
            place="data",
            stage="sample",
            device=device,
            batch_size=batch_size,
            progress=lambda step: None,
        ):
            scores = logits["dense"]
            found = torch.bincount(scores.argmax(1), minlength=scores.shape[1]).double()
            counts = found if counts is None else counts + found
            confidence += float(scores.softmax(1).amax(1).sum())
            images += len(scores)
    share = counts / images
    entropy = -float((share[share > 0] * share[share > 0].log()).sum())
    return {
        "images": images,
        "distinct_images": len(hashes),
        "classes_predicted": int((counts > 0).sum()),
        "classes": len(counts),
        "effective_classes": round(math.exp(entropy), 2),
        "share_of_largest_class_percent": round(100 * float(share.max()), 2),
        "mean_confidence_percent": round(100 * confidence / images, 2),
    }


class _Watched:
    """A source that notes the hash of every image that passes."""

    def __init__(self, source: ImageSource, hashes: set[bytes]) -> None:
        self._source, self._hashes, self.protocol = source, hashes, source.protocol

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, batch_size: int):
        for images, labels in self._source.batches(batch_size):
            self._hashes.update(hashlib.sha256(image.numpy().tobytes()).digest() for image in images)
            yield images, labels
