"""`modhifi audit`: what an unlearning run has made its network forget, and what is still inside."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modhifi_cli.auditing.audit import AuditReport, Case
from modhifi_cli.console import Console
from modhifi_cli.engine.labelling import Labels, image_labels
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.evaluation.forward import RememberedLogits
from modhifi_cli.files import artifacts
from modhifi_cli.pages import audit as audit_pages
from modhifi_cli.pages import figures
from modhifi_cli.pages.terms import class_name
from modhifi_cli.records import ImageSource, LoadedModel, Measurement, last_of
from modhifi_cli.settings import config, recipes
from modhifi_cli.verbs import pieces
from modhifi_cli.verbs.opened import OpenedRun, open_run


def audit(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> Path:
    asked, settings = settings, dict(settings)
    if settings["audit"] is None:
        raise ConfigError("audit=none leaves nothing to do; give audit=standard, or leave the key out.")
    opened = open_run(settings, console)
    saved = opened.folder
    forget = _forgotten(saved)
    device = pieces.device_of(settings)
    before = opened.settings("model", *(key for key in ("data", "evaluation_data") if key not in settings))
    for key in ("data", "evaluation_data"):
        settings.setdefault(key, before.get(key))
    loaded, dtype = _dense(opened, before), pieces.dtype_of(settings)
    dense, edited = loaded.model.to(dtype), opened.network().model.to(dtype)
    calibration, labels = _labelled(settings, loaded, dense, device, console)
    evaluation = pieces.image_source(settings, "evaluation_data", loaded, labelled=True, console=console)
    case = case_of(loaded, dense, edited, calibration, labels, evaluation, forget)
    report = make_audit(settings, before["model"], loaded, case, device=device, console=console)
    place = pieces.begin_run("audit", loaded.name, asked, facts, folder, device)
    write_audit(place.path, report, model=loaded.name, repeat=pieces.command_line("audit", facts["overrides"]))
    artifacts.write_json(
        place.path / "results.json",
        {
            "format_version": artifacts.FORMAT_VERSION,
            "verb": "audit",
            "model": loaded.name,
            "run": str(saved),
            "forget": list(forget),
            "classes": None if loaded.classes is None else list(loaded.classes),
            "verdict": report.verdict.level,
            "measurements": artifacts.measurements_to_json(audit_measurements(report)),
        },
    )
    final = place.finish(edits=False)
    show_audit(console, report)
    console.note(f"the audit's page is {final / 'audit.html'}, the same as text audit.md")
    console.result({"folder": str(final), "verdict": report.verdict.level, "figures": report.figures})
    return final


def case_of(
    loaded: LoadedModel,
    dense: nn.Module,
    edited: nn.Module,
    calibration: ImageSource,
    labels: Labels,
    evaluation: ImageSource | None,
    forget: tuple[int, ...],
) -> Case:
    """What an audit without a reference looks at.

    Args:
        loaded: Description of the dense network.
        dense: The dense network in the run's dtype.
        edited: The edited one.
        calibration: Images, in the order of the labels.
        labels: Their classes.
        evaluation: Labelled images, or None.
        forget: The forgotten classes.
    """
    return Case(
        dense, edited, calibration=calibration, calibration_labels=labels.values, evaluation=evaluation, forget=forget,
        classes=loaded.classes, labels_account=labels.account,
    )  # fmt: skip


def make_audit(
    settings: Mapping[str, Any],
    model: Mapping[str, Any],
    loaded: LoadedModel,
    case: Case,
    *,
    device: torch.device,
    console: Console,
    answers: Mapping[str, RememberedLogits] | None = None,
) -> AuditReport:
    """Run the audit as the settings' `audit` group asks for it; every verb that edits a classifier may call it.

    Args:
        settings: Of the verb, with `audit` and `runtime`.
        model: Settings of the dense network, which a reference file is read into.
        loaded: Description of the dense network.
        case: What is audited; the settings' reference is put beside it.
        device: Where forwards run.
        console: Shown progress.
        answers: Memories that shall learn the logits of the evaluation images, by network.
    """
    from modhifi_cli.auditing.audit import audit as audited

    reference = _reference(settings["audit"]["reference"], model, loaded)
    events = audited(
        dataclasses.replace(case, reference=None if reference is None else reference.to(pieces.dtype_of(settings))),
        recipes.audit_settings(settings["audit"]),
        device=device,
        batch_size=settings["runtime"]["batch_size"],
        seed=settings["runtime"]["seed"],
        answers=answers,
    )
    return last_of(events, AuditReport, console.progress)


def write_audit(folder: Path, report: AuditReport, *, model: str, repeat: str) -> None:
    """Write ``audit.json``, ``audit.md|html`` and ``audit.png|svg`` into a run folder.

    Args:
        folder: Where to.
        report: What was found.
        model: The network's name, for the headline.
        repeat: The command that does it again.
    """
    content = report.plain()
    forgotten = ", ".join(class_name(cls, report.classes) for cls in report.forget)
    title = f"{model}, forgetting {forgotten}"
    artifacts.write_json(folder / "audit.json", {"format_version": artifacts.FORMAT_VERSION, **content})
    kinds = figures.audit(content, title=title)
    pieces.write_figure(folder, "audit", kinds)
    svg = kinds["svg"].decode() if "svg" in kinds else None
    pieces.write_page(
        folder, "audit", audit_pages.page(title=f"Audit: {title}", report=content, svg=svg, repeat=repeat)
    )


def show_audit(console: Console, report: AuditReport) -> None:
    """Print the figures and the verdict with its grounds."""
    console.table(
        "audit (audit.html explains the figures)", audit_pages.rows(report.plain())
    )
    console.note(f"verdict: {report.verdict.level}")
    for sentence in report.verdict.sentences:
        console.note(f"  {sentence}")


def audit_measurements(report: AuditReport) -> tuple[Measurement, ...]:
    """The figures as measurements: ``audit_MIA``, ``audit_relearn_steps`` and others."""
    found = []
    for model, own in report.figures.items():
        for name, value in own.items():
            unit = "steps" if name == "relearn steps" else "" if name.startswith("TV") else "%"
            if value is not None:
                term = "audit_" + name.replace(", ", "_").replace(" ", "_")
                found.append(Measurement(model, term, value, unit, {"definition": _meaning(report, name)}))
    return tuple(found)


def _meaning(report: AuditReport, name: str) -> str:
    return report.definitions[name.partition(",")[0]]


def _forgotten(saved: Path) -> tuple[int, ...]:
    results = artifacts.read_results(saved)
    if results.get("verb") != "unlearn":
        raise DataError(
            f"run={saved}: an audit needs an unlearning run, this folder is of modhifi {results.get('verb')}; give the "
            "folder that modhifi unlearn named at its end."
        )
    forget = results.get("forget")
    if not isinstance(forget, list) or not forget or not all(isinstance(cls, int) for cls in forget):
        raise DataError(
            f"{saved / 'results.json'}: damaged, it does not say what was forgotten; restore the run folder."
        )
    return tuple(forget)


def _dense(opened: OpenedRun, before: Mapping[str, Any]) -> LoadedModel:
    from modhifi_cli.graph.surgery import weights_hash

    loaded = opened.build(before["model"])
    _, made_on = opened.edits()
    if made_on is not None and made_on != weights_hash(loaded.model):
        raise DataError(
            f"run={opened.folder}: the dense weights have changed since (they were {loaded.weights}); put the weights back "
            "that the run was made with."
        )
    return loaded


def _labelled(
    settings: Mapping[str, Any], loaded: LoadedModel, dense: nn.Module, device: torch.device, console: Console
) -> tuple[ImageSource, Labels]:
    """Calibration images and their labels, the source's or the dense network's predictions (``data.labels``)."""
    source = pieces.image_source(settings, "data", loaded, labelled=True, console=console)
    if source is None:
        raise ConfigError(
            "audit: the run names no calibration images; give labelled ones with data=arrays data.path=FILE."
        )
    events = image_labels(
        dense.to(device), source, mode=settings["data"].get("labels") or "auto", device=device,
        batch_size=settings["runtime"]["batch_size"], names=loaded.classes,
    )  # fmt: skip
    return source, last_of(events, Labels, console.progress)


def _reference(asked: str | None, model: Mapping[str, Any], loaded: LoadedModel) -> nn.Module | None:
    if asked is None:
        return None
    path = Path(os.path.expanduser(asked))
    if not path.exists():
        raise DataError(
            f"audit.reference: nothing at {path}; give a weights file for {loaded.name}, or the folder of a run, of a "
            "network that was trained without the forgotten classes."
        )
    try:
        if path.is_dir():
            return artifacts.load_model(path)
        return config.build({**model, "weights": str(path)}).model
    except DataError as error:
        raise DataError(f"audit.reference: {error}") from error
