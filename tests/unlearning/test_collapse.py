"""Collapse: where blocks end, which tokens are read, the solve against stacked rows, and what it promises."""

import copy

import pytest
import torch
from torch import nn

from modhifi_cli.data import arrays
from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError
from modhifi_cli.graph.segments import Segments
from modhifi_cli.graph.surgery import apply_edit_, weights_hash
from modhifi_cli.models import cifar_resnet, timm, torchvision
from modhifi_cli.numerics.readout import nearest_class_mean, recall
from modhifi_cli.numerics.rows import Window, unfold_rows
from modhifi_cli.unlearning.closings import find_closings, read_positions
from modhifi_cli.unlearning.collapse import RIDGES, CollapseU
from modhifi_cli.unlearning.search import UnlearnSummary
from tests.graph import transformers
from tests.unlearning.test_search import Images, Tokens, images, resnet, run, trained  # noqa: F401

SMALL_VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}


def vit():
    torch.manual_seed(0)
    model = timm.build(name="vit_tiny_patch16_224", num_classes=5, options=SMALL_VIT)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def closings(model, example):
    segments = Segments(model, example)
    trace = segments.trace
    kinds = (nn.Conv2d, nn.Linear)
    *names, last = (name for name in trace.visits if isinstance(model.get_submodule(name), kinds))
    return find_closings(model, segments, example, {name: trace.norm_of.get(name) for name in names}, last)


def test_a_residual_block_ends_with_the_convolution_whose_output_meets_the_shortcut(resnet):  # noqa: F811
    found = closings(resnet, images().images[:2])
    assert list(found) == ["conv1", "layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2"]
    assert [one.last for one in found.values()] == [False, False, False, True]
    assert [one.pooled for one in found.values()] == [False, False, False, True]
    assert found["layer3.0.conv2"].stream == "layer3.0.shortcut" and found["conv1"].stream is None


def test_a_block_with_a_convolution_in_its_shortcut_ends_with_the_wider_one(randomise_):
    torch.manual_seed(0)
    model = randomise_(torchvision.build(name="resnet18", num_classes=5))
    found = closings(model, torch.randn(2, 3, 32, 32))
    assert found["layer4.0.conv2"].stream == "layer4.0.downsample"
    assert not any("downsample" in name for name in found)


def test_a_transformer_block_ends_with_the_second_layer_of_its_mlp_and_is_read_at_the_class_token_last():
    model, example = vit(), torch.randn(2, 3, 8, 8)
    found = closings(model, example)
    assert [name for name in found if "blocks" in name] == ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]
    assert found["blocks.1.mlp.fc2"].summed and found["blocks.1.mlp.fc2"].last
    assert not found["blocks.1.mlp.fc2"].pooled
    read = read_positions(model, example, ["blocks.0.mlp.fc2", "blocks.1.attn.qkv", "blocks.1.mlp.fc2"])
    assert {name: tokens.tolist() for name, tokens in read.items()} == {"blocks.1.mlp.fc2": [0]}


def test_a_swin_block_ends_with_its_mlp_although_its_tokens_stand_on_a_grid():
    model, source = transformers.build("swin"), images(size=32)
    found = closings(model, source.images[:2])
    assert list(found)[-2:] == ["layers.1.blocks.0.mlp.fc2", "layers.1.blocks.1.mlp.fc2"]
    assert found["layers.1.blocks.1.mlp.fc2"].last
    again = copy.deepcopy(model)
    edits, _ = run(model, source, CollapseU(beta=0.5, depth=2))
    assert [edit.name for edit in edits] == ["layers.1.blocks.0.mlp.fc2", "layers.1.blocks.1.mlp.fc2", "head.fc"]
    run(again, source, CollapseU(beta=0.5, depth=2), batch_size=7)
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(ours.detach().abs().max()))


def test_what_stands_beside_the_layer_is_the_stream(resnet):  # noqa: F811
    swin = transformers.build("swin"), torch.randn(3, 3, 32, 32)
    for model, example in ((vit(), torch.randn(3, 3, 8, 8)), swin, (resnet, images().images[:3])):
        name, closing = list(closings(model, example).items())[-1]
        norm = Segments(model, example).trace.norm_of.get(name)
        seen = {}
        for one in {norm or name, closing.place, *closing.reads}:
            model.get_submodule(one).register_forward_hook(
                lambda module, inputs, output, one=one: seen.update({one: output.clone()})
            )
        model(example)
        own = seen[norm or name]
        whole = (own + closing.beside(own, seen)).view_as(seen[closing.place])
        assert torch.allclose(seen[closing.place], whole if closing.summed else whole.relu(), atol=1e-5)


