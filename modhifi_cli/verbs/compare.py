"""`modhifi compare`: several methods on one protocol: a grid of ordinary prune runs, one table, and frontiers as figures.

A cell of the grid is (method, source of data, budget, seed): the run that `modhifi prune preset=METHOD` would make with
the user's other settings. What makes the comparison fair (network, images, target, evaluation) is copied from the comparison into
every cell, whatever a preset says. A cell's folder is named after its settings, so finished cells are found again and a
changed preset is a new cell.
"""

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modhifi_cli.console import Console
from modhifi_cli.errors import ConfigError, ModHiFiError, nearest
from modhifi_cli.files import artifacts, kept
from modhifi_cli.pages import many
from modhifi_cli.records import Measurement, Progress, Results
from modhifi_cli.settings import config
from modhifi_cli.verbs import pieces
from modhifi_cli.verbs.prune import prune
from modhifi_cli.verbs.shared import Shared

_SHARED = ("model", "data", "evaluation_data", "evaluation", "target", "runtime", "export", "console", "output_dir")
_SET_HERE = {
    "preset": "methods", "sparsity": "budgets", "data.seed": "seeds", "outside": "methods", "resume": None,
    "measure_dense": None, "dry_run": None,
}  # fmt: skip
_NOT_IN_NAMES = ("console", "output_dir", "resume", "tracker")  # settings that change no result
_GRID = ("methods=", "budgets=", "seeds=", "sources=")
_NOT_IN_FOLDER = (*_GRID, "console", "output_dir=", "hydra")
_DISTANCE = "distance_of_batchnorm_statistics_from_the_stored"


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        method: Name of the preset; of a comparison of sources of calibration data the source's title, and the preset
            where there are several.
        budget: Share that is removed.
        seed: Of the draw of calibration images.
        settings: Plain settings of the prune run.
        words: Overrides that ask `modhifi prune` for it.
        folder: The run's folder.
    """

    method: str
    budget: float
    seed: int
    settings: dict[str, Any]
    words: tuple[str, ...]
    folder: Path

    @property
    def title(self) -> str:
        """For people: ``paper, 0.4 of flops, seed 0``."""
        return f"{self.method}, {self.budget:g} of {config.build(self.settings['target']).name}, seed {self.seed}"


class _CellConsole(Console):
    """Passes a cell's warnings and progress on; its tables and notes are in its folder."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title

    def warning(self, text: str) -> None:
        self._console.warning(f"{self._title}: {text}")

    def progress(self, step: Progress) -> None:
        self._console.progress(step)


def compare(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> Path:
    pieces.require_data(settings)
    overrides = facts["overrides"]
    folder = Path(settings["output_dir"]) / "compare" / _folder_name(overrides)
    cells = _cells(settings, overrides, folder)
    artifacts.make_folder(folder / "records")
    common = Shared(settings, folder / "dense.json", console)
    dense = common.dense(console)  # first: what is wrong with network or images is told once, not by every cell
    records = []
    for number, cell in enumerate(cells, start=1):
        try:
            record = _run_cell(cell, f"{number}/{len(cells)}", folder, console, common)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "Type the same command again: finished cells are kept and this one goes on."
            ) from None
        records.append(record)
    _write(folder, settings, records, dense, console, pieces.command_line("compare", overrides))
    failed = [record for record in records if record["status"] == "failed"]
    if failed:
        raise ModHiFiError(
            f"{len(failed)} of {len(records)} cells failed, the first ({failed[0]['title']}) with: "
            f"{failed[0]['message']} The others are in {folder}; the same command tries only the failed ones again."
        )
    return folder


def _folder_name(overrides: Sequence[str]) -> str:
    """The same for the same network, images and settings, so that another budget or method finds the finished cells."""
    return config.slug(word for word in overrides if not word.startswith(_NOT_IN_FOLDER))


