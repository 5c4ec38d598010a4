"""The table before/after/change and the page of a run."""

from pathlib import Path

import pytest

from modhifi_cli import reports
from modhifi_cli.exports import ExportReport
from modhifi_cli.records import Measurement

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
    rows = reports.table(MEASURED)

    assert [(row.label, row.before, row.after, row.change, row.better) for row in rows] == [
        ("top-1 accuracy", "93.39 %", "92.19 %", "−1.20 points", False),
        ("agreement with dense", "", "95.00 %", "", None),
        ("parameters", "853.0 k", "511.8 k", "−40.0 % (1.67× less)", True),
        ("FLOPs (MACs)", "125.5 M", "125.5 M", "±0", None),
        ("speedup", "", "1.54 ×", "", None),
    ]


def test_one_network_stands_in_its_own_column():
    (dense,) = reports.table([Measurement("dense", "latency_ms", 12.345, "ms")])
    (pruned,) = reports.table([Measurement("pruned", "latency_ms", 234.5, "ms")])

    assert (dense.before, dense.after, dense.change) == ("12.3 ms", "", "")
    assert (pruned.before, pruned.after, pruned.change) == ("", "234 ms", "")


def test_terms_nobody_knows_keep_their_name_and_make_no_judgement():
    rows = reports.table(
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
    assert reports.quantity(value, unit) == text


def test_change_from_zero_is_a_difference_not_a_share():
    assert reports.change(0.0, 0.25, "nats") == "+0.2500"


def test_report_holds_every_section_that_has_content():
    export = ExportReport("onnx", Path("model/model.onnx"), 2048, 3, 1.2e-6, 4.5, 1e-4, "onnxruntime 1.31", 1.0)

    text = reports.markdown_report(
        title="resnet56_cifar, sparsity 0.4",
        asked={"sparsity": 0.4, "exclude": [], "resume": None},
        achieved={"params": 0.4, "flops": 0.3821},
        measurements=MEASURED,
        groups=[{"group": "layer1.0", "kept": 10, "fidelity": 0.98765}, {"group": "a|b", "kept": 3, "note": "dead"}],
        warnings=["The target was\nmissed."],
        exports=[export],
        repeat="modhifi prune model=resnet56_cifar",
    )

    assert text.startswith("# resnet56_cifar, sparsity 0.4\n\n## Warnings\n\n- The target was missed.\n")
    assert "| exclude | [] |\n| resume | none |" in text
    assert "| flops | 38.21 % |" in text
    assert "| top-1 accuracy | 93.39 % | 92.19 % | −1.20 points |" in text
    assert "| group | kept | fidelity | note |\n| --- | --- | --- | --- |\n| layer1.0 | 10 | 0.9877 |  |" in text
    assert "| a\\|b | 3 |  | dead |" in text
    assert "| onnx | model.onnx | 2.05 kB | 1.2e-06 | 4.5 | onnxruntime 1.31 |" in text
    assert "- dense, top1: correct 9339; samples 10000; data source cifar10" in text
    assert text.endswith("## Again\n\n```\nmodhifi prune model=resnet56_cifar\n```\n")


def test_sections_without_content_are_left_out():
    assert reports.markdown_report(title="t", asked={}, achieved={}, measurements=[]) == "# t\n"


def test_measurements_with_one_protocol_share_its_line():
    protocol = {"batch": 64, "iterations": 5}
    measured = [Measurement("dense", name, 1.0, "ms", protocol) for name in ("latency_ms", "latency_median_ms")]

    text = reports.markdown_report(title="t", asked={}, achieved={}, measurements=measured)

    assert text.count("batch 64; iterations 5") == 1
    assert "- dense, latency_ms, latency_median_ms: batch 64; iterations 5" in text
