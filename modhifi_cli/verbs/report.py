"""`modhifi report`: the page of one run again from its folder, or one page that compares several."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modhifi_cli.console import Console
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.files import artifacts
from modhifi_cli.pages import page as pages
from modhifi_cli.pages import plots
from modhifi_cli.pages import run as run_pages
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
        _compare(place, found, pieces.command_line("report", facts["overrides"]))
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


def _compare(place: Path, folders: Sequence[Path], command: str) -> None:
    runs = []
    for folder in folders:
        material = artifacts.report_material(artifacts.run_folder(folder, needs=("results.json",)))
        words = shlex.split(str(material.get("environment", {}).get("command", "")))[2:]
        runs.append(run_pages.compared(material["results"], words, str(folder)))
    rows = run_pages.grouped(runs)
    if not any(row["measured"] for row in rows):
        raise DataError(f"runs: none of the {len(runs)} runs has measurements to compare; evaluate them first.")
    artifacts.make_folder(place)
    charts = [*run_pages.frontiers(rows), *run_pages.tradeoffs(rows)]
    drawn = {}
    for chart in charts:
        drawn[chart.name] = plots.draw(chart)
        pieces.write_figure(place, chart.name, drawn[chart.name])
    page = run_pages.comparison(rows, charts, drawn, command)
    artifacts.write_text(place / "report.md", pages.markdown(page))
    artifacts.write_text(place / "report.html", pages.to_html(page))
