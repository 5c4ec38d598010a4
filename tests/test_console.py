"""What each console does with the same calls."""

import io
import json

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
    speak(console.open_console("rich"))
    printed = capsys.readouterr().out
    assert "begun [sic]" in printed
    assert "conv2 [x]" in printed


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1200, "1,200"), (0.123456, "0.1235"), (1234.5678, "1,234.57"), (None, ""), (True, "yes"), (["a", "b"], "a, b")],
)
def test_numbers_are_readable(value, shown):
    assert console.number(value) == shown
