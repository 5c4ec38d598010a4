"""Multiples for widths: an eighth of a group at most, blocks that runtimes and quantised formats like."""

import pytest
import torch

from modhifi_cli.engine.plan import discover
from modhifi_cli.engine.rounding import channel_steps, neuron_step, refuse_narrow, told
from modhifi_cli.engine.walk import Budget
from modhifi_cli.engine.widths import COST_OF_BLOCKS, GroupWidths
from modhifi_cli.errors import ConfigError
from modhifi_cli.graph.components import ComponentGroup, Slot
from modhifi_cli.models import cifar_resnet
from modhifi_cli.numerics.allocation import Global, Uniform


def group(components, channels=1):
    slot = Slot("layer", torch.arange(components * channels).view(components, channels))
    return ComponentGroup("layer", components, (slot,), (), ())


def test_a_step_is_a_block_of_channels_and_at_most_an_eighth_of_the_group():
    widths = [8, 16, 24, 32, 64, 96, 128, 960]
    steps = channel_steps([group(width) for width in widths], "auto")
    assert steps == [1, 2, 2, 4, 8, 8, 16, 16]
    assert all(step * 8 <= width for step, width in zip(steps, widths, strict=True))


def test_a_card_wants_multiples_of_8_to_64():
    assert channel_steps([group(width) for width in (32, 64, 256, 960)], "auto", "cuda") == [1, 8, 32, 64]


def test_a_runtime_with_a_blocked_layout_gets_whole_blocks_also_of_narrow_groups():
    assert channel_steps([group(width) for width in (8, 16, 24, 64, 128)], "auto", block=8) == [1, 8, 8, 8, 16]


def test_components_of_many_channels_go_in_blocks_of_channels():
    assert channel_steps([group(32, 4), group(12, 64)], "auto") == [4, 1]


def test_a_given_multiple_is_every_groups():
    assert channel_steps([group(8), group(512)], 32) == [32, 32]


@pytest.mark.parametrize(
    ("neurons", "step"), [(11008, 256), (4096, 256), (3072, 128), (1536, 64), (1000, 32), (256, 32), (172, 16), (20, 2)]
)
def test_neurons_go_in_blocks_that_serving_formats_can_quantise(neurons, step):
    assert neuron_step(neurons, "auto") == step


def test_a_multiple_that_no_group_holds_is_refused_and_one_that_some_hold_is_told():
    with pytest.raises(ConfigError, match=r"round_to=64: every group has fewer components \(the widest 32\), so none could"):
        refuse_narrow([16, 32], ["a", "b"], 64)
    (said,) = refuse_narrow([16, 32, 64], ["a", "b", "c"], 64)
    assert said == (
        "round_to=64: a and 1 more have fewer components and stay whole; give round_to=auto or a smaller multiple to "
        "cut them, too."
    )
    assert refuse_narrow([16, 32], ["a", "b"], "auto") == ()


def test_steps_are_told_as_one_or_as_a_range():
    assert (told([8, 8]), told([2, 16, 8], "neurons")) == ("8 components", "2 to 16 neurons")


def test_whole_blocks_are_cut_as_long_as_they_meet_what_is_asked_for_and_finer_steps_where_they_do_not():
    model = cifar_resnet.build(depth=8, num_classes=10, widths=(16, 32, 32))
    images = torch.randn(2, 3, 16, 16)
    _, groups, _ = discover(model, images)
    sizes = [group.components for group in groups]

    def widths(share):
        return GroupWidths(model, images[:1], groups, Uniform(), Budget(share, "flops", "auto", block=8))

    blocks = widths(0.5)
    halves = blocks.shares([size // 2 for size in sizes])["flops"]
    assert all(keep % 8 == 0 for keep in widths(halves).at(halves, sizes, []))
    most = blocks.shares([8] * len(sizes))["flops"] + 0.05
    finer = widths(most)
    keep = finer.at(most, sizes, [])
    assert abs(finer.shares(keep)["flops"] - most) < 0.01 and any(kept % 8 for kept in keep)


def test_a_group_that_loses_much_by_whole_blocks_gets_finer_steps_and_the_others_keep_theirs():
    model = cifar_resnet.build(depth=8, num_classes=10, widths=(16, 32, 32))
    images = torch.randn(2, 3, 16, 16)
    _, groups, _ = discover(model, images)
    sizes = [group.components for group in groups]
    narrow = sizes.index(16)
    # Six of its sixteen go for nothing and any more costs all; the others rise gently.
    gentle = [[0.02 * (gone / size) ** 2 for gone in range(size + 1)] for size in sizes]
    steep = [0.0] * 7 + [1.0] * 10
    curves = [steep if number == narrow else curve for number, curve in enumerate(gentle)]

    def error(keep):
        return sum(curve[size - kept] for curve, size, kept in zip(curves, sizes, keep, strict=True))

    def chosen(block, share=0.5):
        widths = GroupWidths(model, images[:1], groups, Global(), Budget(share, "flops", "auto", block=block))
        keep = widths.at(share, sizes, curves)
        assert abs(widths.shares(keep)["flops"] - share) < 0.02
        return keep

    ours, finest = chosen(8), chosen(1)
    assert error(ours) <= error(finest) + COST_OF_BLOCKS
    assert ours[narrow] >= 10 and sum(kept % 8 == 0 for kept in ours) > sum(kept % 8 == 0 for kept in finest)
    curves = [[error / 10 for error in curve] for curve in gentle]  # where none loses much, all go in blocks
    assert all(kept % 8 == 0 for kept in chosen(8, 0.45)) and any(kept % 8 for kept in chosen(1, 0.45))
