"""What holds of pruning whatever the network reads: one statement, checked on the walk over images and on that over tokens."""

import functools
from dataclasses import replace

import pytest
import torch

from modhifi_cli.engine import image_walk
from modhifi_cli.engine.curves import error_curves, trial_depths
from modhifi_cli.engine.image_walk import ImageWalk
from modhifi_cli.engine.plan import Plan
from modhifi_cli.engine.prune import prune_
from modhifi_cli.engine.token_walk import DecoderOptions, TokenWalk
from modhifi_cli.engine.walk import Budget, Recipe, Surveyed
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.graph.law import randomise_
from modhifi_cli.graph.surgery import apply_edit_, weights_hash
from modhifi_cli.numerics.allocation import Global, Uniform
from modhifi_cli.numerics.compensation import Joint, NoCompensation
from modhifi_cli.numerics.schedule import geometric
from modhifi_cli.numerics.scoring import Energy, Magnitude, Singleton
from modhifi_cli.numerics.selection import Greedy, TopK, Union
from modhifi_cli.records import Edit
from tests.decoders import tiny, tokens
from tests.graph import networks

WALKS = ("images", "tokens")
RECIPE = Recipe(Singleton(), Greedy(), Joint(), Uniform(), functools.partial(geometric, iterations=1))


class Images:
    """Unlabelled images in memory."""

    protocol: dict = {}

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def batches(self, batch_size):
        for batch in self.images.split(batch_size):
            yield batch, None


def dense(kind):
    if kind == "tokens":
        return tiny("llama")
    torch.manual_seed(0)
    model = networks.cifar_resnet.build(depth=8, widths=(8, 12, 16))
    randomise_(model)
    return model.eval()


def walk_over(kind, model):
    if kind == "tokens":
        return TokenWalk(model, tokens(), options=DecoderOptions(components=("mlp", "attention")))
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return ImageWalk(model, Images(images), batch_size=8)


def answers(kind, model):
    if kind == "tokens":
        inputs = {"input_ids": torch.stack(list(tokens(6, 12, seed=9).windows))}
        with torch.no_grad():
            return model(**inputs).logits.double()
    with torch.no_grad():
        return model(torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(2))).double()


def pruned(kind, recipe=RECIPE, budget=Budget(0.3, "components"), *, done=(), passes=1):
    """The edited network, its edits and all records."""
    model = dense(kind)
    recipe = replace(recipe, schedule=functools.partial(geometric, iterations=passes))
    events = list(prune_(walk_over(kind, model), recipe, budget, done=done))
    return model, [event for event in events if isinstance(event, Edit)], events


@pytest.mark.parametrize("kind", WALKS)
def test_removing_nothing_changes_nothing(kind):
    model, edits, _ = pruned(kind, budget=Budget(0.0))
    assert not edits and weights_hash(model) == weights_hash(dense(kind))


@pytest.mark.parametrize("kind", WALKS)
@pytest.mark.parametrize("target", ["params", "flops", "components"])
def test_a_target_is_reached_as_planned(kind, target):
    _, edits, events = pruned(kind, budget=Budget(0.2, target))
    plan = next(event for event in events if isinstance(event, Plan))
    achieved = events[-1].achieved
    assert {name: achieved[name] for name in plan.predicted} == pytest.approx(dict(plan.predicted), abs=1e-6)
    assert achieved[target] == pytest.approx(0.2, abs=0.06)
    assert {edit.name: edit.kept.numel() for edit in edits if edit.removed.numel()} == {
        group.name: group.keep for group in plan.groups if group.keep < group.components
    }


