"""Further attacks of an audit: telling forget images from their nearest class, rounding weights, and several draws.

*Neighbour*: a network that never saw a class answers its images as if they were of the nearest other class. Whether the
edited network does is asked of a linear probe on its answers (without those of the forgotten classes): does it tell
forget images from real images of the class that they are given most? After the neighbour-class membership attack of
arXiv:2506.20893, in our own reading. *Rounding*: weights to 8 and 4 bits and back; an edit that only just hides a class
may lose it again. *Draws*: every attack that draws anything is made with several seeds, and an interval is told.
"""

import copy
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.auditing.attacks import Membership, Relearnt, infer_membership, steps_needed
from modhifi_cli.auditing.plan import LEAST, Seen
from modhifi_cli.errors import ConfigError, is_whole, need_whole
from modhifi_cli.numerics import readout
from modhifi_cli.numerics.rounding import rounded
from modhifi_cli.records import ImageSource, Progress

# Student's t, 95 % on both sides, for 1, 2, … degrees of freedom; the normal's beyond.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class Further:
    """How the further attacks are made.

    Attributes:
        seeds: Draws of the neighbour and the confidence attack; relearning has its own number.
        samples: Images of either side that the neighbour attack is trained on, and that rounding is judged on, at most.
        bits: To which weights are rounded; empty leaves rounding out.
    """

    seeds: int = 3
    samples: int = 500
    bits: Sequence[int] = (8, 4)

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("samples", LEAST)):
            need_whole(f"audit.further.{name}", getattr(self, name), least)
        if not isinstance(self.bits, list | tuple) or not all(is_whole(one) and 2 <= one <= 16 for one in self.bits):
            raise ConfigError(f"audit.further.bits must be a list of whole numbers from 2 to 16; got {self.bits!r}.")


@dataclass(frozen=True)
class Interval:
    """Mean over draws and the interval that holds the mean of many with 95 % chance; of one draw the ends are None."""

    mean: float
    low: float | None
    high: float | None
    draws: int


