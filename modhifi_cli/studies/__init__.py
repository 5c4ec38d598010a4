"""Studies: the paper's experiments on any network (method.md, 6), one file each.

A study is cut into *cells* that do not depend on each other, so that finished ones can be kept. It writes and prints
nothing: `cells` says what has to be computed, `compute` makes the rows of one cell, `conclude` reads all rows and says
what they show.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from modhifi_cli.records import Chart, Finding, Progress
from modhifi_cli.studies.subject import Subject

Cell = Mapping[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a study shows.

    Attributes:
        findings: The paper's claims beside what was found.
        charts: Figures.
        summary: A short table, one row a line.
        notes: How to read it, in sentences.
    """

    findings: tuple[Finding, ...]
    charts: tuple[Chart, ...]
    summary: tuple[Row, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)


class Study(Protocol):
    """What `configs/study/` may name: a frozen dataclass whose fields are its settings."""

    def cells(self, subject: Subject) -> Sequence[Cell]:
        """What has to be computed, JSON-able; cells are independent of each other and of their order.

        Raises:
            ConfigError: If a setting is out of range.
            UnsupportedModelError: If the study does not apply to the network.
        """

    def compute(self, subject: Subject, cell: Cell) -> Generator[Progress, None, list[Row]]:
        """The rows of one cell; each carries what identifies it."""

    def conclude(self, rows: Sequence[Row]) -> Outcome:
        """Findings and figures from the rows of all finished cells."""
