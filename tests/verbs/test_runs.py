"""The list of runs: what was made, by the names that other verbs take, whatever state the folders are in."""

import json
from pathlib import Path

import pytest

from modhifi_cli.cli import main
from modhifi_cli.console import open_console
from modhifi_cli.records import Measurement, Results
from modhifi_cli.verbs import pieces


def results(**fields):
    return json.dumps(Results.written(model="embedded", weights="", **fields))


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    pruned = results(
        verb="prune", target="flops", sparsity=0.4, achieved={"params": 0.5, "flops": 0.4},
        measurements=(
            Measurement("dense", "top1", 99.5, "%"), Measurement("pruned", "top1", 98.0, "%"),
            Measurement("pruned", "speedup", 1.5, "×"),
        ),
    )  # fmt: skip
    unlearned = results(verb="unlearn", forget=[3], classes=list("0123456789"), audit={"verdict": "moved at the output"})
    for name, text in (
        ("prune/embedded/20260101-100000-000001_x", pruned),
        ("unlearn/embedded/20260102-100000-000001_y", unlearned),
        ("prune/embedded/20260103-100000-000001_broken", "{"),
    ):
        (tmp_path / "outputs" / name / "model").mkdir(parents=True)
        (tmp_path / "outputs" / name / "results.json").write_text(text, encoding="utf-8")
    (tmp_path / "outputs/prune/embedded/20260104-100000-000001_i.incomplete").mkdir(parents=True)
    (tmp_path / "outputs/sweeps/prune_a").mkdir(parents=True)
    return tmp_path / "outputs"


def listed(capsys, *words):
    assert main(["runs", "console=json", *words]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return events[-1]["runs"], [event["text"] for event in events if event["event"] == "note"]


def test_runs_are_listed_newest_first_by_the_names_that_verbs_take(outputs, capsys):
    rows, notes = listed(capsys)
    assert [row["run"] for row in rows] == ["20260104-100000-000001", "last", "last-1", "last-2"]
    assert [row["what"] for row in rows[:2]] == ["interrupted", "damaged"]
    assert rows[2]["what"] == "forgot 3; moved at the output" and rows[2]["verb"] == "unlearn"
    assert rows[3]["what"] == "40 % of FLOPs" and rows[3]["speed"] == "1.50 ×"
    assert rows[3]["quality"] == "top-1 accuracy 99.50 % → 98.00 %" and rows[3]["age"].endswith("days")
    assert rows[3]["folder"] == "outputs/prune/embedded/20260101-100000-000001_x"
    assert "run=last" in notes[0] and notes[1].startswith("and 1 in outputs/sweeps")


def test_one_verb_and_a_few_can_be_asked_for(outputs, capsys):
    rows, _ = listed(capsys, "verb=prune", "most=2")
    assert [row["what"] for row in rows] == ["interrupted", "damaged"]
    assert listed(capsys, "verb=audit")[0] == []


def test_an_unknown_verb_is_refused_in_a_sentence(outputs, capsys):
    assert main(["runs", "verb=prun"]) == 2
    assert "verb: there is no verb 'prun'; did you mean 'prune'" in capsys.readouterr().err


def test_nothing_made_yet_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows, notes = listed(capsys)
    assert rows == [] and notes == ["no run under outputs yet; modhifi prune makes the first one"]


@pytest.mark.parametrize(
    "place, name",
    [
        ("prune/embedded/20260103-100000-000001_broken", "last"),
        ("unlearn/embedded/20260102-100000-000001_y", "last-1"),
        ("sweeps/prune_a/0_sparsity_0.2", None),
    ],
)
def test_the_end_of_a_run_names_it_as_verbs_take_it(outputs, monkeypatch, capsys, place, name):
    monkeypatch.setattr(pieces, "show_loading", lambda console, final: None)
    folder = Path("outputs") / place
    pieces.show_end(open_console("plain"), folder, 0)
    said = capsys.readouterr().out
    assert f"modhifi verify run={name or folder}\n" in said
    assert ("modhifi runs" in said) == (name is not None)
