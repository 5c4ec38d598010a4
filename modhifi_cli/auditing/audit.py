"""The audit of an edit that shall make a classifier forget classes: what is gone at the output, what is still inside.

Four networks are compared: the dense one, the edited one, the *head-only control* (the dense network whose logits of
the forgotten classes cannot win, nothing else) and, where the user has one, a *reference* that was trained without the
classes. The control has the dense network's features, so everything inside it is the dense network's by construction.
"""

import dataclasses
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.auditing import further as more
from modhifi_cli.auditing.attacks import Membership, Relearn, infer_membership, relearn
from modhifi_cli.auditing.depths import depths_of_all, read
from modhifi_cli.auditing.figures import (
    DEFINITIONS,
    Accuracies,
    Readouts,
    accuracies,
    criteria,
    distances,
    figures_of,
    gap,
    read_out,
)
from modhifi_cli.auditing.plan import Plan, Probe, Seen
from modhifi_cli.auditing.verdict import Limits, Verdict, judge
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.evaluation.forward import RememberedLogits
from modhifi_cli.records import ImageSource, Progress


@dataclass(frozen=True)
class AuditSettings:
    """All settings of an audit."""

    probe: Probe = field(default_factory=Probe)
    relearn: Relearn = field(default_factory=Relearn)
    membership: Membership = field(default_factory=Membership)
    verdict: Limits = field(default_factory=Limits)
    further: more.Further | None = None


@dataclass(frozen=True)
class AuditReport:
    """Everything an audit found, JSON-able. Accuracies, recalls and shares are in %, TV bounds in 0 … 1.

    Attributes:
        forget: The forgotten classes.
        classes: Class names, or None.
        figures: Network → figure → value, None where it could not be had; the names are explained in `definitions`.
        gaps: Network → figure → value minus the reference's; empty without a reference.
        accuracy: Network → ``calibration``, ``evaluation`` → ``forget``, ``retain`` → accuracy.
        per_class: Network → ``calibration``, ``evaluation`` → accuracy of every class, None without images.
        becomes: Network → ``calibration``, ``evaluation`` → how many images of the forgotten classes are given each
            class, in the order of the classes.
        readouts: One mapping per network and depth: ``model``, ``depth``, ``features``, ``probe``, ``probe_balanced``,
            ``class_mean``, ``class_mean_balanced``, ``tv``.
        distances: ``output`` (mean total variation between the softmax of two networks, by pair and side), ``features``
            (lower bound on the total variation between dense and edited features of the forget images, by depth).
        relearn: Network → ``steps`` (None: never) and ``curves``.
        membership: Network → what the attacks found; empty where they were left out, `protocol` says why.
        verdict: In words.
        definitions: What every figure means.
        protocol: Images, probe classes, depths, thresholds, seeds.
        seconds: By part.
        further: As `further.further_attacks`; empty where they were left out.
    """

    forget: tuple[int, ...]
    classes: tuple[str, ...] | None
    figures: Mapping[str, Mapping[str, float | None]]
    gaps: Mapping[str, Mapping[str, float | None]]
    accuracy: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    per_class: Mapping[str, Mapping[str, list[float | None]]]
    becomes: Mapping[str, Mapping[str, list[int]]]
    readouts: tuple[Mapping[str, Any], ...]
    distances: Mapping[str, Any]
    relearn: Mapping[str, Mapping[str, Any]]
    membership: Mapping[str, Mapping[str, Any]]
    verdict: Verdict
    definitions: Mapping[str, str]
    protocol: Mapping[str, Any]
    seconds: Mapping[str, float]
    further: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As plain mappings and lists, with what the verdict's criteria derive."""
        content = dataclasses.asdict(self)
        for one, criterion in zip(content["verdict"]["criteria"], self.verdict.criteria, strict=True):
            one |= {"closed": criterion.closed, "met": criterion.met}
        return content


@dataclass(frozen=True)
class Case:
    """What is audited.

    Attributes:
        dense: The network before the edit.
        edited: After it, with the same logits.
        reference: A network trained without these classes, with the same logits, or None.
        calibration: Images, in the order of the labels.
        calibration_labels: ``[images]`` int64.
        evaluation: Labelled images that the edit has not seen, or None.
        forget: The classes that shall be forgotten, at least one and not all.
        classes: Class names in the order of the logits, or None.
        labels_account: Where the calibration labels come from, for the report.
    """

    dense: nn.Module
    edited: nn.Module
    reference: nn.Module | None = None
    _: dataclasses.KW_ONLY
    calibration: ImageSource
    calibration_labels: Tensor
    evaluation: ImageSource | None
    forget: Sequence[int]
    classes: Sequence[str] | None
    labels_account: str = "given"

    @property
    def models(self) -> dict[str, nn.Module]:
        """The networks that there are, by name."""
        beside = {} if self.reference is None else {"reference": self.reference}
        return {"dense": self.dense, "edited": self.edited, **beside}

    @property
    def sources(self) -> dict[str, ImageSource]:
        """The images that there are, by name."""
        beside = {} if self.evaluation is None else {"evaluation": self.evaluation}
        return {"calibration": self.calibration, **beside}


