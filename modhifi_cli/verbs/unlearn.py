"""`modhifi unlearn`: from settings to a run folder with the edited network, its edits, its page, numbers and audit."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modhifi_cli.auditing.audit import AuditReport
from modhifi_cli.console import Console
from modhifi_cli.engine.memory import peaks
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.evaluation.forget_retain import both_kinds, named_classes
from modhifi_cli.evaluation.forward import RememberedLogits
from modhifi_cli.files import artifacts
from modhifi_cli.pages import audit as audit_pages
from modhifi_cli.pages.terms import class_name
from modhifi_cli.records import Edit, ImageSource, LoadedModel, Measurement, Progress, Results, last_of
from modhifi_cli.settings import config, recipes
from modhifi_cli.verbs import pieces, quality, tracking
from modhifi_cli.verbs.audit import audit_measurements, case_of, make_audit, show_audit, write_audit
from modhifi_cli.verbs.work import Work


@dataclass(frozen=True)
class _Begun:
    """A run before its first edit.

    Attributes:
        work: What its steps look at.
        model: The network that is edited.
        dense: A copy of it.
        labels: Classes of the calibration images.
        forget: Classes to forget.
        done: Edits of the run that this one goes on with.
    """

    work: Work
    model: nn.Module
    dense: nn.Module
    labels: Any
    forget: tuple[int, ...]
    done: Sequence[Edit]


@dataclass(frozen=True)
class _Outcome:
    """What a run's results tell.

    Attributes:
        summary: Of the task.
        edits: All edits.
        audited: What the audit says, or None.
        measurements: Of the networks.
        exported: What was written for other programs.
        sample: Entries on the calibration sample.
        seen: Its quality, or None.
        seconds: By part.
    """

    summary: Any
    edits: Sequence[Edit]
    audited: AuditReport | None
    measurements: Sequence[Measurement]
    exported: Sequence[Any]
    sample: Mapping[str, Any]
    seen: Any
    seconds: Mapping[str, float]


def unlearn(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> Path:
    pieces.foresee_exports(settings)
    tracking.foresee(settings)
    return pieces.with_room(lambda one: _unlearned(one, facts, console, folder), settings, console)


def _unlearned(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> Path:
    steps = pieces.Steps(
        console,
        {"load": "loading", "quality": "checking the calibration set", "unlearn": "unlearning", "save": "saving"}
        | ({} if settings["audit"] is None else {"audit": "auditing"})
        | {"evaluate": "measuring"},
    )
    begun = _begin(settings, facts, console, folder, steps)
    work, model, dense = begun.work, begun.model, begun.dense
    settings, place, loaded, device = work.settings, work.place, work.loaded, work.device
    with pieces.kept_for_resume("unlearn", place, facts, settings):
        console.note(f"{loaded.name}: {loaded.weights}; {begun.labels.account}; working in {place.path}")
        console.note(f"to be forgotten: {', '.join(class_name(cls, loaded.classes) for cls in begun.forget)}")
        with steps("quality"):
            _, seen = quality.before_the_run(
                model, work.calibration, settings, loaded.preprocess, device, console, place
            )
        with steps("unlearn"):
            summary, edits = _edit_(begun)
        with steps("save"):
            pieces.save_network(place, loaded, model)
            told = {"forgotten": ", ".join(map(str, begun.forget))}
            exported = pieces.export(place.path / "export", settings["export"], loaded, model, told)
        # The audit reads every evaluation image through both networks; what they answer need not be computed again.
        answers = {"dense": RememberedLogits(dense), "edited": RememberedLogits(model)}
        audited = None
        if settings["audit"] is not None:
            with steps("audit"):
                audited = _audited(begun, answers)
        with steps("evaluate"):
            beside = {"dense": dense} if settings["measure_dense"] else {}
            on = pieces.MeasuredOn(work.calibration, work.evaluation, loaded.preprocess)
            models = {**beside, "edited": model}
            measurements = pieces.measure(settings, models, on, device, console, answers=answers)
        sample = pieces.sample_shown(
            place.path, settings, loaded, dense, work.calibration, device, None if seen is None else seen.sample
        )
        summary = dataclasses.replace(summary, warnings=_warnings(seen, summary))
        outcome = _Outcome(summary, edits, audited, measurements, exported, sample, seen, steps.seconds)
        _write_outcome(begun, outcome)
        pieces.write_card(place.path)
        final = place.finish()
    _show_outcome(console, final, settings, begun.forget, summary, measurements, audited)
    tracking.track(settings, facts, final, console)
    return final


def _begin(
    asked: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None, steps: pieces.Steps
) -> _Begun:
    """Load what the run needs and make its folder, or open that of the run it goes on with."""
    from modhifi_cli.graph.surgery import weights_hash
    from modhifi_cli.unlearning.classes import forget_classes

    settings = dict(asked)
    resumed = settings["resume"]
    place = artifacts.RunDirectory.reopen(resumed) if resumed else None
    if place is not None:
        pieces.same_settings(place.path, asked)
    device = pieces.device_of(settings)
    config.build(settings["method"])  # wrong settings of the method are refused before the network is loaded
    with steps("load"):
        pieces.require_data(settings)
        loaded = config.build(settings["model"])
        calibration = pieces.image_source(settings, "data", loaded, labelled=True, console=console)
        evaluation = pieces.image_source(settings, "evaluation_data", loaded, labelled=True, console=console)
        model = loaded.model.to(device=device, dtype=pieces.dtype_of(settings)).eval()
        dense, dense_hash = copy.deepcopy(model), weights_hash(loaded.model)
        labels = _labels(model, calibration, settings, loaded, device, console)
    if loaded.classes is not None and len(loaded.classes) != labels.classes:
        raise ConfigError(
            f"{loaded.name} names {len(loaded.classes)} classes but has {labels.classes} logits; use weights and "
            "model.num_classes that belong together."
        )
    forget = forget_classes(settings["forget_class"], loaded.classes, labels.classes)
    pieces.name_forgotten_(settings, forget)
    _refuse_measuring(settings, evaluation)
    if place is None:
        place = pieces.begin_run("unlearn", loaded.name, asked, facts, folder, device, calibration)
    done = pieces.edits_so_far(place, dense_hash, calibration) if resumed else ()
    place.log(pieces.command_line("unlearn", facts["overrides"]))
    work = Work(settings, loaded, calibration, evaluation, device, place, dense_hash, console)
    return _Begun(work, model, dense, labels, forget, done)


def _refuse_measuring(settings: Mapping[str, Any], evaluation: ImageSource | None) -> None:
    """Refuse before anything is edited what measurements would refuse: classes that are none, images of one kind alone."""
    chosen = {
        name: named_classes(settings["evaluation"][name]["forget_class"], name)
        for name in ("forget_retain", "forgotten_rank")
        if name in settings["evaluation"]
    }
    labels = getattr(evaluation, "labels", None)
    if "forget_retain" in chosen and labels is not None:
        both_kinds(torch.as_tensor(labels), chosen["forget_retain"])


def _audited(begun: _Begun, answers: Mapping[str, RememberedLogits]) -> AuditReport:
    """Audit the edited network and put the audit into the run's folder."""
    work, loaded = begun.work, begun.work.loaded
    case = case_of(
        loaded, begun.dense, begun.model, work.calibration, begun.labels, work.evaluation, begun.forget
    )
    try:
        audited = make_audit(
            work.settings, work.settings["model"], loaded, case, device=work.device, console=work.console, answers=answers
        )
    except DataError as error:
        raise DataError(f"{error} Or leave the audit out: audit=none, and resume=DIR keeps the edits.") from error
    write_audit(work.place.path, audited, model=loaded.name, repeat=f"modhifi audit run={work.place.final}")
    return audited


