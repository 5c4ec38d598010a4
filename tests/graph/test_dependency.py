"""Which channels are found to go together, and what is left alone with its reason."""

import pytest
import torch
from torch import nn

from modhifi_cli.errors import ConfigError, UnsupportedModelError
from modhifi_cli.graph.counting import CostModel, count
from modhifi_cli.graph.dependency import find_groups
from modhifi_cli.graph.law import check, slice_groups_
from modhifi_cli.graph.trace import trace
from tests.graph import networks


def groups_of(model, images, **settings):
    groups, refused = find_groups(model, trace(model, images), images, **settings)
    return {group.name: group for group in groups}, refused


def modules(slots):
    return {slot.module for slot in slots}


def test_a_stage_stream_couples_all_its_producers_and_consumers_with_the_projection():
    groups, _ = groups_of(*networks.small("projected"))
    stream = groups["stem"]
    assert modules(stream.producers) == {"stem", "outer"}
    assert modules(stream.followers) == {"norm"}
    assert modules(stream.consumers) == {"inner", "project", "down"}
    assert modules(groups["project"].producers) == {"project", "down"}


def test_an_option_a_shortcut_parts_two_streams():
    groups, _ = groups_of(*networks.small("option_a"))
    assert modules(groups["conv1"].consumers) == {"layer1.0.conv1", "layer2.0.conv1", "layer2.0.shortcut"}
    assert modules(groups["layer2.0.conv2"].producers) == {"layer2.0.shortcut", "layer2.0.conv2"}


def test_a_grouped_convolution_makes_whole_groups_the_component():
    groups, _ = groups_of(*networks.small("grouped"))
    group = groups["layers.0"]
    assert group.components == 4
    assert [slot.entries for slot in group.producers] == [3]  # 12 channels in, 4 groups
    assert {slot.module: slot.entries for slot in group.followers} == {"layers.1": 3, "layers.3": 6, "layers.4": 6}
    assert [slot.entries for slot in group.consumers] == [6]
    assert groups["layers.6"].components == 10  # depthwise: every channel is a group of its own


def test_concatenated_inputs_point_at_their_own_part():
    groups, _ = groups_of(*networks.small("concatenated"))
    consumers = {slot.module: slot.index for slot in groups["first"].consumers}
    assert torch.equal(consumers["third"].flatten(), torch.arange(4, 10))  # behind the 4 channels of `second`
    assert torch.equal(consumers["second"].flatten(), torch.arange(6))


def test_a_flatten_gives_every_channel_all_its_positions():
    groups, _ = groups_of(*networks.small("flattened"))
    (slot,) = groups["conv"].consumers
    assert torch.equal(slot.index, torch.arange(96).view(6, 16))


def test_the_logits_are_never_a_group():
    for name in networks.SMALL:
        model, images = networks.small(name)
        groups, refused = groups_of(model, images)
        last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
        assert all(last not in modules(group.producers) for group in groups.values())
        assert not refused


def test_excluding_a_module_leaves_every_group_that_touches_it_alone():
    model, images = networks.small("option_a")
    groups, refused = groups_of(model, images, exclude=["layer2"])
    assert all(not name.startswith("layer2") for group in groups.values() for name in group.modules)
    assert all("exclude" in refusal.reason for refusal in refused) and refused


def test_excluding_an_unknown_module_names_the_nearest():
    with pytest.raises(ConfigError, match=r"exclude: the network has no module 'layer2\.0\.conv3'; did you mean"):
        groups_of(*networks.small("option_a"), exclude=["layer2.0.conv3"])


def test_a_stream_through_layer_norm_is_refused_with_the_module():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm, self.head = nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, images):
            return self.head(self.norm(self.inner(images[:, :, :2, :2].flatten(1))))

    groups, (refusal,) = groups_of(Normed().eval(), torch.randn(2, 3, 16, 16))
    assert not groups
    assert refusal.reason == "norm is a LayerNorm across these channels"


class Twice(nn.Module):
    """A convolution that reads its own output, and maps of two sizes."""

    def __init__(self, norm: type[nn.Module] = nn.Identity):
        super().__init__()
        self.stem, self.again, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), norm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, images):
        once = self.norm(self.again(self.stem(images)))
        return self.head(torch.relu(self.norm(self.again(once[:, :, ::2, ::2]))).mean((2, 3)))


