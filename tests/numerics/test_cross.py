"""Cross moments with wanted outputs, against rows that are written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics.cross import CrossMoments, dense_regression, merge_cross, squared_error
from modhifi_cli.numerics.moments import ConvMoments, RowMoments
from modhifi_cli.numerics.rows import Window

CONVS = {
    "same": dict(kernel_size=3, padding=1),
    "pointwise, strided": dict(kernel_size=1, stride=2),
    "strided": dict(kernel_size=3, stride=2, padding=1),
    "dilated, no padding": dict(kernel_size=3, dilation=2),
    "oblong": dict(kernel_size=(3, 1), padding=(1, 0)),
    "padding by name": dict(kernel_size=3, padding="same"),
}


def conv_case(settings, images=6):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 5, bias=False, **settings)
    maps = torch.randn(images, 4, 9, 8)
    targets = torch.randn_like(conv(maps))
    padded = functional.pad(maps, conv._reversed_padding_repeated_twice)
    rows = functional.unfold(padded, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
    return conv, maps, targets, rows.movedim(1, -1).flatten(0, 1).double(), targets.movedim(1, -1).flatten(0, 2).double()


@pytest.mark.parametrize("settings", CONVS.values(), ids=CONVS.keys())
def test_the_cross_moments_of_a_conv_are_those_of_its_rows(settings):
    conv, maps, targets, rows, wanted = conv_case(settings)
    moments = CrossMoments(conv)
    for part in (slice(0, 4), slice(4, 4), slice(4, 6)):
        moments.update(maps[part], targets[part])
    found = moments.result()
    assert found.rows == len(rows)
    torch.testing.assert_close(found.cross, wanted.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mean, wanted.mean(0))
    torch.testing.assert_close(found.energy, wanted.square().mean(0), rtol=1e-6, atol=1e-6)


def test_a_linear_layer_takes_tokens():
    torch.manual_seed(0)
    inputs, targets = torch.randn(3, 7, 4), torch.randn(3, 7, 2)
    moments = CrossMoments(nn.Linear(4, 2))
    moments.update(inputs, targets)
    expected = targets.flatten(0, 1).T @ inputs.flatten(0, 1) / 21
    torch.testing.assert_close(moments.result().cross, expected.double(), rtol=1e-5, atol=1e-6)


def test_merged_parts_are_the_whole():
    conv, maps, targets, _, _ = conv_case(CONVS["same"])
    whole, one, other = CrossMoments(conv), CrossMoments(conv), CrossMoments(conv)
    whole.update(maps, targets)
    one.update(maps[:2], targets[:2])
    other.update(maps[2:], targets[2:])
    merged, expected = merge_cross(one.result(), other.result()), whole.result()
    assert merged.rows == expected.rows
    for name in ("cross", "mean", "energy"):
        torch.testing.assert_close(getattr(merged, name), getattr(expected, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("centred", [True, False])
def test_the_dense_regression_is_least_squares_on_the_rows(centred):
    conv, maps, targets, rows, wanted = conv_case(CONVS["same"])
    inputs, aims = ConvMoments(4, Window.of(3, padding=1)), CrossMoments(conv)
    inputs.update(maps)
    aims.update(maps, targets)
    statistics, aim = inputs.result(), aims.result()
    weight = conv.weight.detach().flatten(1).double()
    regression = dense_regression(statistics, aim, weight)
    if centred:
        regression = regression.about(regression.inputs, regression.targets)
        rows, wanted = rows - rows.mean(0), wanted - wanted.mean(0)
    best = weight + regression.solve(0.0)
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(best, expected, rtol=1e-3, atol=1e-4)
    for some in (weight, best):
        error = (wanted - rows @ some.T).square().sum(1).mean()
        torch.testing.assert_close(squared_error(statistics, aim, some, centred=centred), error, rtol=1e-4, atol=1e-5)


def test_what_a_layer_gives_already_asks_for_no_change():
    conv, maps, _, _, _ = conv_case(CONVS["strided"])
    inputs, aims = ConvMoments(4, Window.of(3, 2, 1)), CrossMoments(conv)
    inputs.update(maps)
    aims.update(maps, conv(maps).detach())
    regression = dense_regression(inputs.result(), aims.result(), conv.weight.detach().flatten(1).double())
    change = regression.about(regression.inputs, regression.targets).solve(1e-4)
    assert change.abs().max() < 1e-3


def test_moments_of_other_rows_are_refused():
    rows, aims = RowMoments(4), CrossMoments(nn.Linear(4, 2))
    rows.update(torch.randn(5, 4))
    aims.update(torch.randn(6, 4), torch.randn(6, 2))
    with pytest.raises(ValueError, match="5 rows and targets of 6"):
        dense_regression(rows.result(), aims.result(), torch.zeros(2, 4, dtype=torch.float64))


def test_targets_that_are_not_finite_name_the_layer():
    with pytest.raises(NumericsError, match="layer1.conv2: the dense network's outputs .* are not finite"):
        CrossMoments(nn.Linear(2, 1), name="layer1.conv2").update(torch.ones(3, 2), torch.full((3, 1), float("nan")))


def test_no_rows_are_an_error_that_names_the_layer():
    with pytest.raises(NumericsError, match="layer1.conv2: no row was seen"):
        CrossMoments(nn.Linear(2, 1), name="layer1.conv2").result()


@pytest.mark.parametrize("padding", [0, 1])
def test_cross_moments_about_the_means_stay_exact_where_these_are_far_above_the_spread(padding):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=padding)
    inputs = torch.randn(8, 3, 9, 9) * 0.01 + torch.tensor([100.0, 0.0, -30.0]).view(3, 1, 1)
    targets = torch.randn(8, 5, 7 + 2 * padding, 7 + 2 * padding) * 0.01 + 50
    moments = CrossMoments(conv)
    for part in range(0, 8, 4):
        moments.update(inputs[part : part + 4], targets[part : part + 4])
    found = moments.result()
    rows = nn.functional.unfold(inputs.double(), 3, padding=padding).transpose(1, 2).flatten(0, 1)
    aims = targets.double().flatten(2).transpose(1, 2).flatten(0, 1)
    expected = (aims - aims.mean(0)).T @ rows / len(rows)
    torch.testing.assert_close(found.cross - torch.outer(found.mean, rows.mean(0)), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.energy - found.mean**2, aims.var(0, correction=0), rtol=1e-5, atol=0)
