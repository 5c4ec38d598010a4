"""Compensation: the kept components' weights that make up for the removed ones. Named in configs/compensation.

A compensation is called with a consumer and the kept components of its whole input, and gives the weight on the kept
features. What the change does to a constant is `restored_constant`, for the bias or BatchNorm behind the layer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modhifi_cli.errors import ConfigError, NumericsError, is_number
from modhifi_cli.numerics.contributions import SimilarityBlocks, contribution_moments
from modhifi_cli.numerics.linalg import feature_index, solve_positive, solve_scaled
from modhifi_cli.numerics.regression import Regression, kept_weight, regressions
from modhifi_cli.records import Consumer

# From this many kept components on, with one feature each, iterations shared by all outputs beat one factorisation per
# output (scripts/bench_numerics.py): 2 to 3 times at 768, more above.
_ITERATIVE_FROM = 768
# The joint ridge where no rows were held out to choose it on: in our trials 1e-2 was best or near it (method.md, 4).
_RIDGE_UNMEASURED = 1e-2
# Of more outputs than these, ridges are compared by so many seeded mixtures: of a thousand outputs a solve costs more
# than the factor of its matrix, and which of ten ridges is best is no question of a digit.
_MOST_OUTPUTS = 128


@dataclass(frozen=True)
class Solution:
    """A compensated weight.

    Attributes:
        weight: ``[outputs, kept features]`` float64.
        ridge: λ of a joint solve, times the mean diagonal of S[C,C]; None where the method has none for the layer.
    """

    weight: Tensor
    ridge: float | None = None


class _Compensation:
    """What compensations share: called, they give the weight alone."""

    reference: str = "current"

    @property
    def wants_held_out(self) -> bool:
        """Whether some of the rows should be set aside to choose something on."""
        return False

    def solve(self, consumer: Consumer, kept: Tensor) -> Solution:
        """The weight on the features of the kept components."""
        raise NotImplementedError

    def __call__(self, consumer: Consumer, kept: Tensor) -> Tensor:
        """The weight of `solve`, ``[outputs, kept features]`` float64."""
        return self.solve(consumer, kept).weight


@dataclass(frozen=True)
class NoCompensation(_Compensation):
    """Leave the kept weights as they are: plain slicing."""

    needs_statistics: ClassVar[bool] = False

    def solve(self, consumer: Consumer, kept: Tensor) -> Solution:
        """The sliced weight, ``[outputs, kept features]`` float64, for kept components ``[kept]`` int64."""
        return Solution(kept_weight(consumer, kept))


@dataclass(frozen=True)
class Constant(NoCompensation):
    """Leave the kept weights as they are and restore the mean of the output alone, in a bias or BatchNorm (FLAP's)."""

    needs_statistics: ClassVar[bool] = True


@dataclass(frozen=True)
class PerKernel(_Compensation):
    """One scale for every kept kernel, the paper's compensation (M5): Q_c[C,C] δ_c = r_c[C], w_{ci} ← δ_{ci} w_{ci}.

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

    def solve(self, consumer: Consumer, kept: Tensor) -> Solution:
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
        _refuse_few_rows(consumer.name, consumer.statistics.rows, len(features), self.ridge)
        kept = kept.to(weight.device)
        moments = contribution_moments(consumer)
        alive = moments.alive.nonzero().flatten()
        r, d = moments.r[alive][:, kept], moments.d[alive][:, kept]
        scales = torch.ones(len(weight), len(kept), dtype=torch.float64, device=weight.device)
        scales[alive] = self._scales(consumer, kept, alive, r, self.ridge * d.mean(1))
        return Solution(weight * scales.repeat_interleave(len(features) // max(len(kept), 1), dim=1))

    def _scales(self, consumer: Consumer, kept: Tensor, alive: Tensor, r: Tensor, ridge: Tensor) -> Tensor:
        # Rows of `r` and `ridge` belong to the outputs `alive`.
        start = 1.0 if self.towards == "weights" else 0.0
        blocks = SimilarityBlocks(consumer, kept)
        scales = torch.full_like(r, start)
        todo = torch.arange(len(alive), device=r.device)
        if blocks.moment is not None and blocks.per == 1 and self.ridge > 0 and len(kept) >= _ITERATIVE_FROM:
            moment, weight = blocks.moment[:, 0, 0], blocks.weight[alive, 0]
            target = r - start * weight * (weight @ moment)
            change, converged = solve_scaled(moment, weight, ridge, target)
            scales += torch.where(converged[:, None], change, 0)
            todo = todo[~converged]
        for chosen in todo.split(blocks.outputs_per_chunk):
            matrices = blocks.of(alive[chosen])
            target = r[chosen] - start * matrices.sum(2)
            matrices.diagonal(dim1=1, dim2=2).add_(ridge[chosen, None])
            scales[chosen] += solve_positive(matrices, target)
        return scales


@dataclass(frozen=True)
class Joint(_Compensation):
    """Free change of all kept weights, joint least squares (M8): W'_C = W_C + W_R S[R,C] (S[C,C] + λ m I)⁻¹.

    m is the mean diagonal of S[C,C]; moments are centred where the consumer is. The ridge pulls towards the
    uncompensated weights: λ → ∞ is plain slicing, and no λ is worse than slicing on its own rows. With fewer rows than
    kept features the system is solved among the rows, of size rows × rows.

    Attributes:
        ridge: λ ≥ 0, 0 for an exact solve. ``"auto"``: fit on the rows that were not held out, for each λ of the grid;
            take the one with the least error on the held-out rows, constant restored from the fit rows; then solve on
            all rows. 0.01 where nothing was held out.
        grid: The ridges that ``"auto"`` tries.
        reference: What the layers shall give. ``"current"``: what they give as the network stands, without the cut
            (M8). ``"dense"``: after all cuts every layer behind one is solved again, in forward order, towards what it
            gives in the dense network, residual stream included (M9), so that errors are repaired, not inherited.
            ``"auto"``: so where a layer's output is added to the stream as it is, ``"current"`` elsewhere.
        towards: What the ridge pulls the weights to: ``"weights"`` as they are, or ``"zero"``: plain least squares,
            which for one feature a component is the paper's M5 at λ → 0; only with reference ``"current"``.

    Raises:
        ConfigError: For a ridge that is neither ``"auto"`` nor at least 0, a grid without positive numbers, or another
            reference.
    """

    ridge: float | str = "auto"
    grid: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
    reference: str = "current"
    towards: str = "weights"
    needs_statistics: ClassVar[bool] = True

    def __post_init__(self):
        if self.ridge != "auto" and not (is_number(self.ridge) and math.isfinite(self.ridge) and self.ridge >= 0):
            raise ConfigError(
                f"compensation.ridge must be 'auto' or a number of at least 0, got '{self.ridge}': leave it at auto."
            )
        if not len(self.grid) or not all(math.isfinite(ridge) and ridge > 0 for ridge in self.grid):
            raise ConfigError(
                f"compensation.grid must hold at least one ridge, all above 0, got {list(self.grid)}: leave it out for "
                f"the default."
            )
        if self.reference not in ("current", "dense", "auto"):
            raise ConfigError(f"compensation.reference must be 'current', 'dense' or 'auto', got '{self.reference}'.")
        if self.towards not in ("weights", "zero"):
            raise ConfigError(f"compensation.towards must be 'weights' or 'zero', got '{self.towards}'.")
        if self.towards == "zero" and self.reference != "current":
            raise ConfigError("compensation.towards=zero is for compensation.reference=current; set one of them back.")

    @property
    def wants_held_out(self) -> bool:
        """Whether some of the rows should be set aside to choose the ridge on."""
        return self.ridge == "auto"

    def solve(self, consumer: Consumer, kept: Tensor) -> Solution:
        """The compensated weight on the kept features, and the ridge that was used.

        Args:
            consumer: The layer before the edit.
            kept: Kept components of its whole input, ``[kept]`` int64 sorted.

        Returns:
            Weight and ridge. Dead inputs and outputs keep their sliced weight.

        Raises:
            NumericsError: If a weight is not finite; or without a ridge, if there are fewer rows than kept features.
        """
        weight = kept_weight(consumer, kept)
        _refuse_few_rows(consumer.name, consumer.statistics.rows, weight.shape[1], self.ridge)
        parts = () if self.ridge != "auto" or consumer.held_out is None else (consumer.held_out,)
        every, *held_out = regressions(consumer, kept, *parts)
        change, ridge, _ = self.fit(every, *held_out, centred=consumer.centred, weight=weight, judge=False)
        return Solution(self.rebuilt(weight, every, change), ridge)

    def rebuilt(self, weight: Tensor, every: Regression, change: Tensor) -> Tensor:
        """The kept weight ``[outputs, kept features]`` with a change of `fit`, ``[outputs, n]``.

        With a ridge towards zero and fewer rows than features, nothing is left outside the rows' span.
        """
        if self.towards == "zero" and every.basis is not None:
            return every.widened(change + weight @ every.basis)
        return weight + every.widened(change)

    def fit(
        self,
        every: Regression,
        held_out: Regression | None = None,
        *,
        centred: bool,
        weight: Tensor | None = None,
        judge: bool = True,
    ) -> tuple[Tensor, float, float | None]:
        """The change of a weight that a regression asks for.

        Args:
            every: Over all rows, not centred.
            held_out: Over some of them: with ``"auto"`` they choose the ridge.
            centred: Whether a constant is free.
            weight: The kept weight, ``[outputs, kept features]``; needed with ``towards="zero"``.
            judge: Whether what the fit gains is needed, and not only the change.

        Returns:
            The change in the regression's coordinates, ``[outputs, n]`` float64; the ridge; and how much the fit
            without the held-out rows changes the squared error on them, output units², below 0 for better; None where
            nothing was held out, or nobody asked and it was not found on the way.
        """
        gained: float | None = None
        pull = -weight if self.towards == "zero" and weight is not None else None
        if not isinstance(self.ridge, str):
            ridge = float(self.ridge)
        elif held_out is None:
            ridge = _RIDGE_UNMEASURED
        else:
            ridge, gained = self._chosen(every, held_out, centred=centred, pull=pull, judge=judge)
        if centred:
            every = every.about(every.inputs, every.targets)
        return every.solve(ridge, pull), ridge, gained

    def _chosen(
        self, every: Regression, held_out: Regression, *, centred: bool, pull: Tensor | None, judge: bool
    ) -> tuple[float, float | None]:
        if not 0 < held_out.rows < every.rows:
            raise ValueError(f"held-out rows must be some of the {every.rows} rows, got {held_out.rows}.")
        fit = every.without(held_out)
        if centred:
            # The held-out rows are looked at about the fit rows' mean: a constant that does not carry over is an error.
            held_out, fit = held_out.about(fit.inputs, fit.targets), fit.about(fit.inputs, fit.targets)
        mixed = _mixed_outputs(len(fit.cross), fit.cross)
        if mixed is None:
            return downhill(self.grid, lambda ridge: held_out.loss(fit.solve(ridge, pull)))
        some, held, pulled = fit.mixed(mixed), held_out.mixed(mixed), None if pull is None else mixed @ pull
        ridge, _ = downhill(self.grid, lambda ridge: held.loss(some.solve(ridge, pulled)))
        return ridge, held_out.loss(fit.solve(ridge, pull)) if judge else None


def _mixed_outputs(outputs: int, like: Tensor) -> Tensor | None:
    """Seeded mixtures of many outputs, ``[mixtures, outputs]``, that keep sums of squares in expectation; else None."""
    if outputs <= _MOST_OUTPUTS:
        return None
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(_MOST_OUTPUTS, outputs, generator=generator, dtype=torch.float64) / _MOST_OUTPUTS**0.5).to(like)


def downhill(grid: Sequence[float], loss: Callable[[float], float]) -> tuple[float, float]:
    """The ridge of a grid at which a loss is lowest, and that loss: from 0.01 step by step to where neighbours are higher.

    Too small a ridge fits what does not carry over, too large a one too little, so the loss falls and rises once; three to
    five solves then say what ten would. Equal losses take the larger ridge, the smaller change.

    Args:
        grid: Ridges > 0.
        loss: Of a ridge.
    """
    ridges = sorted(set(grid), reverse=True)
    known: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in known:
            value = loss(ridges[place])
            known[place] = value if math.isfinite(value) else math.inf
        return known[place]

    here = min(range(len(ridges)), key=lambda place: abs(math.log(ridges[place] / _RIDGE_UNMEASURED)))
    while True:
        around = [place for place in (here - 1, here, here + 1) if 0 <= place < len(ridges)]
        best = min(around, key=lambda place: (at(place), place))
        if best == here:
            return ridges[here], known[here]
        here = best


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


def _refuse_few_rows(name: str, rows: int, features: int, ridge: float | str) -> None:
    if ridge == 0 and rows < features:
        raise NumericsError(
            f"{name}: an exact solve needs at least {features} calibration rows, got "
            f"{rows}. Raise data.num_samples or set compensation.ridge above 0."
        )


def _kept_features(consumer: Consumer, kept: Tensor) -> Tensor:
    return feature_index(kept.to(consumer.weight.device), consumer.weight.shape[1] // consumer.components)
