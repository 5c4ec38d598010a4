"""The verbs, from plain settings to files and tables: each reads in one screen and leaves the work to the rooms above.

A run is a folder (`artifacts`), a voice (`console`) and a sequence of records (`tasks`). Nothing here computes.
"""

import contextlib
import copy
import dataclasses
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli import artifacts, comparison, config, plots, reports
from modhifi_cli.console import Console, open_console
from modhifi_cli.errors import ConfigError, DataError, ModHiFiError, NumericsError
from modhifi_cli.records import Edit, ImageSource, LoadedModel, Measurement, Preprocess, Progress

_NOT_COMPARED = ("resume", "console", "output_dir")  # settings that may differ between a run and its continuation
_VERIFICATION_IMAGES = 4


def run(verb: str, settings: Mapping[str, Any], facts: Mapping[str, Any], *, folder: Path | None = None) -> Path | None:
    """Carry out one verb.

    Args:
        verb: ``prune``, ``evaluate``, ``verify``, ``replay`` or ``info``.
        settings: Checked plain settings of the verb, as `config.settings` gives them.
        facts: `config.job_facts()`: overrides and the place in a sweep.
        folder: Where a run folder shall be; None makes one under ``output_dir`` with time and overrides in its name.

    Returns:
        The run folder, or None for a verb that makes none.

    Raises:
        ModHiFiError: Whatever the user can mend.
        KeyboardInterrupt: With how to go on, if the user stopped the run.
    """
    console = Console() if facts.get("parallel") else open_console(settings["console"]["style"])
    settings = _with_device(settings, facts)
    try:
        return _VERBS[verb](settings, facts, console, folder)
    except ModHiFiError as error:
        console.error(" ".join(str(error).split()))
        raise
    finally:
        console.close()


# ------------------------------------------------------------------------------------------------------------- prune


def _prune(
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    console: Console,
    folder: Path | None,
    shared: comparison.Shared | None = None,
) -> Path:
    from modhifi_cli.graph.surgery import weights_hash

    command = _command("prune", facts["overrides"])
    resumed = settings["resume"]
    # The page of a run says how to make it again from nothing: a finished run cannot be resumed.
    repeat = _command("prune", [word for word in facts["overrides"] if not word.startswith("resume=")])
    place = artifacts.RunDirectory.reopen(resumed) if resumed else None
    if place is not None:
        _same_settings(place.path, settings)
    device = _device(settings)
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        loaded, calibration, evaluation = _sources(settings) if shared is None else shared.sources(settings)
        dense = copy.deepcopy(loaded.model).to(device=device, dtype=_dtype(settings))
        dense_hash = weights_hash(loaded.model)
    if place is None:
        place = artifacts.RunDirectory.create(folder or _new_folder("prune", loaded.name, settings, facts))
        artifacts.write_text(place.path / "config.yaml", config.to_yaml(_portable(settings)))
        artifacts.write_json(place.path / "environment.json", artifacts.environment(command, str(device)))
        artifacts.write_json(place.path / "calibration.json", calibration.protocol)
    done = _edits_so_far(place, dense_hash, calibration) if resumed else ()
    place.log(command)
    console.note(f"{loaded.name}: {loaded.weights}, {len(calibration)} calibration images; working in {place.path}")
    if calibration.protocol.get("skipped"):
        console.warning(
            f"{calibration.protocol['skipped']} images that cannot be decoded were skipped (data.skip_corrupt), "
            f"{calibration.protocol['skipped_files'][0]} the first"
        )
    try:
        with _timed(seconds, "prune"):
            model = loaded.model.to(device=device, dtype=_dtype(settings))
            summary, edits, predicted = _edit_(model, settings, calibration, device, done, place, dense_hash, console)
        with _timed(seconds, "save"):
            _save(place, loaded, model)
            exported = _export(place, settings, model, loaded.preprocess)
        with _timed(seconds, "evaluate"):
            beside = {"dense": dense} if settings["measure_dense"] else {}
            models = {**beside, "pruned": model}
            measurements = _measure(
                settings, models, calibration, evaluation, loaded.preprocess, device, console, shared
            )
        _write_outcome(
            place, settings, loaded, summary, edits, predicted, measurements, exported, seconds, repeat, calibration
        )
        final = place.finish()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_resume(place, facts)) from None
    except ModHiFiError as error:
        with contextlib.suppress(DataError):  # a full disk may be the very cause
            place.log(f"failed: {error}")
        if not resumed:
            place.discard_if_empty()
        if place.path.is_dir():
            console.note(
                f"the edits made so far lie in {place.path}; once the cause is mended: {_how_to_resume(place, facts)}"
            )
        raise
    _show_outcome(console, final, summary, measurements)
    return final


