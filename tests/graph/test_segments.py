"""Cuts found by counting paths, runs that start behind a cut and stop early, and hooks that do not stay."""

import pytest
import torch
from torch import nn

from modhifi_cli.graph.dependency import find_groups
from modhifi_cli.graph.law import slice_groups_
from modhifi_cli.graph.segments import Segments, inputs_seen
from tests.graph import networks


@pytest.mark.parametrize("name", networks.SMALL)
def test_resuming_from_any_cut_gives_the_same_logits(name):
    model, images = networks.small(name)
    segments = Segments(model, images)
    assert segments.cuts
    more = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        logits = model(more)
    last = segments.trace.cuts[-1]
    for cut in segments.cuts[:-1]:
        carried = segments.run(more, until=cut)
        assert torch.allclose(segments.run(carried, start=cut, until=last), segments.run(more, until=last))
    assert torch.equal(model(more), logits)  # nothing stays patched


def test_cuts_stay_usable_after_the_network_was_edited():
    model, images = networks.small("option_a")
    segments, before = Segments(model, images), Segments(model, images).cuts
    groups, _ = find_groups(model, segments.trace, images)
    slice_groups_(model, groups, [torch.arange(group.components // 2) for group in groups])
    assert segments.cuts == before


def test_a_layer_that_runs_twice_shows_all_its_rows_together_and_no_cut_parts_its_runs():
    model, images = networks.small("repeated")
    segments = Segments(model, images)
    seen, given, rows = [], [], []
    segments.run(images, looks={"fc2": seen.append}, outputs={"fc2": given.append})
    with inputs_seen(model, {"fc2": lambda tensor: rows.append(tensor.flatten(1, 2))}):
        model(images)
    assert torch.equal(seen[0], torch.cat(rows, 1)) and len(seen) == len(given) == 1
    assert seen[0].shape == (2, 16 + 4, 24) and given[0].shape == (2, 20, 8)
    trace = segments.trace
    assert trace.calls["fc1"][0] == 2 and "near" not in trace.visits
    first, last = trace.calls["fc1"][1], trace.visits["fc2"].leave
    assert not [cut for cut in segments.cuts if first < trace.visits[cut].leave < last]


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with its activation inside, as timm has it: the identity hands on what no module of its own made."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU6()

    def forward(self, maps):
        return self.act(self.drop(super().forward(maps)))


def test_no_cut_lies_inside_a_layer_that_is_sliced_itself():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), NormAct(8), nn.Conv2d(8, 8, 3, groups=8), NormAct(8), nn.Conv2d(8, 4, 1), nn.Flatten(),
        nn.Linear(4 * 36, 5),
    ).eval()  # fmt: skip
    images = torch.randn(2, 3, 8, 8)
    segments = Segments(model, images)
    assert "1.drop" in segments.trace.cuts and not segments.usable("1.drop") and segments.usable("1")
    groups, _ = find_groups(model, segments.trace, images)
    slice_groups_(model, groups, [torch.arange(3) for _ in groups])
    whole = model(images)
    for cut in segments.cuts:
        carried = segments.run(images, until=cut)
        assert torch.allclose(segments.whole(carried, start=cut), whole, rtol=1e-5, atol=1e-6), cut


def test_logits_that_are_not_finite_make_no_cut_usable_and_raise_nothing():
    model, images = networks.small("option_a")
    segments = Segments(model, images)
    with torch.no_grad():
        next(model.parameters()).fill_(1e38)
    assert not segments.cuts


def test_a_residual_block_is_cut_behind_and_never_inside():
    model, images = networks.small("option_a")
    cuts = Segments(model, images).cuts
    assert "layer2.0" in cuts or "layer2" in cuts
    assert not any(name.startswith("layer2.0.") for name in cuts)


def test_an_identity_shortcut_does_not_hide_the_block_before_it():
    model = networks.cifar_resnet.build(depth=14, widths=(4, 8, 12))
    segments = Segments(model, torch.randn(2, 3, 16, 16))
    assert {"layer1.0", "layer1", "layer2.0", "layer2", "layer3.0", "layer3"} <= set(segments.cuts)
    assert "layer1.0.shortcut" not in segments.cuts  # conv1 of its block has read the same tensor before it


class Overwriting(nn.Module):
    """Writes into what its layers gave and read, as memory is saved: an activation and a sum in place."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.branch, self.end = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, images):
        stream = self.act(self.norm(self.stem(images)))
        stream += self.branch(stream)
        return self.end(stream).mean((2, 3))


def test_what_the_network_writes_into_later_is_copied_and_nothing_else():
    model, images = Overwriting().eval(), torch.randn(2, 3, 16, 16)
    segments = Segments(model, images)
    names = ("stem", "norm", "act", "branch", "end")
    assert [name for name in names if segments.overwritten(name)] == ["norm", "act"]
    assert [name for name in names if segments.overwritten(name, side="input")] == ["act", "branch"]
    assert {"stem", "act"} <= set(segments.cuts)
    whole = segments.whole(images)
    for cut in segments.cuts:
        carried = segments.run(images, until=cut).clone()
        before = carried.clone()
        torch.testing.assert_close(segments.whole(carried, start=cut), whole)
        assert torch.equal(carried, before), cut


def test_modules_that_hand_on_the_tensor_of_a_cut_are_known():
    model = networks.cifar_resnet.build(depth=14, widths=(4, 8, 12))
    same = Segments(model, torch.randn(2, 3, 16, 16)).trace.same
    assert same["layer1.0"] == {"layer1.0", "layer1.1.shortcut"}
    assert "layer2.0.shortcut" not in same["layer1"]  # every other pixel, and more channels


def test_a_cut_inside_one_branch_is_not_a_cut():
    model, images = networks.small("concatenated")
    cuts = Segments(model, images).trace.cuts
    assert "first" in cuts and "joined_norm" in cuts
    assert "second" not in cuts and "norm" not in cuts


def test_a_run_stops_once_everything_was_seen():
    model, images = networks.small("option_a")
    segments = Segments(model, images)
    ran = []
    model.linear.register_forward_hook(lambda *_: ran.append(1))
    seen = {}
    segments.run(images, looks={"layer1.0.conv2": lambda inputs: seen.setdefault("inputs", inputs)})
    assert seen["inputs"].shape[1] == 4
    assert not ran


def test_looks_see_the_same_inputs_from_a_cut_as_from_the_images():
    model, images = networks.small("option_a")
    segments = Segments(model, images)
    cut = segments.cuts[1]
    whole, resumed = [], []
    segments.run(images, looks={"layer3.0.conv2": lambda x: whole.append(x.clone())})
    carried = segments.run(images, until=cut)
    segments.run(carried, start=cut, looks={"layer3.0.conv2": lambda x: resumed.append(x.clone())})
    assert torch.allclose(whole[0], resumed[0])


def test_hooks_are_gone_after_an_exception():
    model, images = networks.small("projected")

    def fail(inputs):
        raise ValueError("look")

    segments = Segments(model, images)
    with pytest.raises(ValueError, match="look"):
        segments.run(images, looks={"inner": fail}, until=segments.cuts[-1])
    with pytest.raises(ValueError, match="look"), inputs_seen(model, {"inner": fail}):
        model(images)
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())
    model(images)


def test_order_of_data_decides_what_depends_on_what():
    model, images = networks.small("projected")
    trace = Segments(model, images).trace
    assert trace.depends("outer", "inner")
    assert not trace.depends("down", "project")  # siblings, though project runs first
    assert trace.norm_of == {"stem": "norm", "inner": "inner_norm"}


def test_equal_images_do_not_make_a_branch_a_cut():
    model, images = networks.small("option_a")
    assert Segments(model, torch.zeros_like(images)).cuts == Segments(model, images).cuts
