"""Cross moments of a layer's input rows with the outputs wanted there, and the regression on a dense target (M9).

The second moment S of the inputs is gathered as for every layer. What a target adds is E[t xᵀ] alone: the sum that a
convolution's weight gradient is, with t in place of the gradient. Outputs and inputs whose mean lies far above their
spread are summed around the mean of the first batch, as S is; what was taken off is put back in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics.linalg import at_least_float32, exact_products, quick_layout
from modhifi_cli.numerics.moments import far_mean, second_moment
from modhifi_cli.numerics.regression import Regression
from modhifi_cli.numerics.rows import padded_apart
from modhifi_cli.records import Statistics


@dataclass(frozen=True)
class CrossStatistics:
    """Means over rows of wanted outputs t against input rows x.

    Attributes:
        rows: Rows that were summed.
        cross: E[t xᵀ], ``[outputs, features]`` float64, features as in the layer's flattened weight.
        mean: E[t], ``[outputs]`` float64.
        energy: E[t²], ``[outputs]`` float64.
    """

    rows: int
    cross: Tensor
    mean: Tensor
    energy: Tensor


class CrossMoments:
    """Sums of t xᵀ over batches: float32 products of one batch, float64 sums.

    Args:
        layer: `nn.Conv2d` without groups, or a linear layer of either orientation: only its geometry is used.
        name: For messages.
    """

    def __init__(self, layer: nn.Module, *, name: str = "layer") -> None:
        self._layer = layer
        self._name = name
        self._rows = 0
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None  # of t xᵀ, t and t², with what is taken off gone
        # Float32, taken off every output and every input, which then have a constant one beside them; None: nothing is.
        self._off: tuple[Tensor, Tensor] | None = None

    @exact_products
    def update(self, inputs: Tensor, targets: Tensor) -> None:
        """Add one batch.

        Args:
            inputs: ``[batch, channels, height, width]``, or ``[batch, …, features]`` for a linear layer.
            targets: Wanted outputs at the same rows, of the shape of the layer's output.

        Raises:
            NumericsError: If a target is not finite.
        """
        if len(inputs) == 0:
            return
        inputs, targets = at_least_float32(inputs), at_least_float32(targets)
        conv = self._layer if isinstance(self._layer, nn.Conv2d) else None
        if conv is None:
            inputs, targets = inputs.flatten(0, -2), targets.flatten(0, -2)
        if self._sums is None:
            far = far_mean(targets), far_mean(inputs)
            self._off = far if any(bool(off.any()) for off in far) else None
        if self._off is not None:
            targets, inputs = _beside_ones(targets, self._off[0]), _beside_ones(inputs, self._off[1])
        cross = targets.T @ inputs if conv is None else _conv_cross(conv, inputs, targets)
        rows, mean, energy = _sums(targets[:, : len(self._off[0])] if self._off is not None else targets)
        if not bool(torch.isfinite(mean).all()):
            raise NumericsError(
                f"{self._name}: the dense network's outputs on the calibration data are not finite; check weights and "
                "images."
            )
        self._rows += rows
        if self._sums is None:
            self._sums = cross.double(), mean, energy
        else:
            for total, part in zip(self._sums, (cross, mean, energy), strict=True):
                total.add_(part)

    def result(self) -> CrossStatistics:
        """Means over everything so far.

        Raises:
            NumericsError: If there was no row.
        """
        if self._sums is None or not self._rows:
            raise NumericsError(f"{self._name}: no row was seen; the calibration data is empty.")
        cross, mean, energy = self._sums
        if self._off is not None:
            cross, mean, energy = _moved_back(cross, mean, energy, self._rows, self._off)
        return CrossStatistics(self._rows, cross / self._rows, mean / self._rows, energy / self._rows)


def _sums(targets: Tensor) -> tuple[int, Tensor, Tensor]:
    """Rows of ``[rows, channels]`` or ``[batch, channels, …]``, and by channel the sums of t and t², float64.

    Each map is summed in float32 where it lies, as products are: to bring pixels into rows first, or to float64, takes ten
    times as long as the convolution that made them.
    """
    if targets.dim() == 2:
        return len(targets), targets.sum(0, dtype=torch.float64), targets.square().sum(0, dtype=torch.float64)
    maps = targets.flatten(2)
    energy = torch.linalg.vector_norm(maps, dim=2).double().square().sum(0)
    return len(maps) * maps.shape[2], maps.sum(2).double().sum(0), energy


def _beside_ones(each: Tensor, off: Tensor) -> Tensor:
    """Less what is off, with a constant one as the last channel."""
    beyond = (1,) * (each.dim() - 2)
    return torch.cat([each - off.view(-1, *beyond), each.new_ones(len(each), 1, *each.shape[2:])], 1)


def _moved_back(
    cross: Tensor, mean: Tensor, energy: Tensor, rows: int, off: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of t xᵀ, of t and of t², as they would be if nothing had been taken off."""
    aims, seen = off[0].double(), off[1].double()
    # With t = t' + a, x = x' + m u (u is 1 inside the image): t'x' and t'u, x' and u each stand in this one sum.
    every = cross.view(len(aims) + 1, len(seen) + 1, -1)
    with_inputs = every[:, :-1] + seen[None, :, None] * every[:, -1:]
    whole = with_inputs[:-1] + aims[:, None, None] * with_inputs[-1:]
    return whole.flatten(1), mean + rows * aims, energy + 2 * aims * mean + rows * aims.square()


