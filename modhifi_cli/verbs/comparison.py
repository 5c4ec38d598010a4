"""Several methods on one protocol: a grid of ordinary prune runs, one table, and frontiers as figures.

A cell of the grid is (method, source of data, budget, seed): the run that `modhifi prune preset=METHOD` would make with
the user's other settings. What makes the comparison fair (network, images, target, evaluation) is copied from the comparison into
every cell, whatever a preset says. A cell's folder is named after its settings, so finished cells are found again and a
changed preset is a new cell.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modhifi_cli.console import Console
from modhifi_cli.errors import ConfigError, ModHiFiError, nearest
from modhifi_cli.evaluation.forward import RememberedLogits
from modhifi_cli.files import artifacts
from modhifi_cli.pages import plots, reports
from modhifi_cli.records import ImageSource, LoadedModel, Measurement, Progress
from modhifi_cli.settings import config

_SHARED = ("model", "data", "evaluation_data", "evaluation", "target", "runtime", "export", "console", "output_dir")
_SET_HERE = {
    "preset": "methods", "sparsity": "budgets", "data.seed": "seeds", "outside": "methods", "resume": None,
    "measure_dense": None,
}  # fmt: skip
_NOT_IN_NAMES = ("console", "output_dir", "resume")  # settings that change no result
_GRID = ("methods=", "budgets=", "seeds=", "sources=")
_NOT_IN_FOLDER = (*_GRID, "console", "output_dir=", "hydra")
_DISTANCE = "distance_of_batchnorm_statistics_from_the_stored"
_ALONE = ("top1", "size")  # measurements of one network at a time: the dense one's are taken once for all cells


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


class Shared:
    """What all cells of a process have in common, made when first needed: the network, images, the dense measurements.

    Args:
        settings: Of the comparison.
        load: Settings → loaded network, calibration images, evaluation images.
        source: (settings, key, loaded network, labelled=…) → images.
        wants_labels: Whether a cell's method looks at the classes of its calibration images.
        measure: As `verbs.pieces.measure`.
        device: Where to measure.
        dtype: Of the networks.
        kept: File of the dense measurements.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        load: Callable,
        source: Callable,
        wants_labels: Callable[[Mapping[str, Any]], bool],
        measure: Callable,
        device: torch.device,
        dtype: torch.dtype,
        kept: Path,
    ) -> None:
        self._settings, self._load, self._source, self._measure = settings, load, source, measure
        self._device, self._dtype, self._kept, self._wants_labels = device, dtype, kept, wants_labels
        self._loaded: LoadedModel | None = None
        self._evaluation: ImageSource | None = None
        self._calibration: dict[str, ImageSource] = {}
        self._answers: RememberedLogits | None = None
        self._dense: tuple[Measurement, ...] | None = None

    def sources(self, settings: Mapping[str, Any]) -> tuple[LoadedModel, ImageSource, ImageSource | None]:
        """A cell's network (its own copy), calibration images and evaluation images."""
        labelled = self._wants_labels(settings)  # a method without labels must not be handed any
        key = json.dumps([settings["data"], labelled], sort_keys=True, default=str)
        if self._loaded is None:
            self._loaded, self._calibration[key], self._evaluation = self._load(settings)
        if key not in self._calibration:
            self._calibration[key] = self._source(settings, "data", self._loaded, labelled=labelled)
        own = dataclasses.replace(self._loaded, model=copy.deepcopy(self._loaded.model))
        return own, self._calibration[key], self._evaluation

    def models(self, evaluation: str, models: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """Which networks a measurement of a cell looks at: the dense one only where it needs it."""
        if "dense" not in models:
            return models
        if evaluation in _ALONE:
            return {name: model for name, model in models.items() if name != "dense"}
        if evaluation == "agreement":
            if self._answers is None:
                self._answers = RememberedLogits(copy.deepcopy(models["dense"]))
            return {**models, "dense": self._answers}
        return models

    def dense(self, console: Console) -> tuple[Measurement, ...]:
        """Measurements of the dense network alone, taken once and kept on disk."""
        if self._dense is not None:
            return self._dense
        keys = ("model", "evaluation_data", "runtime")
        asked = {name: node for name, node in self._settings["evaluation"].items() if name in _ALONE}
        identity = _digest({key: self._settings[key] for key in keys} | {"evaluation": asked})
        if self._kept.is_file():
            before = json.loads(artifacts.read_text(self._kept))
            if before.get("identity") == identity:
                self._dense = tuple(Measurement(**measured) for measured in before["measurements"])
                return self._dense
        loaded, calibration, evaluation = self.sources(self._settings)
        dense = loaded.model.to(device=self._device, dtype=self._dtype)
        self._dense = self._measure(
            {**self._settings, "evaluation": asked},
            {"dense": dense},
            calibration,
            evaluation,
            loaded.preprocess,
            self._device,
            console,
        )
        found = {"identity": identity, "measurements": artifacts.measurements_to_json(self._dense)}
        artifacts.write_json(self._kept, found)
        return self._dense


class _CellConsole(Console):
    """Passes a cell's warnings and progress on; its tables and notes are in its folder."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title

    def warning(self, text: str) -> None:
        self._console.warning(f"{self._title}: {text}")

    def progress(self, step: Progress) -> None:
        self._console.progress(step)


def compare(
    settings: Mapping[str, Any],
    overrides: Sequence[str],
    console: Console,
    *,
    shared: Callable[[Path], Shared],
    prune: Callable[..., Any],
    portable: Callable[[Mapping[str, Any]], dict[str, Any]],
    command: str,
) -> Path:
    """Run what is not finished yet of the grid, then write and print its table and figures.

    Args:
        settings: Checked plain settings of the comparison.
        overrides: The user's own words.
        console: Who is told.
        shared: File for the dense measurements → what the cells share.
        prune: ``(settings, facts, console, folder, shared)`` makes one run.
        portable: Settings without what a machine adds to them.
        command: For the page.

    Returns:
        The comparison's folder.

    Raises:
        ConfigError: If a method is unknown or a setting belongs to the grid.
        ModHiFiError: After everything else, if cells failed.
        KeyboardInterrupt: With how to go on.
    """
    folder = Path(settings["output_dir"]) / "compare" / _folder_name(overrides)
    cells = _cells(settings, overrides, folder, portable)
    artifacts.make_folder(folder / "records")
    common = shared(folder / "dense.json")
    dense = common.dense(console)  # first: what is wrong with network or images is told once, not by every cell
    records = []
    for number, cell in enumerate(cells, start=1):
        try:
            record = _run_cell(cell, f"{number}/{len(cells)}", folder, console, common, prune)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "Type the same command again: finished cells are kept and this one goes on."
            ) from None
        records.append(record)
    _write(folder, settings, records, dense, console, command)
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


def _cells(
    settings: Mapping[str, Any],
    overrides: Sequence[str],
    folder: Path,
    portable: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> list[Cell]:
    presets = config.groups()["preset"]
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
        kept = {key: value for key, value in portable(own).items() if key not in _NOT_IN_NAMES}
        title = source["title"]
        label = method if title is None else f"{title}, {method}" if several else title
        start = method if title is None else f"{method}_{config.slug([title])}"
        name = f"{start}_{price.name}-{budget:g}_seed-{seed}_{_digest(kept)[:8]}"
        words = (*mine, *source["words"], f"preset={method}", f"sparsity={budget:g}", f"data.seed={seed}")
        cells.append(Cell(label, budget, seed, own, words, folder / "cells" / name))
    return cells


def _run_cell(
    cell: Cell, number: str, folder: Path, console: Console, shared: Shared, prune: Callable[..., Any]
) -> dict[str, Any]:
    """Run one cell unless it is finished, continue it if it was interrupted, and record how it ended."""
    record: dict[str, Any] = {
        "method": cell.method, "budget": cell.budget, "seed": cell.seed, "title": cell.title,
        "folder": f"cells/{cell.folder.name}", "status": "finished before", "message": "",
    }  # fmt: skip
    path = folder / "records" / f"{cell.folder.name}.json"
    try:
        if not cell.folder.is_dir():
            console.note(f"cell {number}: {cell.title}")
            settings = dict(cell.settings)
            interrupted = cell.folder.with_name(cell.folder.name + artifacts.INCOMPLETE)
            if (interrupted / "calibration.json").exists():
                settings["resume"] = str(interrupted)
            elif interrupted.exists():
                shutil.rmtree(interrupted)  # it ended before its first edit
            facts = {"verb": "prune", "overrides": list(cell.words), "sweep": str(folder), "number": 0}
            prune(settings, facts, _CellConsole(console, cell.title), cell.folder, shared)
            record["status"] = "finished"
            _release_memory()
    except ModHiFiError as error:
        record |= {"status": "failed", "message": " ".join(str(error).split())}
    except Exception as error:
        # A defect of ours must not be hidden by the comparison: its traceback is kept beside the record.
        artifacts.write_text(path.with_suffix(".txt"), traceback.format_exc())
        told = " ".join(str(error).split())
        record |= {"status": "failed", "message": f"{type(error).__name__}: {told} (see records/{path.stem}.txt)."}
    if record["status"] == "failed":
        console.warning(f"{cell.title} failed: {record['message']}")
    artifacts.write_json(path, record)
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
    cells = []
    beside: dict[str, float] = {}  # of the dense network, where every cell measures it beside its own
    for record in records:
        values: dict[str, float] = {}
        if record["status"] != "failed":
            results = artifacts.read_results(record["path"])
            values = {f"removed_{name}": 100 * share for name, share in results["achieved"].items()}
            values |= {m["name"]: m["value"] for m in results["measurements"] if m["model"] == "pruned"}
            if settings.get("sources"):
                values |= _of_calibration(results)
            beside = beside or {m["name"]: m["value"] for m in results["measurements"] if m["model"] == "dense"}
            if "speedup" in values:
                values["time_saved"] = 100 * (1 - 1 / values["speedup"])
            elif "removed_latency" in values:
                values["time_saved"] = values["removed_latency"]
        cells.append({key: value for key, value in record.items() if key not in ("path", "title")} | values)
    rows = reports.comparison_rows(cells)
    own = {**beside, **{measured.name: measured.value for measured in dense}}
    artifacts.write_text(folder / "cells.csv", reports.csv_text(cells))
    first = reports.comparison_rows([_dense_cell(own)])
    artifacts.write_text(folder / "comparison.csv", reports.csv_text([*first, *rows]))
    artifacts.write_text(folder / "config.yaml", config.to_yaml(settings))
    figures = _figures(folder, settings, rows, own)
    what, target = "sources" if settings.get("sources") else "methods", config.build(settings["target"]).name
    artifacts.write_text(
        folder / "comparison.md",
        reports.comparison_page(
            title=f"{_model_name(settings)}: {len(dict.fromkeys(row['method'] for row in rows))} {what} compared",
            head=what.removesuffix("s"),
            rows=rows,
            dense=own,
            failed=[f"{record['title']}: {record['message']}" for record in records if record["status"] == "failed"],
            figures=figures,
            protocol={"target": target, "seeds": settings["seeds"], **_protocol(settings, dense)},
            repeat=command,
        ),
    )
    other = [f"removed_{name}" for name in ("params", "flops", "components") if name != target]
    shown = reports.comparison_table(rows, own, leave_out=other, head=what.removesuffix("s"))
    console.table(f"{_model_name(settings)}, mean ± standard deviation over seeds", shown)
    console.note(f"the table is in {folder / 'comparison.md'} and comparison.csv, the cells in cells.csv")
    if figures:
        console.note("figures: " + ", ".join(f"{Path(file).stem} (png, svg)" for file in figures.values()))
    console.result({"folder": str(folder), "dense": own, "rows": rows, "cells": cells})


def _of_calibration(results: Mapping[str, Any]) -> dict[str, float]:
    """What tells sources of calibration data apart: number of images, distance of their BatchNorm statistics."""
    found = {
        "calibration_images": results["calibration"].get("num_samples"),
        "batchnorm_distance": results.get("calibration_quality", {}).get(_DISTANCE),
    }
    return {name: value for name, value in found.items() if value is not None}


def _dense_cell(values: Mapping[str, float]) -> dict[str, Any]:
    return {"method": "dense", "budget": 0.0, "seed": "", "status": "finished", "message": "", **values}


def _figures(
    folder: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], dense: Mapping[str, float]
) -> dict[str, str]:
    """Write the frontiers that there are numbers for; caption → file beside the page."""
    quality, label = ("top1", "top-1 accuracy, %")
    if any("token_perplexity" in row for row in rows):
        quality, label = ("token_perplexity", "token perplexity, less is better")
    elif not any(quality in row for row in rows):
        quality, label = ("agreement", "agreement with dense, % of images")
    height = 100.0 if quality == "agreement" else dense.get(quality)
    shown = f"dense {height:.2f}" if quality != "agreement" and height is not None else "dense"
    count = len(set(settings["seeds"]))
    spread = f", mean ± deviation over {count} seeds" if count > 1 else ""
    found = {}
    for stem, key, x_label in (
        ("frontier_flops", "removed_flops", "FLOPs (MACs) removed, % of dense"),
        ("frontier_latency", "time_saved", "time of a forward pass saved, % of dense"),
    ):
        curves: dict[str, list[plots.Point]] = {}
        for row in rows:
            if key in row and quality in row:
                spreads = (row.get(f"{key}_sd") or 0.0, row.get(f"{quality}_sd") or 0.0)
                curves.setdefault(row["method"], []).append(plots.Point(row[key], row[quality], *spreads))
        title = f"{_model_name(settings)}: {label.partition(',')[0]} against {x_label.partition(' ')[0]}{spread}"
        kinds = plots.frontier(
            curves, title=title, x_label=x_label, y_label=label, dense=height, dense_label=shown
        )
        for kind, content in kinds.items():
            artifacts.write_bytes(folder / f"{stem}.{kind}", content)
        if kinds:
            found[title] = f"{stem}.svg"
        else:  # an older command's figure must not stand beside this one's table
            for kind in ("png", "svg"):
                (folder / f"{stem}.{kind}").unlink(missing_ok=True)
    return found


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


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()
