"""`modhifi prune`: from settings to a run folder with the new network, its edits, its page and its numbers."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modhifi_cli.console import Console
from modhifi_cli.engine.memory import peaks
from modhifi_cli.errors import ConfigError
from modhifi_cli.files import artifacts
from modhifi_cli.pages import terms
from modhifi_cli.records import Edit, ImageSource, Measurement, Note, Progress, Results
from modhifi_cli.settings import config, recipes
from modhifi_cli.verbs import drop, dry_run, healing, pieces, quality, timing, tracking
from modhifi_cli.verbs.shared import Shared
from modhifi_cli.verbs.work import Cut, Work

_GROUP_FACTS = ("dead_outputs", "fidelity", "subset_fidelity", "rows", "seconds")


@dataclass(frozen=True)
class _Begun:
    """A run before its first edit.

    Attributes:
        work: What its steps look at.
        dense: A copy of the network, or None where nobody will look at it.
        widths: Of the dense network, as `describe_widths` gives them.
        done: Edits of the run that this one goes on with.
        healed: That of its healing, if it had come so far.
    """

    work: Work
    dense: nn.Module | None
    widths: Mapping[str, Mapping[str, int]]
    done: tuple[Edit, ...]
    healed: Edit | None


@dataclass(frozen=True)
class _Outcome:
    """What a run's results tell beside its cut.

    Attributes:
        sample: Entries on the calibration sample.
        seen: Its quality, or None.
        healed: What is told of the healing, or None.
        measurements: Of the networks.
        exported: What was written for other programs.
        seconds: By part.
    """

    sample: Mapping[str, Any]
    seen: Any
    healed: Mapping[str, Any] | None
    measurements: Sequence[Measurement]
    exported: Sequence[Any]
    seconds: Mapping[str, float]


def prune(
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    console: Console,
    folder: Path | None,
    shared: Shared | None = None,
) -> Path | None:
    if settings["dry_run"]:
        return dry_run.show(settings, console)
    pieces.foresee_exports(settings)
    tracking.foresee(settings)
    if pieces.team_of(settings)[0] > 0:
        return _follow(settings)
    return pieces.with_room(lambda one: _pruned(one, facts, console, folder, shared), settings, console)


def _pruned(
    settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None, shared: Shared | None
) -> Path:
    price = config.build(settings["target"])
    steps = _steps(settings, console, price)
    begun = _begin(settings, facts, console, folder, shared, steps)
    work, place, loaded, device = begun.work, begun.work.place, begun.work.loaded, begun.work.device
    with pieces.kept_for_resume("prune", place, facts, settings, console=console):
        shared_text = _introduce(work, price)
        with steps("prune"):
            model = pieces.placed(loaded.model, settings, device)
            settings, seen = quality.before_the_run(
                model, work.calibration, settings, loaded.preprocess, device, console, place
            )
            pieces.shared_by_all(settings["batchnorm"])
            work = dataclasses.replace(work, settings=settings)
            times = timing.Times(settings, facts, place)
            cut = _searched_(work, model, times) if price.searched else _edit_(work, model, begun.done, times)
        with steps("heal"):
            healed = healing.heal_(work, model, begun.dense, cut.edits, begun.healed)
        with steps("save"):
            pieces.save_network(place, loaded, model)
            asked = {"sparsity": settings["sparsity"], "target": price.name}
            exported = pieces.export(place.path / "export", settings["export"], loaded, model, asked)
        with steps("evaluate"):
            beside = {"dense": begun.dense} if settings["measure_dense"] else {}
            on = pieces.MeasuredOn(work.calibration, work.evaluation, loaded.preprocess)
            measurements = pieces.measure(settings, {**beside, "pruned": model}, on, device, console, shared)
        with steps("latency"):
            summary = times.clocked(cut.summary, begun.dense, model, loaded.preprocess, device, console)
        sample = pieces.sample_shown(
            place.path, settings, loaded, begun.dense, work.calibration, device, None if seen is None else seen.sample
        )
        lagging = terms.not_faster(measurements)
        if lagging is not None:
            place.log(f"warning: {lagging}")
            console.warning(lagging)
        told = () if lagging is None else (lagging,)
        warnings = (*(seen.warnings if seen else ()), *summary.warnings, *shared_text, *told, *healing.told(healed))
        summary = dataclasses.replace(summary, warnings=warnings)
        outcome = _Outcome(sample, seen, healed, measurements, exported, steps.seconds)
        _write_outcome(work, model, price, begun.widths, dataclasses.replace(cut, summary=summary), outcome)
        pieces.write_card(place.path)
        final = place.finish()
    _show_outcome(console, final, summary, measurements)
    tracking.track(settings, facts, final, console)
    return final


def _steps(settings: Mapping[str, Any], console: Console, price: Any) -> pieces.Steps:
    """The parts of the run by their words."""
    return pieces.Steps(
        console,
        {"load": "loading", "prune": "pruning"}
        | ({"heal": "healing"} if settings.get("healing") else {})
        | {"save": "saving", "evaluate": "measuring"}
        | ({"latency": "timing"} if price.timed else {}),
    )


def _begin(
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    console: Console,
    folder: Path | None,
    shared: Shared | None,
    steps: pieces.Steps,
) -> _Begun:
    """Load what the run needs and make its folder, or open that of the run it goes on with."""
    from modhifi_cli.graph.surgery import describe_widths, weights_hash

    resumed = settings["resume"]
    place = artifacts.RunDirectory.reopen(resumed) if resumed else None
    if place is not None:
        pieces.same_settings(place.path, settings)
    device = pieces.device_of(settings)
    recipes.steps(settings)  # wrong settings of the method are refused before a large network is loaded
    if pieces.is_decoder(settings):
        recipes.decoder_options(settings)
    with steps("load"):
        found = pieces.sources(settings, console) if shared is None else shared.sources(settings)
        loaded, calibration, evaluation = found
        pieces.foresee_exports(settings, loaded)
        healing.refuse(settings, calibration)
        # A second copy of a large language model is made only if somebody will look at it.
        kept = settings["measure_dense"] or not pieces.is_decoder(settings) or settings.get("healing")
        dense = pieces.placed(loaded.twin(), settings, device) if kept else None
        dense_hash, widths = weights_hash(loaded.model), describe_widths(loaded.model)
    if place is None:
        place = pieces.begin_run("prune", loaded.name, settings, facts, folder, device, calibration)
    done, healed = healing.apart(pieces.edits_so_far(place, dense_hash, calibration) if resumed else ())
    place.log(pieces.command_line("prune", facts["overrides"]))
    work = Work(settings, loaded, calibration, evaluation, device, place, dense_hash, console)
    return _Begun(work, dense, widths, done, healed)


def _introduce(work: Work, price: Any) -> tuple[str, ...]:
    """Say what the run is about; returned is what calibration and evaluation text share."""
    settings, loaded, calibration, console = work.settings, work.loaded, work.calibration, work.console
    what = "sequences" if pieces.is_decoder(settings) else "images"
    goal = price.goal(settings["sparsity"])
    console.note(
        f"{loaded.name}: {goal}; {loaded.weights}, {len(calibration)} calibration {what}; working in {work.place.path}"
    )
    if pieces.is_decoder(settings):
        from modhifi_cli.models.hf import will_open

        console.note(str(will_open(loaded.model, even=recipes.even_widths(settings))))
    shared_text = pieces.told_overlap(settings, calibration, work.evaluation, console, work.place)
    if calibration.protocol.get("skipped"):
        console.warning(
            f"{calibration.protocol['skipped']} images that cannot be decoded were skipped (data.skip_corrupt), "
            f"{calibration.protocol['skipped_files'][0]} the first"
        )
    return shared_text


def _searched_(work: Work, model: nn.Module, times: timing.Times) -> Cut:
    """The cut of a run that finds its share itself."""

    def edited(one: Work, ours: nn.Module, done: Sequence[Edit]) -> Cut:
        return _edit_(one, ours, done, times)

    return drop.search_(work, model, edit_=edited, plan=lambda one, ours: _plan(one, ours, times))


def _follow(settings: Mapping[str, Any]) -> None:
    """What a process does that only lends a hand: the same run with its share of the samples, nothing written or told."""
    from modhifi_cli.graph.surgery import weights_hash

    device = pieces.device_of(settings)
    loaded, calibration, _ = pieces.sources(settings)
    done: Sequence[Edit] = ()
    if settings["resume"]:
        place = artifacts.RunDirectory.reopen(settings["resume"], alone=False)
        done = pieces.edits_so_far(place, weights_hash(loaded.model), calibration)
    model = pieces.placed(loaded.model, settings, device)
    settings = {**settings, "batchnorm": pieces.shared_by_all(None)}  # the first process has looked at the images
    for _ in _events(model, settings, calibration, device, done, config.build(settings["target"])):
        pass


def _edit_(work: Work, model: nn.Module, done: Sequence[Edit], times: timing.Times) -> Cut:
    """Run the task; every edit is on disk before the next group starts."""
    from modhifi_cli.engine.plan import Plan, Summary
    from modhifi_cli.evaluation.latency_table import LatencyTable

    place, console = work.place, work.console
    events = _events(model, work.settings, work.calibration, work.device, done, times.price())
    edits, summary, warned = [_light(edit) for edit in done], None, set()
    predicted: dict[str, float] = {}
    if done:
        console.note(f"{len(done)} edits of the interrupted run are applied again from its folder")
    for event in events:
        if isinstance(event, Plan):
            predicted = dict(getattr(event, "predicted_error", None) or {})
            _show_plan(console, event)
        elif isinstance(event, Progress):
            console.progress(event)
        elif isinstance(event, Note):
            place.log(event.text)
            console.note(event.text)
        elif isinstance(event, Edit):
            place.save_edit(event, work.dense_hash)
            edits.append(_light(event))
            counts = f"kept {event.kept.numel()}, removed {event.removed.numel()}"
            place.log(f"edit {event.name}: {counts}" if event.removed.numel() else f"repaired {event.name}")
        elif isinstance(event, LatencyTable):
            times.keep(event)
        elif isinstance(event, Summary):
            summary = event
        for text in getattr(event, "warnings", ()):
            if text not in warned:
                warned.add(text)
                place.log(f"warning: {text}")
                console.warning(text)
    assert summary is not None, "the task ended without a summary"
    return Cut(summary, edits, predicted)


def _light(edit: Edit) -> Edit:
    """An edit that is on disk, without its tensors: all of them together are a second network."""
    return dataclasses.replace(edit, modules=tuple(dataclasses.replace(part, tensors={}) for part in edit.modules))


def _plan(work: Work, model: nn.Module, times: timing.Times) -> Any:
    """The plan of a run, which is then abandoned before its first edit; the latency table it measured is kept."""
    from modhifi_cli.engine.plan import Plan
    from modhifi_cli.evaluation.latency_table import LatencyTable

    for event in _events(model, work.settings, work.calibration, work.device, (), times.price()):
        if isinstance(event, Progress):
            work.console.progress(event)
        elif isinstance(event, LatencyTable):
            times.keep(event)
        elif isinstance(event, Plan):
            return event
    raise AssertionError("the task made no plan")


def _events(
    model: nn.Module,
    settings: Mapping[str, Any],
    calibration: ImageSource,
    device: torch.device,
    done: Sequence[Edit],
    price: Any,
) -> Iterator[Any]:
    """The run of our method, or of an outside one where the settings name it; both tell the same kinds of records."""
    from modhifi_cli.engine.prune import prune_
    from modhifi_cli.engine.team import Team

    reads_text = pieces.is_decoder(settings)
    if settings.get("outside"):
        if reads_text:
            raise ConfigError("outside methods are for networks that read images; set outside=null.")
        return config.build(settings["outside"])(
            model,
            calibration=calibration,
            sparsity=float(settings["sparsity"]),
            target=price,
            batchnorm=settings["batchnorm"],
            exclude=tuple(settings["exclude"]),
            round_to=settings["round_to"],
            batch_size=settings["runtime"]["batch_size"],
            device=device,
            done=done,
        )
    recipe, budget = recipes.recipe(settings, reads_text=reads_text), recipes.budget(settings, price)
    team = Team(*pieces.team_of(settings))
    walk = recipes.walk(model, settings, calibration, device, reads_text=reads_text, team=team)
    return prune_(walk, recipe, budget, done=done)


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
    if plan.labels:
        console.note(f"classes: {plan.labels}")
    for refused in plan.refused:
        console.note(f"left alone: {refused.name}: {refused.reason}")


def _write_outcome(
    work: Work, model: nn.Module, price: Any, widths: Mapping[str, Mapping[str, int]], cut: Cut, outcome: _Outcome
) -> None:
    from modhifi_cli.graph.surgery import describe_widths

    settings, place, loaded, edits, summary = work.settings, work.place, work.loaded, cut.edits, cut.summary
    kept = describe_widths(model)
    groups = [
        {"group": edit.name, "pass": edit.iteration, "kept": edit.kept.numel(), "removed": edit.removed.numel()}
        | {key: edit.facts[key] for key in _GROUP_FACTS if key in edit.facts}
        for edit in edits
        if edit.removed.numel()
    ]
    told = edits[0].facts.get("labels") if edits else None
    labelled = {"labels": told} if told else {}
    artifacts.write_json(
        place.path / "results.json",
        Results.written(
            verb="prune",
            model=loaded.name,
            weights=loaded.weights,
            target=price.name,
            goal=price.goal(settings["sparsity"]),
            sparsity=settings["sparsity"],
            achieved=dict(summary.achieved),
            latency=summary.latency,
            healing=outcome.healed,
            trials=[dict(trial) for trial in cut.trials],
            measurements=outcome.measurements,
            groups=groups,
            predicted_error=dict(cut.predicted),
            exports=[export.row() for export in outcome.exported],
            calibration=dict(work.calibration.protocol) | labelled,
            **quality.entries(outcome.sample, work.calibration, outcome.seen),
            widths={name: {key: [counts[key], kept.get(name, {}).get(key, 0)] for key in counts} for name, counts in widths.items()},
            warnings=list(summary.warnings),
            memory=peaks(settings["runtime"]["device"]),
            seconds=dict(outcome.seconds),
        ),
    )
    pieces.write_pages(place.path)
    place.log("finished")


def _show_outcome(console: Console, final: Path, summary: Any, measurements: Sequence[Measurement]) -> None:
    console.note(f"removed {terms.removed(summary.achieved)}")
    pieces.show_measurements(console, measurements)
    pieces.show_end(console, final, len(summary.warnings))
    console.result(
        {
            "folder": str(final),
            "achieved": dict(summary.achieved),
            "warnings": list(summary.warnings),
            "measurements": artifacts.measurements_to_json(measurements),
        }
    )
