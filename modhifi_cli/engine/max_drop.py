"""The most compression that keeps the drop in agreement within a bound: which shares to try, and what a trial counts.

The drop is measured, in points of top-1 agreement with the dense network, on calibration images that no fit has seen;
labels are never needed. Where to begin is predicted: an allocation's error curves say how much of the logits' variance
a share will cost, and noise of that size on the dense logits says how many answers would change.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 0.02  # share of the smallest cut that is tried
_NEAR = 0.01  # shares that lie nearer together are not told apart
_STEEP = 8.0  # how fast the logarithm of the drop rises with the share, where nothing is known yet
_FIRST = 0.3  # share of the first trial where nothing predicts


@dataclass(frozen=True)
class Trial:
    """One pruned copy.

    Attributes:
        sparsity: Share that was asked for.
        drop: Points of agreement lost on the held-out images, 0 … 100.
    """

    sparsity: float
    drop: float


@dataclass(frozen=True)
class DropSearch:
    """Decides which share is tried next; it knows nothing but the trials made so far, so it can be continued.

    Attributes:
        value: Bound on the drop, points.
        trials: Most trials.
        resolution: Points that one held-out image stands for: drops below it cannot be told apart.
        largest: Largest share that can be reached.
        smallest: Smallest share that is worth a trial.
    """

    value: float
    trials: int
    resolution: float
    largest: float = 0.95
    smallest: float = SMALLEST

    def next_share(self, start: float | None, finished: Sequence[Trial]) -> float | None:
        """The share to try next, or None when the search is over.

        Args:
            start: Predicted share, or None where nothing predicts.
            finished: Trials so far.
        """
        if len(finished) >= self.trials:
            return None
        kept = [trial for trial in finished if trial.drop <= self.value]
        lost = [trial for trial in finished if trial.drop > self.value]
        low = max((trial.sparsity for trial in kept), default=None)
        high = min((trial.sparsity for trial in lost), default=None)
        if low is None:
            if high is None:
                return self._within(_FIRST if start is None else start)
            if high <= self.smallest + 1e-9:
                return None
            if len(finished) == self.trials - 1:
                return self.smallest  # the last trial says whether anything is possible at all
            worst = min(lost, key=lambda trial: trial.sparsity)
            aim = high - math.log(worst.drop / self._at_least(self.value)) / _STEEP
            return self._within(min(aim, 0.8 * high))
        if high is None or high <= low:
            if low >= self.largest - _NEAR:
                return None
            best = max(kept, key=lambda trial: trial.sparsity)
            aim = low + math.log(self.value / self._at_least(best.drop)) / _STEEP
            return self._within(min(max(aim, low + 0.05), low + 0.3))
        if high - low <= _NEAR:
            return None
        below = math.log(self._at_least(max(t.drop for t in kept if t.sparsity == low)))
        above = math.log(self._at_least(min(t.drop for t in lost if t.sparsity == high)))
        part = 0.5 if above <= below else (math.log(self._at_least(self.value)) - below) / (above - below)
        # Not too near to an end: the line between two trials is a guess, and a trial at an end teaches nothing.
        return low + min(max(part, 0.25), 0.75) * (high - low)

    def best(self, finished: Sequence[Trial]) -> int | None:
        """Number of the accepted trial with the largest share, or None where none keeps the bound."""
        kept = [number for number, trial in enumerate(finished) if trial.drop <= self.value]
        return max(kept, key=lambda number: finished[number].sparsity, default=None)

    def _within(self, share: float) -> float:
        return min(max(share, self.smallest), self.largest)

    def _at_least(self, drop: float) -> float:
        return max(drop, self.resolution / 2)


def measured_drop(dense: Tensor, other: Tensor) -> float:
    """Points of top-1 agreement lost: share of rows, in percent, whose largest logit is another one.

    Args:
        dense: Logits of the dense network, ``[images, classes]``, or its answers, ``[tokens]`` int64.
        other: The same of the other network.
    """
    answers = [said if said.dim() == 1 else said.argmax(1) for said in (dense, other)]
    return 100 * float((answers[0] != answers[1]).double().mean())


def predicted_drop(dense: Tensor, impact: float) -> float:
    """Points of agreement that a change of the logits of a given size would cost if it were noise.

    Args:
        dense: Logits of the dense network, ``[images, classes]``.
        impact: Squared change of the logits as a share of their variance over the images (`impact.Impact.measure`).
    """
    logits = dense.double()
    variance = impact * float((logits - logits.mean(0)).square().mean())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((16, *logits.shape), generator=generator, dtype=torch.float64) * math.sqrt(variance)
    changed = (logits.cpu()[None] + noise).argmax(-1) != logits.cpu().argmax(-1)
    return 100 * float(changed.double().mean())


def predicted_share(
    dense: Tensor, impact_of: Callable[[float], float], value: float, *, largest: float, smallest: float = SMALLEST
) -> float:
    """The largest share whose predicted drop keeps the bound, by bisection.

    Args:
        dense: Logits of the dense network, ``[images, classes]``.
        impact_of: Share → predicted impact, rising.
        value: Bound, points.
        largest: Largest share.
        smallest: Smallest share; returned where even that is predicted to break the bound.
    """
    low, high = smallest, largest
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted_drop(dense, impact_of(middle)) <= value else (low, middle)
    return low
