"""What the dense network makes of a sample of unlabelled images: whether it is sure, and of how many classes."""

import hashlib
import math

import torch
from torch import Tensor, nn

from modhifi_cli.evaluation.forward import bytes_of, logits_of_batches, ready_to_measure
from modhifi_cli.records import ImageSource


class SampleAnswers:
    """Counts, batch after batch, what the dense network makes of a calibration sample."""

    def __init__(self) -> None:
        self._hashes: set[bytes] = set()
        self._counts: Tensor | None = None
        self._confidence = 0.0
        self._images = 0

    def see(self, images: Tensor) -> None:
        """Note a batch of images, ``[batch, channels, height, width]``, by their bytes."""
        self._hashes.update(hashlib.sha256(bytes_of(image)).digest() for image in images)

    def hear(self, logits: Tensor) -> None:
        """Note what the network says of a batch, ``[batch, classes]``."""
        found = torch.bincount(logits.argmax(1), minlength=logits.shape[1]).double()
        self._counts = found if self._counts is None else self._counts + found
        self._confidence += float(logits.softmax(1).amax(1).sum())
        self._images += len(logits)

    def result(self) -> dict[str, float | int]:
        """The quality of the sample, without labels.

        Returns:
            ``images``; ``distinct_images`` (by their bytes); ``classes_predicted`` and ``classes``;
            ``share_of_largest_class_percent``; ``mean_confidence_percent``, the mean largest probability; and
            ``effective_classes``, exp of the entropy of the predicted classes: all classes where they are even, 1
            where every image falls into one.
        """
        if self._counts is None:
            raise ValueError("nothing was heard yet.")
        share = self._counts / self._images
        entropy = -float((share[share > 0] * share[share > 0].log()).sum())
        return {
            "images": self._images,
            "distinct_images": len(self._hashes),
            "classes_predicted": int((self._counts > 0).sum()),
            "classes": len(self._counts),
            "effective_classes": round(math.exp(entropy), 2),
            "share_of_largest_class_percent": round(100 * float(share.max()), 2),
            "mean_confidence_percent": round(100 * self._confidence / self._images, 2),
        }


def sample_quality(
    model: nn.Module, source: ImageSource, *, device: torch.device, batch_size: int
) -> dict[str, float | int]:
    """Quality of a calibration sample, without labels, from one forward over it: `SampleAnswers.result`.

    Args:
        model: The dense network; given back as it was.
        source: The images.
        device: Where to run.
        batch_size: Images a forward.
    """
    answers = SampleAnswers()
    with ready_to_measure({"dense": model}, device):
        for logits, _ in logits_of_batches(
            {"dense": model},
            _Watched(source, answers),
            place="data",
            stage="sample",
            device=device,
            batch_size=batch_size,
            progress=lambda step: None,
        ):
            answers.hear(logits["dense"])
    return answers.result()


class _Watched:
    """A source that shows every batch that passes to whoever counts."""

    def __init__(self, source: ImageSource, answers: SampleAnswers) -> None:
        self._source, self._answers, self.protocol = source, answers, source.protocol

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, batch_size: int):
        for images, labels in self._source.batches(batch_size):
            self._answers.see(images)
            yield images, labels
