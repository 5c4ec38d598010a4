"""Heads, sizes and bare tensors that follow channels: found from the forward, lawful, and built again as saved."""

import copy

import pytest
import torch
from torch import nn

from modhifi_cli.graph.counting import CostModel, count
from modhifi_cli.graph.dependency import find_groups
from modhifi_cli.graph.law import check, slice_groups_
from modhifi_cli.graph.parts import part_of, size_names
from modhifi_cli.graph.surgery import describe_widths, restore_widths_
from modhifi_cli.graph.trace import trace
from tests.graph import networks


def built(inner, **sizes):
    torch.manual_seed(0)
    return networks.Between(inner(), **sizes).eval(), torch.randn(2, 3, 6, 6)


def groups_of(model, images):
    groups, refused = find_groups(model, trace(model, images), images)
    return {group.name: group for group in groups}, {refusal.name: refusal.reason for refusal in refused}


KINDS = {
    "heads of a convolutional attention with a map between them": networks.ConvHeads,
    "heads whose number follows": networks.LinearHeads,
    "sizes of splits": networks.Portioned,
    "bare tensors": networks.Scaled,
    "halves that are summed": networks.Recounted,
    "convolutions over positions in a row": networks.Tokens,
    "a transposed convolution": networks.Upsampled,
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_cut_obeys_the_law_and_is_built_again(name):
    model, images = built(KINDS[name], reads=4 if KINDS[name] is networks.Recounted else 8)
    groups, refused = groups_of(model, images)
    assert not refused
    found = tuple(groups.values())
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    assert layers <= {module for group in found for module in group.modules}
    assert check(model, found, images).holds

    narrow = copy.deepcopy(model)
    slice_groups_(narrow, found, [torch.arange(group.components // 2) for group in found])
    costs = CostModel(model, images[:1], found)
    kept = [group.components - group.components // 2 for group in found]
    counted = costs.counts(kept)
    assert count(narrow, images[:1]).parameters == counted.parameters
    if KINDS[name] in (networks.Upsampled, networks.Tokens):  # no product outside layers
        assert count(narrow, images[:1]).macs == counted.macs
    again, _ = built(KINDS[name], reads=4 if KINDS[name] is networks.Recounted else 8)
    restore_widths_(again, describe_widths(narrow))
    again.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images), narrow(images))


def test_whole_heads_are_the_components_with_all_that_lies_in_them():
    model, images = built(networks.ConvHeads)
    groups, _ = groups_of(model, images)
    heads = groups["inner.q"]
    assert heads.components == 4
    assert {slot.module: slot.entries for slot in heads.producers} == {
        "inner.q": 4, "inner.k": 4, "inner.v": 4, "inner.between": 1,
    }  # fmt: skip
    assert {"inner", "inner.norm", "inner.local"} <= {slot.module for slot in heads.followers}
    assert {slot.module for slot in heads.consumers} == {"inner.between", "inner.proj.1"}
    slice_groups_(model, [heads], [torch.tensor([1])])
    assert model.inner.num_heads == 3 and model.inner.temperature.shape == (3, 1, 1)


def test_without_several_heads_nothing_of_queries_and_keys_goes():
    model, images = built(lambda: networks.ConvHeads(heads=1, between=False))
    groups, refused = groups_of(model, images)
    assert "reduces these channels to one" in refused["inner.q"]  # each head is normalised, and there is one
    assert check(model, tuple(groups.values()), images).holds


def test_sizes_of_splits_follow_their_own_channels():
    model, images = built(networks.Portioned)
    groups, _ = groups_of(model, images)
    wide = [group for group in groups.values() if group.producers[0].module == "inner.wide"]
    assert sum(group.components for group in wide) == 17
    slice_groups_(model, wide, [torch.arange(group.components // 2) for group in wide])
    assert sum(model.inner.sizes) == model.inner.dim == model.inner.wide.out_channels
    assert model.inner.part == sum(group.components - group.components // 2 for group in wide if group.name in {
        g.name for g in wide if any(slot.module == "inner.part" for slot in g.followers)
    })  # fmt: skip


def test_a_split_by_numbers_that_nothing_holds_is_refused():
    class Fixed(nn.Module):
        def forward(self, maps):
            left, right = maps.split([5, 3], dim=1)
            return torch.cat([right, left], 1)

    _, refused = groups_of(*built(Fixed))
    assert "takes some of these channels by their place" in refused["first"]


def test_channels_that_stay_do_not_keep_the_others_of_their_layer():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.sizes, self.both = (8, 2), nn.Conv2d(8, 10, 1)

        def forward(self, maps):
            values, gates = self.both(maps).split(self.sizes, dim=1)
            return values * gates[:, :1] + values.relu() * gates[:, 1:]

    model, images = built(Gated)
    groups, refused = groups_of(model, images)
    assert groups["inner.both"].components == 8 and "by their place" in refused["inner.both"]
    assert check(model, tuple(groups.values()), images).holds


def test_outputs_of_a_grouped_convolution_go_from_every_group_where_no_group_can_go():
    model, images = built(networks.Radix)
    groups, refused = groups_of(model, images)
    places = groups["inner.grouped"]
    assert places.components == 8 and places.producers[0].entries == 2
    assert "in groups that cannot go as wholes" in refused["first"]
    assert check(model, tuple(groups.values()), images).holds
    narrow = copy.deepcopy(model)
    slice_groups_(narrow, [places], [torch.tensor([0, 5])])
    assert (narrow.inner.grouped.groups, narrow.inner.grouped.out_channels) == (2, 12)
    again, _ = built(networks.Radix)
    restore_widths_(again, describe_widths(narrow))
    again.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images), narrow(images))


def test_a_part_that_does_not_exist_is_told():
    model, _ = built(networks.Scaled)
    assert part_of(model, "inner.gamma").size == 8
    for name in ("inner.nothing", "inner.layer.padding_mode", "inner.gamma.0"):
        with pytest.raises(AttributeError):
            part_of(model, name)


def test_the_law_is_checked_in_float64_where_a_forward_asks_for_float32():
    model, images = built(networks.LinearHeads)
    groups, _ = groups_of(model, images)
    verdict = check(model, tuple(groups.values()), images)
    assert verdict.holds and verdict.difference < 1e-12


class Counted(nn.Module):
    """Splits off one channel by its number, and the others by a size that it holds."""

    def __init__(self):
        super().__init__()
        self.embed_dim = 4

    def forward(self, x):
        one, keys, values = torch.split(x, split_size_or_sections=[1, self.embed_dim, self.embed_dim], dim=1)
        return keys * one.softmax(1) + values


def test_a_split_may_say_a_number_itself():
    assert size_names(Counted(), (1, 4, 4)) == ((1,), ("embed_dim",), ("embed_dim",))
    assert size_names(Counted(), (2, 4, 4)) is None and size_names(Counted(), (4, 4)) is None
