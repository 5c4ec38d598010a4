"""Selection: from votes to the kept components of a group, deterministic. Named in configs/selection.

Equal scores are ordered by component index, so that the same votes always keep the same set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modhifi_cli.numerics.scoring import Scores
from modhifi_cli.records import Consumer


@dataclass(frozen=True)
class Union:
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
class TopK:
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
        total = 0
        for votes in scores.votes:
            size = votes.abs().sum()
            total = total + votes.sum(0) / (size if size > 0 else 1)
        return _first(keep, -total)


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