def _cells(settings: Mapping[str, Any], overrides: Sequence[str], folder: Path) -> list[Cell]:
    presets = config.preset_names()
    for method in settings["methods"]:
        if method not in presets:
            raise ConfigError(f"methods: there is no preset '{method}'; {nearest(method, presets)}")
    price = config.build(settings["target"])
    if price.searched:
        raise ConfigError(
            f"modhifi compare runs methods to the same budgets, and target={price.name} has none; choose another target."
        )
    for word in overrides:
        key = word.partition("=")[0].lstrip("+~")
        if key in _SET_HERE:
            instead = f"give {_SET_HERE[key]}=[…] instead" if _SET_HERE[key] else "leave it out"
            raise ConfigError(f"modhifi compare sets {key} itself for every cell; {instead}.")
    listed = settings.get("sources")
    taken = next((key for key in (word.partition("=")[0] for word in overrides) if key.split(".")[0] == "data"), None)
    if listed and taken:
        raise ConfigError(f"sources=[…] says what every row is calibrated on; leave {taken} out, or give it there.")
    mine = [word for word in overrides if not word.startswith((*_GRID, "hydra"))]
    given = {word.partition("=")[0] for word in mine}
    same = {
        "target": price.name,
        "evaluation": f"[{','.join(settings['evaluation'])}]",
    }
    if "num_samples" in settings["data"] and not listed:  # a preset's own number would be another sample; text has none
        same["data.num_samples"] = settings["data"]["num_samples"]
    mine += [f"{key}={'null' if value is None else value}" for key, value in same.items() if key not in given]
    composed = {method: config.compose("prune", [*mine, f"preset={method}"]) for method in settings["methods"]}
    several = len(composed) > 1
    cells = []
    for source, method, budget, seed in itertools.product(
        listed or [{"title": None, "source": settings["data"], "words": ()}],
        composed,
        dict.fromkeys(settings["budgets"]),
        dict.fromkeys(settings["seeds"]),
    ):
        own = copy.deepcopy(composed[method] | {key: settings[key] for key in _SHARED} | {"data": source["source"]})
        own |= {"sparsity": budget, "measure_dense": True, "resume": None}
        own["data"]["seed"] = seed
        same_result = {key: value for key, value in pieces.portable(own).items() if key not in _NOT_IN_NAMES}
        title = source["title"]
        label = method if title is None else f"{title}, {method}" if several else title
        start = method if title is None else f"{method}_{config.slug([title])}"
        name = f"{start}_{price.name}-{budget:g}_seed-{seed}_{kept.digest(same_result, 8)}"
        words = (*mine, *source["words"], f"preset={method}", f"sparsity={budget:g}", f"data.seed={seed}")
        cells.append(Cell(label, budget, seed, own, words, folder / "cells" / name))
    return cells


def _run_cell(cell: Cell, number: str, folder: Path, console: Console, shared: Shared) -> dict[str, Any]:
    """Run one cell unless it is finished, continue it if it was interrupted, and record how it ended."""
    about = {
        "method": cell.method, "budget": cell.budget, "seed": cell.seed, "title": cell.title,
        "folder": f"cells/{cell.folder.name}",
    }  # fmt: skip

    def make(resume: str | None) -> None:
        console.note(f"cell {number}: {cell.title}")
        facts = {"verb": "prune", "overrides": list(cell.words), "sweep": str(folder), "number": 0}
        prune({**cell.settings, "resume": resume}, facts, _CellConsole(console, cell.title), cell.folder, shared)
        _release_memory()

    record = kept.keep_job(cell.folder, folder / "records" / f"{cell.folder.name}.json", about, make)
    if record["status"] == "failed":
        console.warning(f"{cell.title} failed: {record['message']}")
    return record | {"path": cell.folder}


def _release_memory() -> None:
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------- table and figures


