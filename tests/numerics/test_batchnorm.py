"""BatchNorm statistics: exact over all rows, whatever the batches, also far from zero; and in closed form."""

import pytest
import torch

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics.batchnorm import BatchNormMoments, input_scale, output_moments
from tests.numerics import helpers


@pytest.mark.parametrize("shape", [(10, 3, 5, 4), (10, 3), (10, 3, 7)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_moments_are_those_of_all_rows_for_any_batch_split(shape, offset):
    maps = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) + offset
    rows = maps.double().transpose(0, 1).flatten(1)
    for split in (10, 3, 1):
        moments = BatchNormMoments(3)
        for part in maps.split(split):
            moments.update(part)
        result = moments.result()
        assert result.rows == rows.shape[1]
        torch.testing.assert_close(result.mean, rows.mean(1), rtol=1e-12, atol=1e-12)
        # (offset / deviation)² × 1e-16 is what plain float64 sums may lose.
        torch.testing.assert_close(result.variance, rows.var(1, correction=0), rtol=1e-9, atol=0)
        torch.testing.assert_close(result.unbiased, rows.var(1), rtol=1e-9, atol=0)


def test_input_scale_undoes_the_batchnorm_but_for_channels_it_all_but_silences():
    norm = torch.nn.BatchNorm1d(4).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.05, 0.5]))
        norm.running_var.copy_(torch.tensor([4.0, 1.0, 9.0, 0.25]))
    scale, usable = input_scale(norm.running_var, norm.eps, norm.weight.detach())
    assert usable.tolist() == [True, True, False, True]
    moved = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) * usable
    torch.testing.assert_close(norm(moved * scale) - norm(torch.zeros(1, 4)), moved)
    plain, every = input_scale(norm.running_var, norm.eps, None)
    assert every.all() and torch.equal(plain, (norm.running_var + norm.eps).sqrt())


@pytest.mark.parametrize("rows", [80, 5], ids=["second_moment", "samples"])
def test_output_moments_are_those_of_the_explicit_output(rows):
    consumer, data = helpers.make(rows=rows)
    bias = torch.arange(4.0)
    output = data @ consumer.weight.T
    result = output_moments(consumer.statistics, consumer.weight, bias)
    torch.testing.assert_close(result.mean, output.mean(0) + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.variance, output.var(0, correction=0), rtol=1e-5, atol=1e-5)


def test_a_constant_channel_has_no_variance_and_one_row_neither():
    moments = BatchNormMoments(2)
    moments.update(torch.full((1, 2), 0.1))
    result = moments.result()
    assert result.variance.abs().max() < 1e-15 and result.unbiased.abs().max() < 1e-15


def test_values_that_are_not_finite_name_the_layer():
    moments = BatchNormMoments(2, name="layer1.0.bn1")
    with pytest.raises(NumericsError, match=r"layer1\.0\.bn1: every input value must be finite, got NaN or infinity"):
        moments.update(torch.tensor([[1.0, float("inf")]]))


def test_no_rows_is_an_error_that_names_the_layer():
    with pytest.raises(NumericsError, match=r"bn: moments need at least one calibration row, got none"):
        BatchNormMoments(2, name="bn").result()