def _labels(
    model: nn.Module,
    calibration: ImageSource,
    settings: Mapping[str, Any],
    loaded: LoadedModel,
    device: torch.device,
    console: Console,
) -> Any:
    from modhifi_cli.engine.labelling import Labels, image_labels

    events = image_labels(
        model,
        calibration,
        mode=settings["data"]["labels"],
        device=device,
        batch_size=settings["runtime"]["batch_size"],
        names=loaded.classes,
    )
    return last_of(events, Labels, console.progress)


def _edit_(begun: _Begun) -> tuple[Any, list[Edit]]:
    """Run the task; every edit goes to disk as it comes. The summary, and all edits."""
    from modhifi_cli.unlearning.finetune import Finetune
    from modhifi_cli.unlearning.search import Order, Trial, UnlearnPlan, UnlearnSummary, unlearn_

    work, settings, console = begun.work, begun.work.settings, begun.work.console
    method = config.build(settings["method"])
    order = Order(
        begun.forget,
        method,
        layers=settings["layers"],
        forget_target=float(settings["forget_target"]),
        retain_drop=float(settings["retain_drop"]),
        finetune=Finetune(**settings["finetune"]),
        seed=settings["runtime"]["seed"],
    )
    edits, summary = list(begun.done), None
    for event in unlearn_(
        begun.model,
        order,
        calibration=work.calibration,
        labels=begun.labels.values,
        batch_size=settings["runtime"]["batch_size"],
        device=work.device,
        gathering=config.build(settings["statistics"]),
        done=begun.done,
    ):
        if isinstance(event, UnlearnPlan):
            _refuse_audit(begun)
            console.note(
                f"edits {len(event.layers)} layers with {event.forget_samples} forget and {event.retain_samples} "
                f"retain samples: {', '.join(event.layers)}"
            )
        elif isinstance(event, Progress):
            console.progress(event)
        elif isinstance(event, Trial):
            retain = "" if event.retain is None else f", retain {event.retain:.1%}"
            console.note(
                f"{method.strength} {event.strength:g}: forget {event.forget:.1%}{retain} of {event.images} "
                "calibration images"
            )
        elif isinstance(event, Edit):
            work.place.save_edit(event, work.dense_hash)
            edits.append(event)
            work.place.log(f"edit {event.name}")
        elif isinstance(event, UnlearnSummary):
            summary = event
    assert summary is not None, "the task ended without a summary"
    for text in summary.warnings:
        work.place.log(f"warning: {text}")
        console.warning(text)
    if summary.finetuned:
        console.warning(_finetuned(summary))
    return summary, edits