def _write(
    folder: Path,
    settings: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    dense: Sequence[Measurement],
    console: Console,
    command: str,
) -> None:
    runs = [_run(record, settings) for record in records]
    beside = next((run.dense for run in runs if run.dense), {})
    own = {**beside, **{measured.name: measured.value for measured in dense}}
    cells = [
        {key: value for key, value in record.items() if key not in ("path", "title")} | dict(run.values)
        for record, run in zip(records, runs, strict=True)
    ]
    rows = many.grouped(runs)
    plain = [row.plain() for row in rows]
    (first,) = many.grouped([many.Run("dense", 0.0, values=own)])
    artifacts.write_text(folder / "cells.csv", many.csv_text(cells))
    artifacts.write_text(folder / "comparison.csv", many.csv_text([first.plain(), *plain]))
    artifacts.write_text(folder / "config.yaml", config.to_yaml(settings))
    head, target = "source" if settings.get("sources") else "method", config.build(settings["target"]).name
    failed = [f"{record['title']}: {record['message']}" for record in records if record["status"] == "failed"]
    figures = pieces.write_many(
        folder,
        "comparison",
        rows,
        command=command,
        dense=own,
        title=f"{_model_name(settings)}: {len({row.method for row in rows})} {head}s compared",
        head=head,
        protocol={"target": target, "seeds": settings["seeds"], **_protocol(settings, dense)},
        failed=failed,
    )
    # A terminal is narrow: one share removed, that of the target, is enough there.
    other = [f"removed_{name}" for name in ("params", "flops", "components") if name != target]
    console.table(
        f"{_model_name(settings)}, mean ± standard deviation over seeds",
        many.lines(rows, own, leave_out=other, head=head),
    )
    for found in many.findings(rows, own):
        console.note(found)
    console.note(f"the page is {folder / 'comparison.html'}; the same as text and numbers: comparison.md, comparison.csv")
    if figures:
        console.note("figures: " + ", ".join(f"{name} (png, svg)" for name in figures))
    console.result({"folder": str(folder), "dense": own, "rows": plain, "cells": cells})


def _run(record: Mapping[str, Any], settings: Mapping[str, Any]) -> many.Run:
    """A cell as a comparison needs it."""
    run = many.Run("", record["budget"], model=_model_name(settings))
    if record["status"] != "failed":
        results = Results.read(artifacts.read_results(record["path"]))
        run = many.run_of(results, (), record["folder"])
        if settings.get("sources"):
            # What tells sources apart: number of images, distance of their BatchNorm statistics.
            found = {
                "calibration_images": results.calibration.get("num_samples"),
                "batchnorm_distance": results.calibration_quality.get(_DISTANCE),
            }
            own = {name: value for name, value in found.items() if value is not None}
            run = dataclasses.replace(run, values={**run.values, **own})
    return dataclasses.replace(
        run, method=record["method"], budget=record["budget"], draw=str(record["seed"]), model=_model_name(settings),
        folder=record["folder"], status=record["status"], message=record["message"],
    )  # fmt: skip


def _protocol(settings: Mapping[str, Any], dense: Sequence[Measurement]) -> dict[str, Any]:
    """What a reader needs to judge the numbers: images, their number, where it ran."""
    found = {"device": settings["runtime"]["device"], "dtype": settings["runtime"]["dtype"]}
    if "sequences" in settings["data"]:
        told = ("path", "hub", "sequences", "length")
        for key, node in (("calibration text", settings["data"]), ("evaluation text", settings["evaluation_data"] or {})):
            found[key] = ", ".join(f"{name} {node[name]}" for name in told if node.get(name) is not None) or "none"
        return found
    samples = settings["data"].get("num_samples")
    found["calibration images"] = "all" if samples is None else samples
    if settings.get("sources"):
        asked = (f"{one['title']}: {' '.join(one['words'])}" for one in settings["sources"])
        found["calibration images"] = "; ".join(asked)
    measured = next((measurement for measurement in dense if measurement.name == "top1"), None)
    if measured is not None:
        found["evaluation images"] = measured.protocol.get("samples")
        found["standard error of the dense accuracy"] = f"{measured.protocol.get('standard_error', 0):.2f} points"
    return found


def _model_name(settings: Mapping[str, Any]) -> str:
    node = settings["model"]
    place = node.get("path") or node.get("gguf") or "network"
    return str(node.get("name") or Path(str(place)).stem)
