"""Repair towards the dense network: what it promises on small networks with every kind of coupling."""

import copy

import pytest
import torch
from torch import nn

from modhifi_cli.engine.dense import STEP
from modhifi_cli.errors import DataError
from modhifi_cli.graph.law import randomise_
from modhifi_cli.graph.segments import inputs_seen, outputs_seen
from modhifi_cli.graph.surgery import apply_edit_, weights_hash
from modhifi_cli.graph.trace import Join, trace
from modhifi_cli.numerics.compensation import Joint
from modhifi_cli.records import Edit
from tests.engine.test_prune import Images, run, setting
from tests.graph import networks, transformers


def seen(model, images, *, inputs=(), outputs=()):
    read, given = {}, {}
    with (
        torch.no_grad(),
        inputs_seen(model, {name: lambda x, name=name: read.update({name: x.clone()}) for name in inputs}),
        outputs_seen(model, {name: lambda x, name=name: given.update({name: x.clone()}) for name in outputs}),
    ):
        model(images)
    return read, given


def logit_error(model, dense, images):
    with torch.no_grad():
        wanted = dense(images)
        return float((model(images) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


@pytest.mark.parametrize("batchnorm", ["reestimate", "stored"])
@pytest.mark.parametrize("name", networks.SMALL)
def test_edits_replay_and_a_resumed_run_ends_with_the_same_weights(name, batchnorm):
    model, images = setting(name)
    dense = copy.deepcopy(model)
    settings = {"compensation": Joint(reference="dense"), "sparsity": 0.3, "batchnorm": batchnorm}
    edits, _ = run(model, images, **settings)
    steps = [edit for edit in edits if edit.state.step == STEP]
    assert steps and all(edit.facts["error_after"] <= edit.facts["error_before"] + 1e-6 for edit in steps)
    if name == "grouped":
        assert "layers.8" in [edit.name for edit in steps], "filters of depthwise convolutions are fitted, too"
    replayed = copy.deepcopy(dense)
    for edit in edits:
        apply_edit_(replayed, edit)
    assert weights_hash(replayed) == weights_hash(model)
    groups = len(edits) - len(steps)
    for stop in (groups - 1, groups, groups + 1, len(edits)):
        again = copy.deepcopy(dense)
        rest, _ = run(again, images, **settings, done=edits[:stop])
        assert len(rest) == len(edits) - stop
        assert weights_hash(again) == weights_hash(model)


@pytest.mark.parametrize("batchnorm", ["reestimate", "stored"])
def test_it_is_the_current_reference_where_nothing_in_front_was_edited(batchnorm):
    # One group is cut; the first layer behind it sees an otherwise untouched network, its shortcut included.
    results = {}
    for reference in ("current", "dense"):
        model, images = setting("option_a", count=48)
        convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        edits, _ = run(
            model,
            images,
            compensation=Joint(ridge=0.0, reference=reference),
            batchnorm=batchnorm,
            exclude=[name for name in convs if not name.startswith("layer1.0.")],
            target="components",
        )
        assert [edit.name for edit in edits if edit.removed.numel()] == ["layer1.0.conv1"]
        results[reference] = model
    one, other = (results[key].layer1[0] for key in ("current", "dense"))
    torch.testing.assert_close(other.conv2.weight, one.conv2.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.bn2.running_mean, one.bn2.running_mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.bn2.running_var, one.bn2.running_var, rtol=1e-3, atol=1e-4)


def test_what_is_left_of_the_target_cannot_be_explained_by_the_layers_input():
    # Normal equations, with the residual stream in the target, on the rows themselves.
    model, images = setting("option_a", count=48)
    dense = copy.deepcopy(model)
    edits, _ = run(model, images, compensation=Joint(ridge=0.0, reference="dense"), sparsity=0.3)
    block = [edit.name for edit in edits if edit.facts.get("residual")][-1].rpartition(".")[0]
    names = [f"{block}.conv2", f"{block}.shortcut"]
    read, ours = seen(model, images.images, inputs=names[:1], outputs=names)
    _, theirs = seen(dense, images.images, outputs=names)
    norm = dense.get_submodule(f"{block}.bn2")
    alive = next(e.kept for e in edits if f"{block}.conv2" in [m.module for m in e.modules if m.kept_outputs is not None])
    worth = ((norm.running_var + norm.eps).sqrt() / norm.weight)[alive][:, None, None]
    lacking = theirs[names[1]][:, alive] - ours[names[1]]
    target = theirs[names[0]][:, alive] + worth * lacking
    left = (target - ours[names[0]]).movedim(1, -1).flatten(0, 2).double()
    rows = torch.nn.functional.unfold(read[names[0]], 3, padding=1).movedim(1, -1).flatten(0, 1).double()
    rows, left = rows - rows.mean(0), left - left.mean(0)
    assert lacking.abs().max() > 1e-2  # the stream did change
    assert (left.T @ rows / len(rows)).abs().max() < 1e-3 * left.std() * rows.std()


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_transformers_layers_make_up_for_what_the_stream_lacks_behind_a_layer_scale_too(name):
    # Normal equations again: γ o + s is the dense network's as nearly as a linear layer can make it.
    model, images = transformers.build(name), Images(transformers.images(name, 48))
    randomise_(model)
    dense = copy.deepcopy(model)
    run(model, images, compensation=Joint(ridge=0.0, reference="dense"), sparsity=0.3)
    for layer, stream, behind, scale in (
        ("blocks.1.attn.proj", "blocks.1.norm1", "blocks.1.norm2", "ls1"), ("blocks.1.mlp.fc2", "blocks.1.norm2", "", "ls2"),
    ):  # fmt: skip
        read, given = seen(model, images.images, inputs=[layer, stream, *filter(None, [behind])], outputs=["blocks.1"])
        was, gave = seen(dense, images.images, inputs=[stream, *filter(None, [behind])], outputs=["blocks.1"])
        left = was[behind] - read[behind] if behind else gave["blocks.1"] - given["blocks.1"]
        left = left.flatten(0, -2).double()
        gamma = getattr(dense.get_submodule(f"blocks.1.{scale}"), "gamma", torch.ones(left.shape[1])).double()
        left, rows = left / gamma, read[layer].flatten(0, -2).double()
        rows, left = rows - rows.mean(0), left - left.mean(0)
        assert (was[stream] - read[stream]).abs().max() > 1e-2  # the stream did change
        assert (left.T @ rows / len(rows)).abs().max() < 1e-3 * left.std() * rows.std()


def test_stored_statistics_keep_the_dense_mean_behind_the_layer():
    model, images = setting("option_a", count=48)
    dense = copy.deepcopy(model)
    edits, _ = run(model, images, compensation=Joint(reference="dense"), sparsity=0.3, batchnorm="stored")
    last = [edit for edit in edits if edit.facts.get("residual")][-1]
    block = last.name.rpartition(".")[0]
    names = [f"{block}.bn2", f"{block}.shortcut"]
    _, ours = seen(model, images.images, outputs=names)
    _, theirs = seen(dense, images.images, outputs=names)
    alive = next(e.kept for e in edits if last.name in [m.module for m in e.modules if m.kept_outputs is not None])
    mean = (ours[names[0]] + ours[names[1]]).mean((0, 2, 3))
    wanted = (theirs[names[0]] + theirs[names[1]])[:, alive].mean((0, 2, 3))
    torch.testing.assert_close(mean, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["option_a", "projected"])
def test_the_logits_come_nearer_to_the_dense_ones(name):
    errors = {}
    for reference in ("current", "dense"):
        model, images = setting(name, count=64)
        dense = copy.deepcopy(model)
        run(model, images, compensation=Joint(reference=reference), sparsity=0.4)
        errors[reference] = logit_error(model, dense, images.images)
    assert errors["dense"] < 0.9 * errors["current"]


def test_a_branch_is_joined_with_what_is_added_to_it():
    model, example = networks.small("option_a")
    joins = trace(model, example).joins
    assert joins["layer1.0.bn2"] == Join("layer1.0.shortcut") and joins["layer2.0.bn2"] == Join("layer2.0.shortcut")
    assert "layer1.0.conv2" not in joins and "layer1.0.bn1" not in joins
    model, example = networks.small("projected")
    joins = trace(model, example).joins
    assert joins["project"] == Join("down") and joins["down"] == Join("project") and "inner" not in joins


def test_a_stream_that_no_module_gives_is_the_input_of_the_norm_that_reads_it():
    model, example = transformers.build("vit"), transformers.images("vit")
    joins = trace(model, example).joins
    assert joins["blocks.0.attn.proj"] == Join("norm_pre") and joins["blocks.1.attn.proj"] == Join("blocks.0")
    assert joins["blocks.0.mlp.fc2"] == Join("blocks.0.norm2", read=True)
    assert "blocks.0.mlp.fc1" not in joins and "blocks.0.attn.qkv" not in joins


def test_a_layer_scale_between_a_layer_and_the_stream_is_seen():
    model, example = transformers.build("dinov2"), transformers.images("dinov2")
    joins = trace(model, example).joins
    for name, scale, stream, read in (
        ("blocks.1.attn.proj", "ls1", "blocks.0", False), ("blocks.1.mlp.fc2", "ls2", "blocks.1.norm2", True),
    ):  # fmt: skip
        join = joins[name]
        assert (join.stream, join.read) == (stream, read)
        assert torch.equal(join.gamma, model.get_submodule(f"blocks.1.{scale}").gamma)


def test_edits_of_another_layer_are_not_taken_up():
    model, images = setting("option_a")
    dense = copy.deepcopy(model)
    settings = {"compensation": Joint(reference="dense"), "sparsity": 0.3}
    edits, _ = run(model, images, **settings)
    first = next(number for number, edit in enumerate(edits) if edit.state.step == STEP)
    swapped = [*edits[:first], edits[first + 1]]
    with pytest.raises(DataError, match="solve '.*' again towards the dense network; it is another run's"):
        run(dense, images, **settings, done=swapped)
    assert all(isinstance(edit, Edit) for edit in edits)