def interval(values: Sequence[float]) -> Interval:
    """Student's interval of the mean of a few draws."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return Interval(mean, None, None, count)
    spread = sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = (_STUDENT[count - 2] if count - 2 < len(_STUDENT) else 1.96) * spread / sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def further_attacks(
    models: Mapping[str, nn.Module],
    seen: Seen,
    sources: Mapping[str, ImageSource],
    relearnt: Relearnt,
    *,
    settings: Further,
    membership: Membership,
    seed: int,
) -> Generator[Progress, None, dict[str, Any]]:
    """Make them all.

    Args:
        models: ``dense``, ``edited`` and perhaps ``reference``, on their device.
        seen: What they said.
        sources: The images, ``calibration`` and perhaps ``evaluation``.
        relearnt: What relearning found, for its interval.
        settings: How.
        membership: How membership is inferred.
        seed: Of the first draw.

    Returns:
        ``neighbour`` (network → class, and the interval of the balanced accuracy in %, chance 50), ``rounding``
        (network → bits → ``forget``, ``retain`` accuracy in %), ``intervals`` (figure → network → interval).
    """
    draws = range(seed, seed + settings.seeds)
    yield Progress("audit", "nearest classes", 0, len(seen.names))
    neighbours = {}
    for number, name in enumerate(seen.names):
        cls, found = _neighbour(seen, name, draws, settings.samples)
        neighbours[name] = {"class": cls, **vars(interval(found))} if found else {"class": cls, "mean": None}
        yield Progress("audit", "nearest classes", number + 1, len(seen.names))
    intervals: dict[str, dict[str, Any]] = {}
    inferred = [infer_membership(seen, membership, seed=draw)[0] for draw in draws]
    for figure, key in (("MIA", "forget_as_non_members"), ("MIA check", "confidence_accuracy")):
        intervals[figure] = {name: vars(interval([one[name][key] for one in inferred])) for name in inferred[0]}
    taken = {}
    for name, one in relearnt.networks.items():
        seeds = sorted({curve.seed for curve in one["curves"]})
        each = [steps_needed([curve for curve in one["curves"] if curve.seed == draw]) for draw in seeds]
        if None not in each:
            taken[name] = vars(interval(each))
    intervals["relearn steps"] = taken
    rounding = {}
    for name, model in models.items():
        rounding[name] = {}
        for bits in settings.bits:
            rounding[name][f"int{bits}"] = yield from _rounded(model, seen, sources, settings.samples, bits, name)
    return {"neighbour": neighbours, "rounding": rounding, "intervals": intervals}


def figures_of(name: str, found: Mapping[str, Any]) -> dict[str, float | None]:
    """What joins the figures of a network."""
    figures: dict[str, float | None] = {"neighbour": found["neighbour"].get(name, {}).get("mean")}
    return figures | {f"{bits} FA": one["forget"] for bits, one in found["rounding"].get(name, {}).items()}


def definitions(settings: Further) -> dict[str, str]:
    """What the figures mean that a setting names: forget accuracy with rounded weights, one for every number of bits."""
    meaning = "forget accuracy on at most {} images after the weights went through {} bits and back, per output channel"
    return {f"int{bits} FA": meaning.format(settings.samples, bits) for bits in settings.bits}


def _neighbour(seen: Seen, name: str, draws: Sequence[int], samples: int) -> tuple[int | None, list[float]]:
    """The class that a network gives forget images most, and how well a probe tells them from it, % for each draw."""
    fitted, asked = ("calibration", "evaluation") if "evaluation" in seen.labels else ("calibration", "calibration")
    absent = seen.plan.absent(seen.labels[fitted])
    others = [cls for cls in range(seen.count) if cls not in seen.forget]
    given = seen.scores[fitted][name][absent][:, others].argmax(1)
    cls = others[int(given.bincount(minlength=len(others)).argmax())]

    def sides(where: str) -> list[Tensor]:
        labels = seen.labels[where]
        answers = seen.scores[where][name][:, others].log_softmax(1)
        return [answers[seen.plan.absent(labels)], answers[labels == cls]]

    train, held = sides(fitted), sides(asked)
    found = []
    for draw in draws:
        generator = torch.Generator().manual_seed(draw)
        orders = [torch.randperm(len(side), generator=generator) for side in train]
        count = min(samples, *(len(side) // 2 if fitted == asked else len(side) for side in train))
        if fitted == asked:  # half of the images train, the other half is asked about
            held = [side[order[count:]] for side, order in zip(train, orders, strict=True)]
        else:  # a draw takes four fifths of them, so that draws differ
            count = max(2, count * 4 // 5)
        if count < 2 or min(map(len, held)) < 2:
            return cls, []
        own = [side[order[:count]] for side, order in zip(train, orders, strict=True)]
        labels = torch.tensor([1, 0]).repeat_interleave(count)
        said = readout.linear_probe(torch.cat(own), labels, torch.cat(held))
        right = [float((said[: len(held[0])] == 1).double().mean()), float((said[len(held[0]) :] == 0).double().mean())]
        found.append(50 * sum(right))
    return cls, found


@torch.no_grad()
def _rounded(
    model: nn.Module, seen: Seen, sources: Mapping[str, ImageSource], samples: int, bits: int, name: str
) -> Generator[Progress, None, dict[str, float]]:
    """Accuracy of a copy with rounded weights on forget and retain images, %."""
    copied = copy.deepcopy(model).eval()
    for module in copied.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            module.weight.copy_(rounded(module.weight, bits))
    parameter = next(copied.parameters())
    labels = seen.labels[seen.judged]
    absent = seen.plan.absent(labels)
    wanted = torch.cat([side.nonzero().flatten()[:samples] for side in (absent, ~absent)])
    right = {True: [], False: []}
    start, total = 0, len(sources[seen.judged])
    for images, _ in sources[seen.judged].batches(64):
        inside = wanted[(wanted >= start) & (wanted < start + len(images))]
        if len(inside):
            said = copied(images[inside - start].to(parameter)).argmax(1).cpu()
            for at, answer in zip(inside.tolist(), said.tolist(), strict=True):
                right[bool(absent[at])].append(float(answer == int(labels[at])))
        start += len(images)
        yield Progress("audit", f"int{bits}, {name}", start, total)
    return {"forget": 100 * sum(right[True]) / len(right[True]), "retain": 100 * sum(right[False]) / len(right[False])}
