"""Every kind of page in a real browser: nothing is loaded, nothing is wider than the window, nothing clipped or faint."""

import importlib.util
import sys
from pathlib import Path

import pytest

from modhifi_cli.pages import audit, coverage, many
from modhifi_cli.pages import page as pages
from modhifi_cli.pages.figures import draw
from tests.pages.test_run import CHARTS, ENVIRONMENT, PNG, RESULTS, SETTINGS, STUDY, made

REPOSITORY = Path(__file__).resolve().parents[2]
FORGOTTEN = {"calibration": {"forget": 0.0, "retain": 99.0}, "evaluation": {"forget": 0.0, "retain": 98.0}}


def report():
    """A whole audit of two networks and the control, in plain numbers."""
    names = ("dense", "edited", "head_only")
    figures = {"FA": 0.0, "UA": 100.0, "RA": 99.0, "TA": 98.0, "probe, layer3": 90.0, "probe, penultimate": 88.0,
               "TV, penultimate": 0.91, "relearn steps": None, "MIA": 51.0, "MIA check": 50.0}  # fmt: skip
    readout = {"depth": "penultimate", "features": 64, "probe": 88.0, "probe_balanced": 97.0, "class_mean": 80.0,
               "class_mean_balanced": 95.0, "tv": 0.9}  # fmt: skip
    attack = {"confidence_accuracy": 50.0, "confidence_accuracy_error": 2.0, "forget_as_non_members": 51.0,
              "forget_evaluation_as_non_members": 52.0, "loss_forget": 49.0, "loss_forget_error": 3.0,
              "loss_retain": 53.0, "loss_retain_error": 1.0}  # fmt: skip
    return {
        "forget": [1], "classes": ["dog", "a class with a long name, and a comma"], "gaps": {},
        "verdict": {"level": "forgotten at the output only", "sentences": ["Inside, nothing changed."]},
        "figures": {name: figures for name in names}, "definitions": {"FA": "forget accuracy", "TV": "a bound"},
        "readouts": [{**readout, "model": name} for name in names],
        "accuracy": {name: FORGOTTEN for name in names},
        "per_class": {name: {"evaluation": [99.0, 0.0]} for name in names},
        "becomes": {name: {"evaluation": [40, 0]} for name in names},
        "membership": {name: attack for name in names},
        "distances": {"output": {"dense, edited": {"forget": 0.99, "retain": 0.01}}, "features": {"penultimate": 0.2}},
        "protocol": {"membership": "members are the calibration images", "chance of a probe, %": 50.0, "seed": 0},
        "seconds": {"forward": 1.5},
    }  # fmt: skip


def every_kind():
    terms = {"top1": 90.0, "agreement": 91.0, "kl": 0.1, "speedup": 1.5, "removed_params": 40.0, "removed_flops": 39.0,
             "removed_components": 20.0, "removed_latency": 33.0, "parameters": 1e6, "macs": 1e9, "file_bytes": 4e6,
             "latency_ms": 10.0, "latency_median_ms": 9.0, "top5": 99.0, "time_saved": 33.0}  # fmt: skip
    runs = [many.Run(f"a_method_with_a_name_{m}", b, str(s), {t: v - 10 * b + s for t, v in terms.items()}, {"top1": 93.0})
            for m in "ab" for b in (0.2, 0.4) for s in (0, 1)]  # fmt: skip
    rows = many.grouped(runs)
    charts = many.charts(rows)
    network = {"name": "a_network_of_a_library", "kind": "resnet", "input": [3, 64, 64], "parameters": 1e7, "groups": 9,
               "refused": [{"name": "fc", "reason": "it is the answer"}], "carried": 0.9, "removed": 0.5,
               "law_dtype": "float64", "difference": 1e-12, "reload": 0.0, "counts": True, "why": None}  # fmt: skip
    library = {"library": "timm", "date": "2026-01-01", "settings": {"share": 0.5}, "networks": [network] * 3}
    machine = {"packages": {"torch": "2"}, "system": "Linux", "command": "modhifi coverage"}
    return {
        "run": made(settings=SETTINGS, environment=ENVIRONMENT, sheet=PNG),
        "decoder": made({**RESULTS, "target": "params", "achieved": {"params": 0.2, "model_params": 0.17}}),
        "study": made(STUDY, charts=CHARTS),
        "many": many.page(rows, charts, {chart.name: draw(chart) for chart in charts}, command="modhifi compare"),
        "audit": audit.page(title="Audit: r, forgetting 1", report=report(), svg=draw(CHARTS[0])["svg"].decode()),
        "coverage": coverage.page(library, machine),
    }


def test_every_kind_of_page_fits_and_can_be_read_in_a_browser(tmp_path):
    specification = importlib.util.spec_from_file_location("check_pages", REPOSITORY / "scripts" / "check_pages.py")
    check = importlib.util.module_from_spec(specification)
    sys.modules["check_pages"] = check
    specification.loader.exec_module(check)
    program = check.browser_program()
    if program is None:
        pytest.skip("no browser: install chromium, or name one with CHROMIUM=")
    pytest.importorskip("playwright", reason="pip install playwright drives the browser")
    wrong = []
    for name, page in every_kind().items():
        file = tmp_path / f"{name}.html"
        file.write_text(pages.to_html(page), encoding="utf-8")
        wrong += check.faults(file, program=program)
    assert not wrong


def test_every_kind_of_page_is_text_too():
    for name, page in every_kind().items():
        text = pages.markdown(page)
        assert text.startswith("# ") and text.endswith("\n") and "None" not in text, name
