"""Where forgotten classes stand among the logits, before and after: what can be said where a class has one photograph.

An accuracy of one image is 0 or 100 and says nothing of how far the class is from being answered. Its place among all
classes and its distance from the best other logit do, on images of the class as well as on those of all others.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError
from modhifi_cli.evaluation.forget_retain import named_classes
from modhifi_cli.evaluation.forward import labels_needed, logits_of_batches, ready_to_measure
from modhifi_cli.evaluation.top1 import rank_of_label
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
    forget_class: int | Sequence[int] | None = None,
) -> tuple[Measurement, ...]:
    """Rank and logit of the forgotten classes on their own images and on all others, and agreement on the others.

    An image of a forgotten class is asked about its own class; any other one about the forgotten class whose logit is
    the largest there. The gap is that logit less the largest one of the classes that stay: above 0 the class is answered.

    Args: see `modhifi_cli.evaluation.Measure`; only the labelled `evaluation_data` are read.
        forget_class: The forgotten classes by number; an unlearn run fills in its own.

    Returns:
        Per network ``forgotten_rank`` (median over images, 1 … classes, 1 is the first) and ``forgotten_gap`` (mean over
        images, logits), and the same of the other images as ``others_rank`` and ``others_gap``; for every network but
        the first ``others_agreement``, % of the other images with the first one's answer. What has no image is left
        out. `protocol` holds the counts, and ``told`` of a rank the number of classes. Empty without `evaluation_data`.

    Raises:
        ConfigError: If no forget class is named, or something else than class numbers, or every class.
        DataError: If the images carry no labels, or a label or a forget class is outside of the network's classes.
        NumericsError: If logits are NaN or infinite.
        UnsupportedModelError: If the networks do not have the same number of classes.
    """
    if evaluation_data is None or not models:
        return ()
    forget = named_classes(forget_class, "forgotten_rank")
    found: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in models}
    own: list[Tensor] = []
    classes = 0
    batches = logits_of_batches(
        models, evaluation_data, place="evaluation_data", stage="ranks", device=device, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    with ready_to_measure(models, device):
        for logits, labels in batches:
            wanted = labels_needed(labels, "forgotten_rank")
            own.append(torch.isin(wanted, forget))
            for name, scores in logits.items():
                classes = classes or scores.shape[1]
                _check(name, scores.shape[1], classes, forget)
                asked = torch.where(own[-1], wanted, forget[scores[:, forget].argmax(1)])
                rank = rank_of_label(scores, asked, name=name) + 1
                found[name].append((rank.double(), _gap(scores, asked, forget), scores.argmax(1)))
    shown = {name: tuple(torch.cat(parts) for parts in zip(*seen, strict=True)) for name, seen in found.items()}
    account = {"forget_class": forget.tolist(), "device": str(device), "data": dict(evaluation_data.protocol)}
    return tuple(_told(shown, torch.cat(own), classes, account))


def _check(name: str, count: int, classes: int, forget: Tensor) -> None:
    if count != classes:
        raise UnsupportedModelError(
            f"{name}: forgotten_rank needs as many classes as the first network has ({classes}), got {count}; compare "
            "networks with the same classes, or leave forgotten_rank out of evaluation=[…]."
        )
    outside = (forget < 0) | (forget >= count)
    if bool(outside.any()):
        raise DataError(
            f"evaluation.forgotten_rank.forget_class: expected 0 to {count - 1} for the {count} logits of '{name}', got "
            f"{int(forget[outside][0])}; name classes that the network has."
        )
    if len(forget.unique()) == count:
        raise ConfigError(
            f"evaluation.forgotten_rank.forget_class: all {count} classes of '{name}' are named, so that none is left to "
            "compare with; name fewer."
        )


def _gap(scores: Tensor, asked: Tensor, forget: Tensor) -> Tensor:
    """Logit of the asked class less the largest of the classes that stay, ``[batch]``."""
    others = scores.index_fill(1, forget, -torch.inf)
    return scores.gather(1, asked[:, None])[:, 0] - others.amax(1)


def _told(
    shown: Mapping[str, tuple[Tensor, ...]], own: Tensor, classes: int, account: Mapping[str, Any]
) -> list[Measurement]:
    first = next(iter(shown))
    found = []
    for name, (rank, gap, answer) in shown.items():
        for kind, chosen in (("forgotten", own), ("others", ~own)):
            if not bool(chosen.any()):
                continue
            protocol = {"samples": int(chosen.sum()), **account}
            middle = float(rank[chosen].quantile(0.5))
            told = {"told": f"{middle:g} of {classes}", "first": int((rank[chosen] == 1).sum())}
            found.append(Measurement(name, f"{kind}_rank", middle, "rank", told | protocol))
            found.append(Measurement(name, f"{kind}_gap", float(gap[chosen].mean()), "logits", protocol))
            if kind == "others" and name != first:
                same = int((answer == shown[first][2])[chosen].sum())
                share = 100 * same / int(chosen.sum())
                found.append(Measurement(name, "others_agreement", share, "%", {"same": same, **protocol}))
    return found