def _edit_(
    model: nn.Module,
    settings: Mapping[str, Any],
    calibration: ImageSource,
    device: torch.device,
    done: Sequence[Edit],
    place: artifacts.RunDirectory,
    dense_hash: str,
    console: Console,
) -> tuple[Any, list[Edit], dict[str, float]]:
    """Run the task; every edit is on disk before the next group starts. Summary, edits, and the errors it predicted."""
    from modhifi_cli.tasks.prune import Plan, Summary

    events = _events(model, settings, calibration, device, done)
    edits, summary, warned = list(done), None, set()
    predicted: dict[str, float] = {}
    if done:
        console.note(f"{len(done)} edits of the interrupted run are applied again from its folder")
    for event in events:
        if isinstance(event, Plan):
            predicted = dict(getattr(event, "predicted_error", None) or {})
            _show_plan(console, event)
        elif isinstance(event, Progress):
            console.progress(event)
        elif isinstance(event, Edit):
            place.save_edit(event, dense_hash)
            edits.append(event)
            place.log(f"edit {event.name}: kept {event.kept.numel()}, removed {event.removed.numel()}")
        elif isinstance(event, Summary):
            summary = event
        for text in getattr(event, "warnings", ()):
            if text not in warned:
                warned.add(text)
                place.log(f"warning: {text}")
                console.warning(text)
    assert summary is not None, "the task ended without a summary"
    return summary, edits, predicted


def _events(
    model: nn.Module, settings: Mapping[str, Any], calibration: ImageSource, device: torch.device, done: Sequence[Edit]
) -> Iterator[Any]:
    """The run of our method, or of an outside one where the settings name it; both tell the same kinds of records."""
    from modhifi_cli.tasks.prune import prune_

    if settings.get("outside"):
        return config.build(settings["outside"])(
            model,
            calibration=calibration,
            sparsity=float(settings["sparsity"]),
            target=settings["target"]["name"],
            batchnorm=settings["batchnorm"],
            exclude=tuple(settings["exclude"]),
            round_to=settings["round_to"],
            batch_size=settings["runtime"]["batch_size"],
            device=device,
            done=done,
        )
    return prune_(
        model,
        calibration=calibration,
        sparsity=float(settings["sparsity"]),
        target=settings["target"]["name"],
        scoring=config.build(settings["scoring"]),
        selection=config.build(settings["selection"]),
        compensation=config.build(settings["compensation"]),
        allocation=config.build(settings["allocation"]),
        schedule=config.build(settings["schedule"]),
        batchnorm=settings["batchnorm"],
        classifier=settings["classifier"],
        exclude=tuple(settings["exclude"]),
        round_to=settings["round_to"],
        batch_size=settings["runtime"]["batch_size"],
        device=device,
        seed=settings["runtime"]["seed"],
        gathering=config.build(settings["statistics"]),
        done=done,
    )


def _show_plan(console: Console, plan: Any) -> None:
    rows = [
        {
            "group": group.name,
            "components": group.components,
            "keep": group.keep,
            "producers": len(group.producers),
            "consumers": len(group.consumers),
        }
        for group in plan.groups
    ]
    if rows:
        console.table(f"{len(rows)} groups of coupled components", rows)
    for refused in plan.refused:
        console.note(f"left alone: {refused.name}: {refused.reason}")


