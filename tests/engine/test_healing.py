"""Healing: what training towards the dense network promises, whatever the network, and every error it can cause."""

import copy
import dataclasses

import pytest
import torch

from modhifi_cli.engine import healing
from modhifi_cli.engine.healing import (
    Distill,
    Healed,
    HealingState,
    augmented,
    divergence,
    find_places,
    heal_,
)
from modhifi_cli.engine.token_walk import DecoderOptions
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.graph.answers import respond
from modhifi_cli.graph.surgery import apply_edit_, weights_hash
from modhifi_cli.numerics.compensation import Joint
from modhifi_cli.numerics.scoring import Energy
from modhifi_cli.numerics.selection import TopK
from modhifi_cli.records import Edit, Progress
from tests.decoders import tiny, tokens
from tests.engine.test_prune import Images, run, setting
from tests.engine.test_prune_decoder import prune
from tests.graph import networks

SHORT = Distill(epochs=2, block_epochs=1, batch_size=8, sequences=4, lr=3e-3)


def pruned(name="option_a", count=40):
    model, images = setting(name, count)
    dense = copy.deepcopy(model)
    edits, _ = run(model, images)
    return model, dense, images, edits


def pruned_decoder():
    model, text = tiny("llama").float(), tokens()
    dense = copy.deepcopy(model)
    edits, _ = prune(
        model, scoring=Energy(), selection=TopK(), compensation=Joint(ridge=1e-3), options=DecoderOptions()
    )
    return model, dense, text, edits


def healed(model, dense, samples, edits, recipe=SHORT, **more):
    events = list(heal_(model, dense, samples, recipe=recipe, edits=edits, **more))
    (summary,) = (event for event in events if isinstance(event, Healed))
    return summary, [event for event in events if isinstance(event, Edit)], events


def held_out_divergence(model, dense, samples):
    every = torch.cat([inputs for inputs, _ in samples.batches(8)])
    held = every[4::5]
    with torch.no_grad():
        return float(divergence(respond(dense, held), respond(model, held), 1.0))


@pytest.mark.parametrize("kind", [*networks.SMALL, "decoder"])
def test_held_out_samples_never_lose_and_the_edit_replays(kind):
    model, dense, samples, edits = pruned_decoder() if kind == "decoder" else pruned(kind)
    before, closed = held_out_divergence(model, dense, samples), copy.deepcopy(model)
    summary, own, _ = healed(model, dense, samples, edits)
    after = held_out_divergence(model, dense, samples)
    assert summary.before == pytest.approx(before, rel=1e-4) and summary.after == pytest.approx(after, rel=1e-4)
    assert after <= before and summary.trained == (after < before) == bool(own)
    assert summary.held_out * 5 == len(samples) == summary.held_out + summary.samples
    for edit in own:
        apply_edit_(closed, edit)
    assert weights_hash(closed) == weights_hash(model)


@pytest.mark.parametrize(("kind", "share"), [("option_a", 0.8), ("decoder", 0.95)])
def test_training_helps_where_much_was_cut(kind, share):
    model, dense, samples, edits = pruned_decoder() if kind == "decoder" else pruned(kind)
    summary, _, _ = healed(model, dense, samples, edits, Distill(epochs=8, batch_size=8, sequences=4, lr=3e-3))
    assert summary.trained and summary.after < share * summary.before


def test_layers_that_write_into_their_input_are_trained_too():
    def build():
        layers = [torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(inplace=True)]
        layers += [torch.nn.Conv2d(6, 6, 3), torch.nn.ReLU(inplace=True), torch.nn.Flatten(), torch.nn.Linear(864, 4)]
        return torch.nn.Sequential(*layers).eval()

    torch.manual_seed(0)
    dense, images = build(), Images(torch.randn(40, 3, 16, 16))
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model[3].weight.mul_(0.2)
        for network in (dense, model):
            network[6].weight.mul_(20)
    summary, _, _ = healed(model, dense, images, [], Distill(epochs=8, batch_size=8, lr=3e-3, augment=False))
    assert summary.trained and summary.after < 0.95 * summary.before


@pytest.mark.parametrize("kind", ["option_a", "decoder"])
def test_a_learning_rate_that_diverges_leaves_the_closed_form(kind):
    model, dense, samples, edits = pruned_decoder() if kind == "decoder" else pruned(kind)
    before = weights_hash(model)
    summary, own, _ = healed(model, dense, samples, edits, Distill(epochs=3, block_epochs=0, batch_size=8, lr=1e4))
    assert not own and not summary.trained and weights_hash(model) == before
    told = summary.warnings[0]
    assert "healing diverged" in told and "healing.lr=10000" in told and "the closed form; lower healing.lr" in told


