"""How alike two scorings of the same components are: in their order, and in the set that they would keep."""

import torch
from torch import Tensor


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two scorings, equal scores sharing their mean rank.

    Args:
        first: ``[components]``, any floating type.
        second: The same components.

    Returns:
        −1 … 1; NaN where one scoring is constant, which has no order.
    """
    one, other = (_ranks(scores.double()) for scores in (first, second))
    one, other = one - one.mean(), other - other.mean()
    scale = one.norm() * other.norm()
    return float(one @ other / scale) if scale > 0 else float("nan")


def kept_in_common(first: Tensor, second: Tensor, keep: int) -> float:
    """Share of the `keep` best components of one scoring that are among the `keep` best of the other, 0 … 1.

    Two scorings that know nothing of each other have keep / components in common on average.
    """
    one, other = (scores.argsort(descending=True, stable=True)[:keep] for scores in (first, second))
    return float(torch.isin(one, other).double().mean())


def _ranks(scores: Tensor) -> Tensor:
    _, inverse, counts = scores.unique(sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[inverse]