def test_the_last_block_is_the_least_squares_solution_on_stacked_rows(trained):  # noqa: F811
    source, beta, ridge = images(), 0.7, 0.05
    dense = copy.deepcopy(trained).eval()
    seen = {}
    for name in ("layer3.0", "layer3.0.conv2", "layer3.0.shortcut"):
        dense.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: (inputs[0].clone(), output.clone())})
        )
    with torch.no_grad():
        logits = dense(source.images).double()
    retain = source.labels != 2
    weights = torch.where(retain[:, None], logits, 3 * logits)
    weights[:, 2] = -torch.inf
    weights = weights.softmax(1)
    block = seen["layer3.0"][1].double()
    means = torch.stack(
        [block[source.labels == k].mean(0) if k != 2 else torch.zeros(block[0].shape) for k in range(5)]
    )
    means = means.mean((2, 3), keepdim=True).expand_as(means)  # the classifier sees no more of them
    norm, conv = dense.layer3[0].bn2, dense.layer3[0].conv2
    spread = (norm.running_var + norm.eps).sqrt().double()[:, None, None]
    wanted = torch.einsum("ik,kchw->ichw", weights, means.double()) - seen["layer3.0.shortcut"][1].double()
    wanted = (wanted - norm.bias.double()[:, None, None]) * spread / norm.weight.double()[:, None, None]
    wanted += norm.running_mean.double()[:, None, None]
    usable = norm.weight.abs() > 0.1 * norm.weight.abs().mean()
    assert usable.any()
    rows = unfold_rows(seen["layer3.0.conv2"][0], Window.of(3, padding=1)).double()
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    targets = wanted.movedim(1, -1).flatten(0, 2)
    positions = len(rows) // len(source)
    of_retain = retain.repeat_interleave(positions)
    counts = int(of_retain.sum()), int((~of_retain).sum())
    share = torch.where(of_retain, 1 / counts[0], beta / counts[1]).double().sqrt()[:, None]
    energy = float(rows[of_retain, :-1].square().mean())
    before = torch.cat([conv.weight.detach().flatten(1).double(), torch.zeros(len(conv.weight), 1)], 1)
    anchor = torch.eye(rows.shape[1] - 1, rows.shape[1]).double() * (ridge * energy) ** 0.5
    matrix = torch.cat([rows * share, anchor])
    right = torch.cat([targets * share, anchor @ before.T])
    expected = torch.linalg.lstsq(matrix, right, driver="gelsd").solution.T

    run(trained, source, CollapseU(beta=beta, ridge=ridge, depth=1, sharpness=3))
    found = trained.layer3[0].conv2.weight.detach().flatten(1).double()
    assert torch.allclose(
        found[usable], expected[usable, :-1].detach(), atol=1e-3 * float(expected.detach().abs().max())
    )
    moved = norm.running_mean - trained.layer3[0].bn2.running_mean
    assert torch.allclose(
        moved.double()[usable], expected[usable, -1], atol=1e-3 * float(expected.detach().abs().max())
    )


def test_a_ridge_is_chosen_where_rows_are_few_and_left_small_where_they_are_many(trained):  # noqa: F811
    edits, _ = run(trained, images(300), CollapseU(depth=1))
    chosen = {edit.name: (edit.facts["ridge"], edit.facts["retain_rows"]) for edit in edits}
    assert chosen["layer3.0.conv2"] == (1e-3, 4 * 240)
    edits, _ = run(vit(), images(), CollapseU(depth=1))
    (layer, head), retain = edits, 48
    assert layer.facts["ridge"] in RIDGES and layer.facts["retain_rows"] < retain
    assert head.facts["ridge"] in RIDGES
    edits, _ = run(vit(), images(), CollapseU(depth=1, ridge=0.3))
    assert {(edit.facts["ridge"], edit.facts["retain_rows"]) for edit in edits} == {(0.3, retain)}


def test_the_classifier_answers_nothing_for_the_forgotten_class_whatever_the_ridge():
    model = vit()
    run(model, images(), CollapseU(depth=1, ridge=10.0))
    with torch.no_grad():
        logits = model(images().images)
    assert not model.head.weight[2].any()
    assert torch.allclose(logits[:, 2], model.head.bias[2].expand(60), atol=1e-6)


