"""Selection: from votes or moments to the kept components of a group, deterministic. Named in configs/selection.

Equal scores are ordered by component index, so that the same votes always keep the same set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modhifi_cli.errors import ConfigError, is_whole
from modhifi_cli.numerics.elimination import Elimination, elimination
from modhifi_cli.numerics.fidelity import joint_fidelity
from modhifi_cli.numerics.scoring import Scores
from modhifi_cli.records import Consumer


class _Selection:
    """What selections share: an order of the components, from the sets that they keep."""

    def __call__(self, scores: Scores, consumers: Sequence[Consumer], *, keep: int) -> Tensor:
        """Kept components, ``[keep]`` int64 sorted."""
        raise NotImplementedError

    def ranked(self, scores: Scores, consumers: Sequence[Consumer] = ()) -> list[int]:
        """All components: a component's rank is the smallest width at which the rule keeps it, then its number."""
        size = scores.votes[0].shape[1]
        first: dict[int, int] = {}
        for width in range(1, size + 1):
            for component in self(scores, consumers, keep=width).tolist():
                first.setdefault(component, width)
        return sorted(range(size), key=lambda component: (first[component], component))


@dataclass(frozen=True)
class Union(_Selection):
    """The paper's union rule: keep a component that is among the top p of *any* voter, p as large as `keep` allows.

    The last p rarely fits exactly; its newcomers are ordered by how many voters hold them in their top p, then by
    summed score, then by index.
    """

    needs_statistics: ClassVar[bool] = False

    def __call__(self, scores: Scores, consumers: Sequence[Consumer] = (), *, keep: int) -> Tensor:
        """Kept components.

        Args:
            scores: Votes on the group's components.
            consumers: Unused.
            keep: How many to keep, 1 … in_group.

        Returns:
            ``[keep]`` int64 sorted.
        """
        votes = _checked(scores, keep)
        order = votes.argsort(dim=1, descending=True, stable=True)
        places = torch.arange(votes.shape[1], device=votes.device).expand_as(order)
        ranks = torch.empty_like(order).scatter_(1, order, places)
        best = ranks.amin(0)
        last = int(best.sort().values[keep - 1])
        voters = (ranks <= last).sum(0)
        return _first(keep, best, -voters, -votes.sum(0))


@dataclass(frozen=True)
class TopK(_Selection):
    """Keep the largest summed scores, every consumer's scores first divided by their total size.

    Top-k by singleton fidelity is the best subset where contributions are uncorrelated.
    """

    needs_statistics: ClassVar[bool] = False

    def __call__(self, scores: Scores, consumers: Sequence[Consumer] = (), *, keep: int) -> Tensor:
        """Kept components.

        Args:
            scores: Votes on the group's components.
            consumers: Unused.
            keep: How many to keep, 1 … in_group.

        Returns:
            ``[keep]`` int64 sorted.
        """
        _checked(scores, keep)
        total = torch.zeros_like(scores.votes[0][0])
        for votes in scores.votes:
            size = votes.abs().sum()
            total = total + votes.sum(0) / (size if size > 0 else 1)
        return _first(keep, -total)


@dataclass(frozen=True)
class Greedy(_Selection):
    """Backward elimination (M10): always remove the component whose loss the rest can make up for best.

    The loss is the summed relative error over all consumers of the group. Going backwards is blind to what is best for
    very few, so the scores' top-k is looked at too.

    Attributes:
        block: Components removed before the rest is compared anew; ``"auto"``: one up to 2,048 features.
        ridge: λ > 0, times the mean diagonal of S.
        against_scores: Take the scores' top-k instead where its joint fidelity, summed over the consumers, is higher.
            So the set is never worse than top-k in the fidelity that is recorded.

    Raises:
        ConfigError: For a block below 1 or a ridge that is not above 0.
    """

    block: int | str = "auto"
    ridge: float = 1e-4
    against_scores: bool = True
    needs_statistics: ClassVar[bool] = True

    def __post_init__(self):
        if self.block != "auto" and not (is_whole(self.block) and self.block >= 1):
            raise ConfigError(
                f"selection.block must be 'auto' or a whole number of at least 1, got '{self.block}': leave it at auto."
            )
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise ConfigError(f"selection.ridge must be a number above 0, got {self.ridge}: set it to 1e-4.")

    def __call__(self, scores: Scores | None, consumers: Sequence[Consumer], *, keep: int) -> Tensor:
        """Kept components.

        Args:
            scores: Votes on the group's components, or None for elimination alone.
            consumers: Of the group.
            keep: How many to keep, 1 … in_group.

        Returns:
            ``[keep]`` int64 sorted.

        Raises:
            NumericsError: If a consumer's output has no energy, a weight is not finite, or the ridge is too small.
        """
        kept = self.eliminate(consumers, keep=keep).kept(keep)
        if scores is not None and self.against_scores:
            rival = TopK()(scores, consumers, keep=keep).to(kept.device)
            if not torch.equal(rival, kept) and _joint(consumers, rival) > _joint(consumers, kept):
                kept = rival
        return kept

    def ranked(self, scores: Scores, consumers: Sequence[Consumer] = ()) -> list[int]:
        """All components, those first that elimination removes last."""
        order = self.eliminate(consumers, keep=1).order.tolist()
        return [last for last in range(consumers[0].in_group) if last not in order] + order[::-1]

    def eliminate(self, consumers: Sequence[Consumer], *, keep: int = 1) -> Elimination:
        """The whole order of removal and its error curve, for widths that are chosen later (M11)."""
        return elimination(consumers, keep=keep, block=self.block, ridge=self.ridge)

    def along(self, path: Elimination) -> "Greedy":
        """The same, its order of removal known already: that of the curve by which the width was chosen."""
        return _Along(self.block, self.ridge, self.against_scores, path) if self.block == "auto" else self


@dataclass(frozen=True, eq=False)
class _Along(Greedy):
    path: Elimination | None = None

    def eliminate(self, consumers: Sequence[Consumer], *, keep: int = 1) -> Elimination:
        assert self.path is not None and self.path.components == consumers[0].in_group, "it is of these components"
        return self.path


def _joint(consumers: Sequence[Consumer], kept: Tensor) -> float:
    behind = (torch.arange(consumer.in_group, consumer.components, device=kept.device) for consumer in consumers)
    whole = (torch.cat([kept, rest]) for rest in behind)
    return sum(joint_fidelity(consumer, chosen) for consumer, chosen in zip(consumers, whole, strict=True))


def _checked(scores: Scores, keep: int) -> Tensor:
    votes = torch.cat(scores.votes)
    if not 1 <= keep <= votes.shape[1]:
        raise ValueError(f"keep must lie in 1 … {votes.shape[1]}, got {keep}.")
    return votes


def _first(keep: int, *keys: Tensor) -> Tensor:
    # Stable sorts from the least to the most important key are a lexicographic sort; the index is the last tie-break.
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order[:keep].sort().values
