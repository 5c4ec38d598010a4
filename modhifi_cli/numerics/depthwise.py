"""Moments and least squares of depthwise convolutions: every channel is a layer of its own with k·k features.

A channel's output is one filter over its own map, so that what is solved is a small system for each channel, all at
once: ``[channels, taps, taps]``. The ridge pulls to the present filters and is chosen on held-out images, one for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics.linalg import at_least_float32, exact_products
from modhifi_cli.numerics.rows import padded_apart

_VALUES_AT_ONCE = 2**24  # patch values that are unfolded at once: 64 MiB


@dataclass(frozen=True)
class FilterStatistics:
    """Means over rows (images × positions) of every channel's patch x and of the output t that is wanted there.

    Attributes:
        rows: Rows of a channel that were summed.
        gram: E[x xᵀ], ``[channels, taps, taps]`` float64.
        cross: E[t x], ``[channels, taps]`` float64.
        inputs: E[x], ``[channels, taps]`` float64.
        targets: E[t], ``[channels]`` float64.
        energy: E[t²], ``[channels]`` float64.
    """

    rows: int
    gram: Tensor
    cross: Tensor
    inputs: Tensor
    targets: Tensor
    energy: Tensor

    def merged(self, other: "FilterStatistics") -> "FilterStatistics":
        """Over the rows of both, which must be different ones."""
        rows = self.rows + other.rows
        mean = {name: (self.rows * getattr(self, name) + other.rows * getattr(other, name)) / rows for name in _MEANS}
        return FilterStatistics(rows, **mean)

    def about(self, inputs: Tensor, targets: Tensor) -> "FilterStatistics":
        """The same with the given x and t taken off every row.

        Args:
            inputs: ``[channels, taps]``.
            targets: ``[channels]``.
        """
        moved, drift = self.inputs - inputs, self.targets - targets
        gram = self.gram - inputs[:, :, None] * self.inputs[:, None] - moved[:, :, None] * inputs[:, None]
        cross = self.cross - targets[:, None] * self.inputs - drift[:, None] * inputs
        energy = self.energy - 2 * targets * self.targets + targets.square()
        return replace(self, gram=gram, cross=cross, inputs=moved, targets=drift, energy=energy)

    def solve(self, weight: Tensor, ridge: float) -> Tensor:
        """Filters that bring w · x nearest to t, with a ridge towards the present ones.

        Args:
            weight: Present w, ``[channels, taps]`` float64.
            ridge: λ > 0, times the mean energy of a tap of the channel.
        """
        taps = weight.shape[1]
        energy = self.gram.diagonal(dim1=1, dim2=2).mean(1)
        # A channel that is always 0 asks for nothing and stays as it is.
        strength = ridge * energy + torch.finfo(energy.dtype).tiny
        matrix = self.gram + strength[:, None, None] * torch.eye(taps, dtype=weight.dtype, device=weight.device)
        lacking = self.cross - torch.einsum("ct,cts->cs", weight, self.gram)
        change = torch.linalg.solve_ex(matrix, lacking)[0]
        return weight + torch.where(torch.isfinite(change) & (energy > 0)[:, None], change, 0.0)

    def errors(self, weight: Tensor) -> Tensor:
        """E[(t − w · x)²] of every channel, ``[channels]`` float64, at least 0."""
        rebuilt = torch.einsum("ct,cts,cs->c", weight, self.gram, weight)
        return (self.energy - 2 * (self.cross * weight).sum(1) + rebuilt).clamp(min=0)


_MEANS = ("gram", "cross", "inputs", "targets", "energy")


class FilterMoments:
    """Sums over batches: float32 products of a part of a batch, float64 sums.

    Args:
        layer: A depthwise `nn.Conv2d` that pads with zeros: only its geometry is used.
        name: For messages.
    """

    def __init__(self, layer: nn.Conv2d, *, name: str = "layer") -> None:
        self._layer, self._name = layer, name
        self._rows = 0
        self._sums: dict[str, Tensor] = {}

    @exact_products
    def update(self, inputs: Tensor, targets: Tensor) -> None:
        """Add one batch.

        Args:
            inputs: ``[batch, channels, height, width]``.
            targets: Wanted outputs, of the shape of the layer's output.

        Raises:
            NumericsError: If a value is not finite.
        """
        layer = self._layer
        inputs, targets = at_least_float32(inputs), at_least_float32(targets)
        taps = layer.kernel_size[0] * layer.kernel_size[1]
        inputs, padding = padded_apart(layer, inputs)
        for maps, wanted in zip(*(x.split(self._images_at_once(targets, taps)) for x in (inputs, targets)), strict=True):
            patches = functional.unfold(maps, layer.kernel_size, layer.dilation, padding, layer.stride)
            rows = patches.view(len(maps), maps.shape[1], taps, -1).permute(1, 2, 0, 3).flatten(2)
            aims = wanted.transpose(0, 1).flatten(1)
            self._add("gram", rows @ rows.transpose(1, 2))
            self._add("cross", (rows @ aims[:, :, None])[:, :, 0])
            self._add("inputs", rows.sum(2, dtype=torch.float64))
            self._add("targets", aims.sum(1, dtype=torch.float64))
            self._add("energy", aims.square().sum(1, dtype=torch.float64))
            self._rows += rows.shape[2]
        if self._sums and not all(bool(torch.isfinite(self._sums[key]).all()) for key in ("inputs", "targets")):
            raise NumericsError(
                f"{self._name}: activations on the calibration data are not finite; check weights and images."
            )

    def result(self) -> FilterStatistics:
        """Means over everything so far.

        Raises:
            NumericsError: If there was no row.
        """
        if not self._rows:
            raise NumericsError(f"{self._name}: no row was seen; the calibration data is empty.")
        return FilterStatistics(self._rows, **{name: self._sums[name] / self._rows for name in _MEANS})

    @staticmethod
    def _images_at_once(targets: Tensor, taps: int) -> int:
        return max(1, _VALUES_AT_ONCE // max(taps * targets[:1].numel(), 1))

    def _add(self, name: str, values: Tensor) -> None:
        values = values.double()
        self._sums[name] = values if name not in self._sums else self._sums[name].add_(values)


def fitted_filters(
    every: FilterStatistics,
    held_out: FilterStatistics | None,
    fit: FilterStatistics,
    weight: Tensor,
    grid: Sequence[float],
    *,
    centred: bool,
) -> tuple[Tensor, float | None]:
    """Filters for the wanted outputs, with the ridge of the grid that is best on held-out rows.

    Args:
        every: Over all rows.
        held_out: Over some of them; None leaves the filters alone.
        fit: Over the others.
        weight: Present filters, ``[channels, taps]`` float64.
        grid: Ridges to try, all above 0.
        centred: Whether a constant is free.

    Returns:
        ``[channels, taps]`` float64 and the ridge; the present filters and None where no ridge does better on
        held-out rows.
    """
    if held_out is None:
        return weight, None
    if centred:
        held_out, fit = held_out.about(fit.inputs, fit.targets), fit.about(fit.inputs, fit.targets)
        every = every.about(every.inputs, every.targets)
    before = float(held_out.errors(weight).sum())
    losses = {ridge: float(held_out.errors(fit.solve(weight, ridge)).sum()) for ridge in sorted(grid, reverse=True)}
    ridge = min(losses, key=losses.__getitem__)
    return (weight, None) if losses[ridge] >= before else (every.solve(weight, ridge), ridge)
