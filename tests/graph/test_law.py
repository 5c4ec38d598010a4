"""The slicing law, for every group alone and all together, on every kind of coupling and every named network."""

import pytest
import torch
from torch import nn

from modhifi_cli.graph.components import ComponentGroup, Slot
from modhifi_cli.graph.dependency import find_groups
from modhifi_cli.graph.law import TOLERANCE, check, lawful
from modhifi_cli.graph.trace import trace
from modhifi_cli.models import cifar_resnet
from tests.graph import networks


def groups_of(model, images, **settings):
    return find_groups(model, trace(model, images), images, **settings)


@pytest.mark.parametrize("name", networks.SMALL)
def test_slicing_equals_zeroing_consumer_weights(name):
    model, images = networks.small(name)
    groups, refused = groups_of(model, images)
    assert groups and not refused
    for group in groups:
        verdict = check(model, (group,), images)
        assert verdict.failure is None, group.name
        assert verdict.difference <= TOLERANCE, group.name
        assert verdict.moved >= 100 * TOLERANCE, f"{group.name}: zeroing was invisible, so the law says nothing"
    assert check(model, groups, images).holds


@pytest.mark.parametrize("name", networks.NAMED)
def test_slicing_equals_zeroing_consumer_weights_in_named_networks(name):
    model, images = networks.named(name)
    groups, refused = groups_of(model, images)
    assert groups and not refused
    assert check(model, groups, images).holds
    for group in groups[:: max(1, len(groups) // 3)]:
        assert check(model, (group,), images).holds, group.name


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_slicing_equals_zeroing_consumer_weights_in_cifar_resnets(depth):
    model, images = cifar_resnet.build(depth=depth), torch.randn(2, 3, 16, 16)
    groups, refused = groups_of(model, images)
    blocks = (depth - 2) // 2
    assert not refused
    # every block has inner channels, and the three stages have one stream each, parted by the option-A shortcuts
    assert len(groups) == blocks + 3
    assert check(model, groups, images).holds


def test_a_parameter_without_numbers_is_left_as_it_is():
    """DINOv3 without register tokens holds such a one."""
    model, images = networks.small(next(iter(networks.SMALL)))
    groups, _ = groups_of(model, images)
    model.registers = nn.Parameter(torch.zeros(1, 0, 4))
    assert check(model, groups, images).holds


def test_a_group_that_breaks_the_law_is_refused_and_the_others_stay():
    torch.manual_seed(0)
    model, images = networks.Mixing().eval(), torch.randn(2, 3, 16, 16)
    groups, _ = groups_of(model, images)
    assert {group.name for group in groups} == {"good", "first", "second"}
    passed, failed = lawful(model, [(group,) for group in groups], images)
    assert {group.name for group in passed} == {"good", "second"}
    assert failed["first"].difference > 1e-3


def test_the_check_leaves_the_network_as_found():
    model, images = networks.small("option_a")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups, _ = groups_of(model, images)
    check(model, groups, images)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_whose_inputs_are_its_rows_obeys_the_law_by_its_rows():
    transformers = pytest.importorskip("transformers")
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), transformers.pytorch_utils.Conv1D(9, 9))
    every = torch.arange(9)[:, None]
    group = ComponentGroup("3", 9, (Slot("1", every),), (), (Slot("3", every),))
    assert check(net, [group], torch.randn(2, 3, 2, 2)).holds
