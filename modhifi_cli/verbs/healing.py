"""The healing of a pruning run: from settings to events, states on disk, the edit, and what the page says of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from modhifi_cli.files import healing as files
from modhifi_cli.records import Edit, ImageSource, Progress
from modhifi_cli.settings import config
from modhifi_cli.verbs.work import Work


def refuse(settings: Mapping[str, Any], calibration: ImageSource) -> None:
    """Refuse, before any work, a healing that nothing could judge."""
    if settings.get("healing"):
        from modhifi_cli.engine.healing import check_samples

        check_samples(len(calibration))


def apart(edits: Sequence[Edit]) -> tuple[tuple[Edit, ...], Edit | None]:
    """The edits in closed form of an interrupted run, and that of its healing, if it had come so far."""
    from modhifi_cli.engine.healing import STEP

    healed = [edit for edit in edits if edit.state.step == STEP]
    return tuple(edit for edit in edits if edit.state.step != STEP), healed[0] if healed else None


def heal_(
    work: Work, model: nn.Module, dense: nn.Module | None, edits: list[Edit], done: Edit | None
) -> dict[str, Any] | None:
    """Heal the pruned network in place if the settings ask for it; its edit is appended to `edits` and saved.

    Returns:
        What results.json says of it, or None where there was none.
    """
    settings, place, console = work.settings, work.place, work.console
    if not settings.get("healing"):
        return None
    from modhifi_cli.engine.healing import Healed, HealingState, about, heal_
    from modhifi_cli.graph.surgery import apply_edit_

    if done is not None:
        apply_edit_(model, done)
        edits.append(done)
        return dict(done.facts["healed"])
    assert dense is not None, "healing needs the dense network"
    outcome: Healed | None = None
    for event in heal_(
        model,
        dense,
        work.calibration,
        recipe=config.build(settings["healing"]),
        edits=edits,
        device=work.device,
        seed=settings["runtime"]["seed"],
        state=files.load_state(place.path),
    ):
        if isinstance(event, Progress):
            console.progress(event)
        elif isinstance(event, HealingState):
            files.save_state(place.path, event)
        elif isinstance(event, Edit):
            place.save_edit(event, work.dense_hash)
            edits.append(event)
        elif isinstance(event, Healed):
            outcome = event
    assert outcome is not None, "the healing ended without a summary"
    files.forget_state(place.path)
    for text in outcome.warnings:
        console.warning(text)
    place.log(f"healing: {about(outcome)}")
    console.note(about(outcome))
    return dataclasses.asdict(outcome)


def told(healed: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Sentences of a healing that stand among the run's warnings: a trained result must be known for one."""
    if healed is None:
        return ()
    from modhifi_cli.engine.healing import Healed, about

    outcome = Healed(**{key: tuple(value) if isinstance(value, list) else value for key, value in healed.items()})
    return (*outcome.warnings, *((about(outcome),) if outcome.trained else ()))
