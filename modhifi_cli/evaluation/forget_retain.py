"""Accuracy on forget and on retain classes of labelled held-out images, with the accuracy of every class."""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, DataError, whole_numbers
from modhifi_cli.evaluation.forward import labels_needed, logits_of_batches, ready_to_measure
from modhifi_cli.evaluation.top1 import rank_of_label
from modhifi_cli.records import ImageSource, Measurement, Progress

_FEW = 10  # images, below which a share in % says more than they know


def measure(
    *,
    models: Mapping[str, nn.Module],
    evaluation_data: ImageSource | None,
    calibration_data: ImageSource | None,
    example: Tensor,
    device: torch.device,
    batch_size: int,
    progress: Callable[[Progress], None],
    forget_class: int | Sequence[int] | None = None,
) -> tuple[Measurement, ...]:
    """Top-1 accuracy on the images of the forget classes, and on those of all others, in percent.

    Every image may be given any class: a forgotten class is not taken out of the choice. A share of fewer than ten images
    is told as a count; `forgotten_rank` says more of so few.

    Args: see `modhifi_cli.evaluation.Measure`; only the labelled `evaluation_data` are read.
        forget_class: The forgotten classes by number; an unlearn run fills in its own.

    Returns:
        ``forget_accuracy`` and ``retain_accuracy`` per network, %; `protocol` holds the counts, the standard error in
        percentage points, and the accuracy of every class by its number. Empty without `evaluation_data`.

    Raises:
        ConfigError: If no forget class is named, or something else than class numbers.
        DataError: If the images carry no labels, or lack forget or retain classes, or a label is outside of the
            network's classes.
        NumericsError: If logits are NaN or infinite.
    """
    if evaluation_data is None or not models:
        return ()
    forget = named_classes(forget_class, "forget_retain")
    given: dict[str, list[Tensor]] = {name: [] for name in models}
    truth: list[Tensor] = []
    classes = 0
    batches = logits_of_batches(
        models,
        evaluation_data,
        place="evaluation_data",
        stage="forget and retain",
        device=device,
        batch_size=batch_size,
        progress=progress,
    )
    with ready_to_measure(models, device):
        for logits, labels in batches:
            wanted = labels_needed(labels, "forget_retain")
            for name, scores in logits.items():
                classes = max(classes, scores.shape[1])
                given[name].append(rank_of_label(scores, wanted, name=name) < 1)
            truth.append(wanted)
    labels = torch.cat(truth)
    forgotten = both_kinds(labels, forget)
    shared = {"forget_class": forget.tolist(), "device": str(device), "data": dict(evaluation_data.protocol)}
    found = []
    for name in models:
        right = torch.cat(given[name])
        per_class = {
            int(cls): round(100 * float(right[labels == cls].double().mean()), 4) for cls in labels.unique().tolist()
        }
        for term, chosen in (("forget_accuracy", forgotten), ("retain_accuracy", ~forgotten)):
            found.append(_share(name, term, right[chosen], {"per_class": per_class, **shared}))
    return tuple(found)


def named_classes(forget_class: object, measurement: str) -> Tensor:
    """The forgotten classes that a measurement was told of, ``[classes]`` int64.

    Args:
        forget_class: What the settings say: a whole number, or a list of such.
        measurement: Its name, for messages.

    Raises:
        ConfigError: If it is anything else, or nothing.
    """
    chosen = [] if forget_class is None else whole_numbers(forget_class)
    if chosen == []:
        raise ConfigError(
            f"evaluation.{measurement}.forget_class: name the forgotten classes by number, or leave {measurement} out of "
            "evaluation=[…]; an unlearn run fills in its own."
        )
    if chosen is None or min(chosen) < 0:
        raise ConfigError(
            f"evaluation.{measurement}.forget_class: expected a class by its number, such as 3, or several, such as "
            f"[3,5]; got {forget_class!r}."
        )
    return torch.tensor(chosen)


def both_kinds(labels: Tensor, forget: Tensor) -> Tensor:
    """Which images are of forget classes, ``[images]`` bool.

    Args:
        labels: Of all images, ``[images]`` int64.
        forget: The forgotten classes.

    Raises:
        DataError: If there are none, or only such.
    """
    forgotten = torch.isin(labels, forget)
    for kind, chosen in (("forget", forgotten), ("retain", ~forgotten)):
        if not bool(chosen.any()):
            raise DataError(
                f"evaluation_data: forget_retain needs images of {kind} classes, got none among {len(labels)}; give "
                "images of all classes, or leave forget_retain out of evaluation=[…] (forgotten_rank does without)."
            )
    return forgotten


def _share(model: str, term: str, right: Tensor, protocol: Mapping[str, Any]) -> Measurement:
    share = float(right.double().mean())
    few = {"told": f"{int(right.sum())} of {len(right)}"} if len(right) < _FEW else {}
    counts = {
        **few,
        "correct": int(right.sum()),
        "samples": len(right),
        "standard_error": 100 * sqrt(share * (1 - share) / len(right)),
    }
    return Measurement(model, term, 100 * share, "%", {**counts, **protocol})
