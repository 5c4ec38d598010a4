"""The only file that prints: notes, warnings, progress and tables, for a terminal, for a log or for a program.

All three consoles take the same calls, so the pipeline does not know which one listens. Rich is imported when used.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from modhifi_cli.records import Progress

_SECONDS_BETWEEN_LINES = 2.0  # progress lines of the plain and json consoles; a bar per batch would flood a log


def open_console(style: str) -> "Console":
    """The console of that style: ``rich``, ``plain`` or ``json``."""
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


class Console:
    """What the pipeline can say. The base class says nothing; use it where nobody listens."""

    def note(self, text: str, **facts: Any) -> None:
        """One line of news; `facts` are for programs."""

    def warning(self, text: str) -> None:
        """Something the user should know although the run goes on."""

    def error(self, text: str) -> None:
        """Why the run ended, for a program that reads standard output; people read it on standard error."""

    def progress(self, step: Progress) -> None:
        """A step of a long stage."""

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with the same keys, which are the column heads."""

    def result(self, facts: Mapping[str, Any]) -> None:
        """The whole outcome for a program; people have seen it in tables."""

    def close(self) -> None:
        """Take away what is still moving (progress bars)."""


class PlainConsole(Console):
    """One plain line per event, no colours, no cursor movement."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._last_line = 0.0
        self._last_item = ""

    def note(self, text: str, **facts: Any) -> None:
        print(text, file=self._out, flush=True)

    def warning(self, text: str) -> None:
        print(f"warning: {text}", file=self._out, flush=True)

    def progress(self, step: Progress) -> None:
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES and step.item != self._last_item:
            self._last_line, self._last_item = now, step.item
            print(f"{step.stage} {step.done}/{step.total} {step.item}".rstrip(), file=self._out, flush=True)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        print(title, file=self._out)
        if rows:
            heads = list(rows[0])
            cells = [heads, *([number(row.get(head)) for head in heads] for row in rows)]
            widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
            for line in cells:
                print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip(), file=self._out)
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
    """Progress bars with the item at work and the time left, and tables, for a terminal."""

    def __init__(self) -> None:
        from rich.console import Console as Terminal

        self._terminal = Terminal(highlight=False)
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def note(self, text: str, **facts: Any) -> None:
        self._terminal.print(text, markup=False, soft_wrap=True)

    def warning(self, text: str) -> None:
        self._terminal.print(f"[yellow]warning:[/yellow] {_escape(text)}", soft_wrap=True)

    def progress(self, step: Progress) -> None:
        if not self._terminal.is_terminal:
            return
        if self._bars is None:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            self._bars = Bars(
                TextColumn("{task.fields[stage]:<12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
                console=self._terminal,
                transient=True,
            )
            self._bars.start()
        if step.stage not in self._tasks:
            self._tasks[step.stage] = self._bars.add_task(step.item, total=step.total, stage=step.stage)
        self._bars.update(self._tasks[step.stage], completed=step.done, total=step.total, description=step.item)
        if step.done >= step.total:
            self._bars.remove_task(self._tasks.pop(step.stage))
        if not self._tasks:
            self.close()

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        from rich import box
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for head in rows[0] if rows else ():
            numeric = all(isinstance(row.get(head), (int, float)) or row.get(head) is None for row in rows)
            table.add_column(_escape(str(head)), justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(_escape(number(value)) for value in row.values()))
        self._terminal.print(table)

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._tasks = None, {}


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
