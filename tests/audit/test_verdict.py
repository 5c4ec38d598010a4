"""The verdict's logic, case by case; it never says that something was unlearned."""

import itertools

import pytest

from modhifi_cli.auditing.verdict import INSIDE, NOT_FORGOTTEN, OUTPUT_ONLY, UNDECIDED, Criterion, Limits, judge
from modhifi_cli.errors import ConfigError


def criterion(edited: float, *, control: float = 90.0, target: float = 50.0, resolution: float = 4.0) -> Criterion:
    return Criterion("linear probe", "%", control, edited, target, resolution)


CLOSED, OPEN, NO_GAP = criterion(60.0), criterion(80.0), criterion(60.0, target=88.0)


def verdict(criteria, *, forget: float = 0.0, retain: float = 91.5, reference: bool = True):
    return judge(
        forget={"dense": 91.0, "edited": forget, "head_only": 0.0},
        retain={"dense": 92.0, "edited": retain, "head_only": 92.4},
        criteria=criteria,
        images="evaluation images",
        reference=reference,
    )


def test_a_class_that_is_still_named_is_not_forgotten_whatever_is_inside():
    assert verdict([CLOSED, CLOSED], forget=16.3).level == NOT_FORGOTTEN


def test_forget_accuracy_alone_is_forgetting_at_the_output_only():
    assert verdict([criterion(90.0)]).level == OUTPUT_ONLY


def test_one_figure_short_of_half_is_enough_for_output_only():
    assert verdict([CLOSED, CLOSED, OPEN]).level == OUTPUT_ONLY
    assert verdict([CLOSED, CLOSED, CLOSED]).level == INSIDE


def test_exactly_half_of_the_gap_counts():
    assert criterion(70.0).closed == 0.5
    assert criterion(70.0).met
    assert not criterion(70.1).met


def test_figures_without_a_gap_decide_nothing():
    assert NO_GAP.closed is None
    assert NO_GAP.met is None
    assert verdict([NO_GAP, NO_GAP]).level == UNDECIDED
    assert verdict([NO_GAP, CLOSED]).level == INSIDE
    assert verdict([NO_GAP, OPEN]).level == OUTPUT_ONLY
    assert "too near each other for this figure to tell anything" in " ".join(verdict([NO_GAP]).sentences)


def test_what_a_damaged_network_no_longer_shows_does_not_count():
    found = verdict([CLOSED, CLOSED], retain=90.9)
    assert found.level == OUTPUT_ONLY
    assert "The other classes lost 1.1 points, more than the 1 allowed" in " ".join(found.sentences)
    assert verdict([CLOSED, CLOSED], retain=91.0).level == INSIDE


def test_more_relearn_steps_close_the_gap_upwards():
    steps = Criterion("relearning", "steps", 4.0, 12.0, 20.0, 2.0)
    assert steps.closed == 0.5
    assert verdict([steps]).level == INSIDE
    assert verdict([Criterion("relearning", "steps", 4.0, 11.0, 20.0, 2.0)]).level == OUTPUT_ONLY


def test_figures_that_are_only_bounds_are_told_as_such():
    never = Criterion("relearning", "steps", 4.0, 32.0, 20.0, 2.0, edited_more=True)
    assert (
        "edited more than 32 steps, reference 20 steps; the edit closes at least 175 %" in verdict([never]).sentences[2]
    )
    slow = Criterion("relearning", "steps", 4.0, 20.0, 32.0, 2.0, target_more=True)
    assert "reference more than 32 steps; the edit closes at most 57 %" in verdict([slow]).sentences[2]


def test_without_a_reference_the_verdict_says_what_it_compared_with():
    found = verdict([CLOSED], reference=False)
    assert found.compared_with == "chance"
    assert "There is no retrained reference" in found.sentences[-1]
    assert verdict([CLOSED]).compared_with == "reference"


def test_relearning_without_a_reference_is_compared_with_the_end_of_the_attack():
    steps = Criterion("relearning", "steps", 4.0, 12.0, 32.0, 2.0)
    assert "the end of the attack 32 steps" in verdict([steps], reference=False).sentences[2]
    assert "reference 32 steps" in verdict([steps]).sentences[2]


def test_no_verdict_says_unlearned():
    cases = itertools.product([0.0, 50.0], [80.0, 92.0], [[CLOSED], [OPEN], [NO_GAP], [CLOSED, OPEN]], [True, False])
    for forget, retain, criteria, reference in cases:
        found = verdict(criteria, forget=forget, retain=retain, reference=reference)
        assert "unlearn" not in " ".join([found.level, *found.sentences]).lower()


def test_the_grounds_name_the_control():
    assert "removing the classifier's rows and nothing else, reaches 0.0 % and 92.4 %" in verdict([OPEN]).sentences[1]


@pytest.mark.parametrize("name", ["forgotten", "retain_drop"])
def test_limits_out_of_range_are_refused(name):
    with pytest.raises(ConfigError, match=f"audit.verdict.{name} must be a number from 0 to 100; got -1"):
        Limits(**{name: -1})