@pytest.mark.parametrize("network", ["resnet", "vit"])
def test_edits_replay_and_do_not_depend_on_the_batches(trained, network):  # noqa: F811
    model = trained if network == "resnet" else vit()
    dense, again = copy.deepcopy(model), copy.deepcopy(model)
    edits, events = run(model, images(), CollapseU(beta=0.5, depth=2))
    assert isinstance(events[-1], UnlearnSummary) and len(edits) == 3
    for edit in edits:
        apply_edit_(dense, edit)
    assert weights_hash(dense) == weights_hash(model)
    run(again, images(), CollapseU(beta=0.5, depth=2), batch_size=7)
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(ours.detach().abs().max()))


def test_the_class_is_forgotten_and_nearer_to_the_others_inside(trained):  # noqa: F811
    source = images()
    dense = copy.deepcopy(trained)
    run(trained, source, CollapseU(beta=1.0, depth=1))
    forget = source.labels == 2

    def features(model):
        head, model.linear = model.linear, nn.Identity()
        with torch.no_grad():
            found = model(source.images)
        model.linear = head
        return found

    def distance(found):
        between = (found[forget].mean(0) - found[~forget].mean(0)).square().sum()
        return float(between / found[~forget].var(0).sum())

    with torch.no_grad():
        before, after = (model(source.images).argmax(1) == source.labels for model in (dense, trained))
    assert before[forget].double().mean() > 0.8 and after[forget].double().mean() < 0.2
    assert after[~forget].double().mean() > before[~forget].double().mean() - 0.15
    assert distance(features(trained)) < 0.8 * distance(features(dense))


def test_classes_without_images_are_refused_since_their_features_could_not_be_rebuilt(trained):  # noqa: F811
    source = images()
    source.labels = torch.where(source.labels == 4, 0, source.labels)
    before = weights_hash(trained)
    with pytest.raises(DataError, match="mean of every class that stays, and there are images of 3 of 4; .*method=contrast_few"):
        run(trained, source, CollapseU(depth=1))
    assert weights_hash(trained) == before


def test_a_network_whose_blocks_end_in_nothing_that_can_be_solved_is_refused():
    with pytest.raises(UnsupportedModelError, match="last block does not end in one layer's output plus a stream"):
        run(Tokens(), images(), CollapseU())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"depth": 0}, "method.depth must be a whole number from 1; got 0"),
        ({"beta": -1}, "method.beta must be a number from 0, or auto; got -1"),
        ({"ridge": -1}, "method.ridge must be a number from 0; got -1"),
        ({"collapse": 1.5}, "method.collapse must be a number from 0 to 1; got 1.5"),
        ({"sharpness": 0}, "method.sharpness must be a number above 0; got 0"),
        ({"earlier": "all"}, "method.earlier must be a number from 0 to 1; got 'all'"),
    ],
)
def test_settings_out_of_range(setting, words):
    with pytest.raises(ConfigError, match=words):
        CollapseU(**setting)


@pytest.mark.real
def test_a_real_class_is_gone_at_the_output_and_harder_to_read_inside_at_a_price_below_three_points(test_data):
    torch.set_num_threads(1)
    loaded = cifar_resnet.load(name="resnet20_cifar", weights=str(test_data / "weights/cifar10_resnet20.safetensors"))
    found = {}
    for name, count in (("train_10000", 1000), ("test", 800)):
        source = arrays.load(
            path=str(test_data / f"cifar10/{name}.npz"), preprocess=loaded.preprocess, labelled=True, num_samples=count
        )
        found[name] = next(source.batches(count))
    (known, labels), (asked, truth) = found.values()
    model = copy.deepcopy(loaded.model)
    run(model, Images(known, labels), CollapseU(), forget=(3,), batch_size=100)
    cats = truth == 3
    told = {}
    for which, network in (("dense", loaded.model), ("edited", model)):
        seen: list[torch.Tensor] = []
        handle = network.linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            network(known)
            right = network(asked).argmax(1) == truth
        handle.remove()
        mean = nearest_class_mean(seen[0], labels, seen[1])
        told[which] = float(right[cats].double().mean()), float(right[~cats].double().mean()), recall(mean, truth)[3]
    assert told["edited"][0] <= 0.01 < 0.7 < told["dense"][0]
    assert told["edited"][1] >= told["dense"][1] - 0.03
    assert told["edited"][2] <= told["dense"][2] - 0.1
