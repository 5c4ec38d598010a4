"""`modhifi report`: the page of one run again from its folder, or one page that compares several."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modhifi_cli.console import Console
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.files import artifacts
from modhifi_cli.pages import many
from modhifi_cli.records import Results
from modhifi_cli.verbs import pieces


def report(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> Path:
    run, runs = settings["run"], list(settings["runs"])
    if (run is None) == (not runs):
        raise ConfigError(
            "modhifi report: give run=DIR for one run or a sweep, or runs=[DIR1,DIR2] for a comparison, not both."
        )
    several = _runs_inside(Path(run)) if run is not None else []
    if run is not None and not several:
        place = artifacts.run_folder(run, needs=("results.json",))
        pieces.write_pages(place)
    else:
        place = Path(run) if run is not None else pieces.new_folder("report", "comparison", settings, facts)
        found = several or [inside for given in runs for inside in _runs_inside(Path(given)) or [Path(given)]]
        write_comparison(place, found, pieces.command_line("report", facts["overrides"]))
    console.note(f"the page is {place / 'report.html'}, the same as text report.md")
    console.result({"folder": str(place)})
    return place


def _runs_inside(folder: Path) -> list[Path]:
    """The finished runs of a sweep or a comparison; none where the folder is a run itself or something else."""
    if (folder / "results.json").is_file():
        return []
    inside = folder / "cells" if (folder / "cells").is_dir() else folder
    if not inside.is_dir():
        return []
    return sorted(
        path.parent for path in inside.glob("*/results.json") if not path.parent.name.endswith(artifacts.INCOMPLETE)
    )


def write_comparison(place: Path, folders: Sequence[Path], command: str) -> list[many.Row]:
    """Write ``report.md|html`` with figures of several finished runs, and return its rows.

    Raises:
        DataError: If none of them has measurements.
    """
    runs = []
    for folder in folders:
        material = artifacts.report_material(artifacts.run_folder(folder, needs=("results.json",)))
        words = shlex.split(str(material.get("environment", {}).get("command", "")))[2:]
        runs.append(many.run_of(Results.read(material["results"]), words, str(folder)))
    rows = many.grouped(many.named(runs))
    if not any(row.mean for row in rows):
        raise DataError(f"runs: none of the {len(runs)} runs has measurements to compare; evaluate them first.")
    artifacts.make_folder(place)
    pieces.write_many(place, "report", rows, command=command)
    return rows
