"""Features of queries and keys as components: found where a class can lose them, cut in closed form, saved and replayed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from modhifi_cli.engine.plan import discover
from modhifi_cli.errors import DataError
from modhifi_cli.files.exports.onnx import Onnx
from modhifi_cli.graph.counting import CostModel, count
from modhifi_cli.graph.law import check, slice_groups_
from modhifi_cli.graph.products import PAIRS
from modhifi_cli.graph.segments import inputs_seen
from modhifi_cli.graph.surgery import apply_edit_, describe_widths, restore_widths_, weights_hash
from modhifi_cli.numerics.allocation import Global
from modhifi_cli.numerics.compensation import Joint
from modhifi_cli.numerics.selection import Greedy
from modhifi_cli.records import LoadedModel, Preprocess
from tests.engine.test_prune import run
from tests.engine.test_prune_transformers import error, setting
from tests.graph import transformers

# By which part of an attention its group of features is named.
CAN = {
    **dict.fromkeys(("vit", "deit", "dinov2"), "qkv"),
    "torchvision_vit": "in_proj",
    **dict.fromkeys(("hf_vit", "hf_vit_without_biases", "hf_deit", "hf_dinov2"), PAIRS),
}
WRITERS = ("qkv", "in_proj", "q_proj", "query", "k_proj", "key")  # what writes queries and keys; the names change with versions


def attentions(model):
    """Names of the modules that hold one of these layers, in order."""
    inside = {name: set(module.state_dict()) for name, module in model.named_modules()}
    found = [name for name, keys in inside.items() if any(key.startswith(WRITERS) for key in keys)]
    return [name for name in found if "." not in name or name.rpartition(".")[2] not in WRITERS]


def names_of(name):
    return [f"{place}.{CAN[name]}" for place in attentions(transformers.build(name))]


def products(groups):
    return [group for group in groups if group.product]


def readers(model, example):
    """Layers that read the heads and the neurons, in order."""
    _, groups, _ = discover(copy.deepcopy(model), example)
    return [group.consumers[0].module for group in groups]


@pytest.mark.parametrize("name", CAN)
def test_features_of_every_attention_are_lawful_and_their_network_answers_as_before(name):
    model, example = transformers.build(name), transformers.images(name)
    with torch.no_grad():
        before = model(example)
    _, groups, _ = discover(model, example, products=True)
    assert [group.name for group in products(groups)] == names_of(name)
    assert check(model, groups, example).holds
    with torch.no_grad():
        assert torch.allclose(model(example), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted({*transformers.FAMILIES, *transformers.APART} - {*CAN, "packed_gate"}))
def test_attention_whose_logits_are_more_than_the_product_is_left_whole(name):
    model = transformers.build(name)
    _, groups, _ = discover(model, transformers.images(name), products=True)
    assert groups and not products(groups)


@pytest.mark.parametrize("name", ["vit", "torchvision_vit", "hf_vit"])
def test_features_of_a_lone_head_can_go_and_nothing_that_is_cut_is_listed_as_left_alone(name):
    model, example = transformers.build(name), transformers.images(name)
    _, groups, _ = discover(model, example, products=True)
    heads = [group for group in groups if group.components == 3]
    slice_groups_(model, heads, [torch.arange(2)] * 2)
    _, groups, refused = discover(model, example, products=True)
    assert [group.name for group in products(groups)] == names_of(name)
    assert not {group.name for group in groups} & {one.name for one in refused}


class Asking(nn.Module):
    """Tokens look at themselves, and then at others."""

    def __init__(self):
        super().__init__()
        self.patches, self.others = nn.Conv2d(3, 24, 8, 8), nn.Conv2d(3, 24, 8, 8)
        self.own, self.cross = (nn.MultiheadAttention(24, 3, batch_first=True) for _ in range(2))
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        tokens, memory = (layer(x).flatten(2).transpose(1, 2) for layer in (self.patches, self.others))
        tokens = tokens + self.own(tokens, tokens, tokens, need_weights=False)[0]
        asked = (memory, memory) if isinstance(self.cross, nn.MultiheadAttention) else ()
        return self.head((tokens + self.cross(tokens, *asked, need_weights=False)[0]).mean(1))


def test_attention_to_other_tokens_keeps_its_features_and_its_heads_can_go():
    model, example = Asking().eval(), transformers.images("vit")
    _, groups, _ = discover(model, example, products=True)
    assert [group.name for group in products(groups)] == ["own.in_proj"]
    assert {"own", "cross"} <= {group.name for group in groups}


class Normed(nn.Module):
    """Attention of transformers whose queries are normalised by its own code."""

    __module__ = "transformers.models.vit"

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 3, 8
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, hidden_states, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        shares = (nn.functional.normalize(query, dim=-1) @ key.mT).softmax(-1)
        return self.o_proj((shares @ value).transpose(1, 2).flatten(2)), shares


def test_features_that_are_changed_on_the_way_fail_the_law_and_are_listed():
    model, example = Asking().eval(), transformers.images("vit")
    model.cross = Normed().eval()
    _, groups, refused = discover(model, example, products=True)
    assert [group.name for group in products(groups)] == ["own.in_proj"]
    assert [one.name for one in refused if "slicing law" in one.reason] == [f"cross.{PAIRS}"]


@pytest.mark.parametrize("name", ["vit", "torchvision_vit", "hf_vit"])
def test_what_is_excluded_stays_whole(name):
    model, example = transformers.build(name), transformers.images(name)
    _, groups, _ = discover(model, example, exclude=attentions(model)[:1], products=True)
    assert [group.name for group in products(groups)] == names_of(name)[1:]


@pytest.mark.parametrize("widths", [(3, 2, 40), (8, 1, 96), (1, 3, 7), (5, 2, 96)])
@pytest.mark.parametrize("name", ["vit", "torchvision_vit", "hf_vit_without_biases", "hf_deit"])
def test_heads_and_features_of_one_layer_are_counted_together_and_built_again(name, widths):
    model, example = transformers.build(name), transformers.images(name)
    _, groups, _ = discover(model, example, products=True)
    neurons = 48 if name == "torchvision_vit" else 96
    keep = [min(width, size) for width, size in zip(widths, (8, 3, neurons), strict=True)] * 2
    costs = CostModel(model, example[:1], groups)
    assert [group.components for group in groups] == [8, 3, neurons] * 2
    narrow = copy.deepcopy(model)
    slice_groups_(narrow, groups, [torch.arange(k, g.components) for k, g in zip(keep, groups, strict=True)])
    assert count(narrow, example[:1]) == costs.counts(keep)
    again = transformers.build(name, seed=7)
    restore_widths_(again, describe_widths(narrow))
    again.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        assert torch.equal(again(example), narrow(example))
    _, groups, _ = discover(again, example, products=True)
    assert [group.components for group in groups] == [size for size in keep if size > 1]


@pytest.mark.parametrize("name", ["vit", "torchvision_vit", "hf_vit", "hf_vit_without_biases"])
def test_the_kept_features_give_the_logits_of_least_error_of_every_head(name):
    model, images = setting(name)
    dense = copy.deepcopy(model)
    first, second = attentions(model)
    spared = readers(model, images.images[:2])
    edits, _ = run(
        model, images, exclude=[*spared, second], sparsity=0.5, target="components", compensation=Joint(), query_key=True,
    )  # fmt: skip
    assert [edit.name for edit in edits] == names_of(name)[:1]
    seen = []
    with torch.no_grad(), inputs_seen(dense, {first: seen.append}):
        dense(images.images)
    rows = torch.cat(seen).flatten(0, -2).double()

    def written(network, features):
        own = network.get_submodule(first).state_dict().items()
        kinds = [[part for key, part in own if key.endswith(kind) and key.startswith(WRITERS)] for kind in ("weight", "bias")]
        weight, bias = (torch.cat(parts or [torch.zeros(1)]).double() for parts in kinds)
        both = (rows @ weight.T + bias)[:, : 2 * 3 * features]
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


@pytest.mark.parametrize(("name", "passes"), [("vit", 1), ("vit", 2), ("torchvision_vit", 2), ("hf_deit", 2), ("hf_vit", 1)])
def test_a_run_is_repaired_replayed_and_resumed_to_equal_weights(name, passes):
    model, images = setting(name, count=64)
    dense = copy.deepcopy(model)
    edits, events = run(model, images, iterations=passes, **RECIPE)
    cut = [edit for edit in edits if edit.name in names_of(name) and edit.state.step == "cut"]
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


@pytest.mark.parametrize(("name", "writers"), [("vit", 1), ("torchvision_vit", 1), ("hf_vit_without_biases", 2)])
def test_layers_that_write_turned_features_are_solved_again_in_the_turned_basis(name, writers):
    """Solved for features of another basis the network would be worse than without the solve."""
    model, images = setting(name, count=64)
    dense = copy.deepcopy(model)
    first, second = attentions(model)
    parts = {"exclude": [first, readers(model, images.images[:2])[-1]], "sparsity": 0.1}
    errors = {}
    for how in ("current", "dense"):
        pruned = copy.deepcopy(dense)
        edits, _ = run(pruned, images, **{**RECIPE, **parts, "compensation": Joint(reference=how)})
        errors[how] = error(pruned, dense, images.images)
    solved = {edit.name for edit in edits if edit.state.step == "dense"}
    assert len({f"{second}.{writer}" for writer in WRITERS} & solved) == writers
    assert getattr(pruned.get_submodule(second), PAIRS) < 8
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


@pytest.mark.parametrize("name", ["torchvision_vit", "hf_vit", "hf_vit_without_biases"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fewer_features_go_through_every_precision_with_the_dense_scale(name, dtype):
    """The last features carry nothing, so the logits are those of the dense network; another scale would move them."""
    model, example = setting(name)[0], transformers.images(name)
    _, groups, _ = discover(model, example, products=True)
    for group in products(groups):
        for slot in group.producers:
            layer = model.get_submodule(slot.module)
            with torch.no_grad():
                layer.weight[slot.index[5:].flatten()] = 0
                if layer.bias is not None:
                    layer.bias[slot.index[5:].flatten()] = 0
    model.to(dtype)
    with torch.no_grad():
        before = model(example.to(dtype))
        slice_groups_(model, products(groups), [torch.arange(5, 8)] * 2)
        after = model(example.to(dtype))
    assert after.dtype == dtype
    assert torch.allclose(after, before, rtol=0, atol=float(before.abs().max()) * 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["torchvision_vit", "hf_vit"])
def test_fewer_features_are_exported_to_onnx_with_a_free_batch(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, example = setting(name)[0], transformers.images(name)
    _, groups, _ = discover(model, example, products=True)
    slice_groups_(model, groups, [torch.arange(group.components // 3) for group in groups])
    loaded = LoadedModel(model, name, Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3), {}, "drawn")
    report = Onnx()(loaded, example=example[:1], path=tmp_path, facts={})
    session = runtime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = transformers.images(name, batch)
        with torch.no_grad():
            expected = model(images)
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        assert torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
