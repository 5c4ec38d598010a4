"""Rounding weights to few bits and back, as weight quantisation does it: per output channel, symmetric, to nearest."""

import torch
from torch import Tensor

from modhifi_cli.errors import NumericsError


def rounded(weight: Tensor, bits: int) -> Tensor:
    """The weight after a round trip through integers of so many bits.

    Every output channel has the scale max|w| / (2^(bits−1) − 1), so its largest weight stays and the error of each is at
    most half a step.

    Args:
        weight: ``[outputs, …]``.
        bits: From 2.

    Returns:
        The same shape and dtype.

    Raises:
        NumericsError: If there are fewer than two bits, or a weight is not finite.
    """
    if bits < 2:
        raise NumericsError(f"a weight needs at least 2 bits to be rounded to, got {bits}.")
    if not bool(torch.isfinite(weight).all()):
        raise NumericsError("weights must be finite to be rounded; use another weights file.")
    flat = weight.double().flatten(1)
    scale = flat.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    steps = (flat / torch.where(scale > 0, scale, torch.ones_like(scale))).round()
    return (steps * scale).view_as(weight).to(weight.dtype)
