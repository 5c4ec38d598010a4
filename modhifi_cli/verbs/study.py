"""`modhifi study`: one of the paper's experiments, cell by cell, with what is finished kept on disk."""

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modhifi_cli.console import Console
from modhifi_cli.engine.memory import peaks
from modhifi_cli.errors import ConfigError
from modhifi_cli.files import artifacts, kept
from modhifi_cli.pages.figures import chart_to_json
from modhifi_cli.pages.many import csv_text
from modhifi_cli.records import ImageSource, LoadedModel, Progress, Results
from modhifi_cli.settings import config
from modhifi_cli.verbs import pieces

_CELLS_VERSION = 1  # to be raised when cells are computed in another way: older ones are then computed anew
_OF_A_CELL = ("rows", "seconds")
_NOT_IN_FOLDER = ("study=", "layers=", "seeds=", "minutes=", "study.", "console", "output_dir=", "hydra")


def study(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> Path:
    name = str(settings["study"]["_target_"]).rpartition(".")[2].lower()
    command = pieces.command_line("study", config.spelled("study", facts["overrides"], for_people=True))
    device = pieces.device_of(settings)
    loaded, calibration, evaluation = pieces.sources(settings, console)
    subject, identity = _subject(settings, loaded, calibration, evaluation, device)
    asked = config.build(settings["study"])
    own = config.slug(word for word in facts["overrides"] if not word.startswith(_NOT_IN_FOLDER))
    place = folder or Path(settings["output_dir"]) / "study" / name / own
    cells = list(asked.cells(subject))
    artifacts.make_folder(place / "cells")
    console.note(f"{name} of {loaded.name}: {len(cells)} cells, {len(calibration)} calibration samples; in {place}")
    started = time.monotonic()
    rows, missing = [], 0
    seconds: dict[str, float] = {}
    for number, cell in enumerate(cells):
        told = ", ".join(str(value) for key, value in cell.items() if key != "layers" and value != "")
        console.progress(Progress("cells", told, number, len(cells)))
        path = place / "cells" / f"{kept.digest({'cell': cell, **identity})}.json"
        late = settings["minutes"] is not None and time.monotonic() - started > 60 * settings["minutes"]
        if late and kept.read_cell(path, _OF_A_CELL) is None:
            missing += 1
            continue

        def computed(cell: Mapping[str, Any] = cell) -> dict[str, Any]:
            begun = time.perf_counter()
            found = {"cell": cell, "rows": _computed(asked.compute(subject, cell), console)}
            return found | {"seconds": round(time.perf_counter() - begun, 3)}

        try:
            found = kept.kept_cell(path, computed, _OF_A_CELL)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{len(seconds)} of {len(cells)} cells are finished and kept; the same command goes on with the others"
            ) from None
        rows += found["rows"]
        seconds[told] = found["seconds"]
    console.progress(Progress("cells", "done", len(cells), len(cells)))
    if not rows:
        raise ConfigError(f"minutes={settings['minutes']}: no cell was finished in that time; give more minutes.")
    outcome = asked.conclude(rows)
    finished = _Finished(name, loaded, subject, outcome, rows, seconds, len(cells), missing)
    _write(place, settings, finished, command)
    _show(console, place, name, loaded, outcome, missing, len(cells))
    return place


def _subject(
    settings: Mapping[str, Any],
    loaded: LoadedModel,
    calibration: ImageSource,
    evaluation: ImageSource | None,
    device: Any,
) -> tuple[Any, dict[str, Any]]:
    """What the study looks at, and what makes a cell of it the same cell."""
    import torch

    from modhifi_cli.engine.plan import example_of
    from modhifi_cli.evaluation.runtimes import runtime
    from modhifi_cli.graph.surgery import weights_hash
    from modhifi_cli.models import build_architecture
    from modhifi_cli.studies.subject import Subject

    example = example_of(calibration, torch.device("cpu"))

    def untrained() -> Any:
        if pieces.is_decoder(settings):
            return config.build({**settings["model"], "weights": "random", "seed": settings["seeds"][0]}).model
        torch.manual_seed(settings["seeds"][0])
        return build_architecture(loaded.architecture, allow=True)  # whoever started the study named it

    def draw(source: str, seed: int) -> ImageSource:
        own = copy.deepcopy(dict(settings))
        own["data"] = _source_node(settings, source) | {"seed": seed}
        found = pieces.image_source(own, "data", loaded, labelled=False)
        assert found is not None
        return found

    steps = {
        key: config.build(settings[key]) for key in ("scoring", "selection", "compensation", "allocation", "statistics")
    }
    rounding = {"round_to": settings["round_to"], "block": runtime(settings["runtime"]["serve"]).BLOCK}
    subject = Subject(
        model=_placed(loaded.model, settings, device),
        calibration=calibration,
        evaluation=evaluation,
        example=example,
        untrained=untrained,
        draw=draw,
        sources=tuple(settings["study"].get("sources", ())),
        asked=settings["layers"] if isinstance(settings["layers"], str) else tuple(settings["layers"]),
        seeds=tuple(settings["seeds"]),
        steps=steps | {"target": config.build(settings["target"]).name, **rounding},
        batch_size=settings["runtime"]["batch_size"],
        device=device,
    )
    same = ("study", "scoring", "selection", "compensation", "allocation", "target", "statistics")
    identity = {
        "version": _CELLS_VERSION,
        "weights": weights_hash(loaded.model),
        "architecture": dict(loaded.architecture),
        "data": settings["data"],
        "calibration": calibration.protocol.get("sha256"),
        "evaluation": None if evaluation is None else evaluation.protocol.get("sha256"),
        "dtype": settings["runtime"]["dtype"],
        **rounding,
        **{key: settings[key] for key in same},
    }
    return subject, identity


