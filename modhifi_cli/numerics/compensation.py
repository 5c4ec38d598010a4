"""Compensation: the kept components' weights that make up for the removed ones. Named in configs/compensation.

A compensation is called with a consumer and the kept components of its whole input, and gives the weight on the kept
features. What the change does to a constant is `restored_constant`, for the bias or BatchNorm behind the layer.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modhifi_cli.errors import ConfigError, NumericsError
from modhifi_cli.numerics.contributions import SimilarityBlocks, contribution_moments
from modhifi_cli.numerics.linalg import feature_index, solve_positive
from modhifi_cli.records import Consumer

# From this many kept components on, with one feature each, conjugate gradients shared by all outputs beat one
# factorisation per output (scripts/bench_numerics.py).
_ITERATIVE_FROM = 768
_ITERATIONS = 400
_RESIDUAL = 1e-10


@dataclass(frozen=True)
class NoCompensation:
    """Leave the kept weights as they are: plain slicing."""

    needs_statistics: ClassVar[bool] = False

    def __call__(self, consumer: Consumer, kept: Tensor) -> Tensor:
        """The sliced weight, ``[outputs, kept features]`` float64, for kept components ``[kept]`` int64."""
        return consumer.weight.double()[:, _kept_features(consumer, kept)]


@dataclass(frozen=True)
class PerKernel:
    """One scale for every kept kernel w_{ci}, the paper's compensation (M5): Q_c[C,C] δ_c = r_c[C], w_{ci} ← δ_{ci} w_{ci}.

    Attributes:
        ridge: λ as a share of the mean diagonal of Q_c[C,C]; 0 for an exact solve.
        towards: What the ridge pulls the scales to. ``"weights"``: δ = 1, never worse than slicing on its own rows.
            ``"zero"``: δ = 0, as in the paper.

    Raises:
        ConfigError: For a negative ridge or another `towards`.
    """

    ridge: float = 1e-4
    towards: str = "weights"
    needs_statistics: ClassVar[bool] = True

    def __post_init__(self):
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ConfigError(f"compensation.ridge must be a number of at least 0, got {self.ridge}: set it to 1e-4.")
        if self.towards not in ("weights", "zero"):
            raise ConfigError(
                f"compensation.towards must be 'weights' or 'zero', got '{self.towards}': use 'weights' unless the "
                f"paper's ridge is wanted."
            )

    def __call__(self, consumer: Consumer, kept: Tensor) -> Tensor:
        """The compensated weight on the kept features.

        Args:
            consumer: The layer before the edit.
            kept: Kept components of its whole input, ``[kept]`` int64 sorted.

        Returns:
            ``[outputs, kept features]`` float64. Dead outputs keep their sliced weight.

        Raises:
            NumericsError: If every output is dead; or without a ridge, if there are fewer rows than kept features.
        """
        features = _kept_features(consumer, kept)
        weight = consumer.weight.double()[:, features]
        if self.ridge == 0 and consumer.statistics.rows < len(features):
            raise NumericsError(
                f"{consumer.name}: an exact solve needs at least {len(features)} calibration rows, got "
                f"{consumer.statistics.rows}. Raise data.num_samples or set compensation.ridge above 0."
            )
        kept = kept.to(weight.device)
        moments = contribution_moments(consumer)
        alive = moments.alive.nonzero().flatten()
        r, d = moments.r[alive][:, kept], moments.d[alive][:, kept]
        scales = torch.ones(len(weight), len(kept), dtype=torch.float64, device=weight.device)
        scales[alive] = self._scales(consumer, kept, alive, r, self.ridge * d.mean(1))
        return weight * scales.repeat_interleave(len(features) // max(len(kept), 1), dim=1)

    def _scales(self, consumer: Consumer, kept: Tensor, alive: Tensor, r: Tensor, ridge: Tensor) -> Tensor:
        # Rows of `r` and `ridge` belong to the outputs `alive`.
        start = 1.0 if self.towards == "weights" else 0.0
        blocks = SimilarityBlocks(consumer, kept)
        solved = torch.full_like(r, start)
        todo = torch.arange(len(alive), device=alive.device)
        if blocks.per == 1 and len(kept) >= _ITERATIVE_FROM and self.ridge > 0 and blocks.moment is not None:
            todo = _conjugate_gradients_(solved, blocks.moment[:, 0, 0], blocks.weight[alive, 0], r, ridge)
        for chosen in todo.split(blocks.outputs_per_chunk):
            matrices = blocks.of(alive[chosen])
            target = r[chosen]
            if start:
                target = target - matrices.sum(2)
            matrices.diagonal(dim1=1, dim2=2).add_(ridge[chosen, None])
            solved[chosen] = start + solve_positive(matrices, target)
        return solved


def restored_constant(consumer: Consumer, kept: Tensor, weight: Tensor) -> Tensor:
    """What the edit takes from each output's mean: W μ − W' μ_C.

    Args:
        consumer: The layer before the edit.
        kept: Kept components of its whole input, ``[kept]`` int64.
        weight: W', ``[outputs, kept features]``.

    Returns:
        ``[outputs]`` float64, output units: to be added to the bias, or taken off the running mean of the BatchNorm
        right behind the layer.
    """
    mean = consumer.statistics.mean
    return consumer.weight.to(mean) @ mean - weight.to(mean) @ mean[_kept_features(consumer, kept)]


def _conjugate_gradients_(scales: Tensor, moment: Tensor, weight: Tensor, r: Tensor, ridge: Tensor) -> Tensor:
    """Solve (Q_c + λ_c) (δ_c − start) = r_c − Q_c start for all outputs together, Q_c = S ∘ w_c w_cᵀ, in place.

    Each step is one product with S for all outputs, instead of one factorisation each. `scales` holds the start.

    Returns:
        The outputs that did not converge, ``[…]`` int64, their scales as at the start.
    """
    start = scales.clone()

    def product(values: Tensor) -> Tensor:
        return ((values * weight) @ moment).mul_(weight)

    tiny = torch.finfo(r.dtype).tiny  # an output may have no weight on any kept component
    precondition = 1 / (weight.square() * moment.diagonal() + ridge[:, None]).clamp_min(tiny)
    residual = r - product(scales)
    limit = _RESIDUAL * residual.norm(dim=1)
    direction = precondition * residual
    strength = (residual * direction).sum(1)
    for _ in range(_ITERATIONS):
        step = product(direction).add_(ridge[:, None] * direction)
        length = _ratio(strength, (direction * step).sum(1))[:, None]
        scales.add_(length * direction)
        residual.sub_(length * step)
        if (residual.norm(dim=1) <= limit).all():
            break
        fresh = precondition * residual
        following = (residual * fresh).sum(1)
        direction.mul_(_ratio(following, strength)[:, None]).add_(fresh)
        strength = following
    left = (~(residual.norm(dim=1) <= limit)).nonzero().flatten()
    scales[left] = start[left]
    return left


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    # A converged output has nothing left to divide.
    return torch.where(whole > 0, part / whole.clamp_min(torch.finfo(whole.dtype).tiny), torch.zeros_like(part))


def _kept_features(consumer: Consumer, kept: Tensor) -> Tensor:
    return feature_index(kept.to(consumer.weight.device), consumer.weight.shape[1] // consumer.components)
