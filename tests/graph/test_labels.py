"""Channels followed through one forward: what meets where, and what is spoilt by what."""

import re

import pytest
import torch
import torchvision
from torch import nn

from modhifi_cli.errors import UnsupportedModelError
from modhifi_cli.graph.dependency import find_groups
from modhifi_cli.graph.labels import label
from modhifi_cli.graph.law import check
from modhifi_cli.graph.trace import trace
from tests.graph import networks


def groups_of(model, images):
    groups, refused = find_groups(model, trace(model, images), images)
    return {group.name: group for group in groups}, {refusal.name: refusal.reason for refusal in refused}


def modules(slots):
    return {slot.module for slot in slots}


def made(kind):
    torch.manual_seed(0)
    return kind().eval(), torch.randn(2, 3, 16, 16)


def layer(function):
    """A network that is `function` between two convolutions, ``[2, 8, 6, 6]`` → a tensor whose second size is 8."""

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

        def forward(self, images):
            return self.head(self.second(function(self.first(images[:, :, :6, :6]))).mean((2, 3)))

    return made(Between)


KEPT = {
    "roll in space": lambda x: x.roll(2, 3),
    "tokens and back": lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, (6, 6)),
    "windows and back": lambda x: (
        x.view(*x.shape[:2], 2, 3, 6).permute(0, 2, 3, 4, 1).reshape(-1, 3, 6, x.shape[1]).unflatten(0, (-1, 2))
        .permute(0, 4, 1, 2, 3).flatten(2, 3)
    ),
    "softmax over positions": lambda x: x.flatten(2).softmax(-1).unflatten(2, (6, 6)),
    "a gate by position": lambda x: x * torch.ones(1, 1, 6, 6),
    "padding in space": lambda x: nn.functional.pad(x, (1, 1, 2, 0)),
    "a pool and its resizing": lambda x: nn.functional.interpolate(nn.functional.max_pool2d(x, 2), scale_factor=2.0),
    "channels turned round": lambda x: x.flip(1),
    "written into zeros": lambda x: torch.zeros(2, x.shape[1], 6, 6, dtype=x.dtype)[: len(x)].copy_(x),
    "both halves in turn": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
}  # fmt: skip
SPOILT = {
    "mean over channels": (lambda x: x - x.mean(1, keepdim=True), "takes the mean over these channels"),
    "softmax over channels": (lambda x: x.softmax(1), r"in relation to each other \(softmax\)"),
    "largest channel": (lambda x: x / x.amax(1, keepdim=True), r"reduces these channels to one \(amax\)"),
    "fixed slice": (lambda x: torch.cat([x[:, 4:], x[:, :4]], 1), "some of these channels by their place"),
    "attention": (
        lambda x: (x.flatten(2).transpose(1, 2) @ x.flatten(2) @ x.flatten(2).transpose(1, 2)).mT.unflatten(2, (6, 6)),
        "as attention does",
    ),
    "a tensor as wide": (lambda x: x + torch.arange(8.0)[:, None, None], "a tensor that always stays"),
    "layer norm": (lambda x: nn.functional.layer_norm(x, x.shape[1:]), "across these channels"),
    "channels padded": (lambda x: nn.functional.pad(x, (0, 0, 0, 0, 4, 4))[:, 4:12], "pads or crops"),
    "unequal chunks": (lambda x: torch.cat(x.chunk(3, 1), 1), "splits these channels into unequal parts"),
    "a weight of nobody": (lambda x: nn.functional.linear(x, torch.eye(6, dtype=x.dtype)), "a weight that is no linear layer's own"),
    "Fourier": (lambda x: torch.fft.fft(x, dim=1).real, "not known here"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_only_moves_or_scales_elements_keeps_the_group(name):
    model, images = layer(KEPT[name])
    groups, refused = groups_of(model, images)
    assert not refused and modules(groups["first"].consumers) == {"second"}
    assert check(model, tuple(groups.values()), images).holds


@pytest.mark.parametrize("name", SPOILT)
def test_what_mixes_channels_spoils_its_group_alone(name):
    function, words = SPOILT[name]
    model, images = layer(function)
    groups, refused = groups_of(model, images)
    assert set(groups) == {"second"}
    assert re.search(words, refused["first"])
    assert check(model, tuple(groups.values()), images).holds


def test_a_network_that_knows_its_batch_cannot_be_followed():
    model, images = layer(lambda x: x.clone().copy_(torch.ones(2, 8, 6, 6)))
    with pytest.raises(UnsupportedModelError, match="could not be traced for coupled channels: .*; its forward must be plain"):
        groups_of(model, images)


def test_both_halves_of_a_chunk_go_together():
    groups, _ = groups_of(*layer(KEPT["both halves in turn"]))
    assert groups["first"].components == 4
    assert torch.equal(groups["first"].producers[0].index, torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]]))


