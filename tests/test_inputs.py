"""What networks take and give beside an image batch and logits: sound, volumes, tables, several inputs, several heads."""

import copy

import pytest
import torch
from torch import nn

import modhifi_cli
from modhifi_cli.errors import DataError, NumericsError, UnsupportedModelError
from modhifi_cli.graph.surgery import apply_edit_
from modhifi_cli.models.called import Called, Form, side_by_side


def convolutions(kind: type, norm: type, **settings) -> nn.Module:
    """Two convolutions along any number of dimensions, the second with an odd geometry, and a classifier."""
    return nn.Sequential(
        kind(1, 12, 3, padding=1), norm(12), nn.ReLU(), kind(12, 16, 3, stride=2, padding=2, dilation=2, **settings),
        nn.ReLU(), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


class Towers(nn.Module):
    """An image and some words, read by two towers; it answers with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU())
        self.words, self.read = nn.Embedding(20, 8), nn.Linear(8, 16)
        self.one, self.other = nn.Linear(28, 3), nn.Linear(28, 2)

    def forward(self, image, words):
        both = torch.cat([self.seen(image).mean((2, 3)), self.read(self.words(words).mean(1)).relu()], 1)
        return {"one": self.one(both), "others": [self.other(both)]}


def pairs(labels: bool = False) -> list[dict]:
    torch.manual_seed(1)
    return [
        {"image": torch.randn(24, 3, 8, 8), "words": torch.randint(0, 20, (24, 5)), "path": ["a"] * 24}
        | ({"label": torch.zeros(24, dtype=torch.int64)} if labels else {})
        for _ in range(2)
    ]


@pytest.mark.parametrize(
    "kind, norm, shape, settings",
    [
        (nn.Conv1d, nn.BatchNorm1d, (1, 40), {}),
        (nn.Conv1d, nn.BatchNorm1d, (1, 40), {"padding_mode": "replicate"}),
        (nn.Conv3d, nn.BatchNorm3d, (1, 6, 7, 8), {}),
        (nn.Conv2d, nn.BatchNorm2d, (1, 9, 8), {"padding_mode": "reflect"}),
        (nn.Conv2d, nn.BatchNorm2d, (1, 9, 8), {"padding_mode": "circular"}),
    ],
    ids=["sound", "sound, replicated", "volumes", "reflected", "circular"],
)
def test_a_convolution_of_any_shape_is_repaired_as_least_squares_over_its_rows(kind, norm, shape, settings):
    torch.manual_seed(0)
    model, inputs = convolutions(kind, norm, **settings), torch.randn(60, *shape)
    chosen = ["compensation=joint", "compensation.ridge=1e-6", "selection=top_k", "allocation=uniform",
              "batchnorm=stored", "classifier=keep"]  # fmt: skip
    pruned, result = modhifi_cli.prune(
        model, inputs, sparsity=0.3, target="components", preset="fast", settings=chosen, exclude="8", check_data=False
    )
    kept = result.kept["0"]
    with torch.no_grad():  # the layer's rows, unfolded by convolving with unit kernels; a float64 solve of its own
        seen = model[2](model[1](model[0](inputs))).double()
        taps = 3 ** (len(shape) - 1)
        unit = copy.deepcopy(model[3]).double()
        unit.weight = nn.Parameter(torch.eye(12 * taps).double().view(12 * taps, 12, *model[3].kernel_size))
        unit.bias = None
        rows = unit(seen).flatten(2).transpose(1, 2).flatten(0, 1)
        wanted = rows @ model[3].weight.double().flatten(1).T
        own = (kept[:, None] * taps + torch.arange(taps)).flatten()
        centred, aim = rows[:, own] - rows[:, own].mean(0), wanted - wanted.mean(0)
        best = float((aim - centred @ torch.linalg.lstsq(centred, aim).solution).square().sum() / aim.square().sum())
        weight = pruned[3].weight.double()
        found = float((aim - centred @ weight.flatten(1).T).square().sum() / aim.square().sum())
    assert set(result.kept) == {"0"} and 0.01 < best < 0.9 and found == pytest.approx(best, rel=1e-3)


def test_several_inputs_and_heads_prune_and_the_network_comes_back_as_itself():
    torch.manual_seed(0)
    dense = Towers().eval()
    narrow, result = modhifi_cli.prune(dense, pairs(labels=True), sparsity=0.2, target="components", preset="fast")
    assert type(narrow) is Towers and set(result.kept) == {"seen.0", "seen.2", "read"}
    assert result.achieved["components"] == pytest.approx(0.2, abs=0.05)
    again = copy.deepcopy(dense)
    for edit in result.edits:
        apply_edit_(again, edit)
    batch = pairs()[0]
    with torch.no_grad():
        one, other = (network(batch["image"], batch["words"]) for network in (narrow, again))
    assert torch.equal(one["one"], other["one"]) and torch.equal(one["others"][0], other["others"][0])


def test_a_function_of_model_and_batch_decides_what_is_read_and_what_counts():
    torch.manual_seed(0)
    batches = [(each["words"], each["image"], each["path"]) for each in pairs()]
    found, refused = modhifi_cli.groups(
        Towers(), batches, forward=lambda model, batch: model(batch[1], batch[0])["one"], exclude=["read"]
    )
    assert {group.name for group in found} == {"seen.0", "seen.2"}
    assert any(each.name == "read" and "excluded" in each.reason for each in refused)


def test_labels_and_paths_beside_images_are_not_read_and_a_key_can_be_named():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    images, labels = torch.randn(24, 3, 8, 8), torch.randint(0, 4, (24,))
    found = [
        modhifi_cli.evaluate(net, batches, **given)
        for batches, given in (
            ([(images, labels, ["path"] * 24)], {}),
            ([{"image": images, "label": labels, "id": torch.arange(24)}], {}),
            ([{"scan": images, "mask": images, "target": labels}], {"inputs": "scan"}),
            ([(labels, images)], {"inputs": 1}),
        )
    ]
    assert all(each == found[0] and "top1" in each for each in found)


def test_a_network_in_bfloat16_prunes_on_batches_in_bfloat16():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).bfloat16()
    narrow, result = modhifi_cli.prune(net, torch.randn(48, 3, 8, 8).bfloat16(), sparsity=0.25)
    assert next(narrow.parameters()).dtype == torch.bfloat16 and result.achieved["params"] == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize(
    "batches, given, message",
    [
        ([{"a": torch.zeros(4, 3, 8, 8), "b": torch.zeros(4, 3, 8, 8)}], {}, "not clear which of a, b the network reads; n"),
        ([{"a": torch.zeros(4, 3, 8, 8)}], {"inputs": "b"}, "not clear which of a the network reads"),
        ([(torch.zeros(4, 3, 8, 8),)], {"inputs": 2}, "there is no entry 2 in a batch of 1; give its place"),
        ([{"a": torch.zeros(4, 3), "b": torch.zeros(5)}], {"forward": lambda m, b: b}, "2 tensors of lengths .4, 5."),
        ([torch.zeros(4, 3, dtype=torch.int64) - 1], {"forward": lambda m, b: b}, "whole numbers must not be negative"),
    ],
)
def test_batches_that_cannot_be_read_are_told(batches, given, message):
    with pytest.raises(DataError, match=message):
        modhifi_cli.groups(nn.Linear(3, 3), batches, **given)


def test_an_answer_without_numbers_for_each_sample_is_told():
    with pytest.raises(UnsupportedModelError, match="the network gives a tensor .1. for 4 samples, .* function of model"):
        side_by_side({"loss": torch.zeros(1)}, 4)
    with pytest.raises(UnsupportedModelError, match="the network gives a list without numbers"):
        side_by_side([], 4)


def test_a_network_that_runs_twice_says_what_to_do():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    batches = [(torch.randn(48, 3, 8, 8), torch.randn(48, 3, 8, 8))]

    def difference(model, batch):
        return model(batch[0]) - model(batch[1])

    with pytest.raises(UnsupportedModelError, match="runs more than once in one forward, .*; stack its inputs in one batch"):
        modhifi_cli.prune(net, batches, forward=difference)
    net[1] = nn.GroupNorm(4, 8)
    narrow, result = modhifi_cli.prune(net, batches, forward=difference, sparsity=0.25, check_data=False)
    assert narrow[0].out_channels < 8 and result.achieved["flops"] > 0.1


def test_what_is_packed_comes_out_as_it_went_in():
    batch = {"a": torch.randn(3, 2, 5), "b": [torch.randint(0, 9, (3, 4)), torch.rand(3) > 0.5], "c": "no tensor"}
    form = Form(batch)
    packed = form.pack(batch)
    found = form.unpack(packed)
    assert packed.shape == (3, 15) and torch.equal(found["a"], batch["a"])
    assert all(torch.equal(one, other) for one, other in zip(found["b"], batch["b"], strict=True))
    assert int(form.unpack(packed * -50)["b"][0].min()) >= 0  # what is drawn to try a network out stays in range
    with pytest.raises(DataError, match=r"expected a tensor \[batch, 2, 5\] as in the first batch, got \[3, 2, 6\]"):
        form.pack(batch | {"a": torch.zeros(3, 2, 6)})
    assert Called(nn.Identity(), Form(torch.zeros(2, 3)))(torch.ones(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_a_layer_of_which_the_data_say_nothing_is_left_alone_and_the_run_goes_on(preset):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    ).eval()  # fmt: skip
    net[2].bias.data.fill_(-100.0)  # dead on every image: the layer behind reads nothing but zeros
    _, result = modhifi_cli.prune(net, torch.randn(64, 3, 12, 12), sparsity=0.3, preset=preset, check_data=False)
    assert len(result.kept["0"]) < 12 and len(result.kept["2"]) == 8
    said = any("left alone after all: 4: at least one output must have energy" in text for text in result.warnings)
    assert said == (preset == "fast")  # error curves know before the first cut


def test_a_network_whose_only_layer_is_dead_is_an_error():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    net[0].bias.data.fill_(-100.0)
    with pytest.raises(NumericsError, match="3: at least one output must have energy on the calibration data"):
        modhifi_cli.prune(net, torch.randn(64, 3, 8, 8), sparsity=0.3, preset="fast", check_data=False)


def test_a_mask_of_ones_does_not_travel_and_must_stay_one():
    form = Form({"ids": torch.tensor([[1, 2], [3, 4]]), "mask": torch.ones(2, 2, dtype=torch.int64)})
    packed = form.pack({"ids": torch.tensor([[1, 2], [3, 4]]), "mask": torch.ones(2, 2, dtype=torch.int64)})
    assert packed.shape == (2, 2) and bool((form.unpack(packed * 0)["mask"] == 1).all())
    with pytest.raises(DataError, match="holds nothing but 1 in the first batch and other values later"):
        form.pack({"ids": torch.zeros(2, 2, dtype=torch.int64), "mask": torch.zeros(2, 2, dtype=torch.int64)})


def test_a_compiled_network_is_pruned_inside_and_a_scripted_one_is_told_of():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    narrow, _ = modhifi_cli.prune(torch.compile(net), torch.randn(48, 6), sparsity=0.25, check_data=False)
    assert isinstance(narrow, nn.Sequential) and narrow[0].out_features < 12 and net[0].out_features == 12
    with pytest.raises(UnsupportedModelError, match="modules of TorchScript cannot be cut; give the module that it was made"):
        modhifi_cli.prune(torch.jit.script(net), torch.randn(48, 6))
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    with pytest.raises(UnsupportedModelError, match="0 is quantised .Linear. and cannot be cut; prune the network that it was"):
        modhifi_cli.prune(quantised, torch.randn(48, 6))


def test_attention_that_divides_its_width_by_the_heads_is_told_what_to_store():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.n_head, self.c_attn, self.c_proj = 4, nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, stream):
            B, T, C = stream.size()
            q, k, v = self.c_attn(stream).split(C, dim=2)
            q, k, v = (each.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for each in (q, k, v))
            mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
            return stream + self.c_proj(mixed.transpose(1, 2).reshape(B, T, C))

    net = nn.Sequential(nn.Linear(8, 16), Attention(), nn.LayerNorm(16), nn.Flatten(), nn.Linear(160, 3))
    _, refused = modhifi_cli.groups(net, torch.randn(4, 10, 8))
    told = {each.name: each.reason for each in refused}["1.c_attn"]
    assert "computes the width of a head from that of its input (C // self.n_head), so that none can go; store head_dim" in told