def _placed(model: Any, settings: Mapping[str, Any], device: Any) -> Any:
    """The network on the device, in the precision of the run; a language model keeps its own."""
    return model.to(device) if pieces.is_decoder(settings) else model.to(device=device, dtype=pieces.dtype_of(settings))


def _source_node(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings of a data source: the calibration data, or a file or folder of its kind at another place."""
    node = dict(settings["data"])
    if not source:
        return node
    kind = "folder" if Path(source).is_dir() and not list(Path(source).glob("*.np*")) else "arrays"
    return {
        "_target_": f"modhifi_cli.data.{kind}.load",
        "_partial_": True,
        "path": source,
        "num_samples": "auto",
    }


def _computed(steps: Any, console: Console) -> list[dict[str, Any]]:
    """Run one cell, passing its progress on."""
    while True:
        try:
            console.progress(next(steps))
        except StopIteration as done:
            return done.value


@dataclasses.dataclass(frozen=True)
class _Finished:
    """A study as far as it has come.

    Attributes:
        name: Of the study.
        loaded: The network.
        subject: What the study looked at.
        outcome: What its rows say.
        rows: Of all finished cells.
        seconds: Of each of them.
        cells: How many cells there are.
        missing: How many of them are not finished.
    """

    name: str
    loaded: LoadedModel
    subject: Any
    outcome: Any
    rows: Sequence[Mapping[str, Any]]
    seconds: Mapping[str, float]
    cells: int
    missing: int


def _write(place: Path, settings: Mapping[str, Any], study: _Finished, command: str) -> None:
    outcome, subject, missing = _named(study.outcome, study.loaded.name), study.subject, study.missing
    artifacts.write_text(place / "config.yaml", config.to_yaml(pieces.portable(settings)))
    artifacts.write_json(place / "environment.json", artifacts.environment(command, str(subject.device)))
    artifacts.write_text(place / "rows.csv", csv_text(study.rows))
    for chart in outcome.charts:
        artifacts.write_json(place / f"{chart.name}.json", chart_to_json(chart))
    warnings = []
    if missing:
        warnings.append(
            f"{missing} of {study.cells} cells are not finished (minutes={settings['minutes']:g}); the same command "
            "goes on with them."
        )
    artifacts.write_json(
        place / "results.json",
        Results.written(
            verb="study",
            study=study.name,
            model=study.loaded.name,
            weights=study.loaded.weights,
            settings={key: value for key, value in settings["study"].items() if not key.startswith("_")},
            seeds=settings["seeds"],
            findings=[vars(finding) for finding in outcome.findings],
            summary=list(outcome.summary),
            notes=list(outcome.notes),
            charts=[chart.name for chart in outcome.charts],
            rows=len(study.rows),
            cells=study.cells,
            missing_cells=missing,
            calibration=dict(subject.calibration.protocol),
            evaluation=None if subject.evaluation is None else dict(subject.evaluation.protocol),
            warnings=warnings,
            memory=peaks(settings["runtime"]["device"]),
            seconds=dict(study.seconds),
        ),
    )
    pieces.write_pages(place)


def _named(outcome: Any, model: str) -> Any:
    """The same with the network's name in every figure's title, which has to be read without a caption."""
    charts = tuple(dataclasses.replace(chart, title=f"{model}: {chart.title}") for chart in outcome.charts)
    return dataclasses.replace(outcome, charts=charts)


def _show(
    console: Console, place: Path, name: str, loaded: LoadedModel, outcome: Any, missing: int, cells: int
) -> None:
    if outcome.summary:
        console.table(f"{name} of {loaded.name}", list(outcome.summary))
    for finding in outcome.findings:
        verdict = {True: "holds here", False: "does not hold here", None: "cannot be said here"}[finding.holds]
        console.note(f"claim: {finding.claim} → {verdict}: {finding.found}")
    if missing:
        console.warning(f"{missing} of {cells} cells are not finished; the same command goes on with them")
    console.note(f"the page is {place / 'report.html'}; all rows are in rows.csv")
    console.result(
        {
            "folder": str(place),
            "findings": [vars(finding) for finding in outcome.findings],
            "summary": list(outcome.summary),
        }
    )
