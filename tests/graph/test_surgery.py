"""Slicing, replaying edits, describing and restoring widths, counting."""

import copy

import pytest
import torch
from torch import nn

from modhifi_cli.errors import DataError, UnsupportedModelError
from modhifi_cli.graph.components import Layout
from modhifi_cli.graph.counting import CostModel, count
from modhifi_cli.graph.dependency import find_groups
from modhifi_cli.graph.law import randomise_, slice_groups_
from modhifi_cli.graph.modules import ChannelPadShortcut
from modhifi_cli.graph.surgery import (
    apply_edit_,
    apply_module_edit_,
    describe_widths,
    restore_widths_,
    slice_module_,
    weights_hash,
)
from modhifi_cli.graph.trace import trace
from modhifi_cli.records import Edit, ModuleEdit
from tests.graph import networks


def narrowed(name):
    model, images = networks.small(name)
    randomise_(model)
    groups, _ = find_groups(model, trace(model, images), images)
    removed = [torch.arange(0, group.components, 3) for group in groups]
    narrow = copy.deepcopy(model)
    slice_groups_(narrow, groups, removed)
    return model, narrow, groups, removed, images


@pytest.mark.parametrize("name", networks.SMALL)
def test_restored_widths_take_the_narrow_weights(name):
    dense, narrow, _, _, images = narrowed(name)
    rebuilt = copy.deepcopy(dense)
    restore_widths_(rebuilt, describe_widths(narrow))
    rebuilt.load_state_dict(narrow.state_dict())
    assert torch.equal(rebuilt(images), narrow(images))
    assert weights_hash(rebuilt) == weights_hash(narrow) != weights_hash(dense)


@pytest.mark.parametrize("name", networks.SMALL)
def test_predicted_costs_equal_counted_costs(name):
    dense, narrow, groups, removed, images = narrowed(name)
    costs = CostModel(dense, images[:1], groups)
    keep = [group.components - gone.numel() for group, gone in zip(groups, removed, strict=True)]
    assert costs.dense == count(dense, images[:1])
    assert costs.counts(keep) == count(narrow, images[:1])


def test_counted_macs_of_a_convolution_and_a_linear_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(4 * 16, 5))
    counted = count(model, torch.randn(1, 3, 8, 8))
    assert counted.macs == 4 * 3 * 9 * 16 + 64 * 5
    assert counted.parameters == 4 * 27 + 4 + 64 * 5 + 5


def test_attributes_tell_the_new_sizes():
    _, narrow, *_ = narrowed("grouped")
    grouped = narrow.layers[3]
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (2, 6, 12)
    assert narrow.layers[4].num_features == 12 == narrow.layers[4].running_var.numel()


def test_a_split_convolution_group_is_refused():
    with pytest.raises(UnsupportedModelError, match="split a group of 3 channels"):
        slice_module_(nn.Conv2d(6, 6, 1, groups=2), outputs=torch.tensor([0, 1, 2, 3]))


def test_the_shortcut_map_follows_both_sides():
    shortcut = ChannelPadShortcut.centred(4, 8, stride=2)
    assert shortcut.source.tolist() == [-1, -1, 0, 1, 2, 3, -1, -1]
    images = torch.randn(2, 4, 6, 6)
    dense = shortcut(images)
    assert torch.equal(dense[:, 2:6], images[:, :, ::2, ::2]) and not dense[:, :2].any() and not dense[:, 6:].any()
    slice_module_(shortcut, outputs=torch.tensor([1, 2, 4, 5]), inputs=torch.tensor([0, 3]))
    assert shortcut.source.tolist() == [-1, 0, -1, 1]
    assert torch.equal(shortcut(images[:, [0, 3]])[:, 3], dense[:, 5])


def test_a_nan_does_not_leak_through_the_shortcut_into_zero_channels():
    shortcut = ChannelPadShortcut.centred(2, 4, stride=1)
    images = torch.full((1, 2, 3, 3), float("nan"))
    assert not shortcut(images)[:, [0, 3]].any()


def test_layout_numbers_follow_earlier_edits():
    model, images = networks.small("concatenated")
    groups, _ = find_groups(model, trace(model, images), images)
    by_name = {group.name: group for group in groups}
    layout = Layout(model, groups)
    layout.keep_(by_name["second"], torch.tensor([1, 3]))  # 2 of the 4 channels in front of those of `first`
    slot = next(slot for slot in by_name["first"].consumers if slot.module == "third")
    assert layout.inputs(slot, layout.alive(by_name["first"])).flatten().tolist() == [2, 3, 4, 5, 6, 7]
    assert layout.input_order(slot, torch.tensor([5, 0])).tolist() == [7, 2, 0, 1, 3, 4, 5, 6]


def edit(module, **changes):
    return Edit("group", 0, (ModuleEdit(module, **changes),), torch.arange(1), torch.arange(0))


def test_an_edit_of_another_network_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(DataError, match="module 'layer9', which this network does not have"):
        apply_edit_(model, edit("layer9"))
    with pytest.raises(DataError, match="0: the saved edit keeps channel 7, but there are 4"):
        apply_edit_(model, edit("0", kept_outputs=torch.tensor([0, 7])))
    with pytest.raises(DataError, match=r"0\.weight: the saved edit holds shape \(9,\), the network \(4, 3, 1, 1\)"):
        apply_edit_(model, edit("0", tensors={"weight": torch.zeros(9)}))


def test_an_edit_slices_and_then_replaces():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    apply_module_edit_(model, ModuleEdit("0", torch.tensor([1, 2]), None, {"bias": torch.tensor([5.0, 6.0])}))
    assert model[0].bias.tolist() == [5.0, 6.0] and model[0].weight.shape == (2, 3, 1, 1)
    assert isinstance(model[0].bias, nn.Parameter)


def test_widths_that_would_grow_are_damage():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(DataError, match="0: the saved network asks for out_channels = 9, the architecture has 4"):
        restore_widths_(model, {"0": {"in_channels": 3, "out_channels": 9, "groups": 1}})


def test_a_network_that_changes_after_an_edit_leaves_the_edit_as_it_was():
    model, _ = networks.small("projected")
    edit = ModuleEdit("inner", tensors={"weight": torch.zeros_like(model.inner.weight)})
    apply_module_edit_(model, edit)
    with torch.no_grad():
        model.inner.weight.add_(1)
    assert not edit.tensors["weight"].any()
