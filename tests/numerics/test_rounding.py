"""Rounding weights: the error of every one, and what is refused."""

import pytest
import torch

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics.rounding import rounded


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_weight_moves_by_half_a_step_at_most_and_takes_one_of_few_values(bits):
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    found = rounded(weight, bits)
    levels = 2 ** (bits - 1) - 1
    for ours, of in zip(found, weight, strict=True):
        step = float(of.abs().max()) / levels
        assert float((ours - of).abs().max()) <= step / 2 + 1e-6
        assert float((ours / step - (ours / step).round()).abs().max()) < 1e-4 and len(ours.unique()) <= 2 * levels + 1
        assert float(ours.abs().max()) == pytest.approx(float(of.abs().max()))


def test_a_channel_of_zeros_stays():
    assert torch.equal(rounded(torch.zeros(2, 4), 4), torch.zeros(2, 4))


def test_too_few_bits_and_weights_that_are_not_finite_are_refused():
    with pytest.raises(NumericsError, match="at least 2 bits"):
        rounded(torch.ones(1, 2), 1)
    with pytest.raises(NumericsError, match="must be finite to be rounded"):
        rounded(torch.tensor([[torch.nan, 1.0]]), 8)