def _write_outcome(
    place: artifacts.RunDirectory,
    settings: Mapping[str, Any],
    loaded: LoadedModel,
    summary: Any,
    edits: Sequence[Edit],
    predicted: Mapping[str, float],
    measurements: Sequence[Measurement],
    exported: Sequence[Any],
    seconds: Mapping[str, float],
    command: str,
    calibration: ImageSource,
) -> None:
    groups = [
        {"group": edit.name, "pass": edit.iteration, "kept": edit.kept.numel(), "removed": edit.removed.numel()}
        | {key: edit.facts[key] for key in ("dead_outputs", "fidelity", "rows", "seconds") if key in edit.facts}
        for edit in edits
        if edit.removed.numel()
    ]
    achieved, warnings = dict(summary.achieved), list(summary.warnings)
    target = settings["target"]["name"]
    artifacts.write_json(
        place.path / "results.json",
        {
            "format_version": artifacts.FORMAT_VERSION,
            "verb": "prune",
            "model": loaded.name,
            "weights": loaded.weights,
            "target": target,
            "sparsity": settings["sparsity"],
            "achieved": achieved,
            "measurements": artifacts.measurements_to_json(measurements),
            "groups": groups,
            "predicted_error": dict(predicted),
            "exports": [{**dataclasses.asdict(export), "path": export.path.name} for export in exported],
            "calibration": dict(calibration.protocol),
            "warnings": warnings,
            "seconds": dict(seconds),
        },
    )
    drawn = calibration.protocol
    asked: dict[str, Any] = {
        "weights": loaded.weights,
        "calibration images": f"{len(calibration)} of {drawn.get('available', len(calibration))}, {drawn.get('path')}",
    }
    asked |= {key: settings[key] for key in ("sparsity", "batchnorm", "classifier", "round_to", "exclude")}
    asked["target"] = target
    steps = ("scoring", "selection", "compensation", "allocation", "schedule")
    for name in ("outside",) if settings.get("outside") else steps:
        node = settings[name]
        own = ", ".join(f"{key} {value}" for key, value in node.items() if not key.startswith("_"))
        asked[name] = str(node["_target_"]).rpartition(".")[2] + (f" ({own})" if own else "")
    figures = _write_figure(place.path, "groups", _group_figure(loaded.name, edits, predicted))
    text = reports.markdown_report(
        title=f"{loaded.name}, sparsity {settings['sparsity']:g} of {target}",
        asked=asked,
        achieved=achieved,
        measurements=measurements,
        groups=[_group_line(group) for group in groups],
        figures={"Relative error of each group": figures} if figures else {},
        warnings=warnings,
        exports=exported,
        repeat=command,
    )
    artifacts.write_text(place.path / "report.md", text)
    place.log("finished")


def _group_figure(model: str, edits: Sequence[Edit], predicted: Mapping[str, float]) -> dict[str, bytes]:
    """Predicted and measured relative error per group (of its last pass), summed over its consumers like M10's."""
    measured = {}
    for edit in edits:
        fidelity = edit.facts.get("fidelity")
        if edit.removed.numel() and fidelity:
            measured[edit.name] = sum(1 - value for value in fidelity.values() if value is not None)
    return plots.group_errors(
        [*predicted, *measured], predicted=predicted, measured=measured, title=f"{model}: error of each group"
    )


def _write_figure(folder: Path, stem: str, kinds: Mapping[str, bytes]) -> str | None:
    """Write ``stem.png``, ``stem.svg``; the name of the one that a page shows, or None where there is no figure."""
    for kind, content in kinds.items():
        artifacts.write_bytes(folder / f"{stem}.{kind}", content)
    return f"{stem}.svg" if "svg" in kinds else None


def _group_line(group: Mapping[str, Any]) -> dict[str, Any]:
    """One group for the report: the lowest fidelity over its consumers stands for all of them."""
    line = {key: value for key, value in group.items() if key not in ("fidelity", "rows", "seconds")}
    if group.get("fidelity"):
        line["lowest fidelity"] = min(group["fidelity"].values())
    return line


def _show_outcome(console: Console, final: Path, summary: Any, measurements: Sequence[Measurement]) -> None:
    shares = ", ".join(f"{share:.1%} of {name}" for name, share in summary.achieved.items())
    console.note(f"removed {shares}")
    _show_measurements(console, measurements)
    console.note(f"the new network lies in {final / 'model'}; the report in {final / 'report.md'}")
    console.result(
        {
            "folder": str(final),
            "achieved": dict(summary.achieved),
            "warnings": list(summary.warnings),
            "measurements": artifacts.measurements_to_json(measurements),
        }
    )


