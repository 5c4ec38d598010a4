"""Pruning vision transformers: heads and neurons go, output projections are repaired, every step can be replayed."""

import copy

import pytest
import torch

from modhifi_cli.graph.heads import adopt_
from modhifi_cli.graph.law import randomise_
from modhifi_cli.graph.segments import inputs_seen
from modhifi_cli.graph.surgery import apply_edit_, weights_hash
from modhifi_cli.numerics.compensation import Joint, NoCompensation
from modhifi_cli.numerics.scoring import Magnitude
from modhifi_cli.numerics.selection import Greedy, TopK
from tests import reference
from tests.engine.test_prune import Images, run
from tests.graph import transformers


def setting(name, count=40):
    model = transformers.build(name)
    randomise_(model)  # biases and heads that start at zero and layer scales of 1e-5 would hide mistakes
    return model, Images(transformers.images(name, count))


def error(model, dense, images):
    with torch.no_grad():
        wanted = dense(images)
        return float((model(images) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


@pytest.mark.parametrize("name", ["vit", "dinov2", "torchvision_vit", "swinv2"])
def test_an_output_projection_is_repaired_as_centred_least_squares_with_its_bias(name):
    model, images = setting(name)
    reader = {
        "vit": "blocks.0.attn.proj",
        "dinov2": "blocks.0.attn.proj",
        "torchvision_vit": "encoder.layers.encoder_layer_0.self_attention.out_proj",
        "swinv2": "layers.1.blocks.0.attn.proj",
    }[name]
    dense = copy.deepcopy(model)
    everything = {part for part, _ in model.named_modules() if part}
    attention = reader.rpartition(".")[0]
    ends = (".mlp", "cpb_mlp.0", "attn", "self_attention")
    spared = [part for part in everything if part.endswith(ends) and part != attention]
    edits, _ = run(
        model, images, exclude=spared, sparsity=0.25, target="components", scoring=Magnitude(), selection=TopK(),
        compensation=Joint(ridge=1e-3),
    )  # fmt: skip
    edit = next(edit for edit in edits if edit.name == attention)
    adopt_(dense)
    rows = []
    with torch.no_grad(), inputs_seen(dense, {reader: lambda seen: rows.append(seen.flatten(0, -2).double())}):
        dense(images.images)
    rows = torch.cat(rows)
    layer, repaired = dense.get_submodule(reader), model.get_submodule(reader)
    weight = layer.weight.detach().double()
    # Moments are sums of float32 products: where a head varies little about a large mean the fourth digit is theirs.
    size = weight.shape[1] // (edit.kept.numel() + edit.removed.numel())
    assert size == 8
    features = (edit.kept[:, None] * size + torch.arange(size)).flatten()
    expected = reference.joint_weight(rows, weight, features.tolist(), ridge=1e-3, centred=True)
    mean = rows.mean(0)
    bias = layer.bias.detach().double() + weight @ mean - expected @ mean[features]
    assert torch.allclose(repaired.weight.detach().double(), expected, rtol=0, atol=1e-4)
    assert torch.allclose(repaired.bias.detach().double(), bias, rtol=0, atol=1e-4)


def test_neurons_are_chosen_by_what_reaches_the_stream_behind_a_layer_scale():
    model, images = setting("dinov2")
    block = model.blocks[0]
    neurons = block.mlp.fc2.in_features
    with torch.no_grad():
        block.ls2.gamma.fill_(1e-3)
        block.ls2.gamma[0] = 1.0
        block.mlp.fc2.weight[:, : neurons // 2] *= 10  # loud, where the layer scale lets next to nothing through
        block.mlp.fc2.weight[0, : neurons // 2] = 0
    spared = [name for name, _ in model.named_modules() if name.endswith((".attn", "blocks.1.mlp"))]
    edits, _ = run(
        model, images, exclude=spared, sparsity=0.8, target="components", selection=Greedy(), compensation=NoCompensation()
    )
    kept = edits[0].kept
    assert edits[0].name == "blocks.0.mlp.fc1" and len(kept) < neurons // 4
    assert int((kept >= neurons // 2).sum()) > 0.8 * len(kept)


@pytest.mark.parametrize("name", transformers.FAMILIES)
def test_repair_brings_the_pruned_network_nearer_and_its_edits_replay_to_equal_weights(name):
    model, images = setting(name)
    errors = {}
    for how, compensation in (("none", NoCompensation()), ("joint", Joint()), ("dense", Joint(reference="dense"))):
        pruned = copy.deepcopy(model)
        edits, events = run(
            pruned, images, sparsity=0.3, target="components", selection=Greedy(), compensation=compensation
        )
        errors[how] = error(pruned, model, images.images)
        again = copy.deepcopy(model)
        for edit in edits:
            apply_edit_(again, edit)
        assert weights_hash(again) == weights_hash(pruned)
        with torch.no_grad():
            assert torch.equal(again(images.images), pruned(images.images))
        assert events[-1].achieved["flops"] > 0.1
    assert errors["joint"] < 0.8 * errors["none"]
    assert errors["dense"] < 0.8 * errors["none"]


@pytest.mark.parametrize("name", ["vit", "cait", "torchvision_swin_v2"])
def test_a_run_that_goes_on_ends_with_the_weights_of_an_undisturbed_one(name):
    model, images = setting(name, count=12)
    dense = copy.deepcopy(model)
    settings = {"compensation": Joint(reference="dense"), "sparsity": 0.3, "iterations": 2}
    edits, _ = run(model, images, **settings)
    for stop in (1, len(edits) // 2, len(edits)):
        again = copy.deepcopy(dense)
        rest, _ = run(again, images, **settings, done=edits[:stop])
        assert len(rest) == len(edits) - stop
        assert weights_hash(again) == weights_hash(model)
