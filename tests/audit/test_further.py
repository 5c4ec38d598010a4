"""The further attacks of an audit: intervals, nearest classes, rounding; on the tiny networks of `test_audit`."""

import copy
import dataclasses

import pytest
import torch

from modhifi_cli.auditing.further import Further, interval
from modhifi_cli.errors import ConfigError
from modhifi_cli.pages import audit as audit_pages
from modhifi_cli.verbs.audit import audit_measurements
from tests.audit.test_audit import QUICK, blind, network, patterns, row_removed, run  # noqa: F401

FURTHER = dataclasses.replace(QUICK, further=Further(seeds=3, samples=60, bits=(8, 2)))


def test_an_interval_holds_the_mean_as_student_says():
    found = interval([1.0, 2.0, 3.0])
    half = 4.30 / 3**0.5
    assert found.mean == 2 and found.low == pytest.approx(2 - half) and found.high == pytest.approx(2 + half)
    assert interval([5.0]).low is None and interval([5.0]).mean == 5
    flat = interval([4.0, 4.0, 4.0])
    assert (flat.low, flat.high) == (4, 4)


def test_an_edit_of_the_row_is_told_from_its_neighbour_and_a_blind_network_is_not(network, row_removed, blind):  # noqa: F811
    told = run(network, row_removed, settings=FURTHER)
    neighbour = told.further["neighbour"]["edited"]
    assert neighbour["class"] != 3 and neighbour["draws"] == 3 and neighbour["mean"] > 70
    assert told.figures["edited"]["neighbour"] == neighbour["mean"]
    assert neighbour["low"] <= neighbour["mean"] <= neighbour["high"]
    unseen = run(network, blind, settings=FURTHER).further["neighbour"]["edited"]
    assert abs(unseen["mean"] - 50) < 15


def test_rounding_to_eight_bits_changes_little_and_is_measured_on_every_network(network, row_removed):  # noqa: F811
    found = run(network, row_removed, settings=FURTHER)
    dense, edited = found.further["rounding"]["dense"], found.further["rounding"]["edited"]
    assert set(dense) == {"int8", "int2"} and found.figures["edited"]["int8 FA"] == edited["int8"]["forget"] == 0
    assert abs(dense["int8"]["retain"] - found.accuracy["dense"]["evaluation"]["retain"]) < 5


def test_an_edit_that_only_just_hides_the_class_may_lose_it_again_by_rounding(network):  # noqa: F811
    edited = copy.deepcopy(network)
    with torch.no_grad():  # a small weight beside a large one is rounded away
        edited[3].weight[3] *= 1e-3
        edited[3].bias[3] = -1e-3
        edited[3].weight[3, 0] = 1.0
    found = run(network, edited, settings=FURTHER)
    assert found.further["rounding"]["edited"]["int2"] != found.further["rounding"]["edited"]["int8"]


def test_attacks_that_draw_have_intervals(network, row_removed):  # noqa: F811
    relearn = dataclasses.replace(QUICK.relearn, seeds=2)
    found = run(network, row_removed, settings=dataclasses.replace(FURTHER, relearn=relearn))
    assert found.further["intervals"]["MIA"]["edited"]["draws"] == 3
    assert found.further["intervals"]["relearn steps"]["edited"]["draws"] == 2
    assert found.further["intervals"]["MIA check"]["dense"]["low"] is not None


def test_every_figure_has_a_meaning_and_a_name_on_the_page_whatever_the_bits(network, row_removed):  # noqa: F811
    found = run(network, row_removed, settings=FURTHER)
    assert {"neighbour", "int8 FA", "int2 FA"} <= set(found.figures["edited"])
    for name in {name for figures in found.figures.values() for name in figures}:
        assert found.definitions[name.partition(",")[0]]
    assert "at most 60 images" in found.definitions["int2 FA"] and "through 2 bits" in found.definitions["int2 FA"]
    told = {measured.name: measured.protocol["definition"] for measured in audit_measurements(found)}
    assert told["audit_int2_FA"] == found.definitions["int2 FA"]
    names = {row["figure"] for row in audit_pages.rows(found.plain())}
    assert {"forget accuracy, weights in 2 bits (int2 FA), %", "told from the nearest class (neighbour), %"} <= names
    assert "int2 FA" not in run(network, row_removed).definitions, "what was not measured is not explained"


def test_without_evaluation_images_half_of_the_others_are_asked(network, row_removed):  # noqa: F811
    found = run(network, row_removed, settings=FURTHER, evaluation=None, calibration=patterns(80, 0))
    assert found.further["neighbour"]["edited"]["draws"] == 3
    assert found.further["intervals"]["MIA"] == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": 0}, "audit.further.seeds must be a whole number from 1; got 0"),
        ({"samples": 3}, "audit.further.samples must be a whole number from 10; got 3"),
        ({"bits": [1]}, r"audit.further.bits must be a list of whole numbers from 2 to 16; got \[1\]"),
        ({"bits": 8}, "audit.further.bits must be a list of whole numbers from 2 to 16; got 8"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Further(**settings)
