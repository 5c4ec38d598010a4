"""Many runs as rows, a table, a finding and figures: draws of one method are one row, dials are curves."""

import pytest

from modhifi_cli.pages import many
from modhifi_cli.pages import page as pages
from modhifi_cli.pages.figures import draw
from modhifi_cli.records import Results
from tests.pages.test_run import RESULTS, Watcher, measured


def drawn(charts):
    return {chart.name: draw(chart) for chart in charts}


def test_rows_are_mean_and_deviation_over_finished_seeds():
    runs = [
        many.Run("a", 0.2, "0", {"top1": 90.0, "kl": 0.1}),
        many.Run("a", 0.2, "1", {"top1": 92.0, "kl": 0.1}),
        many.Run("a", 0.2, "2", status="failed", message="why"),
        many.Run("b", 0.2, "0", status="failed", message="why"),
    ]
    first, second = rows = many.grouped(runs)
    assert (first.seeds, first.failed, first.mean["top1"]) == (2, 1, 91.0)
    assert first.spread["top1"] == pytest.approx(2**0.5) and first.plain()["top1_sd"] == first.spread["top1"]
    assert second.plain() == {"method": "b", "budget": 0.2, "seeds": 0, "failed": 1}
    dense, shown, empty = many.lines(rows, {"top1": 93.0})
    assert (dense["method"], dense["top-1, %"]) == ("dense", "93.00")
    assert shown["top-1, %"] == "91.00 ± 1.41" and shown["runs"] == "2 (1 failed)" and shown["asked"] == "20 %"
    assert empty["top-1, %"] == ""
    page = many.page(rows, [], {}, command="modhifi compare", title="t", failed=["b: why"], protocol={"target": "flops"})
    text = pages.markdown(page)
    assert text.startswith("# t\n") and "- b: why" in text and "| target | flops |" in text
    assert many.csv_text([{"a": 1}, {"a": None, "b": "x,y"}]).splitlines() == ["a,b", "1,", ',"x,y"']


def test_the_finding_names_who_keeps_most_and_when_the_next_is_as_good():
    def row(method, *values, budget=0.4):
        return [many.Run(method, budget, str(n), {"top1": value}, {"top1": 93.0}) for n, value in enumerate(values)]

    far = many.finding(many.grouped([*row("paper", 80.0, 80.2), *row("best", 90.0, 90.2)]))
    assert far == (
        "At 40 % best keeps most: top-1 accuracy 90.10 ± 0.14 (dense 93.00); next comes paper with 80.10 ± 0.14."
    )
    near = many.finding(many.grouped([*row("paper", 90.0, 91.0), *row("best", 90.2, 91.2)]))
    assert near.endswith("which is within the spread of the draws.")
    assert many.finding(many.grouped(row("alone", 90.0))) == ""


def test_methods_at_one_budget_are_bars_and_at_several_are_curves():
    runs = [many.Run(m, b, "0", {"top1": 90 - 10 * b, "removed_flops": 100 * b}) for m in "ab" for b in (0.2, 0.4)]
    (bars,) = many.charts(many.grouped([run for run in runs if run.budget == 0.4]))
    assert (bars.name, bars.kind, bars.categories) == ("methods", "bars", ("a", "b"))
    (curves,) = many.charts(many.grouped(runs))
    assert curves.name == "frontier_flops" and curves.series[0].x == (20.0, 40.0)


def test_a_dial_of_an_unlearning_sweep_is_one_curve_of_means_over_the_forgotten_classes():
    def run(depth, forget, probe, retain, method="contrast"):
        terms = {"dense": 90.0, "edited": probe, "head_only": 89.0}
        audit = [measured(model, "audit_probe_penultimate", value, "%") for model, value in terms.items()]
        audit.append(measured("head_only", "audit_TA", 94.0, "%"))
        results = {"verb": "unlearn", "model": "r", "forget": [forget], "audit": {"measurements": audit}}
        results["measurements"] = [measured("edited", "retain_accuracy", retain, "%")]
        words = [f"method={method}", f"method.depth={depth}", f"forget_class={forget}"]
        return many.run_of(Results.read(results), words, f"{depth}{forget}{method}")

    runs = [run(2, 0, 80, 92), run(2, 1, 60, 90), run(4, 0, 50, 88), run(4, 1, 40, 86), run(4, 0, 70, 91, "deep")]
    rows = many.grouped(many.named(runs))
    (chart,) = charts = many.charts(rows)
    assert chart.name == "tradeoff_audit_probe_penultimate" and "along depth" in chart.title
    assert chart.levels == {"dense 90.0": 90.0, "head-only control 89.0": 89.0}
    assert [(series.name, series.x, series.y) for series in chart.series] == [
        ("method contrast", (91, 87), (70, 45)), ("method deep", (91,), (70,))
    ]  # fmt: skip
    text = pages.markdown(many.page(rows, charts, drawn(charts), command="modhifi report"))
    assert "| head-only control |  |  | 94.00 | 89.00 |" in text and "budgets" not in text
    assert "Least is left inside with" in text


def test_runs_that_differ_in_the_draw_alone_are_one_row():
    def run(preset, seed, top1, budget=0.4):
        results = {**RESULTS, "sparsity": budget, "achieved": {"flops": budget}}
        results["measurements"] = [measured("dense", "top1", 93.0, "%"), measured("pruned", "top1", top1, "%")]
        words = [f"preset={preset}", f"data.seed={seed}", f"sparsity={budget}", "model=resnet56_cifar"]
        return many.run_of(Results.read(results), words, f"{preset}{seed}{budget}")

    runs = [run("best", 0, 90), run("best", 1, 92), run("paper", 0, 80), run("paper", 0, 85, 0.2)]
    rows = many.grouped(many.named(runs))
    assert [(row.method, row.budget, row.seeds) for row in rows] == [
        ("best", 0.4, 2), ("paper", 0.4, 1), ("paper", 0.2, 1)
    ]  # fmt: skip
    assert rows[0].mean["top1"] == 91 and abs(rows[0].spread["top1"] - 2**0.5) < 1e-9
    (chart,) = charts = many.charts(rows)
    assert chart.levels == {"dense 93.00": 93.0}
    assert [series.name for series in chart.series] == ["best", "paper"]
    assert chart.series[1].x == (40.0, 20.0) and chart.series[1].y == (80, 85)
    page = many.page(rows, charts, drawn(charts), command="modhifi report")
    text = pages.markdown(page)
    assert "| best | 40 % | 2 | 40.00 | 91.00 ± 1.41 |" in text and "| dense |  |  |" in text
    Watcher(pages.to_html(page))