def test_a_stage_that_loses_its_way_costs_the_next_nothing(monkeypatch):
    model, dense, samples, edits = pruned()
    rates = iter([1e3] * 4)
    plain = healing._rate
    monkeypatch.setattr(healing, "_rate", lambda step, steps: next(rates, None) or plain(step, steps))
    summary, own, _ = healed(model, dense, samples, edits)
    assert "blocks, epoch 1" in summary.warnings[0] and summary.trained and own
    assert [row["stage"] for row in summary.history] == ["blocks", "whole", "whole"]


def test_what_does_not_help_is_thrown_away_and_said():
    model, dense, samples, edits = pruned("repeated")
    before = weights_hash(model)
    summary, own, _ = healed(model, dense, samples, edits, SHORT)
    assert not own and weights_hash(model) == before
    assert "did not bring held-out samples nearer" in summary.warnings[0]


@pytest.mark.parametrize("stop", [1, 3, 7, 12])
def test_an_interrupted_healing_ends_with_the_same_weights(stop, monkeypatch):
    monkeypatch.setattr(healing, "_SAVE_SECONDS", -1.0)  # a state after every step
    model, dense, samples, edits = pruned()
    whole, again = copy.deepcopy(model), copy.deepcopy(model)
    undisturbed, _, _ = healed(whole, dense, samples, edits)
    state = None
    left = stop
    for event in heal_(model, dense, samples, recipe=SHORT, edits=edits):
        if isinstance(event, HealingState):
            state, left = event, left - 1
            if not left:
                break
    summary, _, _ = healed(again, dense, samples, edits, state=state)
    assert weights_hash(again) == weights_hash(whole) and summary == undisturbed
    assert [row["epoch"] for row in summary.history] == [1, 1, 2]


def test_batchnorm_statistics_embeddings_and_the_dense_network_stay():
    model, dense, samples, edits = pruned()
    buffers, untouched = {n: b.clone() for n, b in model.named_buffers()}, weights_hash(dense)
    healed(model, dense, samples, edits)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert weights_hash(dense) == untouched
    decoder, dense, text, edits = pruned_decoder()
    before = decoder.get_input_embeddings().weight.clone(), decoder.get_output_embeddings().weight.clone()
    summary, _, _ = healed(decoder, dense, text, edits)
    assert summary.trained and torch.equal(decoder.get_input_embeddings().weight, before[0])
    assert torch.equal(decoder.get_output_embeddings().weight, before[1])


@pytest.mark.parametrize("name", ["option_a", "concatenated"])
def test_batchnorms_that_follow_the_batches_are_part_of_the_edit(name):
    model, dense, samples, edits = pruned(name)
    again, before = copy.deepcopy(model), {key: value.clone() for key, value in model.named_buffers()}
    summary, (edit,), _ = healed(
        model, dense, samples, edits, dataclasses.replace(SHORT, batchnorm="batches", epochs=6)
    )
    assert summary.trained and not model.training
    changed = {key for key, value in model.named_buffers() if not torch.equal(value, before[key])}
    assert changed and all(key.endswith(("running_mean", "running_var")) for key in changed)
    apply_edit_(again, edit)
    assert weights_hash(again) == weights_hash(model)
    assert summary.after == pytest.approx(held_out_divergence(model, dense, samples), rel=1e-3)


@pytest.mark.parametrize("stop", [2, 6])
def test_a_healing_whose_batchnorms_follow_goes_on_to_the_same_weights(stop, monkeypatch):
    monkeypatch.setattr(healing, "_SAVE_SECONDS", -1.0)
    recipe = dataclasses.replace(SHORT, batchnorm="batches")
    model, dense, samples, edits = pruned()
    whole, again = copy.deepcopy(model), copy.deepcopy(model)
    undisturbed, _, events = healed(whole, dense, samples, edits, recipe)
    states = [event for event in events if isinstance(event, HealingState)]
    summary, _, _ = healed(again, dense, samples, edits, recipe, state=states[stop])
    assert weights_hash(again) == weights_hash(whole) and summary == undisturbed


