"""The table before/after/change, protocols in words, and charts as JSON."""

import json

import pytest

from modhifi_cli.errors import DataError
from modhifi_cli.pages import figures, terms
from modhifi_cli.records import Chart, Measurement, Series

MEASURED = (
    Measurement("dense", "top1", 93.39, "%", {"correct": 9339, "samples": 10000, "data": {"source": "cifar10"}}),
    Measurement("pruned", "top1", 92.19, "%", {"correct": 9219, "samples": 10000}),
    Measurement("pruned", "agreement", 95.0, "%"),
    Measurement("dense", "parameters", 853018.0, "parameters"),
    Measurement("pruned", "parameters", 511811.0, "parameters"),
    Measurement("dense", "macs", 125_500_000.0, "MACs"),
    Measurement("pruned", "macs", 125_500_000.0, "MACs"),
    Measurement("pruned", "speedup", 1.5412, "×"),
)


def test_rows_stand_in_the_order_of_measuring_with_both_sides():
    rows = terms.table(MEASURED)

    assert [(row.label, row.before, row.after, row.change, row.better) for row in rows] == [
        ("top-1 accuracy", "93.39 %", "92.19 %", "−1.20 points", False),
        ("agreement with dense", "", "95.00 %", "", None),
        ("parameters", "853.0 k", "511.8 k", "−40.0 % (1.67× less)", True),
        ("FLOPs (MACs)", "125.5 M", "125.5 M", "±0", None),
        ("speedup", "", "1.54 ×", "", None),
    ]


def timed(macs, speedup, p10, p90):
    protocol = {"batch": 64, "runtime": "eager", "low": p10, "high": p90}
    return (
        Measurement("dense", "macs", 100.0, "MACs"), Measurement("pruned", "macs", macs, "MACs"),
        Measurement("pruned", "speedup", speedup, "×", protocol),
    )  # fmt: skip


def test_fewer_flops_that_are_no_less_time_are_said():
    said = terms.not_faster(timed(70.0, 1.02, 0.99, 1.05))
    words = "30.0% fewer FLOPs are only 2.0% less time in eager here (batch of 64, 0.99 to 1.05 times as fast"
    assert said.startswith(words)
    assert "round_to=auto" in said and "target=latency" in said
    assert "no less time (25.0% more) in eager here" in terms.not_faster(timed(70.0, 0.8, 0.75, 0.9))
    assert terms.not_faster(timed(40.0, 1.36, 1.34, 1.38)) is None, "26 % less time for 60 % fewer FLOPs are worth having"
    assert terms.not_faster(timed(70.0, 1.3, 1.2, 1.4)) is None, "23 % less time for 30 % fewer FLOPs"
    assert terms.not_faster(timed(70.0, 1.1, 0.9, 1.4)) is None, "the clock is too restless to say so"
    assert terms.not_faster(timed(95.0, 1.0, 1.0, 1.0)) is None
    assert terms.not_faster(timed(70.0, 1.0, 1.0, 1.0)[:2]) is None, "nothing was timed"


def test_two_times_are_compared_by_the_speedup_alone():
    speedup = {"told": "too noisy to tell: between 0.80 and 1.30 times", "runtime": "eager", "batch": 64}
    rows = terms.table(
        [Measurement("dense", "latency_ms", 12.0, "ms", {"runtime": "eager", "batch": 64}),
         Measurement("pruned", "latency_ms", 15.0, "ms", {"runtime": "eager", "batch": 64}),
         Measurement("pruned", "speedup", 1.1, "×", speedup)]
    )  # fmt: skip
    assert [(row.label, row.after, row.change, row.better) for row in rows] == [
        ("latency, eager, batch 64", "15.0 ms", "", None),
        ("speedup, eager", "too noisy to tell: between 0.80 and 1.30 times", "", None),
    ]


def test_one_network_stands_in_its_own_column():
    (dense,) = terms.table([Measurement("dense", "latency_ms", 12.345, "ms")])
    (pruned,) = terms.table([Measurement("pruned", "latency_ms", 234.5, "ms")])

    assert (dense.before, dense.after, dense.change) == ("12.3 ms", "", "")
    assert (pruned.before, pruned.after, pruned.change) == ("", "234 ms", "")


def test_terms_nobody_knows_keep_their_name_and_make_no_judgement():
    rows = terms.table(
        [Measurement("dense", "grue_count", 5.0, ""), Measurement("pruned", "grue_count", 6.0, "")]
    )

    assert (rows[0].label, rows[0].after, rows[0].change) == ("grue count", "6", "+20.0 % (1.20× more)")
    assert rows[0].better is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (999, "bytes", "999 B"),
        (1_080_000, "bytes", "1.08 MB"),
        (269_722, "parameters", "269.7 k"),
        (12, "parameters", "12"),
        (4.1e9, "MACs", "4.10 G"),
        (0.012345, "nats", "0.01235 nats"),
        (0.5, "ms", "0.500 ms"),
        (13.0, "ms", "13.0 ms"),
        (99.97, "ms", "100 ms"),
    ],
)
def test_quantities_are_rounded_for_readers(value, unit, text):
    assert terms.quantity(value, unit) == text


def test_distances_between_logits_change_by_a_difference():
    assert terms.change(3.5, 0.5, "logits") == "−3.0000"


def test_change_from_zero_is_a_difference_not_a_share():
    assert terms.change(0.0, 0.25, "nats") == "+0.2500"


def test_measurements_with_one_protocol_share_its_line():
    protocol = {"batch": 64, "iterations": 5}
    measured = [Measurement("dense", name, 1.0, "ms", protocol) for name in ("latency_ms", "latency_ms_jit")]

    assert terms.protocol_lines(measured) == ["dense, latency_ms, latency_ms_jit: batch 64; iterations 5"]


def test_a_chart_comes_back_from_its_json_and_numbers_that_are_none_stay_out():
    series = (Series("greedy", (0.1, None), (1.0, 2.0), (0.01, 0.0), panel="layer1"),)
    chart = Chart("name", "title", "x, %", "y", series, levels={"dense": 0.9})
    assert figures.chart_from_json(json.loads(json.dumps(figures.chart_to_json(chart)))) == chart
    odd = Chart("name", "t", "x", "y", (Series("a", (float("nan"),), (1.0,)),))
    assert figures.chart_to_json(odd)["series"][0]["y"] == [None]


@pytest.mark.parametrize("plain", [{}, {"series": 3}, {"series": [{"name": "a", "y": [], "colour": 1}], "name": "b"}])
def test_a_chart_of_another_version_is_refused(plain):
    with pytest.raises(DataError, match="a chart's file is damaged or of another version"):
        figures.chart_from_json(plain)
