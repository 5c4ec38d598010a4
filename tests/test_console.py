"""What each console does with the same calls."""

import io
import json
import re

import pytest

from modhifi_cli import console
from modhifi_cli.records import Progress


def speak(voice: console.Console) -> None:
    voice.note("begun [sic]", images=3)
    voice.progress(Progress("groups", "conv1", 0, 2))
    voice.progress(Progress("groups", "conv2", 1, 2))
    voice.progress(Progress("groups", "done", 2, 2))
    voice.table("sizes", [{"group": "conv1", "components": 1200}, {"group": "conv2 [x]", "components": None}])
    voice.warning("near the target")
    voice.error("ended")
    voice.result({"folder": "here"})
    voice.close()


def test_json_console_writes_one_object_a_line():
    out = io.StringIO()
    speak(console.JsonConsole(out))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["note", "progress", "table", "warning", "error", "result"]
    assert events[0]["images"] == 3
    assert events[-1]["folder"] == "here"


def test_plain_console_aligns_tables_and_does_not_flood():
    out = io.StringIO()
    speak(console.PlainConsole(out))
    lines = out.getvalue().splitlines()
    assert "  conv1      1,200" in lines
    assert len([line for line in lines if line.startswith("groups")]) == 1


def test_rich_console_prints_brackets_as_they_are(capsys):
    speak(console.RichConsole())
    printed = capsys.readouterr().out
    assert "begun [sic]" in printed
    assert "conv2 [x]" in printed


def test_without_a_terminal_the_plain_console_speaks():
    assert isinstance(console.open_console("rich"), console.PlainConsole)  # pytest's standard output is no terminal


def test_a_wide_table_goes_on_below_with_its_first_column_again():
    rows = [{"layer": f"layer{n}", **{f"a column of some width {c}": n * c for c in range(6)}} for n in range(2)]
    tables = console.folded(rows, 80)
    assert len(tables) > 1 and all(heads[0] == "layer" for heads, _ in tables)
    assert [head for heads, _ in tables for head in heads[1:]] == list(rows[0])[1:]
    out = io.StringIO()
    console.PlainConsole(out).table("wide", rows)
    assert max(map(len, out.getvalue().splitlines())) <= 100


def test_progress_says_the_part_the_stages_and_what_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    voice = console.PlainConsole(out)
    voice.part("pruning", 2, 5)
    for done in range(4):
        now[0] = 10.0 * done + 5
        voice.progress(Progress("groups", f"conv{done}", done, 4))
        voice.progress(Progress("images", f"conv{done}", 1, 2))
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 2 of 5, pruning: groups 0 of 4, conv0"
    assert re.fullmatch(r"step 2 of 5, pruning: groups 3 of 4, conv3, about 1\d s left", lines[-1])


def test_an_estimate_follows_the_latest_speed_and_forgets_another_piece_of_work():
    remaining = console.Remaining()
    assert remaining.update(0.0, 0.0) is None
    assert remaining.update(0.5, 10.0) == pytest.approx(10.0)
    for second in range(11, 60):
        slower = remaining.update(0.5 + (second - 10) / 200, float(second))
    assert slower == pytest.approx((1 - 0.745) * 200, rel=0.05)
    assert remaining.update(0.0, 61.0) is None
    assert [console.duration(s) for s in (0.2, 40, 130, 4200, 12000)] == ["1 s", "40 s", "2 min", "70 min", "3 h 20 min"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1200, "1,200"), (0.123456, "0.1235"), (1234.5678, "1,234.57"), (None, ""), (True, "yes"), (["a", "b"], "a, b")],
)
def test_numbers_are_readable(value, shown):
    assert console.number(value) == shown
