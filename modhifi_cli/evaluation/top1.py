"""Accuracy on labelled held-out images: the share whose label has the largest logit, or is among the five largest."""

from collections.abc import Callable, Mapping
from math import sqrt

import torch
from torch import Tensor, nn

from modhifi_cli.errors import DataError
from modhifi_cli.evaluation.forward import labels_needed, logits_of_batches, ready_to_measure
from modhifi_cli.records import ImageSource, Measurement, Progress


def measure(
    *,
    models: Mapping[str, nn.Module],
    evaluation_data: ImageSource | None,
    calibration_data: ImageSource | None,
    example: Tensor,
    device: torch.device,
    batch_size: int,
    progress: Callable[[Progress], None],
) -> tuple[Measurement, ...]:
    """Top-1 and top-5 accuracy of every network, in percent.

    Equal logits are ordered by class index, so that a network with constant output does not look right everywhere.
    Top-5 is left out for networks with five classes or fewer, where it says nothing.

    Args: see `modhifi_cli.evaluation.Measure`; only the labelled `evaluation_data` are read.

    Returns:
        ``top1`` and ``top5`` per network, %; `protocol` holds the counts and the standard error of the share (in
        percentage points, binomial). Empty without `evaluation_data`, and for networks that read text.

    Raises:
        DataError: If the images carry no labels, or a label is outside of the network's classes.
        NumericsError: If logits are NaN or infinite.
    """
    if evaluation_data is None or not models or not example.is_floating_point():
        return ()
    correct = {name: torch.zeros(2, dtype=torch.int64) for name in models}
    classes = dict.fromkeys(models, 0)
    samples = 0
    batches = logits_of_batches(
        models,
        evaluation_data,
        place="evaluation_data",
        stage="top1",
        device=device,
        batch_size=batch_size,
        progress=progress,
    )
    with ready_to_measure(models, device):
        for logits, labels in batches:
            truth = labels_needed(labels, "top1")
            for name, scores in logits.items():
                classes[name] = scores.shape[1]
                rank = rank_of_label(scores, truth, name=name)
                correct[name] += torch.stack([(rank < 1).sum(), (rank < 5).sum()])
            samples += len(truth)
    return tuple(
        _share(name, term, int(count), samples, batch_size=batch_size, device=device, data=evaluation_data.protocol)
        for name in models
        for term, count in zip(("top1", "top5"), correct[name], strict=True)
        if term == "top1" or classes[name] > 5
    )


def rank_of_label(logits: Tensor, labels: Tensor, *, name: str) -> Tensor:
    """How many classes come before the true one when they are ordered by falling logit, equal ones by index.

    Args:
        logits: ``[batch, classes]``, finite.
        labels: Class index of every image, ``[batch]`` int64 in 0 … classes − 1.
        name: The network's name, for the message.

    Returns:
        ``[batch]`` int64; 0 where the label has the largest logit.

    Raises:
        DataError: If a label is outside of 0 … classes − 1.
    """
    classes = logits.shape[1]
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        raise DataError(
            f"evaluation_data: expected labels 0 to {classes - 1} for the {classes} logits of '{name}', "
            f"got {int(labels[outside][0])}; use data labelled for this network, or a network with as many classes."
        )
    own = logits.gather(1, labels[:, None])
    before = torch.arange(classes)[None, :] < labels[:, None]
    return ((logits > own) | ((logits == own) & before)).sum(dim=1)


def _share(model: str, term: str, correct: int, samples: int, *, batch_size, device, data) -> Measurement:
    share = correct / samples
    protocol = {
        "correct": correct,
        "samples": samples,
        "standard_error": 100 * sqrt(share * (1 - share) / samples),
        "batch_size": batch_size,
        "device": str(device),
        "data": dict(data),
    }
    return Measurement(model, term, 100 * share, "%", protocol)