def test_branches_between_shuffles_are_groups_and_the_stream_stays_in_step():
    model, images = made(networks.Shuffled)
    groups, refused = groups_of(model, images)
    assert {"units.0.0", "units.1.0"} <= set(groups)
    assert groups["units.0.0"].components == 8  # the depthwise convolution follows
    assert not refused and modules(groups["stem"].producers) == {"stem", "units.0.4", "units.1.4"}
    assert check(model, tuple(groups.values()), images).holds


def test_squeeze_and_excitation_joins_its_block_and_group_norm_makes_groups_of_channels():
    model, images = made(networks.Excited)
    groups, refused = groups_of(model, images)
    block = groups["inner"]
    assert block.components == 4 and block.producers[0].entries == 3
    assert modules(block.producers) == {"inner", "excite"} and modules(block.followers) == {"norm"}
    assert modules(block.consumers) == {"squeeze", "outer"}
    assert groups["squeeze"].components == 4
    assert not refused and "scale" in modules(groups["stem"].followers)
    assert check(model, tuple(groups.values()), images).holds


def test_channels_that_a_fixed_split_parts_are_refused():
    groups, refused = groups_of(*made(networks.Parted))
    assert set(groups) == {"stem", "left"}  # what is read before the split, and what is written behind it
    assert "takes some of these channels by their place" in refused["first"]


def test_a_mean_over_channels_leaves_the_other_groups():
    model, images = made(networks.MeanTaken)
    groups, refused = groups_of(model, images)
    assert set(groups) == {"good", "second"}
    assert "takes the mean over these channels" in refused["first"]


def test_channels_of_the_answer_are_refused_where_they_are_read_too():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Linear(8, 5)

        def forward(self, images):
            maps = self.stem(images)
            return self.head(self.body(maps).mean((2, 3))), maps

    groups, refused = groups_of(*made(Both))
    assert set(groups) == {"body"}
    assert refused == {"stem": "the network gives these channels out as its answer"}


def test_labelling_leaves_no_hook_and_no_label_on_the_weights():
    model, images = networks.small("concatenated")
    label(model, images)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(hasattr(tensor, "_component_labels") for tensor in model.state_dict(keep_vars=True).values())


def test_the_hooks_are_gone_after_a_forward_that_fails():
    model, _ = networks.small("concatenated")
    with pytest.raises(RuntimeError):
        label(model, torch.randn(1, 7, 16, 16))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mnasnet0_5", "squeezenet1_1", "mobilenet_v3_small"])
def test_every_layer_of_small_torchvision_families_is_in_a_lawful_group(name):
    torch.manual_seed(0)
    model, images = torchvision.models.get_model(name, weights=None).eval(), torch.randn(2, 3, 64, 64)
    groups, _ = groups_of(model, images)
    assert check(model, tuple(groups.values()), images).holds
    touched = {name for group in groups.values() for name in group.modules}
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(touched.intersection(layers)) >= 0.9 * len(layers)
