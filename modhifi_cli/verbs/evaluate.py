"""`modhifi evaluate`: measure a saved run or a dense network again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from modhifi_cli.console import Console
from modhifi_cli.engine.memory import peaks
from modhifi_cli.files import artifacts
from modhifi_cli.records import Results
from modhifi_cli.settings import config
from modhifi_cli.verbs import pieces, tracking
from modhifi_cli.verbs.opened import OpenedRun, open_run

_MADE = tuple(f"modhifi_cli.data.{name}." for name in ("synthetic", "inversion", "class_inversion", "generated", "mixed"))


def evaluate(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> Path:
    tracking.foresee(settings)
    asked, settings = settings, dict(settings)
    of = settings  # whose ``model`` the networks are
    device = pieces.device_of(settings)
    models: dict[str, nn.Module] = {}
    opened: OpenedRun | None = None
    if settings["run"] is None:
        loaded = dense = config.build(settings["model"])
        models["dense"] = loaded.model
    else:
        opened = open_run(settings, console)
        saved = opened.folder
        used = [key for key in ("data", "evaluation_data") if key not in settings]
        before = opened.settings(*used)
        of = pieces.settings_of(saved)
        for key in ("data", "evaluation_data"):
            settings.setdefault(key, before.get(key))
        loaded = opened.network()
        dense = loaded
        # Data that were made came from the dense network, and are made from it again.
        made = str((settings["data"] or {}).get("_target_")).startswith(_MADE)
        if settings["measure_dense"] or made and settings["evaluation_data"] is None:
            dense = opened.build(opened.settings("model")["model"])
        if settings["measure_dense"]:
            models["dense"] = dense.model
        results = artifacts.read_results(saved)
        models["edited" if results.get("verb") == "unlearn" else "pruned"] = loaded.model
        pieces.name_forgotten_(settings, results.get("forget"))
    evaluation = pieces.image_source(settings, "evaluation_data", loaded, labelled=True, console=console)
    # What is measured on evaluation data needs no other; a set may be gone by now, or take long to make again.
    calibration = None
    if evaluation is None:
        calibration = pieces.image_source(settings, "data", dense, labelled=False, console=console)
    kept = {**settings, "model": of["model"]}  # a language model stays in its own precision, as in the run
    models = {name: pieces.placed(model, kept, device) for name, model in models.items()}
    on = pieces.MeasuredOn(calibration, evaluation, loaded.preprocess)
    measurements = pieces.measure(settings, models, on, device, console)
    place = pieces.begin_run("evaluate", loaded.name, asked, facts, folder, device)
    results = ({} if opened is None else opened.record()) | Results.written(
        verb="evaluate", model=loaded.name, weights=loaded.weights, measurements=measurements,
        memory=peaks(device),
    )
    artifacts.write_json(place.path / "results.json", results)
    pieces.write_pages(place.path)
    final = place.finish(edits=False)
    pieces.show_measurements(console, measurements)
    console.note(f"results lie in {final}")
    tracking.track(settings, facts, final, console)
    console.result({"folder": str(final), "measurements": results["measurements"]})
    return final
