"""Convolutions with weight standardisation: settled they answer as before, and their inputs can go."""

import copy

import pytest
import torch
from timm.layers import std_conv
from torch import nn

from modhifi_cli.graph.dependency import find_groups
from modhifi_cli.graph.heads import adopt_
from modhifi_cli.graph.law import check, slice_groups_
from modhifi_cli.graph.standardised import computes_weight
from modhifi_cli.graph.surgery import describe_widths, restore_widths_
from modhifi_cli.graph.trace import trace

KINDS = [std_conv.StdConv2d, std_conv.StdConv2dSame, std_conv.ScaledStdConv2d, std_conv.ScaledStdConv2dSame]


def network(kind):
    torch.manual_seed(0)
    first, second, third = kind(3, 8, kernel_size=3), kind(8, 10, kernel_size=3, stride=2), kind(10, 6, kernel_size=1)
    layers = first, nn.ReLU(), second, nn.ReLU(), third
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.2, 1.0)
    return model, torch.randn(2, 3, 9, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_settled_convolution_answers_as_before_and_its_groups_are_lawful(kind):
    model, images = network(kind)
    with torch.no_grad():
        before = model(images)
    assert adopt_(model) == ("0", "2", "4") and not any(computes_weight(module) for module in model)
    with torch.no_grad():
        torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-5)
    assert adopt_(model) == ()
    groups, refused = find_groups(model, trace(model, images), images)
    pads_itself = kind in (std_conv.StdConv2dSame, std_conv.ScaledStdConv2dSame)
    assert len(groups) == (2 if pads_itself else 3) and len(refused) == (1 if pads_itself else 0)
    assert check(model, groups, images).holds
    narrow = copy.deepcopy(model)
    slice_groups_(narrow, groups, [torch.arange(group.components // 2) for group in groups])
    again, _ = network(kind)
    restore_widths_(again, describe_widths(narrow))
    again.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images), narrow(images))


def test_one_of_transformers_is_settled_with_the_padding_of_its_own():
    bit = pytest.importorskip("transformers.models.bit.modeling_bit")
    torch.manual_seed(0)
    model = nn.Sequential(bit.WeightStandardizedConv2d(3, 8, kernel_size=3, stride=2), nn.ReLU(),
                          bit.WeightStandardizedConv2d(8, 6, kernel_size=3, padding=1)).eval()  # fmt: skip
    images = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        before = model(images)
        assert adopt_(model) == ("0", "2")
        torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-5)
    assert not any(computes_weight(module) for module in model)