def test_warnings_of_an_interrupted_healing_are_those_of_an_undisturbed_one(monkeypatch):
    model, dense, samples, edits = pruned()
    plain = healing._rate
    whole, again = copy.deepcopy(model), copy.deepcopy(model)
    rates = iter([1e3] * 4)
    monkeypatch.setattr(healing, "_rate", lambda step, steps: next(rates, None) or plain(step, steps))
    undisturbed, _, events = healed(whole, dense, samples, edits)
    last = [event for event in events if isinstance(event, HealingState)][-1]
    summary, _, _ = healed(again, dense, samples, edits, state=last)
    assert "blocks, epoch 1" in undisturbed.warnings[0] and summary == undisturbed


def test_averages_of_batchnorms_go_a_share_of_the_way_as_weights_do():
    model, dense, samples, edits = pruned()
    start, whole = copy.deepcopy(model), copy.deepcopy(model)
    recipe = dataclasses.replace(SHORT, batchnorm="batches", epochs=6)
    assert healed(whole, dense, samples, edits, dataclasses.replace(recipe, way=1.0))[0].trained
    summary, (edit,), _ = healed(model, dense, samples, edits, dataclasses.replace(recipe, way=0.25))
    assert summary.trained and summary.way == 0.25
    for (name, part), one, other in zip(model.named_buffers(), start.buffers(), whole.buffers(), strict=True):
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(part, torch.lerp(one, other, 0.25))
    again = copy.deepcopy(start)
    apply_edit_(again, edit)
    assert weights_hash(again) == weights_hash(model)


def test_a_network_without_batchnorm_is_told_that_nothing_follows():
    model, dense, text, edits = pruned_decoder()
    summary, _, _ = healed(model, dense, text, edits, dataclasses.replace(SHORT, batchnorm="batches"))
    assert "healing.batchnorm=batches changes nothing" in summary.warnings[0]


def test_a_lone_last_sample_joins_the_batch_before_it():
    model, dense, samples, edits = pruned("concatenated")  # 32 of 40 train
    recipe = dataclasses.replace(SHORT, batchnorm="batches", batch_size=31)
    summary, _, events = healed(model, dense, samples, edits, recipe)
    trained = [event for event in events if isinstance(event, Progress) and event.item.startswith("whole")]
    assert summary.epochs == 3 and {event.total for event in trained} == {2}  # a step an epoch


