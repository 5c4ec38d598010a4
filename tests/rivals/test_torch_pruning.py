"""Torch-Pruning as an outside method: budgets met, cut as our surgery cuts, replayable, refusals in one sentence."""

import copy

import pytest
import torch
from torch import nn

from modhifi_cli.engine.plan import Plan, Summary
from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError
from modhifi_cli.graph.counting import count
from modhifi_cli.graph.modules import ChannelPadShortcut
from modhifi_cli.graph.surgery import apply_edit_, weights_hash
from modhifi_cli.models.cifar_resnet import CifarResNet
from modhifi_cli.records import Edit
from modhifi_cli.rivals import torch_pruning as outside
from modhifi_cli.rivals.torch_pruning import torch_pruning_


class Images:
    protocol = {"source": "random"}

    def __init__(self, count=12, channels=3, size=16):
        self.images = torch.randn((count, channels, size, size), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.images)

    def batches(self, batch_size):
        for part in self.images.split(batch_size):
            yield part, None


@pytest.fixture
def option_a(randomise_):
    """ResNet-8 with option-A shortcuts, random; every buffer and weight at working scale."""
    model = CifarResNet(8, shortcut="A")
    return randomise_(model)


def run(model, **settings):
    given = {"calibration": Images(), "sparsity": 0.4, "target": "flops", "importance": "magnitude"} | settings
    return list(torch_pruning_(model, **given))


@pytest.mark.parametrize("importance", outside.IMPORTANCES)
@pytest.mark.parametrize(
    ("target", "sparsity", "whole_network"),
    [("flops", 0.4, True), ("params", 0.4, True), ("flops", 0.25, False), ("flops", 0.5, False), ("params", 0.6, False)],
)
def test_the_budget_is_met_within_one_point_on_option_a(option_a, importance, target, sparsity, whole_network):
    events = run(option_a, importance=importance, target=target, sparsity=sparsity, whole_network=whole_network)
    summary = events[-1]
    assert isinstance(summary, Summary)
    assert abs(summary.achieved[target] - sparsity) < 0.01
    assert not summary.warnings
    assert option_a.linear.out_features == 10


def test_what_is_reported_is_what_was_cut(option_a):
    example = Images().images[:1]
    dense = count(option_a, example)
    events = run(option_a)
    after = count(option_a, example)
    assert events[-1].achieved["flops"] == pytest.approx(1 - after.macs / dense.macs)
    assert events[-1].achieved["params"] == pytest.approx(1 - after.parameters / dense.parameters)
    (plan,) = [event for event in events if isinstance(event, Plan)]
    assert sum(group.keep for group in plan.groups) < sum(group.components for group in plan.groups)
    shortcut = option_a.layer2[0].shortcut
    assert isinstance(shortcut, ChannelPadShortcut)
    assert shortcut.in_channels == option_a.layer1[0].conv2.out_channels
    assert shortcut.out_channels == option_a.layer2[0].conv2.out_channels


def test_its_edits_replay_without_data(option_a):
    dense = copy.deepcopy(option_a)
    for event in run(option_a):
        if isinstance(event, Edit):
            apply_edit_(dense, event)
    assert weights_hash(dense) == weights_hash(option_a)


def test_an_interrupted_run_goes_on_to_the_same_weights(option_a):
    again = copy.deepcopy(option_a)
    edits = [event for event in run(option_a) if isinstance(event, Edit)]
    for done in (edits[:2], edits):
        model = copy.deepcopy(again)
        run(model, done=done)
        assert weights_hash(model) == weights_hash(option_a)


def test_batchnorm_is_reestimated_or_stored_as_asked(option_a):
    stored, fresh = copy.deepcopy(option_a), option_a
    run(stored, batchnorm="stored")
    events = run(fresh)
    assert [event.name for event in events if isinstance(event, Edit)][-1] == "batchnorm"
    assert torch.equal(stored.conv1.weight, fresh.conv1.weight)
    inputs = fresh.conv1(Images().images)
    torch.testing.assert_close(fresh.bn1.running_mean, inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fresh.bn1.running_var, inputs.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(stored.bn1.running_mean, fresh.bn1.running_mean)


def test_excluded_modules_keep_their_width(option_a):
    run(option_a, exclude=["layer1.0.conv1"])
    assert option_a.layer1[0].conv1.out_channels == 16


def test_a_sparsity_of_zero_changes_nothing(option_a):
    before = weights_hash(option_a)
    assert run(option_a, sparsity=0.0)[-1].achieved["flops"] == 0
    assert weights_hash(option_a) == before


def test_a_budget_that_cannot_be_met_is_a_warning(option_a):
    nn.init.ones_(option_a.bn1.weight)
    for module in option_a.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # every channel scores the same, so no ratio lies between all and nothing
    (*_, summary) = run(option_a, importance="bn_scale", whole_network=True)
    assert "no pruning ratio of Torch-Pruning came closer" in summary.warnings[0]


def test_a_network_that_no_longer_runs_after_the_cut_is_refused(option_a, monkeypatch):
    monkeypatch.setattr(outside._ShortcutPruner, "prune_in_channels", lambda self, layer, idxs: layer)
    with pytest.raises(UnsupportedModelError, match="Torch-Pruning cannot prune CifarResNet .*leave this method out"):
        run(option_a)


def test_a_network_that_is_cut_otherwise_is_refused(option_a, monkeypatch):
    honest = outside._ShortcutPruner.prune_out_channels

    def rerouted(self, layer, idxs):
        honest(self, layer, idxs)
        layer.source = layer.source.flip(0)
        return layer

    monkeypatch.setattr(outside._ShortcutPruner, "prune_out_channels", rerouted)
    with pytest.raises(UnsupportedModelError, match="cuts .*shortcut.source .* in another way than its own groups say"):
        run(option_a)


def test_a_bare_parameter_across_the_channels_is_refused():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.second(self.first(x) * self.scale).mean((2, 3)))

    with pytest.raises(UnsupportedModelError, match="Torch-Pruning cannot prune Scaled .*leave this method out"):
        run(Scaled().eval())


def test_settings_out_of_range_are_one_sentence(option_a):
    with pytest.raises(ConfigError, match="outside.importance: there is no 'magnitud'; did you mean 'magnitude'"):
        run(option_a, importance="magnitud")
    with pytest.raises(ConfigError, match=r"sparsity .* must lie in \[0, 1\), got 1"):
        run(option_a, sparsity=1.0)
    with pytest.raises(ConfigError, match="target must be one of params, flops, components, got 'speed'"):
        run(option_a, target="speed")
    with pytest.raises(ConfigError, match="exclude: the network has no module 'layer9'"):
        run(option_a, exclude=["layer9"])
    with pytest.raises(DataError, match="holds no image"):
        run(option_a, calibration=Images(0))