def audit(
    case: Case,
    settings: AuditSettings = AuditSettings(),
    *,
    device: torch.device,
    batch_size: int,
    seed: int,
    answers: Mapping[str, RememberedLogits] | None = None,
) -> Iterator[Progress | AuditReport]:
    """Compare the edited network with the dense one, the head-only control and the reference; the report comes last.

    No network is changed. Without evaluation data every second calibration image of a class is held out from probes and
    relearning, membership is left out, and accuracies are of images that the edit has seen.

    Args:
        case: Networks, images and classes.
        settings: How many samples, steps and so on.
        device: Where forwards run.
        batch_size: Images a forward.
        seed: Of every draw.
        answers: Memories by network (``dense``, ``edited``) that shall learn the logits of the evaluation images, for
            whoever measures on them next.

    Raises:
        ConfigError: If a class does not exist, or nothing would be left.
        DataError: If labels do not fit, there are too few images for a probe, or a network has other classes.
        UnsupportedModelError: If the network has no linear classifier.
        NumericsError: If logits or features are not finite.
    """
    clock = _Clock()
    models, sources = case.models, case.sources
    for model in models.values():
        model.to(device).eval()
    seen = yield from _seen(case, settings.probe, device, batch_size, answers)
    found = accuracies(seen)
    clock.lap("forward")

    seen.plan.check_held_out(case.classes)
    readouts = yield from read_out(seen, settings.probe)
    clock.lap("probes")

    apart = distances(seen)
    members, why_not = infer_membership(seen, settings.membership, seed=seed)
    clock.lap("distances and membership")

    relearnt = yield from relearn(models, seen, sources, settings.relearn, seed=seed)
    clock.lap("relearn")

    attacked: Mapping[str, Any] = {}
    if settings.further is not None:
        attacked = yield from more.further_attacks(
            models, seen, sources, relearnt, settings=settings.further, membership=settings.membership, seed=seed
        )
        clock.lap("further attacks")

    again, accuracy = relearnt.networks, found.accuracy
    figures = {
        name: figures_of(name, accuracy[name], readouts, members.get(name), again.get(name)) for name in seen.names
    }
    if attacked:
        figures = {name: own | more.figures_of(name, attacked) for name, own in figures.items()}
    gaps = {}
    if case.reference is not None:
        gaps = {name: gap(figures[name], figures["reference"]) for name in seen.names if name != "reference"}
    yield AuditReport(
        forget=seen.forget,
        classes=None if case.classes is None else tuple(case.classes),
        figures=figures,
        gaps=gaps,
        **vars(found),
        readouts=readouts.rows,
        distances=apart,
        relearn=again,
        membership=members,
        verdict=_verdict(case, settings, seen, found, readouts, again),
        definitions=DEFINITIONS if settings.further is None else {**DEFINITIONS, **more.definitions(settings.further)},
        protocol=_protocol(case, seen)
        | {
            "relearn": relearnt.protocol,
            "membership": why_not or "members are the calibration images: true only if the network was trained on them",
            "seed": seed,
        },
        seconds=clock.seconds,
        further=attacked,
    )


def _seen(
    case: Case,
    probe: Probe,
    device: torch.device,
    batch_size: int,
    answers: Mapping[str, RememberedLogits] | None,
) -> Generator[Progress, None, Seen]:
    """What the networks say of all images, after a look at whether the case can be judged at all."""
    models, calibration, evaluation = case.models, case.calibration, case.evaluation
    forget = tuple(sorted(set(int(cls) for cls in case.forget)))
    parameter = next(case.dense.parameters())
    example = next(iter(calibration.batches(2)))[0].to(device=device, dtype=parameter.dtype)
    count = _logits_agree(models, example)
    _check_forget(forget, count, case.classes)
    _check_labels(case.calibration_labels, len(calibration), count, "data")
    labels = {"calibration": case.calibration_labels.cpu()}
    plan = Plan.make(case.calibration_labels, forget, case.classes, probe, held_back=evaluation is None)
    depths = depths_of_all(models, example, depths=probe.depths, features=probe.features)
    readings = {}
    readings["calibration"], _ = yield from read(
        models, depths, calibration, lambda _, start: plan.of_calibration(start, batch_size),
        place="calibration images", device=device, batch_size=batch_size,
    )  # fmt: skip
    if evaluation is not None:
        readings["evaluation"], labels["evaluation"] = yield from read(
            models, depths, evaluation, plan.of_evaluation,
            place="evaluation images", device=device, batch_size=batch_size, answers=answers,
        )  # fmt: skip
        _check_labels(labels["evaluation"], len(evaluation), count, "evaluation_data")
    return Seen(plan, count, labels, readings, depths)


