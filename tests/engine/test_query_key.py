"""Features of queries and keys as components: found where a class can lose them, cut in closed form, saved and replayed."""

import copy
from dataclasses import replace

import pytest
import torch

from modhifi_cli.engine.plan import discover
from modhifi_cli.errors import DataError
from modhifi_cli.graph.counting import CostModel, count
from modhifi_cli.graph.heads import PAIRS
from modhifi_cli.graph.law import check, slice_groups_
from modhifi_cli.graph.segments import inputs_seen
from modhifi_cli.graph.surgery import apply_edit_, describe_widths, restore_widths_, weights_hash
from modhifi_cli.numerics.allocation import Global
from modhifi_cli.numerics.compensation import Joint
from modhifi_cli.numerics.selection import Greedy
from tests.engine.test_prune import run
from tests.engine.test_prune_transformers import error, setting
from tests.graph import transformers

CAN = ("vit", "deit", "dinov2")


def products(groups):
    return [group for group in groups if group.product]


@pytest.mark.parametrize("name", CAN)
def test_features_of_every_attention_are_lawful_and_their_network_answers_as_before(name):
    model, example = transformers.build(name), transformers.images(name)
    with torch.no_grad():
        before = model(example)
    _, groups, _ = discover(model, example, products=True)
    assert [group.name for group in products(groups)] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert check(model, groups, example).holds
    with torch.no_grad():
        assert torch.allclose(model(example), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(transformers.FAMILIES) - {*CAN, "packed_gate"}))
def test_attention_whose_logits_are_more_than_the_product_is_left_whole(name):
    model = transformers.build(name)
    _, groups, _ = discover(model, transformers.images(name), products=True)
    assert groups and not products(groups)


def test_what_is_excluded_stays_whole():
    model, example = transformers.build("vit"), transformers.images("vit")
    _, groups, _ = discover(model, example, exclude=["blocks.0"], products=True)
    assert [group.name for group in products(groups)] == ["blocks.1.attn.qkv"]


@pytest.mark.parametrize("widths", [(3, 2, 40), (8, 1, 96), (1, 3, 7), (5, 2, 96)])
def test_heads_and_features_of_one_layer_are_counted_together_and_built_again(widths):
    model, example = transformers.build("vit"), transformers.images("vit")
    _, groups, _ = discover(model, example, products=True)
    keep = [*widths, *widths]
    costs = CostModel(model, example[:1], groups)
    assert [group.components for group in groups] == [8, 3, 96] * 2
    narrow = copy.deepcopy(model)
    slice_groups_(narrow, groups, [torch.arange(k, g.components) for k, g in zip(keep, groups, strict=True)])
    assert count(narrow, example[:1]) == costs.counts(keep)
    again = transformers.build("vit", seed=7)
    restore_widths_(again, describe_widths(narrow))
    again.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        assert torch.equal(again(example), narrow(example))


def test_the_kept_features_give_the_logits_of_least_error_of_every_head():
    model, images = setting("vit")
    dense = copy.deepcopy(model)
    spared = [name for name, _ in model.named_modules() if name.endswith(("mlp", "attn.proj"))]
    edits, _ = run(
        model, images, exclude=[*spared, "blocks.1"], sparsity=0.5, target="components", compensation=Joint(),
        query_key=True,
    )  # fmt: skip
    assert [edit.name for edit in edits] == ["blocks.0.attn.qkv"]
    seen = []
    with torch.no_grad(), inputs_seen(dense, {"blocks.0.attn.qkv": seen.append}):
        dense(images.images)
    rows = torch.cat(seen).flatten(0, -2).double()

    def written(network, features):
        layer = network.get_submodule("blocks.0.attn.qkv")
        both = (rows @ layer.weight.detach().double().T + layer.bias.detach().double())[:, : 2 * 3 * features]
        queries, keys = both.unflatten(-1, (2, 3, features)).unbind(1)
        return queries.transpose(0, 1), (keys - keys.mean(0)).transpose(0, 1)

    for queries, keys, less, fewer in zip(*written(dense, 8), *written(model, 4), strict=True):
        logits = queries @ keys.mT
        left = torch.linalg.svd(queries @ torch.linalg.qr(keys).R.mT, full_matrices=False).S
        least = float(left[4:].square().sum() / left.square().sum())
        found = float((logits - less @ fewer.mT).square().sum() / logits.square().sum())
        assert found == pytest.approx(least, rel=1e-3)


RECIPE = {
    "sparsity": 0.3, "target": "flops", "selection": Greedy(), "compensation": Joint(reference="dense"),
    "allocation": Global(), "query_key": True, "batchnorm": "stored",
}  # fmt: skip


@pytest.mark.parametrize("passes", [1, 2])
def test_a_run_is_repaired_replayed_and_resumed_to_equal_weights(passes):
    model, images = setting("vit", count=64)
    dense = copy.deepcopy(model)
    edits, events = run(model, images, iterations=passes, **RECIPE)
    cut = [edit for edit in edits if edit.name.endswith(".qkv") and edit.state.step == "cut"]
    assert cut and any(edit.modules[-1].turn is not None for edit in cut)
    assert events[-1].achieved["flops"] == pytest.approx(0.3, abs=0.03)
    replayed = copy.deepcopy(dense)
    for edit in edits:
        apply_edit_(replayed, edit)
    assert weights_hash(replayed) == weights_hash(model)
    with torch.no_grad():
        assert torch.equal(replayed(images.images), model(images.images))
    for stop in (edits.index(cut[0]) + 1, edits.index(cut[-1]) + 1, len(edits) - 1):
        again = copy.deepcopy(dense)
        run(again, images, iterations=passes, **RECIPE, done=edits[:stop])
        assert weights_hash(again) == weights_hash(model)


def test_layers_that_write_turned_features_are_solved_again_in_the_turned_basis():
    """Solved for features of another basis the network would be worse than without the solve."""
    model, images = setting("vit", count=64)
    dense = copy.deepcopy(model)
    parts = {"exclude": ["blocks.0.attn", "blocks.1.mlp"], "sparsity": 0.1}
    errors = {}
    for how in ("current", "dense"):
        pruned = copy.deepcopy(dense)
        edits, _ = run(pruned, images, **{**RECIPE, **parts, "compensation": Joint(reference=how)})
        errors[how] = error(pruned, dense, images.images)
    assert any(edit.name == "blocks.1.attn.qkv" and edit.state.step == "dense" for edit in edits)
    assert getattr(pruned.blocks[1].attn, PAIRS) < 8
    assert errors["dense"] < errors["current"]


def test_an_edit_whose_turn_is_anothers_is_refused_in_a_sentence():
    model, images = setting("vit", count=64)
    dense = copy.deepcopy(model)
    edits, _ = run(model, images, **RECIPE)
    place = next(number for number, edit in enumerate(edits) if edit.modules[-1].turn is not None)
    last = edits[place].modules[-1]
    for turn in (last.turn[:, :1], last.turn[0], last.turn[..., :1]):
        modules = (*edits[place].modules[:-1], replace(last, turn=turn))
        with pytest.raises(DataError, match=r"turns features \(.*\) where \(2, 3, 8, .*\) is expected; it is another run's"):
            run(copy.deepcopy(dense), images, **RECIPE, done=[*edits[:place], replace(edits[place], modules=modules)])