@pytest.mark.parametrize("kind", WALKS)
@pytest.mark.parametrize("selection", [TopK(), Union(), Greedy()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("scoring", [Singleton(), Magnitude(), Energy()], ids=lambda score: type(score).__name__)
def test_every_score_goes_with_every_selection(kind, scoring, selection):
    model, edits, _ = pruned(kind, replace(RECIPE, scoring=scoring, selection=selection))
    for edit in edits:
        whole = torch.cat([edit.kept, edit.removed])
        assert whole.unique().numel() == whole.numel() and torch.equal(edit.kept, edit.kept.sort().values)
    assert edits and torch.isfinite(answers(kind, model)).all()


@pytest.mark.parametrize("kind", WALKS)
@pytest.mark.parametrize("compensation", [Joint(), Joint(reference="dense")], ids=repr)
def test_repair_brings_the_answers_nearer_than_cutting_alone(kind, compensation):
    wanted = answers(kind, dense(kind))
    errors = [
        float((answers(kind, pruned(kind, replace(RECIPE, compensation=repair))[0]) - wanted).square().mean())
        for repair in (compensation, NoCompensation())
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("kind", WALKS)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    ("reference", "allocation"), [("current", Uniform()), ("dense", Uniform()), ("current", Global(floor=0.1))], ids=repr
)
def test_edits_replay_and_a_run_goes_on_from_any_of_them(kind, passes, reference, allocation):
    recipe = replace(RECIPE, compensation=Joint(reference=reference), allocation=allocation)
    model, edits, _ = pruned(kind, recipe, passes=passes)
    again = dense(kind)
    for edit in edits:
        apply_edit_(again, edit)
    assert weights_hash(again) == weights_hash(model)
    # Curves of a later pass are measured on the network as cut so far, so that going on takes them from it again.
    for stop in range(1, len(edits) + 1, max(1, len(edits) // 3)):
        resumed, rest, _ = pruned(kind, recipe, passes=passes, done=edits[:stop])
        assert len(rest) == len(edits) - stop
        assert weights_hash(resumed) == weights_hash(model)


@pytest.mark.parametrize("kind", WALKS)
def test_edits_of_another_run_are_refused(kind):
    _, edits, _ = pruned(kind)
    with pytest.raises(DataError, match="does not fit these settings"):
        pruned(kind, budget=Budget(0.5, "components"), done=edits)
    with pytest.raises(DataError, match="edits more than these settings make"):
        pruned(kind, budget=Budget(0.0), done=edits)


@pytest.mark.parametrize("kind", WALKS)
def test_curves_start_at_nothing_never_fall_and_leave_no_trace(kind):
    model = dense(kind)
    walk = walk_over(kind, model)
    for _ in walk.prepare(RECIPE, 1):
        pass
    stream = error_curves(walk, RECIPE)
    try:
        while True:
            next(stream)
    except StopIteration as end:
        curves, shapes, orders = end.value
    assert not orders, "cuts look again, since no layer is solved towards the dense network"
    assert weights_hash(model) == weights_hash(dense(kind))
    for part, curve, shape in zip(walk.parts, curves, shapes, strict=True):
        assert len(curve) == len(shape) == part.components and curve[0] == shape[0] == 0
        assert all(later >= before for before, later in zip(curve, curve[1:], strict=False)) and curve[-1] > 0


@pytest.mark.parametrize("kind", WALKS)
def test_trials_look_at_samples_that_their_repairs_were_not_fitted_to(kind):
    walk = walk_over(kind, dense(kind))
    found = [event for event in walk.survey() if isinstance(event, Surveyed)]
    assert [one.part.name for one in found] == [part.name for part in walk.parts]
    for one in found:
        for slot in walk.consumers(one.part):
            moments = one.gathered[slot.module]
            assert moments.held_out is not None and moments.statistics.rows == moments.fitted.rows
            # Every fifth sample is held out: of 40 images or 20 sequences.
            assert moments.statistics.rows == 4 * moments.held_out.rows


def test_a_survey_of_many_images_looks_at_whole_blocks_of_five_and_holds_out_the_same_ones(monkeypatch):
    monkeypatch.setattr(image_walk, "_SURVEYED", 20)
    monkeypatch.setattr(image_walk, "_ROWS_A_FEATURE", 1)
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    others = images.clone()
    others.view(4, 2, 5, 3, 16, 16)[:, 1] += 5
    many, same = (surveyed(ImageWalk(dense("images"), Images(those), batch_size=8)) for those in (images, others))
    monkeypatch.setattr(image_walk, "_SURVEYED", 100)
    every, other = (surveyed(ImageWalk(dense("images"), Images(those), batch_size=8)) for those in (images, others))
    for name, found in many.items():
        assert 2 * found.held_out.rows == every[name].held_out.rows and 2 * found.fitted.rows == every[name].fitted.rows
        assert torch.equal(found.fitted.mean, same[name].fitted.mean), "what lies between is not looked at"
        assert torch.equal(found.held_out.mean, same[name].held_out.mean)
        assert not torch.allclose(every[name].fitted.mean, other[name].fitted.mean)


def test_a_layer_with_few_rows_an_image_does_not_make_the_others_look_at_more_images(monkeypatch):
    monkeypatch.setattr(image_walk, "_SURVEYED", 10)
    monkeypatch.setattr(image_walk, "_ROWS_A_FEATURE", 4)
    images = torch.randn(80, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = surveyed(ImageWalk(dense("images"), Images(images), batch_size=8))
    # Fitted rows: the classifier's 16 features want 64 images of one row, the third stage's 144 want 36 of 16, others 10.
    expected = {"linear": 64, "layer3.0.conv2": 32 * 16, "layer2.0.conv2": 8 * 64, "layer1.0.conv2": 8 * 256}
    assert {name: found[name].statistics.rows for name in expected} == expected
    for name, step in (("linear", 1), ("layer3.0.conv2", 2), ("layer1.0.conv2", 8)):
        walk = ImageWalk(dense("images"), Images(images[torch.arange(80) // 5 % step == 0]), batch_size=8)
        alone = looked_at(walk, name)
        # Products are float32, of a batch, and batches are others.
        torch.testing.assert_close(found[name].held_out.mean, alone.held_out.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[name].fitted.summed, alone.fitted.summed, rtol=1e-5, atol=1e-5)


def looked_at(walk, name):
    slots = [slot for part in walk.parts for slot in walk.consumers(part) if slot.module == name]
    stream = walk.look(slots, "one layer", hold_out=True)
    while True:
        try:
            next(stream)
        except StopIteration as end:
            return end.value[name]


def surveyed(walk):
    return next(event for event in walk.survey() if isinstance(event, Surveyed)).gathered


@pytest.mark.parametrize("kind", WALKS)
def test_uneven_widths_follow_what_parts_cost_the_answers(kind):
    _, _, events = pruned(kind, replace(RECIPE, allocation=Global(floor=0.1)))
    plan = next(event for event in events if isinstance(event, Plan))
    assert len({group.keep / group.components for group in plan.groups}) > 1
    assert plan.impact_at(0.1) < plan.impact_at(0.4)
    assert events[-1].predicted_impact == pytest.approx(plan.impact_at(0.3))


@pytest.mark.parametrize("kind", WALKS)
def test_settings_out_of_range_are_named(kind):
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\), got 1.5"):
        pruned(kind, budget=Budget(1.5))
    with pytest.raises(ConfigError, match="target must be one of"):
        pruned(kind, budget=Budget(0.3, "weight"))
    with pytest.raises(ConfigError, match="cannot be reached"):
        pruned(kind, budget=Budget(0.999, "components"))


def test_trial_depths_are_multiples_of_what_must_stay_even():
    assert trial_depths(10, 1) == [2, 5, 8]
    assert trial_depths(9, 3) == [3, 6]
    assert trial_depths(1, 1) == [] and trial_depths(3, 3) == []
