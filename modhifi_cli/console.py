"""The only file that prints: notes, warnings, progress and tables, for a terminal, for a log or for a program.

All three consoles take the same calls, so the pipeline does not know which one listens. Rich is imported when used.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from modhifi_cli.records import Progress

_SECONDS_BETWEEN_LINES = 2.0  # progress lines of the plain and json consoles; a bar per batch would flood a log
_WIDTH_OF_A_LOG = 100  # columns where no terminal tells
_LEARNS_OVER = 20.0  # seconds of work that an estimate remembers


def open_console(style: str) -> "Console":
    """The console of that style: ``rich``, ``plain`` or ``json``. Without a terminal rich would be silent: plain."""
    if style == "rich" and not sys.stdout.isatty():
        style = "plain"
    return {"rich": RichConsole, "plain": PlainConsole, "json": JsonConsole}[style]()


def number(value: Any) -> str:
    """A value for a table cell: whole numbers with thousands separators, others with four significant digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(number(entry) for entry in value)
    return str(value)


def duration(seconds: float) -> str:
    """A time for people: ``40 s``, ``2 min``, ``1 h 10 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def folded(rows: Sequence[Mapping[str, Any]], width: int) -> list[tuple[list[str], list[list[str]]]]:
    """Rows as tables that fit a width: columns that do not fit go on below, behind the first one again.

    Args:
        rows: Rows with the same keys.
        width: Columns of the terminal.

    Returns:
        For every table its heads and its lines of cells.
    """
    heads = list(rows[0])
    columns = [[number(row.get(head)) for row in rows] for head in heads]
    widths = [max(map(len, (str(head), *cells))) + 2 for head, cells in zip(heads, columns, strict=True)]
    tables: list[list[int]] = [[0]]
    for place in range(1, len(heads)):
        taken = sum(widths[each] for each in tables[-1])
        if taken + widths[place] > width and len(tables[-1]) > 1:
            tables.append([0])
        tables[-1].append(place)
    return [
        ([str(heads[place]) for place in table], [[columns[place][row] for place in table] for row in range(len(rows))])
        for table in tables
    ]


class Remaining:
    """How long a piece of work will still take: from its latest speed, so that an estimate learns from what it sees."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, float]] = []  # time, share done

    def update(self, share: float, now: float) -> float | None:
        """Seconds that are left, or None where it is too early to say.

        Args:
            share: What is done of the work, 0 … 1.
            now: Seconds of a steady clock.
        """
        if self._seen and share < self._seen[-1][1]:
            self._seen = []  # another piece of work has begun
        self._seen.append((now, share))
        while len(self._seen) > 2 and now - self._seen[1][0] > _LEARNS_OVER:
            self._seen.pop(0)
        begun, before = self._seen[0]
        if now - begun < 1.0 or share - before < 0.005:
            return None
        return (1 - share) * (now - begun) / (share - before)


class Work:
    """Where a run stands: its part, the stages inside one another, the time that is left.

    Attributes:
        part: In words.
        share: Of the outermost stage that is done, 0 … 1.
    """

    def __init__(self) -> None:
        self.part, self.share = "", 0.0
        self._stages: dict[str, Progress] = {}
        self._remaining = Remaining()

    def begin(self, name: str, number: int, total: int) -> None:
        """A part of the run begins."""
        self.part, self._stages, self._remaining = f"step {number} of {total}, {name}", {}, Remaining()

    def update(self, step: Progress) -> str:
        """The stages from the outer to the inner one, and the time left; "" where nothing is at work."""
        known = list(self._stages)
        if step.stage in known and self._stages[step.stage].done != step.done:
            for inner in known[known.index(step.stage) + 1 :]:  # what stood inside the step before is over
                del self._stages[inner]
        self._stages[step.stage] = step
        if step.done >= step.total:
            del self._stages[step.stage]
        self.share = 0.0
        if not self._stages:
            return ""
        share = 0.0
        for stage in reversed(self._stages.values()):
            share = (stage.done + min(share, 1.0)) / max(stage.total, 1)
        self.share = min(share, 1.0)
        left = self._remaining.update(share, time.monotonic())
        told = [f"{stage.stage} {stage.done} of {stage.total}" for stage in self._stages.values()]
        item = next((stage.item for stage in self._stages.values() if stage.item), "")
        parts = [*told, *([item] if item else []), *([f"about {duration(left)} left"] if left is not None else [])]
        return ", ".join(parts)