def test_a_convolution_that_runs_twice_is_cut_and_a_batch_normalisation_that_does_is_refused():
    images = torch.randn(2, 3, 16, 16)
    groups, refused = groups_of(Twice().eval(), images)
    (group,) = groups.values()
    assert not refused and modules(group.producers) == {"stem", "again"} and modules(group.consumers) == {"again", "head"}
    assert check(Twice().eval(), [group], images).holds
    groups, refused = groups_of(Twice(nn.BatchNorm2d).eval(), images)
    assert not groups
    assert any("norm runs more than once" in refusal.reason for refusal in refused)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, lambda width: nn.InstanceNorm2d(width, affine=True)])
def test_an_instance_normalisation_follows_its_channels(norm):
    images = torch.randn(2, 3, 12, 12)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(6, 3)).eval()  # fmt: skip
    groups, refused = groups_of(model, images)
    assert not refused and modules(groups["0"].followers) == {"1"}
    assert check(model, list(groups.values()), images).holds
    slice_groups_(model, list(groups.values()), [torch.tensor([0, 3])] * 2)
    assert model[1].num_features == 6 and model(images).shape == (2, 3)


def test_an_instance_normalisation_with_statistics_of_the_past_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, track_running_stats=True), nn.Conv2d(8, 6, 3), nn.Flatten(),
                          nn.Linear(384, 3)).eval()  # fmt: skip
    groups, (refusal,) = groups_of(model, torch.randn(2, 3, 12, 12))
    assert refusal.reason == "1 is an instance normalisation with statistics of the past, or without a module"


def test_both_halves_of_a_gated_linear_unit_go_together():
    images = torch.randn(2, 3, 12, 12)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GLU(1), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(6, 3)).eval()  # fmt: skip
    groups, refused = groups_of(model, images)
    group = groups["0"]
    assert not refused and group.components == 8 and group.producers[0].index[2].tolist() == [2, 10]
    assert check(model, list(groups.values()), images).holds


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_what_a_recurrence_reads_is_left_alone_in_one_sentence(kind):
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.read, self.head = nn.Conv2d(3, 8, 3), kind(8, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, images):
            return self.head(self.read(self.stem(images).mean(2).transpose(1, 2))[0][:, -1])

    groups, (refusal,) = groups_of(Read().eval(), torch.randn(2, 3, 12, 12))
    assert refusal.reason == f"read is {'a' if kind is nn.GRU else 'an'} {kind.__name__}, whose gates are left alone; a linear layer in between can be cut"


def test_a_linear_layer_whose_product_is_written_out_is_cut_like_the_librarys_own():
    class Written(nn.Linear):
        def forward(self, rows):
            return rows @ self.weight.T + self.bias

    model = nn.Sequential(nn.Flatten(), Written(12, 8), nn.ReLU(), Written(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    images = torch.randn(2, 3, 2, 2)
    groups, refused = groups_of(model, images)
    assert set(groups) == {"1", "3"} and not refused and check(model, list(groups.values()), images).holds


def test_a_linear_layer_that_runs_twice_is_cut_where_all_that_it_reads_may_go():
    model, images = networks.small("repeated")
    found, _ = groups_of(model, images)
    group, groups = found["fc1"], tuple(found.values())
    assert [slot.module for slot in group.followers] == ["near"]
    assert [slot.module for slot in group.consumers] == ["fc2"] and group.components == 24
    assert check(model, groups, images).holds
    costs = CostModel(model, images[:1], groups)
    slice_groups_(model, groups, [torch.arange(one.components // 2) for one in groups])
    assert count(model, images[:1]) == costs.counts([one.components - one.components // 2 for one in groups])

    stream = found["stem"]
    assert modules(stream.producers) == {"stem", "fc2"} and modules(stream.consumers) == {"fc1", "last"}

    class AlsoReadingOnes(networks.Repeated):
        def forward(self, images):
            return super().forward(images) + self.head(self.last(torch.ones(1, 16)))

    groups, refused = groups_of(AlsoReadingOnes().eval(), images)  # what `last` writes is as free as ever
    assert set(groups) == {"fc1", "last"}
    assert "last also runs on what always stays" in {refusal.reason for refusal in refused}

    class AlsoOnOnes(networks.Repeated):
        def forward(self, images):
            return super().forward(images) + self.fc2(torch.ones(1, 24)).sum()

    groups, refused = groups_of(AlsoOnOnes().eval(), images)
    assert set(groups) == {"last"}
    assert "fc2 also runs on what always stays" in {refusal.reason for refusal in refused}


def test_a_network_with_other_inputs_is_refused_in_one_sentence():
    with pytest.raises(UnsupportedModelError, match=r"Bilinear does not take an image batch of shape \(2, 3, 16, 16\)"):
        trace(nn.Bilinear(3, 4, 5), torch.randn(2, 3, 16, 16))
