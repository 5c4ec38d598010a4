"""Statistics for BatchNorm: exact over all rows however they are batched, or in closed form behind an edited layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi_cli.numerics.moments import no_rows, refuse_not_finite
from modhifi_cli.records import Statistics

# Values that are converted to float64 at once: 2 MiB, so that they are squared while they are still in the cache.
_VALUES_AT_ONCE = 2**18
_LEAST_SCALE = 0.1  # of the mean |γ|: channels scaled by less pass on next to nothing


@dataclass(frozen=True)
class ChannelMoments:
    """Mean and variance of each channel.

    Attributes:
        rows: Values per channel (images × positions).
        mean: ``[channels]`` float64.
        variance: Biased (over rows), ``[channels]`` float64: what BatchNorm divides by.
    """

    rows: int
    mean: Tensor
    variance: Tensor

    @property
    def unbiased(self) -> Tensor:
        """Variance over rows − 1, ``[channels]`` float64: what PyTorch stores in running_var. One row gives zero."""
        return self.variance * (self.rows / max(self.rows - 1, 1))


def input_scale(variance: Tensor, eps: float, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """What one unit behind a BatchNorm is worth in front of it, σ_c / γ_c (method.md M9).

    Args:
        variance: Its running variance, ``[channels]``, input units².
        eps: What it adds to the variance.
        gamma: Its scale γ, ``[channels]``, or None where it has none.

    Returns:
        The scale, ``[channels]``, 0 where γ is so small that inputs would have to be huge to make up for anything; and
        whether it is not, ``[channels]`` bool.
    """
    deviation = (variance + eps).sqrt()
    if gamma is None:
        return deviation, torch.ones_like(deviation, dtype=torch.bool)
    usable = gamma.abs() > _LEAST_SCALE * gamma.abs().mean()
    return torch.where(usable, deviation / torch.where(usable, gamma, 1.0), 0.0), usable


class BatchNormMoments:
    """Exact streaming mean and variance of a BatchNorm's input; the batch split does not matter.

    Args:
        channels: Of the BatchNorm.
        name: Layer name, for messages.
    """

    def __init__(self, channels: int, *, name: str = "batchnorm"):
        self._channels = channels
        self._name = name
        self._rows = 0
        self._sum: Tensor | None = None
        self._squares: Tensor | None = None

    def update(self, maps: Tensor) -> None:
        """Add inputs ``[batch, channels, ...]``, any floating type.

        Raises:
            NumericsError: If a value is not finite.
        """
        if maps.ndim < 2 or maps.shape[1] != self._channels:
            raise ValueError(f"{self._name}: inputs of {self._channels} channels expected, got {tuple(maps.shape)}.")
        maps = maps.detach().reshape(len(maps), self._channels, -1)
        if self._sum is None or self._squares is None:
            self._sum = maps.new_zeros(self._channels, dtype=torch.float64)
            self._squares = torch.zeros_like(self._sum)
        for part in maps.split(max(1, _VALUES_AT_ONCE // max(maps[0].numel(), 1))) if len(maps) else ():
            # Plain sums: float64 loses (mean/deviation)² × 1e-16 of the variance, nothing for float32 activations.
            part = part.double()
            self._sum += part.sum((0, 2))
            self._squares += part.square_().sum((0, 2))
        refuse_not_finite(self._sum, self._name)
        self._rows += maps.shape[0] * maps.shape[2]

    def result(self) -> ChannelMoments:
        """Moments of everything so far.

        Raises:
            NumericsError: If there was nothing.
        """
        if self._sum is None or self._squares is None or not self._rows:
            raise no_rows(self._name)
        mean = self._sum / self._rows
        return ChannelMoments(self._rows, mean, (self._squares / self._rows - mean.square()).clamp_min(0))


def output_moments(statistics: Statistics, weight: Tensor, bias: Tensor | None = None) -> ChannelMoments:
    """Moments of a layer's output in closed form, for a BatchNorm right behind an edited layer: W μ and diag(W Σ Wᵀ).

    Args:
        statistics: Of the layer's input, in the features of `weight`.
        weight: ``[outputs, features]``.
        bias: ``[outputs]`` or None.

    Returns:
        Moments over the statistics' rows. For a subsample of positions they are estimates.
    """
    weight = weight.to(statistics.mean)
    mean = weight @ statistics.mean
    if statistics.samples is None:
        variance = ((weight @ statistics.summed) * weight).sum(1) - mean.square()
    else:
        outputs = (statistics.samples.double() - statistics.mean) @ weight.T
        variance = outputs.square().mean(0)
    return ChannelMoments(statistics.rows, mean if bias is None else mean + bias.to(mean), variance.clamp_min(0))
