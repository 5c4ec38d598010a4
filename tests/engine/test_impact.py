"""The measured side of an uneven allocation: trial edits leave no trace, and scales come from the logits."""

import copy

import pytest
import torch
from torch import nn

from modhifi_cli.engine.impact import Impact, images_for, scaled_curve
from modhifi_cli.engine.plan import Plan
from modhifi_cli.graph.components import ComponentGroup, Slot
from modhifi_cli.graph.law import randomise_
from modhifi_cli.graph.segments import Segments
from modhifi_cli.graph.surgery import weights_hash
from modhifi_cli.numerics.allocation import Global
from modhifi_cli.numerics.compensation import Joint
from modhifi_cli.numerics.selection import Greedy
from tests.engine.test_prune import Images, run, setting


def test_a_trial_edit_is_undone_also_after_an_exception():
    model, images = setting("option_a")
    before = weights_hash(model)
    impact = Impact(Segments(model, images.images[:2]), images.images)
    assert impact.measure() == 0
    try:
        with impact.edited([model.conv1]):
            model.conv1.weight.data.zero_()
            moved = impact.measure()
            raise ValueError
    except ValueError:
        pass
    assert moved > 0.01 and weights_hash(model) == before


def test_the_measure_is_the_squared_change_over_the_variance():
    model, images = setting("flattened")
    logits = model(images.images).detach().double()
    impact = Impact(Segments(model, images.images[:2]), images.images)
    with impact.edited([model.head]), torch.no_grad():
        model.head.bias += 1.0
        moved = impact.measure()
    expected = logits.numel() / float((logits - logits.mean(0)).square().sum())
    assert abs(moved - expected) < 1e-4 * expected


def read_by(name):
    return ComponentGroup(name, 1, (), (), (Slot(name, torch.arange(1)[:, None]),))


@pytest.mark.parametrize("limit", [0.0, 1e9])
def test_a_trial_behind_a_cut_moves_the_logits_as_a_whole_forward_says(limit):
    """Also when a later trial lies further in front, and when nothing may be carried."""
    model, images = setting("option_a")
    layers = ["layer1.0.conv2", "layer2.0.conv2", "layer1.0.conv1", "linear"]
    whole = Impact(Segments(model, images.images[:2]), images.images)
    carried = Impact(Segments(model, images.images[:2]), images.images, limit_bytes=limit)
    for name in layers:
        module = model.get_submodule(name)
        carried.stand_before(read_by(name))
        with whole.edited([module]), torch.no_grad():
            module.weight *= 0.5
            expected, moved = whole.measure(), carried.measure()
        assert expected > 1e-4 and moved == pytest.approx(expected, rel=1e-3)


def test_a_classifier_with_fewer_images_than_features_does_not_look_free():
    """On the images it was fitted to it loses nothing; the plan must say what is lost on others."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)
    ).eval()  # fmt: skip
    randomise_(model)
    dense, fresh = copy.deepcopy(model), torch.randn(500, 3, 8, 8)
    _, events = run(
        model, Images(torch.randn(40, 3, 8, 8)), sparsity=0.3, target="components", allocation=Global(),
        selection=Greedy(), compensation=Joint(ridge=1e-3),
    )  # fmt: skip
    plan = next(event for event in events if isinstance(event, Plan))
    with torch.no_grad():
        before, after = dense(fresh), model(fresh)
    lost = float((after - before).square().sum() / (before - before.mean(0)).square().sum())
    assert plan.predicted_impact["0"] == pytest.approx(lost, rel=0.7) and lost > 0.02


@pytest.mark.parametrize("count, even", [(32, True), (40, False)])
def test_with_fewer_than_eight_images_held_out_the_cut_is_spread_evenly_and_said(count, even):
    model, images = setting("option_a", count=count)
    _, events = run(model, images, sparsity=0.3, allocation=Global(), selection=Greedy(), compensation=Joint(ridge=1e-3))
    plan = next(event for event in events if isinstance(event, Plan))
    shares = [group.keep / group.components for group in plan.groups]
    said = [text for text in events[-1].warnings if "8 must be held out, one in five), so the cut is spread evenly" in text]
    assert bool(said) == even and (plan.predicted_impact == {}) == even
    assert not even or max(shares) - min(shares) <= 0.25  # of groups of 4 to 12, less one step


def test_the_ridge_of_the_selection_is_that_of_the_curves():
    """A run that is told to raise selection.ridge must not go on with another one."""
    found = []
    for ridge in (1e-4, 10.0):
        model, images = setting("option_a", count=40)
        _, events = run(model, images, sparsity=0.3, allocation=Global(), selection=Greedy(ridge=ridge),
                        compensation=Joint(ridge=1e-3))  # fmt: skip
        found.append(next(event for event in events if isinstance(event, Plan)).predicted_error)
    assert found[0] != found[1]


def test_predicted_errors_say_what_a_lone_cut_does_to_the_logits():
    """The plan's number for a group is the change of the logits when that group alone is cut to the planned width."""
    model, images = setting("flattened", count=128)
    dense = copy.deepcopy(model)
    settings = {"selection": Greedy(against_scores=False), "compensation": Joint(ridge=1e-3), "batchnorm": "stored"}
    edits, events = run(model, images, sparsity=0.3, allocation=Global(), exclude=["conv"], **settings)
    plan = next(event for event in events if hasattr(event, "predicted_impact"))
    predicted = plan.predicted_impact
    assert set(predicted) == {"hidden"} and [edit.name for edit in edits] == ["hidden"]
    logits = dense(images.images).detach()
    moved = float((model(images.images).detach() - logits).square().sum() / (logits - logits.mean(0)).square().sum())
    assert 0.5 * moved < predicted["hidden"] < 2 * moved
    # and the error at the group's own reader, before the cut and after it
    measured = 1 - edits[0].facts["fidelity"]["head"]
    assert plan.predicted_error["hidden"] == pytest.approx(measured, rel=0.1)


def test_an_uneven_run_resumes_to_the_same_weights_and_meets_its_budget():
    model, images = setting("option_a", count=40)
    dense = copy.deepcopy(model)
    settings = {"selection": Greedy(), "compensation": Joint(), "allocation": Global(), "classifier": "refit"}
    edits, events = run(model, images, iterations=2, **settings)
    again = copy.deepcopy(dense)
    run(again, images, iterations=2, done=edits[: len(edits) // 2], **settings)
    assert weights_hash(again) == weights_hash(model)
    assert abs(events[-1].achieved["params"] - 0.4) < 0.1


def test_a_scaled_curve_meets_the_measurements_and_never_falls():
    errors = [0.0, 0.01, 0.04, 0.09, 0.16, 0.25]
    curve = scaled_curve(errors, {1: 0.02, 4: 0.12})
    assert curve[0] == 0 and curve[1] == pytest.approx(0.02) and curve[4] == pytest.approx(0.12)
    assert curve[5] == pytest.approx(0.25 * 0.75)  # behind the last depth its scale goes on
    assert all(after >= before for before, after in zip(curve, curve[1:], strict=False))


def test_without_a_usable_measurement_the_curve_stays():
    assert scaled_curve([0.0, 0.1, 0.4], {}) == [0.0, 0.1, 0.4]
    assert scaled_curve([0.0, 0.0, 0.4], {1: 0.2}) == [0.0, 0.0, 0.4]


def test_trials_run_on_a_sixteenth_of_the_images_and_cost_one_forward_at_most_together():
    assert [images_for(count, 4) for count in (48, 1024, 100_000)] == [16, 64, 256]
    assert [images_for(count, 40) for count in (48, 1024, 100_000)] == [16, 17, 256]
