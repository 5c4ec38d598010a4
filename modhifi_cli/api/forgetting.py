"""Unlearning from Python: taking classes out of a classifier, and an audit of what is left of them inside."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from modhifi_cli.api.bar import Listener, listening
from modhifi_cli.api.given import Batches, Forward, Given, ready
from modhifi_cli.api.results import Audited, Unlearned
from modhifi_cli.api.words import own_words
from modhifi_cli.data.tensors import TensorImages
from modhifi_cli.errors import ConfigError
from modhifi_cli.records import Edit, Progress, last_of
from modhifi_cli.settings import config, recipes


@own_words
def unlearn(
    model: nn.Module,
    batches: Batches,
    *,
    forget: int | str | Sequence[int | str],
    method: str = "contrast",
    layers: str | Sequence[str] = "auto",
    classes: Sequence[str] | None = None,
    labels: str = "auto",
    forget_target: float = 0.01,
    retain_drop: float = 0.003,
    settings: Sequence[str] = (),
    batch_size: int = 64,
    device: torch.device | str | None = None,
    seed: int = 0,
    in_place: bool = False,
    forward: Forward | None = None,
    inputs: str | int | None = None,
    progress: Listener | bool | None = None,
) -> tuple[nn.Module, Unlearned]:
    """Take classes out of a classifier in closed form. What it answers changes; what it still holds, only an audit says.

    One parameter for each of the command line's settings that applies here, by its word.

    Args:
        model: A trained classifier that ends in a linear layer.
        batches: Images of the classes to forget and of others, with labels (pairs) or without.
        forget: Classes to forget: numbers, or names where `classes` are given.
        method: ``"contrast"``, ``"contrast_deep"``, ``"contrast_few"``, ``"collapse"``, ``"modhifi_u"`` or
            ``"discedit_u"``.
        layers: ``"auto"``, ``"last N"``, or names (or their beginnings).
        classes: Names of the classes in the order of the logits.
        labels: ``"auto"`` takes those of `batches`, else the network's own predictions; ``"given"``; ``"model"``.
        forget_target: Forget accuracy on calibration images that is good enough, 0 … 1.
        retain_drop: Retain accuracy that may be lost (`contrast`), 0 … 1.
        settings: Further settings in the command line's words, such as ``["method.depth=4"]``.
        batch_size: Images a forward.
        device: Where the forwards run; None: where the network is.
        seed: For everything that is drawn.
        in_place: Change `model` itself and return it, instead of a copy.
        forward, inputs: As of `prune`.
        progress: As of `prune`.

    Returns:
        The edited network in evaluation mode, and what was done.

    Raises:
        ConfigError: If a setting is unknown or a class does not exist.
        DataError: If there are too few samples of the classes.
        NumericsError: If values are not finite.
        UnsupportedModelError: If the network is no classifier that can be edited.
    """
    from modhifi_cli.unlearning.classes import forget_classes
    from modhifi_cli.unlearning.search import Order, UnlearnSummary, trials_as_rows, unlearn_

    chosen = config.steps("unlearn", ["forget_class=0", f"method={method}", *settings])
    given = ready(model, batches, device, in_place=in_place, forward=forward, inputs=inputs)
    inside, summary, edits = given.inside, None, []
    with listening(progress, "unlearning") as listen:
        found = _labels(given, labels, classes, batch_size, listen)
        wanted = forget_classes(_asked(forget), classes, found.classes)
        for event in unlearn_(
            given.network,
            Order(wanted, config.build(chosen["method"]), layers, forget_target, retain_drop, seed=seed),
            calibration=given.samples,
            labels=found.values,
            batch_size=batch_size,
            device=given.device,
            gathering=config.build(chosen["statistics"]),
        ):
            if isinstance(event, Edit):
                edits.append(event)
            elif isinstance(event, UnlearnSummary):
                summary = event
            elif isinstance(event, Progress):
                listen(event)
    assert summary is not None, "the task ended without a summary"
    return inside.network(given.network), Unlearned(
        forgotten=wanted,
        layers=tuple(inside.outer(name) for name in summary.layers),
        strength={summary.strength_name: summary.strength},
        trials=tuple(trials_as_rows(summary.trials, summary.strength_name)),
        edits=tuple(inside.edit(edit) for edit in edits),
        warnings=(*inside.folded, *summary.warnings),
    )


@own_words
def audit(
    dense: nn.Module,
    edited: nn.Module,
    batches: Batches,
    *,
    forget: int | str | Sequence[int | str],
    evaluation: Batches | None = None,
    classes: Sequence[str] | None = None,
    labels: str = "auto",
    reference: nn.Module | None = None,
    settings: Sequence[str] = (),
    batch_size: int = 64,
    device: torch.device | str | None = None,
    seed: int = 0,
    forward: Forward | None = None,
    inputs: str | int | None = None,
    progress: Listener | bool | None = None,
) -> Audited:
    """What an edited classifier still holds of the classes it shall have forgotten: probes, relearning, membership.

    One parameter for each of the command line's settings that applies here, by its word.

    Args:
        dense: The network before the edit; left as it was, like all others.
        edited: After it, with the same logits.
        batches: The images that the edit has seen, with labels (pairs) or without, as of `unlearn`.
        forget: Classes that shall be forgotten: numbers, or names where `classes` are given.
        evaluation: Labelled images that it has not seen; None holds out every second one of `batches`.
        classes: Names of the classes in the order of the logits.
        labels: As of `unlearn`, of `batches`.
        reference: A network that was trained without the classes, with the same logits; None for none.
        settings: Further settings in the command line's words, such as ``["audit.relearn.seeds=3"]``.
        batch_size: Images a forward.
        device: Where the forwards run; None: where the network is.
        seed: For everything that is drawn.
        forward, inputs, progress: As of `prune`.

    Returns:
        The verdict with its grounds, and the figures of every network.

    Raises:
        ConfigError: If a setting is unknown or out of range, a class does not exist, a network is none, or the images to
            evaluate on come without labels.
        DataError: If there are too few samples of the classes, or the networks do not have the same number of logits.
        NumericsError: If values are not finite.
        UnsupportedModelError: If the network is no classifier.
    """
    from modhifi_cli.auditing.audit import AuditReport, Case
    from modhifi_cli.auditing.audit import audit as audited
    from modhifi_cli.pages import audit as pages
    from modhifi_cli.unlearning.classes import forget_classes

    chosen = config.steps("audit", ["run=given", *settings])["audit"]
    if chosen is None:
        raise ConfigError("settings: audit=none leaves nothing to do.")
    if not isinstance(edited, nn.Module):
        raise ConfigError(f"edited: expected a torch.nn.Module, got a {type(edited).__name__}.")
    given = ready(dense, batches, device, forward=forward, inputs=inputs)
    unseen = None if evaluation is None else given.more(evaluation)
    if unseen is not None and next(iter(unseen.batches(1)))[1] is None:
        raise ConfigError("evaluation: an audit measures accuracy on these images, and they come without labels.")
    asked = recipes.audit_settings(chosen)
    with listening(progress, "auditing") as listen:
        found = _labels(given, labels, classes, batch_size, listen)
        case = Case(
            given.network,
            given.of(edited),
            None if reference is None else given.of(reference),
            calibration=given.samples,
            calibration_labels=found.values,
            labels_account=found.account,
            evaluation=unseen,
            forget=forget_classes(_asked(forget), classes, found.classes),
            classes=None if classes is None else tuple(classes),
        )
        events = audited(case, asked, device=given.device, batch_size=batch_size, seed=seed)
        report = last_of(events, AuditReport, listen)
    return Audited(
        verdict=report.verdict.level,
        sentences=tuple(report.verdict.sentences),
        figures=report.figures,
        definitions=report.definitions,
        report=report.plain(),
        rows=tuple(pages.rows(report.plain())),
    )


def _asked(forget: int | str | Sequence[int | str]) -> Any:
    return list(forget) if isinstance(forget, Sequence) and not isinstance(forget, str) else forget


def _labels(given: Given, labels: str, classes: Sequence[str] | None, batch_size: int, listen: Listener) -> Any:
    """Classes of the calibration images: those that came with them, or the network's own predictions."""
    from modhifi_cli.engine.labelling import Labels, image_labels

    if not isinstance(given.samples, TensorImages):
        raise ConfigError("model: classes can be taken out of classifiers of images only, and this is a language model.")
    events = image_labels(
        given.network, given.samples, mode=labels, device=given.device, batch_size=batch_size,
        names=None if classes is None else tuple(classes), place="batches",
    )  # fmt: skip
    return last_of(events, Labels, listen)
