"""Refitting a linear layer to given outputs: against lstsq, and what it promises."""

import pytest
import torch

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics.refit import refit


def problem(rows=200, noise=0.0):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, 6, generator=generator, dtype=torch.float64) + 2
    true = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    targets = inputs @ true.T + torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    targets += noise * torch.randn(targets.shape, generator=generator, dtype=torch.float64)
    held_out = torch.arange(rows) % 5 == 4
    return inputs, targets, true, held_out


def test_an_exact_relation_is_found_whatever_the_present_weights():
    inputs, targets, true, held_out = problem()
    found = refit(inputs, targets, torch.zeros(3, 6), torch.zeros(3), held_out=held_out, grid=(1e-12,))
    assert torch.allclose(found.weight, true, atol=1e-8)
    assert torch.allclose(found.bias, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), atol=1e-7)
    assert found.error_after < 1e-12 < found.error_before


def test_it_equals_least_squares_with_an_intercept():
    inputs, targets, true, held_out = problem(noise=0.5)
    found = refit(inputs, targets, true, torch.zeros(3), held_out=held_out, grid=(1e-12,))
    design = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(design, targets).solution.T
    assert torch.allclose(found.weight, expected[:, :6], atol=1e-7)
    assert torch.allclose(found.bias, expected[:, 6], atol=1e-6)


def test_a_large_ridge_keeps_the_weights_and_only_puts_the_mean_right():
    inputs, targets, true, held_out = problem()
    found = refit(inputs, targets, true + 1, torch.zeros(3), held_out=held_out, grid=(1e12,))
    assert torch.allclose(found.weight, true + 1, atol=1e-6)
    assert torch.allclose((inputs @ found.weight.T + found.bias).mean(0), targets.mean(0), atol=1e-6)


def test_with_few_noisy_rows_the_held_out_rows_ask_for_a_larger_ridge():
    inputs, targets, true, held_out = problem(rows=10, noise=3.0)
    many = problem(rows=2000, noise=3.0)
    few = refit(inputs, targets, true, torch.zeros(3), held_out=held_out)
    plenty = refit(many[0], many[1], many[2] + 0.3, torch.zeros(3), held_out=many[3])
    assert few.ridge > plenty.ridge


def test_weights_that_nothing_improves_stay():
    inputs, targets, true, held_out = problem(rows=10)
    bias = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = refit(inputs, targets, true, bias, held_out=held_out)
    assert found.ridge is None or found.error_after < found.error_before
    assert torch.allclose(found.weight, true, atol=1e-6) and torch.allclose(found.bias, bias, atol=1e-6)


def test_too_few_rows_and_bad_numbers_are_refused():
    inputs, targets, true, _ = problem(rows=4)
    with pytest.raises(NumericsError, match="a refit needs at least 5 calibration images, got 4"):
        refit(inputs, targets, true, torch.zeros(3), held_out=torch.zeros(4, dtype=torch.bool))
    inputs[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="classifier: its inputs and the dense logits must be finite"):
        refit(inputs, targets, true, torch.zeros(3), held_out=torch.arange(4) == 3)