def _verdict(
    case: Case, settings: AuditSettings, seen: Seen, found: Accuracies, readouts: Readouts, again: Mapping[str, Any]
) -> Verdict:
    """What all of it says of forgetting."""
    sides = {
        side: {name: found.accuracy[name][seen.judged][side] for name in ("dense", "edited", "head_only")}
        for side in ("forget", "retain")
    }
    reference = case.reference is not None
    return judge(
        **sides,
        criteria=criteria(
            readouts, again, reference=reference, classes=len(seen.plan.classes), most=float(settings.relearn.steps)
        ),
        images="evaluation images" if case.evaluation is not None else "the calibration images, which the edit has seen,",
        reference=reference,
        limits=settings.verdict,
    )


def _protocol(case: Case, seen: Seen) -> dict[str, Any]:
    """Images, probe classes and depths of an audit, for its report."""
    plan, evaluation = seen.plan, case.evaluation
    return {
        "calibration": dict(case.calibration.protocol),
        "calibration labels": case.labels_account,
        "evaluation": None if evaluation is None else dict(evaluation.protocol),
        "held out": "evaluation images" if evaluation is not None else "every second calibration image of a class",
        "probe classes": plan.classes,
        "probe images": {"trained on": len(plan.train_labels), "asked": len(plan.asked_labels)},
        "chance of a probe, %": 100 / len(plan.classes),
        "depths": {name: [at.name for at in found] for name, found in seen.depths.items()},
    }


def check_samples(
    labels: Tensor, forget: Sequence[int], classes: Sequence[str] | None, *, evaluated: bool, settings: AuditSettings
) -> None:
    """Refuse calibration images that an audit could not use, before anything is computed.

    Args:
        labels: Of the calibration images, ``[images]`` int64.
        forget: The classes that shall be forgotten.
        classes: Class names, or None.
        evaluated: Whether there are evaluation images; otherwise calibration images are held back.
        settings: Of the audit.

    Raises:
        DataError: If there are too few images of a forgotten class, or of all others.
    """
    Plan.make(labels.cpu(), tuple(forget), classes, settings.probe, held_back=not evaluated)


class _Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = round(now - self._since, 3)
        self._since = now


def _logits_agree(models: Mapping[str, nn.Module], example: Tensor) -> int:
    counts = {}
    for name, model in models.items():
        with torch.no_grad():
            output = model(example)
        counts[name] = output.shape[1] if isinstance(output, Tensor) and output.dim() == 2 else 0
    for name, count in counts.items():
        if count != counts["dense"]:
            what = "audit.reference" if name == "reference" else f"the {name} network"
            raise DataError(
                f"{what} has {count} classes and the dense network {counts['dense']}; give a network with the same "
                "classes in the same order, the forgotten ones among them."
            )
    return counts["dense"]


def _check_forget(forget: Sequence[int], count: int, classes: Sequence[str] | None) -> None:
    known = (
        ", ".join(f"{number} {name}" for number, name in enumerate(classes[:20])) if classes else f"0 to {count - 1}"
    )
    if not forget:
        raise ConfigError(f"audit: at least one class must be forgotten, got none; the classes are {known}.")
    for cls in forget:
        if not 0 <= cls < count:
            raise ConfigError(f"audit: there is no class {cls}; the classes are {known}.")
    if len(forget) == count:
        raise ConfigError(
            f"audit: all {count} classes shall be forgotten and none would be left; leave out one at least."
        )


def _check_labels(labels: Tensor, images: int, count: int, place: str) -> None:
    if labels.shape != (images,):
        raise DataError(
            f"{place}: an audit needs a label for every image, got {len(labels)} labels for {images} images; give a "
            "labelled set."
        )
    outside = (labels < 0) | (labels >= count)
    if bool(outside.any()):
        raise DataError(
            f"{place}: expected labels 0 to {count - 1} for the network's {count} classes, got "
            f"{int(labels[outside][0])}; use data labelled for this network."
        )