def _conv_cross(conv: nn.Conv2d, inputs: Tensor, targets: Tensor) -> Tensor:
    """t xᵀ summed over one batch, ``[outputs, features]``."""
    inputs, padding = padded_apart(conv, inputs)
    shape = (targets.shape[1], inputs.shape[1], *conv.kernel_size)
    inputs, targets = quick_layout(inputs), quick_layout(targets)
    return conv2d_weight(inputs, shape, targets, conv.stride, padding, conv.dilation).flatten(1)


def merge_cross(one: CrossStatistics, other: CrossStatistics) -> CrossStatistics:
    """The moments of both sets of rows together; the rows must be different ones."""
    rows = one.rows + other.rows

    def mean(of: str) -> Tensor:
        return (one.rows * getattr(one, of) + other.rows * getattr(other, of)) / rows

    return CrossStatistics(rows, mean("cross"), mean("mean"), mean("energy"))


def dense_regression(statistics: Statistics, aims: CrossStatistics, weight: Tensor) -> Regression:
    """Normal equations of a change Δ of the weight that brings W x nearest to the wanted outputs (M9).

    Args:
        statistics: Moments of the layer's present inputs x over the same rows.
        aims: Their cross moments with the wanted outputs t.
        weight: Present W, ``[outputs, features]`` float64.

    Returns:
        The regression of t − W x on x, not centred. With t = W x it asks for no change.

    Raises:
        ValueError: If the two were gathered over different rows.
    """
    if statistics.rows != aims.rows:
        raise ValueError(f"moments of {statistics.rows} rows and targets of {aims.rows} do not belong together.")
    gram = second_moment(statistics, centred=False)
    return Regression(
        rows=statistics.rows,
        gram=gram,
        cross=aims.cross - weight @ gram,
        inputs=statistics.mean,
        targets=aims.mean - weight @ statistics.mean,
        features=weight.shape[1],
    )


def squared_error(statistics: Statistics, aims: CrossStatistics, weight: Tensor, *, centred: bool) -> Tensor:
    """E|t − W x|² over the rows, summed over outputs; about both means where a constant is free.

    Args:
        statistics: Moments of the inputs x.
        aims: Their cross moments with the wanted outputs t, over the same rows.
        weight: W, ``[outputs, features]`` float64.
        centred: Whether the best constant is added.

    Returns:
        A float64 scalar, output units², at least 0.
    """
    gram = second_moment(statistics, centred=False)
    total = aims.energy.sum() + ((weight @ gram - 2 * aims.cross) * weight).sum()
    if centred:
        total = total - (aims.mean - weight @ statistics.mean).square().sum()
    return total.clamp(min=0)
