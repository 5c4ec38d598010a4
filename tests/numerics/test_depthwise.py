"""Filters of depthwise convolutions for wanted outputs, against least squares on the patches themselves."""

import pytest
import torch
from torch import nn

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics.depthwise import FilterMoments, fitted_filters

LAYERS = {
    "same": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "strided": lambda: nn.Conv2d(4, 4, 5, stride=2, padding=2, groups=4),
    "dilated": lambda: nn.Conv2d(4, 4, 3, dilation=2, padding="same", groups=4),
    "oblong": lambda: nn.Conv2d(4, 4, (1, 7), padding=(0, 3), groups=4),
}


def data(layer, count=24, seed=0):
    """Inputs, and outputs of other filters plus noise."""
    torch.manual_seed(seed)
    inputs = torch.randn(count, 4, 9, 9) + torch.tensor([0.0, 1.0, -2.0, 0.5])[:, None, None]
    with torch.no_grad():
        targets = layer(inputs)
    return inputs, targets + 0.1 * torch.randn_like(targets) + torch.rand(4)[:, None, None]


def rows_of(layer, inputs, channel):
    """Patches of one channel, one a row, by running the layer with each tap alone."""
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    columns = []
    for tap in range(taps):
        probe = torch.zeros_like(layer.weight)
        probe.view(4, -1)[:, tap] = 1
        with torch.no_grad():
            seen = torch.func.functional_call(layer, {"weight": probe, "bias": torch.zeros(4)}, inputs)
        columns.append(seen[:, channel].flatten())
    return torch.stack(columns, 1).double()


@pytest.mark.parametrize("name", LAYERS)
def test_filters_are_those_of_least_squares_on_the_patches(name):
    torch.manual_seed(3)
    layer = LAYERS[name]()
    inputs, targets = data(layer)
    moments, held = FilterMoments(layer), FilterMoments(layer)
    moments.update(inputs[:20], targets[:20])
    held.update(inputs[20:], targets[20:])
    fit, held_out = moments.result(), held.result()
    present = layer.weight.detach().flatten(1).double() + 0.5
    found, ridge = fitted_filters(fit.merged(held_out), held_out, fit, present, (1e-9,), centred=True)
    assert ridge == 1e-9
    for channel in range(4):
        rows = rows_of(layer, inputs, channel)
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        expected = torch.linalg.lstsq(rows, targets[:, channel].flatten().double()[:, None]).solution[:-1, 0]
        assert torch.allclose(found[channel], expected, atol=1e-4), channel


def test_the_error_is_that_of_the_outputs_and_the_split_does_not_matter():
    layer = LAYERS["same"]()
    inputs, targets = data(layer)
    whole, parts = FilterMoments(layer), FilterMoments(layer)
    whole.update(inputs, targets)
    for part in (slice(0, 7), slice(7, 24)):
        parts.update(inputs[part], targets[part])
    one, other = whole.result(), parts.result()
    assert torch.allclose(one.gram, other.gram, rtol=1e-5, atol=1e-6) and one.rows == other.rows == 24 * 81
    weight = layer.weight.detach().flatten(1).double()
    with torch.no_grad():
        rest = (targets - layer(inputs) + layer.bias[:, None, None]).double()
    assert torch.allclose(one.errors(weight), rest.square().mean((0, 2, 3)), rtol=1e-4)
    centred = one.about(one.inputs, one.targets)
    expected = (rest - rest.mean((0, 2, 3))[:, None, None]).square().mean((0, 2, 3))
    assert torch.allclose(centred.errors(weight), expected, rtol=1e-3)


def test_filters_stay_where_no_ridge_helps_on_held_out_images_and_where_a_channel_is_always_zero():
    layer = LAYERS["same"]()
    inputs, _ = data(layer)
    inputs[:, 2] = 0
    with torch.no_grad():
        exact, noise = layer(inputs), torch.randn(24, 4, 9, 9)
    moments, held = FilterMoments(layer), FilterMoments(layer)
    moments.update(inputs[:20], exact[:20] + noise[:20])
    held.update(inputs[20:], exact[20:])
    fit, held_out = moments.result(), held.result()
    present = layer.weight.detach().flatten(1).double()
    found, ridge = fitted_filters(fit.merged(held_out), held_out, fit, present, (1e-3,), centred=True)
    assert ridge is None and torch.equal(found, present)
    assert torch.equal(fitted_filters(fit, None, fit, present, (1e-3,), centred=True)[0], present)
    other = present + 1.0
    found, ridge = fitted_filters(fit.merged(held_out), held_out, fit, other, (1e-3,), centred=True)
    assert ridge == 1e-3 and torch.equal(found[2], other[2]) and not torch.equal(found[0], other[0])


def test_what_is_not_finite_or_absent_is_named():
    layer = LAYERS["same"]()
    moments = FilterMoments(layer, name="conv_dw")
    with pytest.raises(NumericsError, match="conv_dw: no row was seen"):
        moments.result()
    inputs, targets = data(layer)
    with pytest.raises(NumericsError, match="conv_dw: activations on the calibration data are not finite"):
        moments.update(inputs * float("inf"), targets)