def _edits_so_far(place: artifacts.RunDirectory, dense_hash: str, calibration: ImageSource) -> tuple[Edit, ...]:
    """Edits to go on from, after checking that weights and images are still those they were made with."""
    edits, made_on = place.load_edits()
    if edits and made_on != dense_hash:
        raise DataError(
            f"resume={place.path}: the dense weights have changed since (sha256 {dense_hash[:12]}, was "
            f"{str(made_on)[:12]}); give the weights that the run began with, or start a new run."
        )
    import json

    before = json.loads(artifacts.read_text(place.path / "calibration.json"))
    now = json.loads(json.dumps(dict(calibration.protocol), default=str))
    if before.get("sha256") != now.get("sha256"):
        raise DataError(
            f"resume={place.path}: the calibration images have changed since the run began; "
            "give the same images, or start a new run."
        )
    return edits


def _settings_of(folder: Path) -> dict[str, Any]:
    """Settings that a run was made with.

    Raises:
        DataError: If its ``config.yaml`` is unreadable or says nothing of a model.
    """
    try:
        before = config.from_yaml(artifacts.read_text(folder / "config.yaml"))
    except ConfigError as error:
        raise DataError(f"{folder / 'config.yaml'}: damaged, {error}; restore the run folder.") from error
    model = before.get("model")
    if not isinstance(model, dict) or "_target_" not in model:
        raise DataError(f"{folder / 'config.yaml'}: damaged, it names no model; restore the run folder.")
    return before


def _same_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    before = _settings_of(folder)
    ours = {key: value for key, value in _portable(settings).items() if key not in _NOT_COMPARED}
    theirs = {key: value for key, value in before.items() if key not in _NOT_COMPARED}
    found = config.differences(ours, theirs)
    if found:
        raise ConfigError(
            f"resume={folder}: the run was begun with other settings: {'; '.join(found[:5])}"
            f"{f' and {len(found) - 5} more' if len(found) > 5 else ''}; give the same ones, or start a new run."
        )


def _how_to_resume(place: artifacts.RunDirectory, facts: Mapping[str, Any]) -> str:
    if facts.get("sweep"):
        return "Type the same command again: finished jobs are skipped and this one goes on."
    words = [word for word in facts["overrides"] if not word.startswith("resume=")]
    return f"Go on with: {_command('prune', [*words, f'resume={place.path}'])}"


# -------------------------------------------------------------------------------------------- evaluate, verify, replay


