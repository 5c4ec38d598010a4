"""Compensation laws: least squares on explicit contributions, never worse than slicing, duplicates, dead outputs."""

import pytest
import torch

from modhifi_cli.errors import ConfigError, NumericsError
from modhifi_cli.numerics import compensation as module
from modhifi_cli.numerics import contributions, linalg
from modhifi_cli.numerics.compensation import NoCompensation, PerKernel, restored_constant
from modhifi_cli.numerics.fidelity import layer_fidelity
from modhifi_cli.numerics.linalg import feature_index
from tests import reference
from tests.numerics import helpers

KEPT = torch.tensor([0, 2, 3, 5])


@pytest.mark.parametrize("towards", ["weights", "zero"])
@pytest.mark.parametrize("ridge", [1e-4, 0.3])
@pytest.mark.parametrize("per", [1, 3])
@pytest.mark.parametrize("rows", [80, 5], ids=["second_moment", "samples"])
@pytest.mark.parametrize("iterative", [False, True], ids=["direct", "iterative"])
def test_scales_are_ridge_least_squares_on_explicit_contributions(monkeypatch, towards, ridge, per, rows, iterative):
    if iterative:
        monkeypatch.setattr(module, "_ITERATIVE_FROM", 1)
    consumer, data = helpers.make(per=per, rows=rows)
    weight = PerKernel(ridge=ridge, towards=towards)(consumer, KEPT)
    features = feature_index(KEPT, per)
    parts = reference.contributions(data, consumer.weight, 6, centred=True)
    anchor = 1.0 if towards == "weights" else 0.0
    for output in range(4):
        scales = reference.compensated_scales(parts[output], KEPT.tolist(), ridge=ridge, towards=anchor)
        expected = consumer.weight[output, features] * scales.repeat_interleave(per)
        torch.testing.assert_close(weight[output], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("iterative", [False, True], ids=["direct", "iterative"])
@pytest.mark.parametrize("rows", [80, 5], ids=["second_moment", "samples"])
@pytest.mark.parametrize("ridge", [1e-8, 1e-4, 1e-2, 1.0, 100.0])
def test_compensation_towards_the_weights_is_never_worse_than_slicing(monkeypatch, ridge, rows, iterative):
    if iterative:
        monkeypatch.setattr(module, "_ITERATIVE_FROM", 1)
    for seed in range(3):
        consumer, _ = helpers.make(rows=rows, seed=seed)
        compensated = PerKernel(ridge=ridge)(consumer, KEPT)
        assert layer_fidelity(consumer, KEPT, compensated) >= layer_fidelity(consumer, KEPT) - 1e-9


def test_exact_compensation_reaches_the_subset_fidelity_of_every_output():
    consumer, data = helpers.make(per=2)
    weight = PerKernel(ridge=0)(consumer, KEPT)
    parts = reference.contributions(data, consumer.weight, 6, centred=True)
    for output in range(4):
        fitted = reference.contributions(data[:, feature_index(KEPT, 2)], weight[output : output + 1], 4, centred=True)
        target = parts[output].sum(1)
        fidelity = 1 - (target - fitted[0].sum(1)).square().mean() / target.square().mean()
        assert float(fidelity) == pytest.approx(reference.fidelity_of(parts[output], KEPT.tolist()), abs=1e-5)


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_duplicate_channels_do_not_break_the_solve(ridge):
    data = torch.randn(60, 5, generator=torch.Generator().manual_seed(3))
    data = torch.cat([data, data[:, :1], data[:, 1:2]], 1)  # components 5 and 6 repeat 0 and 1
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    consumer = helpers.of(data, weight, 7)
    kept = torch.tensor([0, 2, 3, 4, 5, 6])
    compensated = PerKernel(ridge=ridge)(consumer, kept)
    assert torch.isfinite(compensated).all()
    # Component 1 is gone but its twin is left, so nothing is lost but what the ridge holds back.
    assert layer_fidelity(consumer, kept, compensated) == pytest.approx(1, abs=1e-5 + 10 * ridge)


def test_keeping_everything_returns_the_weight():
    for per in (1, 3):
        consumer, _ = helpers.make(per=per)
        torch.testing.assert_close(PerKernel()(consumer, torch.arange(6)), consumer.weight, rtol=1e-9, atol=1e-9)


def test_one_output_chunk_or_many_is_the_same(monkeypatch):
    consumer, _ = helpers.make(outputs=5, per=3)
    whole = PerKernel()(consumer, KEPT)
    monkeypatch.setattr(contributions, "_CHUNK_BYTES", 8 * 16 * 2)
    torch.testing.assert_close(PerKernel()(consumer, KEPT), whole)


def test_iterative_outputs_that_do_not_converge_are_solved_directly(monkeypatch):
    consumer, _ = helpers.make()
    direct = PerKernel()(consumer, KEPT)
    monkeypatch.setattr(module, "_ITERATIVE_FROM", 1)
    monkeypatch.setattr(linalg, "_ITERATIONS", 1)
    monkeypatch.setattr(linalg, "_PRECONDITIONER_RANK", 1)
    torch.testing.assert_close(PerKernel()(consumer, KEPT), direct)


@pytest.mark.parametrize("iterative", [False, True], ids=["direct", "iterative"])
def test_dead_outputs_and_outputs_without_kept_weights_keep_their_sliced_weight(monkeypatch, iterative):
    if iterative:
        monkeypatch.setattr(module, "_ITERATIVE_FROM", 1)
    consumer, data = helpers.make()
    weight = consumer.weight.clone()
    weight[1] = 0
    weight[2, KEPT] = 0
    consumer = helpers.of(data, weight, 6)
    compensated = PerKernel()(consumer, KEPT)
    assert compensated[1].eq(0).all() and compensated[2].eq(0).all()
    assert compensated[0].ne(weight[0, KEPT]).all()


@pytest.mark.parametrize("per", [1, 3])
def test_no_compensation_is_slicing(per):
    consumer, _ = helpers.make(per=per)
    expected = consumer.weight.view(4, 6, per)[:, KEPT].flatten(1)
    assert torch.equal(NoCompensation()(consumer, KEPT), expected)


@pytest.mark.parametrize("rows", [80, 5], ids=["second_moment", "samples"])
def test_the_restored_constant_makes_the_mean_output_equal(rows):
    consumer, data = helpers.make(per=2, rows=rows)
    weight = PerKernel()(consumer, KEPT)
    before = (data @ consumer.weight.T).mean(0)
    after = (data[:, feature_index(KEPT, 2)] @ weight.T).mean(0)
    torch.testing.assert_close(after + restored_constant(consumer, KEPT, weight), before, rtol=1e-5, atol=1e-5)


def test_too_few_rows_for_an_exact_solve_says_how_many_are_needed():
    consumer, _ = helpers.make(per=3, rows=5, name="layer4.1.conv2")
    message = (
        r"layer4\.1\.conv2: an exact solve needs at least 12 calibration rows, got 5\. "
        r"Raise data\.num_samples or set compensation\.ridge above 0\."
    )
    with pytest.raises(NumericsError, match=message):
        PerKernel(ridge=0)(consumer, KEPT)


@pytest.mark.parametrize("ridge", [-1.0, float("nan")])
def test_a_bad_ridge_is_refused(ridge):
    with pytest.raises(ConfigError, match=r"compensation\.ridge must be a number of at least 0, got"):
        PerKernel(ridge=ridge)


def test_a_bad_direction_is_refused():
    with pytest.raises(ConfigError, match=r"compensation\.towards must be 'weights' or 'zero', got 'one'"):
        PerKernel(towards="one")


def test_a_dead_layer_is_an_error_that_names_it():
    consumer = helpers.of(torch.randn(9, 3), torch.zeros(2, 3), 3, name="fc1")
    with pytest.raises(NumericsError, match=r"fc1: at least one output must have energy"):
        PerKernel()(consumer, torch.tensor([0, 1]))