class Console:
    """What the pipeline can say. The base class says nothing; use it where nobody listens."""

    def note(self, text: str, **facts: Any) -> None:
        """One line of news; `facts` are for programs."""

    def warning(self, text: str) -> None:
        """Something the user should know although the run goes on."""

    def error(self, text: str) -> None:
        """Why the run ended, for a program that reads standard output; people read it on standard error."""

    def part(self, name: str, number: int, total: int) -> None:
        """A part of a run begins: ``pruning``, 3 of 5."""

    def progress(self, step: Progress) -> None:
        """A step of a long stage."""

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with the same keys, which are the column heads."""

    def result(self, facts: Mapping[str, Any]) -> None:
        """The whole outcome for a program; people have seen it in tables."""

    def close(self) -> None:
        """Take away what is still moving."""


class PlainConsole(Console):
    """One plain line per event, no colours, no cursor movement."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._last_line = 0.0
        self._last_item = ""
        self._work = Work()

    def note(self, text: str, **facts: Any) -> None:
        print(text, file=self._out, flush=True)

    def warning(self, text: str) -> None:
        print(f"warning: {text}", file=self._out, flush=True)

    def part(self, name: str, number: int, total: int) -> None:
        self._work.begin(name, number, total)

    def progress(self, step: Progress) -> None:
        now, told = time.monotonic(), self._work.update(step)
        if now - self._last_line >= _SECONDS_BETWEEN_LINES and step.item != self._last_item and told:
            self._last_line, self._last_item = now, step.item
            print(told if not self._work.part else f"{self._work.part}: {told}", file=self._out, flush=True)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        print(title, file=self._out)
        width = shutil.get_terminal_size().columns if self._out.isatty() else _WIDTH_OF_A_LOG
        for number, (heads, lines) in enumerate(folded(rows, width - 2) if rows else ()):
            if number:
                print(file=self._out)
            widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
            for cells in (heads, *lines):
                line = "  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
                print(line, file=self._out)
        self._out.flush()


class JsonConsole(Console):
    """One JSON object per line on standard output, each with the key ``event``."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._last_line = 0.0

    def _say(self, event: str, **facts: Any) -> None:
        print(json.dumps({"event": event, **facts}, default=str), file=self._out, flush=True)

    def note(self, text: str, **facts: Any) -> None:
        self._say("note", text=text, **facts)

    def warning(self, text: str) -> None:
        self._say("warning", text=text)

    def error(self, text: str) -> None:
        self._say("error", text=text)

    def part(self, name: str, number: int, total: int) -> None:
        self._say("part", name=name, number=number, total=total)

    def progress(self, step: Progress) -> None:
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._say("progress", stage=step.stage, item=step.item, done=step.done, total=step.total)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._say("table", title=title, rows=[dict(row) for row in rows])

    def result(self, facts: Mapping[str, Any]) -> None:
        self._say("result", **facts)


class RichConsole(Console):
    """One live line with the part, the stage and the time left, gone at the end; and tables, for a terminal."""

    def __init__(self) -> None:
        from rich.console import Console as Terminal

        self._terminal = Terminal(highlight=False)
        self._work = Work()
        self._live: Any = None

    def note(self, text: str, **facts: Any) -> None:
        self._terminal.print(text, markup=False, soft_wrap=True)

    def warning(self, text: str) -> None:
        self._terminal.print(f"[yellow]warning:[/yellow] {_escape(text)}", soft_wrap=True)

    def part(self, name: str, number: int, total: int) -> None:
        self._work.begin(name, number, total)
        self._show("")

    def progress(self, step: Progress) -> None:
        self._show(self._work.update(step))

    def _show(self, told: str) -> None:
        from rich.live import Live
        from rich.spinner import Spinner
        from rich.text import Text

        if not self._terminal.is_terminal:
            return
        text = ": ".join(part for part in (self._work.part, told) if part)
        if not text:
            self.close()
            return
        # One line, whatever the width: what does not fit is cut, not wrapped.
        spinner = Spinner("line", Text(text, no_wrap=True, overflow="ellipsis"))
        if self._live is None:
            self._live = Live(spinner, console=self._terminal, transient=True, refresh_per_second=4)
            self._live.start()
        else:
            self._live.update(spinner)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        from rich import box
        from rich.table import Table

        self.close()  # nothing may move through a table
        tables = folded(rows, self._terminal.width - 2) if rows else [([], [])]
        for place, (heads, lines) in enumerate(tables):
            table = Table(title=None if place else _escape(title), title_justify="left", box=box.SIMPLE_HEAD)
            for head in heads:
                numeric = all(isinstance(row.get(head), int | float) or row.get(head) is None for row in rows)
                table.add_column(_escape(head), justify="right" if numeric else "left", overflow="fold")
            for cells in lines:
                table.add_row(*map(_escape, cells))
            self._terminal.print(table)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = None


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
