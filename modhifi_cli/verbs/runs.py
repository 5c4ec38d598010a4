"""`modhifi runs`: what was made so far under ``output_dir``, by the names that other verbs take."""

import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from modhifi_cli.console import Console, duration
from modhifi_cli.errors import ConfigError, DataError, nearest
from modhifi_cli.files import artifacts, run_names
from modhifi_cli.pages import terms
from modhifi_cli.records import Results
from modhifi_cli.settings import config

# What tells how good a network is, the first that was measured, and how fast.
_QUALITY = ("top1", "token_perplexity", "retain_accuracy", "agreement")
_SEVERAL = ("sweeps", "compare", "study", "coverage")  # folders whose runs are told on a page of their own


def runs(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> None:
    outputs, wanted = Path(settings["output_dir"]), settings["verb"]
    if wanted is not None and wanted not in config.verbs():
        raise ConfigError(f"verb: there is no verb '{wanted}'; {nearest(str(wanted), config.verbs())}")
    every = run_names.runs(outputs)
    found = [place for place in every if wanted in (None, place.parent.parent.name)]
    names = run_names.short_names(every)
    rows = [_row(place, names.get(place, "")) for place in reversed(found[-settings["most"] :])]
    if not rows:
        of = "" if wanted is None else f" of modhifi {wanted}"
        console.note(f"no run{of} under {outputs} yet; modhifi prune makes the first one")
    else:
        console.table(f"{len(rows)} of {len(found)} runs under {outputs}, the newest first", rows)
        if any(row["run"].startswith("last") for row in rows):
            console.note("the newest is run=last, as in: modhifi verify run=last; so are the other names and beginnings")
    for several in _SEVERAL:
        inside = [place for place in (outputs / several).glob("*") if place.is_dir()]
        if inside:
            console.note(f"and {len(inside)} in {outputs / several}, the newest {max(inside, key=_changed).name}")
    console.result({"runs": [{**row, "folder": str(place)} for row, place in zip(rows, reversed(found), strict=False)]})


def _row(place: Path, name: str) -> dict[str, str]:
    """One line of the table; a run that is not whole says so instead of its numbers."""
    verb, network = place.parent.parent.name, place.parent.name
    row = {"run": name or place.name[:22], "verb": verb, "network": network, "what": "", "quality": "", "speed": ""}
    row["age"] = _age(place)
    if place.name.endswith(artifacts.INCOMPLETE):
        return row | {"what": "interrupted"}
    try:
        results = Results.read(artifacts.read_results(place))
    except DataError:
        return row | {"what": "no results" if not (place / "results.json").exists() else "damaged"}
    return row | _outcome(results)


def _outcome(results: Results) -> dict[str, str]:
    """What a run did, and what it measured, dense → edited."""
    what = terms.removed({name: share for name, share in results.achieved.items() if name == results.target})
    if results.forget:
        what = "forgot " + ", ".join(terms.class_name(one, results.classes) for one in results.forget)
        verdict = (results.audit or {}).get("verdict")
        what += f"; {verdict}" if verdict else ""
    shown = {row.name: row for row in terms.table(m for m in results.measurements if m.model != "head_only")}
    term = next((term for term in _QUALITY if term in shown), None)
    quality = ""
    if term is not None:
        row = shown[term]
        quality = f"{row.label} " + " → ".join(one for one in (row.before, row.after) if one)
    speed = next((row.after for name, row in shown.items() if name == "speedup"), "")
    return {"what": what, "quality": quality, "speed": speed}


def _age(place: Path) -> str:
    """How long ago a run was begun, from its name."""
    begun = datetime.strptime(place.name[:15], "%Y%m%d-%H%M%S").timestamp()
    seconds = max(0.0, time.time() - begun)
    return f"{round(seconds / 86400)} days" if seconds > 2 * 86400 else duration(seconds)


def _changed(place: Path) -> float:
    return place.stat().st_mtime