def _evaluate(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> Path:
    asked, settings = settings, dict(settings)
    device = _device(settings)
    models: dict[str, nn.Module] = {}
    if settings["run"] is None:
        loaded = config.build(settings["model"])
        models["dense"] = loaded.model
    else:
        saved = artifacts.run_folder(settings["run"])
        before = _settings_of(saved)
        for key in ("data", "evaluation_data"):
            settings.setdefault(key, before.get(key))
        loaded = artifacts.load_saved(saved)
        if settings["measure_dense"]:
            models["dense"] = config.build(before["model"]).model
        models["pruned"] = loaded.model
    models = {name: model.to(device=device, dtype=_dtype(settings)) for name, model in models.items()}
    calibration = _source(settings, "data", loaded.preprocess, labelled=False)
    evaluation = _source(settings, "evaluation_data", loaded.preprocess, labelled=True)
    measurements = _measure(settings, models, calibration, evaluation, loaded.preprocess, device, console)
    place = artifacts.RunDirectory.create(folder or _new_folder("evaluate", loaded.name, settings, facts))
    command = _command("evaluate", facts["overrides"])
    artifacts.write_text(place.path / "config.yaml", config.to_yaml(_portable(asked)))
    artifacts.write_json(place.path / "environment.json", artifacts.environment(command, str(device)))
    results = {
        "format_version": artifacts.FORMAT_VERSION,
        "verb": "evaluate",
        "model": loaded.name,
        "weights": loaded.weights,
        "measurements": artifacts.measurements_to_json(measurements),
    }
    artifacts.write_json(place.path / "results.json", results)
    text = reports.markdown_report(
        title=f"{loaded.name}, measured", asked={}, achieved={}, measurements=measurements, repeat=command
    )
    artifacts.write_text(place.path / "report.md", text)
    final = place.finish(edits=False)
    _show_measurements(console, measurements)
    console.note(f"results lie in {final}")
    console.result({"folder": str(final), "measurements": results["measurements"]})
    return final


def _verify(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> None:
    saved = artifacts.run_folder(settings["run"])
    inputs, logits = artifacts.load_verification(saved)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "answer.safetensors"
        script = "import sys; from modhifi_cli.artifacts import answer_process; sys.exit(answer_process(*sys.argv[1:]))"
        process = subprocess.run(
            [sys.executable, "-c", script, str(saved), str(path)], capture_output=True, text=True, check=False
        )
        if process.returncode != 0:
            last = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise DataError(f"run={saved}: the saved network cannot be loaded in a fresh process: {last}")
        again = artifacts.read_answer(path)
    if again.shape != logits.shape:
        raise DataError(f"run={saved}: expected logits {tuple(logits.shape)}, got {tuple(again.shape)}; it is damaged.")
    difference, scale = float((again - logits).abs().max()), float(logits.abs().max())
    facts_out = {"run": str(saved), "largest_difference": difference, "largest_logit": scale}
    if not difference <= settings["tolerance"] * scale:
        raise NumericsError(
            f"run={saved}: the reloaded network differs from the saved logits by {difference:.3g} (largest logit "
            f"{scale:.3g}, tolerance {settings['tolerance']:g} of it); the saved network is damaged, run again."
        )
    console.note(
        f"{saved}: reloaded in a fresh process; logits of {inputs.shape[0]} inputs agree "
        f"(largest difference {difference:.3g}, largest logit {scale:.3g})"
    )
    console.result(facts_out)


def _replay(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> Path:
    from modhifi_cli.graph.surgery import apply_edit_, weights_hash

    # The saved network may be lost: edits and dense weights are enough to make it again.
    source = artifacts.run_folder(settings["run"], needs=("config.yaml", "edits.json", "edits.safetensors"))
    edits, made_on = artifacts.load_edits(source)
    before = _settings_of(source)
    if settings["model"]["weights"] is not None:
        before["model"]["weights"] = settings["model"]["weights"]
    loaded = config.build(before["model"])
    found = weights_hash(loaded.model)
    if edits and found != made_on:
        raise DataError(
            f"run={source}: its edits were made on dense weights with sha256 {str(made_on)[:12]}, these have "
            f"{found[:12]}; give the same weights with model.weights=FILE."
        )
    model = loaded.model
    for number, edit in enumerate(edits):
        console.progress(Progress("replay", edit.name, number + 1, len(edits)))
        apply_edit_(model, edit)
    model.eval()
    place = artifacts.RunDirectory.create(folder or _new_folder("replay", loaded.name, settings, facts))
    command = _command("replay", facts["overrides"])
    for edit in edits:
        place.save_edit(edit, found)
    artifacts.write_text(place.path / "config.yaml", config.to_yaml(before))
    artifacts.write_json(place.path / "environment.json", artifacts.environment(command, "cpu"))
    _save(place, loaded, model)
    same = None
    try:
        same = weights_hash(artifacts.load_model(source)) == weights_hash(model)
    except DataError as error:
        console.warning(f"the run's own saved network cannot be compared with: {error}")
    results = {
        "format_version": artifacts.FORMAT_VERSION,
        "verb": "replay",
        "model": loaded.name,
        "weights": loaded.weights,
        "replayed": str(source),
        "edits": len(edits),
        "equals_saved_model": same,
        "measurements": [],
    }
    artifacts.write_json(place.path / "results.json", results)
    final = place.finish()
    told = {
        True: "; weights equal to those of the run's saved network",
        False: "; weights NOT equal to those of the run's saved network",
        None: "",
    }[same]
    console.note(f"{len(edits)} edits applied to {loaded.weights}{told}")
    console.note(f"the network lies in {final / 'model'}")
    console.result({"folder": str(final), "edits": len(edits), "equals_saved_model": same})
    return final


# --------------------------------------------------------------------------------------------------------------- info


def _info(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> None:
    from modhifi_cli.graph.counting import CostModel
    from modhifi_cli.tasks.prune import discover

    loaded = config.build(settings["model"])
    example = _example(loaded.preprocess, 2)
    _, groups, refused = discover(loaded.model, example, exclude=tuple(settings["exclude"]))
    cost = CostModel(loaded.model, example[:1], groups)
    sizes = [group.components for group in groups]
    rows = []
    for number, group in enumerate(groups):
        without = cost.counts([*sizes[:number], 0, *sizes[number + 1 :]])
        rows.append(
            {
                "group": group.name,
                "components": group.components,
                "producers": [slot.module for slot in group.producers],
                "consumers": [slot.module for slot in group.consumers],
                "parameters": cost.dense.parameters - without.parameters,
                "MACs": cost.dense.macs - without.macs,
            }
        )
    console.note(
        f"{loaded.name}: {cost.dense.parameters:,} parameters, {cost.dense.macs:,} MACs for one image, {loaded.weights}"
    )
    console.table("groups of coupled components, with what hangs on each", rows)
    for refusal in refused:
        console.note(f"left alone: {refusal.name}: {refusal.reason}")
    console.result(
        {
            "model": loaded.name,
            "parameters": cost.dense.parameters,
            "macs": cost.dense.macs,
            "groups": rows,
            "refused": [dataclasses.asdict(refusal) for refusal in refused],
        }
    )


# ------------------------------------------------------------------------------------------------------------- sweeps


def run_sweep_job(composed: Any, facts: Mapping[str, Any]) -> None:
    """One job of a sweep: skipped if it is finished, continued if it was interrupted, recorded if it fails.

    Args:
        composed: Hydra's config object of the job.
        facts: `config.job_facts()` with the sweep's folder.
    """
    sweep = Path(facts["sweep"])
    own = [word for word in facts["overrides"] if not word.startswith(("console", "output_dir="))]
    final = sweep / config.slug(own)
    record = {"number": facts["number"], "overrides": own, "folder": final.name, "status": "running", "message": ""}
    path = sweep / "jobs" / f"{facts['number']:04d}.json"
    artifacts.make_folder(path.parent)
    artifacts.write_json(path, record)
    try:
        settings = config.settings(facts["verb"], composed)
        if final.is_dir():
            _same_settings(final, _with_device(settings, facts))
            record["status"] = "finished before"
        else:
            interrupted = final.with_name(final.name + artifacts.INCOMPLETE)
            if (interrupted / "calibration.json").exists() and facts["verb"] == "prune":
                settings["resume"] = str(interrupted)
            elif interrupted.exists():
                artifacts.RunDirectory(final).discard_if_empty()
            run(facts["verb"], settings, facts, folder=final)
            record["status"] = "finished"
    except KeyboardInterrupt:
        record["status"] = "interrupted"
        raise
    except Exception as error:
        record |= {"status": "failed", "message": " ".join(str(error).split()) or type(error).__name__}
        if not isinstance(error, ModHiFiError):
            # A defect of ours must not be hidden by the sweep: its traceback is kept beside the record.
            record["message"] = f"{type(error).__name__}: {record['message']} (see jobs/{path.stem}.txt)"
            artifacts.write_text(path.with_suffix(".txt"), traceback.format_exc())
    finally:
        artifacts.write_json(path, record)
        style = composed.console.style
        told = f"job {record['number']} {record['status']}: {record['folder']} {record['message']}"
        open_console(style).note(told.rstrip())


def begin_sweep(folder: Path) -> None:
    """Forget the job records of an earlier sweep with the same overrides; its finished runs stay.

    Raises:
        DataError: If the folder cannot be written.
    """
    artifacts.make_folder(folder / "jobs")
    for path in (folder / "jobs").iterdir():
        path.unlink()


def summarise_sweep(folder: Path, style: str) -> int:
    """Write ``summary.csv`` of a sweep and print it.

    Args:
        folder: The sweep's folder.
        style: Console style.

    Returns:
        Number of jobs that did not finish.
    """
    import csv
    import io
    import json

    records = [json.loads(artifacts.read_text(path)) for path in sorted((folder / "jobs").glob("*.json"))]
    keys = list(dict.fromkeys(word.partition("=")[0] for record in records for word in record["overrides"]))
    rows = []
    for record in records:
        given = dict(word.partition("=")[::2] for word in record["overrides"])
        row: dict[str, Any] = {"job": record["number"]} | {key: given.get(key, "") for key in keys}
        row["status"] = record["status"]
        if record["status"].startswith("finished"):
            results = artifacts.read_results(folder / record["folder"])
            row |= {f"removed_{name}": share for name, share in results.get("achieved", {}).items()}
            for measured in results["measurements"]:
                row[f"{measured['model']}_{measured['name']}"] = measured["value"]
        row |= {"folder": record["folder"], "message": record["message"]}
        rows.append(row)
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("folder", "message")))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, "folder", "message"], restval="")
    writer.writeheader()
    writer.writerows(rows)
    artifacts.write_text(folder / "summary.csv", text.getvalue())
    console = open_console(style)
    changing = [key for key in keys if len({row[key] for row in rows}) > 1] or keys[-1:]
    wanted = ["removed_params", "removed_flops", "dense_top1", "pruned_top1", "pruned_agreement"]
    present = [column for column in wanted if column in columns]
    present = present or [column for column in columns if column.startswith(("dense_", "pruned_"))][:6]
    shown = ["job", *changing, "status", *present]
    console.table(f"sweep of {len(rows)} jobs", [{key: row.get(key, "") for key in shown} for row in rows])
    failed = [row for row in rows if not row["status"].startswith("finished")]
    for row in failed:
        console.warning(f"job {row['job']} {row['status']}: {row['message']}")
    console.note(f"all numbers are in {folder / 'summary.csv'}")
    console.result({"folder": str(folder), "jobs": rows})
    return len(failed)