def _refuse_audit(begun: _Begun) -> None:
    """Refuse, before anything is computed, an audit that would have too few images."""
    from modhifi_cli.auditing.audit import check_samples

    settings = begun.work.settings
    if settings["audit"] is None:
        return
    evaluated = settings["evaluation_data"] is not None
    try:
        check_samples(
            begun.labels.values, begun.forget, begun.work.loaded.classes, evaluated=evaluated,
            settings=recipes.audit_settings(settings["audit"]),
        )  # fmt: skip
    except DataError as error:
        raise DataError(
            f"{error} Where there are no more, evaluation=[forgotten_rank] tells what one image of a class can tell. "
            "Or leave the audit out: audit=none."
        ) from error


def _write_outcome(begun: _Begun, outcome: _Outcome) -> None:
    from modhifi_cli.unlearning.search import trials_as_rows

    work, labels, summary, audited = begun.work, begun.labels, outcome.summary, outcome.audited
    settings, place, loaded = work.settings, work.place, work.loaded
    method = str(settings["method"]["_target_"]).rpartition(".")[2]
    hidden = ("trials", "warnings", "strength", "edits", "finetuned")
    layers = [{"layer": edit.name} | {k: v for k, v in edit.facts.items() if k not in hidden} for edit in outcome.edits]
    trials = trials_as_rows(summary.trials, summary.strength_name)
    artifacts.write_json(
        place.path / "results.json",
        Results.written(
            verb="unlearn",
            model=loaded.name,
            weights=loaded.weights,
            forget=list(begun.forget),
            classes=None if loaded.classes is None else list(loaded.classes),
            method=method,
            strength={summary.strength_name: summary.strength},
            finetuned_epochs=summary.finetuned,
            labels=labels.origin,
            layers=layers,
            trials=trials,
            measurements=outcome.measurements,
            audit=None if audited is None else _audit_in_short(audited),
            exports=[export.row() for export in outcome.exported],
            calibration=dict(work.calibration.protocol) | {"labels": labels.account},
            **quality.entries(outcome.sample, work.calibration, outcome.seen),
            warnings=list(summary.warnings),
            memory=peaks(settings["runtime"]["device"]),
            seconds=dict(outcome.seconds),
        ),
    )
    pieces.write_pages(place.path)
    place.log("finished")


def _show_outcome(
    console: Console,
    final: Path,
    settings: Mapping[str, Any],
    forget: Sequence[int],
    summary: Any,
    measurements: Sequence[Measurement],
    audited: AuditReport | None,
) -> None:
    console.note(f"{summary.strength_name} {summary.strength:g} on {len(summary.layers)} layers")
    pieces.show_measurements(console, measurements)
    if audited is None:
        console.note(audit_pages.NOT_MADE)
    else:
        show_audit(console, audited)
    pieces.show_end(console, final, len(summary.warnings))
    console.result(
        {
            "folder": str(final),
            "forget": list(forget),
            summary.strength_name: summary.strength,
            "finetuned_epochs": summary.finetuned,
            "warnings": list(summary.warnings),
            "measurements": artifacts.measurements_to_json(measurements),
            "audit": None if audited is None else _audit_in_short(audited),
        }
    )


def _audit_in_short(audited: AuditReport) -> dict[str, Any]:
    return {
        "verdict": audited.verdict.level,
        "compared_with": audited.verdict.compared_with,
        "sentences": list(audited.verdict.sentences),
        "figures": audit_pages.rows(audited.plain()),
        "measurements": artifacts.measurements_to_json(audit_measurements(audited)),
    }


def _warnings(seen: Any, summary: Any) -> tuple[str, ...]:
    """All of a run: on its calibration set, of the task, and of what was done after it."""
    trained = (_finetuned(summary),) if summary.finetuned else ()
    return (*(seen.warnings if seen else ()), *summary.warnings, *trained)


def _finetuned(summary: Any) -> str:
    return (
        f"fine-tuned for {summary.finetuned} epochs on retain samples after the edit: these results are not those of a "
        "closed form alone."
    )