def test_of_made_up_samples_half_of_the_way_is_kept():
    model, dense, samples, edits = pruned()
    start, whole = copy.deepcopy(model), copy.deepcopy(model)
    summary, _, _ = healed(whole, dense, samples, edits, dataclasses.replace(SHORT, way=1.0))
    assert summary.trained and summary.way == 1.0
    samples.protocol = {"source": "mixed", "parts": [{"source": "arrays"}, {"source": "inversion"}]}
    summary, _, _ = healed(model, dense, samples, edits)
    assert summary.trained and summary.way == 0.5 and "50% of the way" in healing.about(summary)
    for half, one, other in zip(model.parameters(), start.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(half, (one + other) / 2)
    assert summary.after == pytest.approx(held_out_divergence(model, dense, samples), rel=1e-3)


def test_of_other_samples_the_share_that_held_out_ones_like_best_is_kept():
    model, dense, samples, edits = pruned()
    found = {}
    for way in (0.25, 0.5, 0.75, 1.0):
        one = copy.deepcopy(model)
        found[way] = healed(one, dense, samples, edits, dataclasses.replace(SHORT, way=way))[0].after
    summary, _, _ = healed(model, dense, samples, edits)
    assert summary.way == min(found, key=found.get) and summary.after == min(found.values())


def test_half_precision_is_judged_as_it_is_kept():
    model, dense, text, edits = pruned_decoder()
    model, dense = model.bfloat16(), dense.bfloat16()
    summary, _, _ = healed(model, dense, text, edits)
    assert next(model.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        held = torch.cat([ids for ids, _ in text.batches(8)])[4::5]
        after = float(divergence(respond(dense, held).float(), respond(model, held).float(), 1.0))
    assert summary.after == pytest.approx(after, rel=1e-3)


def test_blocks_are_compared_on_the_channels_that_are_left():
    model, dense, images, edits = pruned()
    places = {place.module: place for place in find_places(model, dense, images.images[:2], edits)}
    assert len(places) >= 3
    for edit in edits:
        for part in edit.modules:
            if part.module == "layer2.0.conv2" and part.kept_outputs is not None:
                assert torch.equal(places["layer2"].channels, part.kept_outputs)
                return
    raise AssertionError("the stream of layer2 was not cut, so nothing was tested")


def test_a_block_trained_by_itself_learns_from_its_own_error_alone():
    model, dense, images, edits = pruned()
    work = healing._Work(model, dense, images.images, SHORT, edits, torch.device("cpu"), 0)
    first = work.places[0].module
    work.losses(images.images[:8], apart=True)
    front = {n: p for n, p in work.parameters.items() if n.startswith(("conv1", "bn1"))}
    own = {name: parameter.grad.clone() for name, parameter in front.items() if parameter.grad is not None}
    theirs, ours = {}, {}
    with healing._watched(dense, {first: healing._keep_in(theirs, first)}), torch.no_grad():
        dense(images.images[:8])
    work.student.zero_grad()
    with healing._watched(work.student, {first: lambda seen: ours.update(seen=seen) or None}):
        work.student(images.images[:8])
    wanted = theirs[first] if work.places[0].channels is None else theirs[first][:, work.places[0].channels]
    ((ours["seen"] - wanted).square().mean() / wanted.square().mean() / len(work.places)).backward()
    for name, gradient in own.items():
        assert torch.allclose(gradient, work.parameters[name].grad, rtol=1e-4, atol=1e-7), name
    assert own


def test_an_infinite_temperature_is_the_limit_of_high_ones():
    wanted, answers = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    high, infinite = (divergence(wanted, answers, temperature) for temperature in (1e4, float("inf")))
    assert torch.allclose(high, infinite, rtol=1e-3) and infinite > 0
    assert torch.allclose(divergence(wanted, answers + 3.0, float("inf")), infinite)  # no softmax sees a constant


def test_augmented_images_are_shifted_or_mirrored_copies():
    images = torch.arange(2 * 1 * 16 * 16).view(2, 1, 16, 16).float() + 1
    moved = augmented(images, torch.Generator().manual_seed(3))
    for image, of in zip(moved, images, strict=True):
        padded = torch.nn.functional.pad(torch.stack([of, of.flip(-1)]), (2, 2, 2, 2))
        views = padded.unfold(2, 16, 1).unfold(3, 16, 1).reshape(-1, 16, 16)
        assert any(torch.equal(image[0], view) for view in views)


def test_too_few_samples_are_refused():
    model, dense, images, edits = pruned()
    with pytest.raises(ConfigError, match="at least 5 calibration samples; got 4.*healing=none"):
        list(heal_(model, dense, Images(images.images[:4]), recipe=SHORT, edits=edits))


def test_a_state_of_another_network_is_refused():
    model, dense, images, edits = pruned()
    state = HealingState({}, {"stage": 0, "epoch": 0, "step": 1, "before": 1.0, "lowest": 1.0, "history": []})
    with pytest.raises(DataError, match="does not fit this network.*healing.safetensors"):
        list(heal_(model, dense, images, recipe=SHORT, edits=edits, state=state))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("epochs", -1, "healing.epochs must be a whole number from 0; got -1"),
        ("lr", 0, "healing.lr must be a number above 0; got 0"),
        ("temperature", "hot", "healing.temperature must be a number above 0, infinite or auto; got 'hot'"),
        ("temperature", 0, "healing.temperature must be a number above 0, infinite or auto; got 0"),
        ("batch_size", 0, "healing.batch_size must be a whole number from 1; got 0"),
        ("sequences", 1.5, "healing.sequences must be a whole number from 1; got 1.5"),
        ("match", -1.0, "healing.match must be a number from 0; got -1.0"),
        ("augment", 1, "healing.augment must be true or false; got 1"),
        ("way", 0, "healing.way must be a number above 0 up to 1, or auto; got 0"),
        ("way", 1.5, "healing.way must be a number above 0 up to 1, or auto; got 1.5"),
        ("batchnorm", "none", "healing.batchnorm must be stored or batches; got 'none'"),
    ],
)
def test_settings_out_of_range_are_one_sentence(key, value, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(SHORT, **{key: value})


def test_a_batch_of_one_cannot_be_standardised():
    with pytest.raises(ConfigError, match="takes healing.batch_size from 2; got 1"):
        Distill(batchnorm="batches", batch_size=1)


def test_no_epoch_at_all_is_refused():
    with pytest.raises(ConfigError, match="both 0, so nothing is trained; set healing=none"):
        Distill(epochs=0, block_epochs=0)


def test_progress_names_stage_and_epoch():
    _, _, events = healed(*pruned())
    items = [event.item for event in events if isinstance(event, Progress)]
    assert "blocks, epoch 1 of 1" in items and "whole, epoch 2 of 2" in items