# --------------------------------------------------------------------------------------------------------- comparison


def _compare(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> Path:
    def shared(kept: Path) -> comparison.Shared:
        return comparison.Shared(
            settings,
            load=_sources,
            source=_source,
            measure=_measure,
            device=_device(settings),
            dtype=_dtype(settings),
            kept=kept,
        )

    return comparison.compare(
        settings,
        facts["overrides"],
        console,
        shared=shared,
        prune=_prune,
        portable=_portable,
        command=_command("compare", facts["overrides"]),
    )


# ------------------------------------------------------------------------------------------------------ shared pieces


def _sources(settings: Mapping[str, Any]) -> tuple[LoadedModel, ImageSource, ImageSource | None]:
    if settings["data"] is None:
        name = settings["model"].get("name", "this model")
        raise ConfigError(
            f"{name} brings no images of its own: give unlabelled calibration images with data=folder "
            "data.path=FOLDER, data=arrays data.path=FILE, data=cifar10 or data=cifar100."
        )
    loaded = config.build(settings["model"])
    calibration = _source(settings, "data", loaded.preprocess, labelled=False)
    assert calibration is not None
    return loaded, calibration, _source(settings, "evaluation_data", loaded.preprocess, labelled=True)


def _source(
    settings: Mapping[str, Any], key: str, preprocess: Preprocess, *, labelled: bool
) -> ImageSource | None:
    node = settings.get(key)
    if node is None:
        return None
    source = config.build(node)(preprocess=preprocess, labelled=labelled)
    return source if settings["runtime"]["dtype"] == "float32" else _Cast(source, _dtype(settings))


class _Cast:
    """An image source whose batches have the dtype that the run computes in."""

    def __init__(self, source: ImageSource, dtype: torch.dtype) -> None:
        self._source, self._dtype, self.protocol = source, dtype, source.protocol

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        for images, labels in self._source.batches(batch_size):
            yield images.to(self._dtype), labels


def _measure(
    settings: Mapping[str, Any],
    models: Mapping[str, nn.Module],
    calibration: ImageSource | None,
    evaluation: ImageSource | None,
    preprocess: Preprocess,
    device: torch.device,
    console: Console,
    shared: comparison.Shared | None = None,
) -> tuple[Measurement, ...]:
    """Everything that the settings ask for; within a comparison the dense network is measured once for all cells."""
    found: list[Measurement] = [] if shared is None else list(shared.dense(console))
    for name, node in settings["evaluation"].items():
        found += config.build(node)(
            models=models if shared is None else shared.models(name, models),
            evaluation_data=evaluation,
            calibration_data=calibration,
            example=_example(preprocess, 1).to(device=device, dtype=_dtype(settings)),
            device=device,
            batch_size=settings["runtime"]["batch_size"],
            progress=console.progress,
        )
    return tuple(found)


def _show_measurements(console: Console, measurements: Sequence[Measurement]) -> None:
    names = {measurement.model for measurement in measurements}
    rows = [
        {"": row.label, "dense": row.before, "edited": row.after, "change": row.change}
        for row in reports.table(measurements)
    ]
    if rows and len(names) == 1:
        rows = [{"": row[""], next(iter(names)): row["dense"] or row["edited"]} for row in rows]
    if rows:
        console.table("before and after" if len(names) > 1 else "measured", rows)


def _save(place: artifacts.RunDirectory, loaded: LoadedModel, model: nn.Module) -> None:
    """Write the network, and a few inputs with its logits on the CPU for `verify`."""
    artifacts.save_model(place.path / "model", loaded, model)
    saved = artifacts.load_model(place.path / "model")
    inputs = _example(loaded.preprocess, _VERIFICATION_IMAGES)
    with torch.inference_mode():
        ours = copy.deepcopy(model).cpu().eval()
        logits = ours(inputs.to(next(ours.parameters()).dtype))
        again = saved(inputs.to(next(saved.parameters()).dtype))
    if not torch.equal(logits, again):
        difference = float((logits - again).abs().max())
        raise NumericsError(f"{place.path}: the saved network reloads to other logits (difference {difference:.3g}).")
    artifacts.save_verification(place.path / "verification.safetensors", inputs, logits)


def _export(
    place: artifacts.RunDirectory, settings: Mapping[str, Any], model: nn.Module, preprocess: Preprocess
) -> list[Any]:
    reports_made = []
    for node in settings["export"].values():
        artifacts.make_folder(place.path / "export")
        ours = copy.deepcopy(model).cpu().float().eval()
        reports_made.append(
            config.build(node)(model=ours, example=_example(preprocess, 1), path=place.path / "export")
        )
    return reports_made


def _example(preprocess: Preprocess, batch: int) -> Tensor:
    """Random inputs ``[batch, channels, height, width]`` of the scale of normalised images, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((batch, len(preprocess.mean), *preprocess.size), generator=generator)


def _with_device(settings: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """In a parallel sweep each job takes its own card: job n card n modulo their number."""
    settings = copy.deepcopy(dict(settings))
    if facts.get("parallel") and settings["runtime"]["device"] == "cuda" and torch.cuda.is_available():
        settings["runtime"]["device"] = f"cuda:{facts['number'] % torch.cuda.device_count()}"
    return settings


def _device(settings: Mapping[str, Any]) -> torch.device:
    runtime = settings["runtime"]
    if runtime["threads"] is not None:
        torch.set_num_threads(runtime["threads"])
    device = torch.device(runtime["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"runtime.device={runtime['device']}: torch finds no graphics card here; use runtime=cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"runtime.device={runtime['device']}: there are {torch.cuda.device_count()} graphics cards, from cuda:0."
        )
    return device


def _dtype(settings: Mapping[str, Any]) -> torch.dtype:
    return {"float32": torch.float32, "float64": torch.float64}[settings["runtime"]["dtype"]]


def _portable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are kept and compared: the card that a sweep's job happened to get is no setting."""
    kept = copy.deepcopy(dict(settings))
    kept["runtime"]["device"] = kept["runtime"]["device"].partition(":")[0]
    kept.pop("resume", None)
    return kept


def _new_folder(verb: str, model: str, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> Path:
    now = time.time()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now)) + f"-{int(now % 1 * 1e6):06d}"
    ignored = ("model=", "console", "output_dir=", "resume=", "run=", "hydra", "evaluation", "export", "runtime")
    # The time already makes the name unique: paths and what does not change the network would only make it long.
    name = config.slug(word for word in facts["overrides"] if not word.startswith(ignored) and "/" not in word)
    return Path(settings["output_dir"]) / verb / config.slug([model]) / f"{stamp}_{name}"


def _command(verb: str, overrides: Sequence[str]) -> str:
    return shlex.join(["modhifi", verb, *overrides])


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = round(time.perf_counter() - started, 3)


_VERBS = {
    "prune": _prune,
    "evaluate": _evaluate,
    "verify": _verify,
    "replay": _replay,
    "info": _info,
    "compare": _compare,
}
