"""The audit of an edit that shall make a classifier forget classes: what is gone at the output, what is still inside.

Four networks are compared: the dense one, the edited one, the *head-only control* (the dense network whose logits of
the forgotten classes cannot win, nothing else) and, where the user has one, a *reference* that was trained without the
classes. The control has the dense network's features, so everything inside it is the dense network's by construction.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.audit.depths import PENULTIMATE, Depth, Reading, classifier_of, find_depths, read
from modhifi_cli.audit.relearn import Curve, Relearn, Sides, attack, steps_needed
from modhifi_cli.audit.verdict import Criterion, Limits, Verdict, judge
from modhifi_cli.errors import ConfigError, DataError, is_number, is_whole
from modhifi_cli.evaluation.forward import RememberedLogits
from modhifi_cli.numerics import discriminability, membership, readout
from modhifi_cli.records import ImageSource, Progress

LEAST = 10  # images of a class on either side, below which a probe says nothing
_STEPS_RESOLUTION = 2.0  # relearn steps: one way or the other of a draw

DEFINITIONS: Mapping[str, str] = {
    "UA": "unlearning accuracy: 100 % minus the accuracy on the calibration images of the forgotten classes",
    "RA": "remaining accuracy: accuracy on the calibration images of the other classes",
    "TA": "test accuracy: accuracy on the evaluation images of the other classes",
    "FA": "forget accuracy: accuracy on the evaluation images of the forgotten classes (calibration images without "
    "evaluation data)",
    "MIA": "membership inference by confidence: share of the forgotten classes' calibration images that a support "
    "vector classifier takes for images the network was not trained on; it learns from the probability of the true "
    "class on calibration (members) and evaluation (non-members) images of the other classes",
    "MIA check": "balanced accuracy of that classifier on calibration and evaluation images of the other classes that "
    "it was not trained on; 50 % is chance, and at chance the MIA figure means nothing",
    "loss forget": "membership by loss: chance that a calibration image of the forgotten classes has a smaller loss "
    "than an evaluation image of them; 50 % is chance and the aim",
    "loss retain": "the same for the other classes",
    "probe": "recall of the forgotten classes by a linear probe that is trained, on calibration images of all classes, "
    "on the features of that depth and asked about held-out images",
    "class mean": "the same by the nearest class mean",
    "relearn steps": "gradient steps until a few images of the forgotten classes bring forget and retain accuracy back "
    "above a share of the dense network's; the faster of keeping the classifier's row and starting it anew",
    "TV": "lower bound, 0 to 1, on the total variation between the features of the forgotten classes and those of the "
    "others, from mean and variance of held-out images along the direction that separates calibration images best: "
    "some test errs in at most (1 − TV) / 2 of the cases; a large value proves that the classes can still be told "
    "apart, a small one proves nothing",
    "head-only": "control: the dense network with the classifier's rows of the forgotten classes removed, nothing else",
    "reference": "a network trained from scratch without the forgotten classes",
}


@dataclass(frozen=True)
class Probe:
    """How features are read out.

    Attributes:
        samples: Calibration images of a class that a probe is trained on, at most.
        held_out: Images of a class that it is asked about, at most.
        classes: Classes in all, at most: the forgotten ones and others at even distances.
        depths: Places in the network, at most.
        features: Features of a place after averaging its map.
        strength: Inverse ridge of the linear probe.
        iterations: Limit of its solver.
    """

    samples: int = 100
    held_out: int = 1000
    classes: int = 20
    depths: int = 4
    features: int = 256
    strength: float = 1.0
    iterations: int = 200

    def __post_init__(self) -> None:
        least = {"samples": LEAST, "held_out": LEAST, "classes": 2, "depths": 1, "features": 1, "iterations": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if not is_whole(value) or value < smallest:
                raise ConfigError(f"audit.probe.{name} must be a whole number from {smallest}; got {value!r}.")
        if not is_number(self.strength) or not self.strength > 0:
            raise ConfigError(f"audit.probe.strength must be a number above 0; got {self.strength!r}.")


@dataclass(frozen=True)
class Membership:
    """How membership is inferred.

    Attributes:
        members: ``calibration``: the calibration images were among the network's training images; ``none``: they were
            not, or nobody knows, and the attacks are left out.
        samples: Members, and as many others, that the confidence attack uses at most.
    """

    members: str = "calibration"
    samples: int = 1000

    def __post_init__(self) -> None:
        if self.members not in ("calibration", "none"):
            raise ConfigError(f"audit.membership.members must be calibration or none; got {self.members!r}.")
        if not is_whole(self.samples) or self.samples < 8:
            raise ConfigError(f"audit.membership.samples must be a whole number from 8; got {self.samples!r}.")


@dataclass(frozen=True)
class AuditSettings:
    """All settings of an audit."""

    probe: Probe = field(default_factory=Probe)
    relearn: Relearn = field(default_factory=Relearn)
    membership: Membership = field(default_factory=Membership)
    verdict: Limits = field(default_factory=Limits)


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

    def plain(self) -> dict[str, Any]:
        """As plain mappings and lists, with what the verdict's criteria derive."""
        content = dataclasses.asdict(self)
        for one, criterion in zip(content["verdict"]["criteria"], self.verdict.criteria, strict=True):
            one |= {"closed": criterion.closed, "met": criterion.met}
        return content


def audit(
    dense: nn.Module,
    edited: nn.Module,
    *,
    calibration: ImageSource,
    calibration_labels: Tensor,
    evaluation: ImageSource | None,
    forget: Sequence[int],
    classes: Sequence[str] | None,
    reference: nn.Module | None,
    device: torch.device,
    batch_size: int,
    seed: int,
    settings: AuditSettings = AuditSettings(),
    labels_account: str = "given",
    answers: Mapping[str, RememberedLogits] | None = None,
) -> Iterator[Progress | AuditReport]:
    """Compare the edited network with the dense one, the head-only control and the reference; the report comes last.

    No network is changed. Without evaluation data every second calibration image of a class is held out from probes and
    relearning, membership is left out, and accuracies are of images that the edit has seen.

    Args:
        dense: The network before the edit.
        edited: After it, with the same logits.
        calibration: Images, in the order of the labels.
        calibration_labels: ``[images]`` int64.
        evaluation: Labelled images that the edit has not seen, or None.
        forget: The classes that shall be forgotten, at least one and not all.
        classes: Class names in the order of the logits, or None.
        reference: A network trained without these classes, with the same logits, or None.
        device: Where forwards run.
        batch_size: Images a forward.
        seed: Of every draw.
        settings: How many samples, steps and so on.
        labels_account: Where the calibration labels come from, for the report.
        answers: Memories by network (``dense``, ``edited``) that shall learn the logits of the evaluation images, for
            whoever measures on them next.

    Raises:
        ConfigError: If a class does not exist, or nothing would be left.
        DataError: If labels do not fit, there are too few images for a probe, or a network has other classes.
        UnsupportedModelError: If the network has no linear classifier.
        NumericsError: If logits or features are not finite.
    """
    clock = _Clock()
    models = {"dense": dense, "edited": edited} | ({"reference": reference} if reference is not None else {})
    for model in models.values():
        model.to(device).eval()
    forget = tuple(sorted(set(int(cls) for cls in forget)))
    parameter = next(dense.parameters())
    example = next(iter(calibration.batches(2)))[0].to(device=device, dtype=parameter.dtype)
    count = _logits_agree(models, example)
    _check_forget(forget, count, classes)
    _check_labels(calibration_labels, len(calibration), count, "data")
    plan = _Plan.make(calibration_labels, forget, classes, settings.probe, held_back=evaluation is None)
    depths = _depths(models, example, settings.probe)

    readings: dict[str, dict[str, Reading]] = {"calibration": {}}
    labels = {"calibration": calibration_labels.cpu()}
    yield from read(
        models, depths, calibration, lambda _, start: plan.of_calibration(start, batch_size),
        place="calibration images", stage="audit", device=device, batch_size=batch_size,
        result=readings["calibration"], labels=[],
    )  # fmt: skip
    if evaluation is not None:
        readings["evaluation"], given = {}, []
        yield from read(
            models, depths, evaluation, plan.of_evaluation,
            place="evaluation images", stage="audit", device=device, batch_size=batch_size,
            result=readings["evaluation"], labels=given, answers=answers,
        )  # fmt: skip
        labels["evaluation"] = torch.cat(given)
        _check_labels(labels["evaluation"], len(evaluation), count, "evaluation_data")
    scores = {
        where: {name: reading.logits for name, reading in found.items()}
        | {"head_only": _without(found["dense"].logits, forget)}
        for where, found in readings.items()
    }
    clock.lap("forward")

    names = [name for name in ("dense", "edited", "head_only", "reference") if name in models or name == "head_only"]
    accuracy, per_class, becomes = _accuracies(scores, labels, names, forget, count)

    plan.check_held_out(classes)
    readouts, correct = [], {}
    for number, (name, at) in enumerate(places := [(name, at) for name in models for at in depths[name]]):
        yield Progress("audit", f"probes, {name}, {at.name}", number, len(places))
        one, right = _read_out(plan, readings, name, at, forget, settings.probe)
        readouts.append(one)
        correct[name, at.name] = right
    yield Progress("audit", "probes", len(places), len(places))
    # The control has the dense network's features: what can be read in one can be read in the other.
    readouts += [{**one, "model": "head_only"} for one in readouts if one["model"] == "dense"]
    clock.lap("probes")

    distances = _distances(plan, readings, scores, labels, depths, forget)
    attacks, why_not = _membership(scores, labels, names, forget, settings.membership, seed, evaluation is not None)
    clock.lap("distances and membership")

    curves: dict[str, list[Curve]] = {}
    own, held_out = _sides(plan, calibration, evaluation, labels, forget, settings.relearn, device, parameter.dtype)
    base = [_share(dense, images, of) for images, of in _pairs(held_out)]
    aim = (settings.relearn.threshold * base[0], settings.relearn.threshold * base[1])
    # The dense network with a fresh row is the control with a fresh row; with its own row it has nothing to relearn.
    starts = [("head_only", dense, (True,)), ("edited", edited, (True, False))]
    starts += [("reference", reference, (True, False))] if reference is not None else []
    for name, model, rows in starts:
        classifier = classifier_of(model, example)
        curves[name] = []
        for draw in range(settings.relearn.seeds):
            most = None
            for fresh in rows:
                yield from attack(
                    model, classifier, forget, own=own, held_out=held_out, aim=aim, fresh=fresh,
                    settings=settings.relearn, most=most, seed=seed + draw,
                    item=f"{name}, {'fresh row' if fresh else 'as saved'}", result=curves[name],
                )  # fmt: skip
                most = curves[name][-1].reached
    relearnt = {name: {"steps": steps_needed(found), "curves": found} for name, found in curves.items()}
    clock.lap("relearn")

    figures = {name: _figures(name, accuracy[name], readouts, attacks.get(name), relearnt.get(name)) for name in names}
    gaps = {}
    if reference is not None:
        gaps = {name: _gap(figures[name], figures["reference"]) for name in names if name != "reference"}
    where = "evaluation" if evaluation is not None else "calibration"
    verdict = judge(
        forget={name: accuracy[name][where]["forget"] for name in ("dense", "edited", "head_only")},
        retain={name: accuracy[name][where]["retain"] for name in ("dense", "edited", "head_only")},
        criteria=_criteria(readouts, correct, relearnt, reference is not None, len(plan.classes), settings.relearn),
        images="evaluation images" if evaluation is not None else "the calibration images, which the edit has seen,",
        reference=reference is not None,
        limits=settings.verdict,
    )
    yield AuditReport(
        forget=forget,
        classes=None if classes is None else tuple(classes),
        figures=figures,
        gaps=gaps,
        accuracy=accuracy,
        per_class=per_class,
        becomes=becomes,
        readouts=tuple(readouts),
        distances=distances,
        relearn=relearnt,
        membership=attacks,
        verdict=verdict,
        definitions=DEFINITIONS,
        protocol={
            "calibration": dict(calibration.protocol),
            "calibration labels": labels_account,
            "evaluation": None if evaluation is None else dict(evaluation.protocol),
            "held out": "evaluation images" if evaluation is not None else "every second calibration image of a class",
            "probe classes": plan.classes,
            "probe images": {"trained on": len(plan.train_labels), "asked": len(plan.asked_labels)},
            "chance of a probe, %": 100 / len(plan.classes),
            "depths": {name: [at.name for at in found] for name, found in depths.items()},
            "relearn": {
                "forget images": len(own.forget),
                "retain images": len(own.retain),
                "batch": 2 * settings.relearn.batch,
                "learning rate": settings.relearn.learning_rate,
                "most steps": settings.relearn.steps,
                "back at forget, retain accuracy, %": aim,
                "measured on": [len(held_out.forget), len(held_out.retain)],
            },
            "membership": why_not or "members are the calibration images: true only if the network was trained on them",
            "seed": seed,
        },  # fmt: skip
        seconds=clock.seconds,
    )


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
    _Plan.make(labels.cpu(), tuple(forget), classes, settings.probe, held_back=not evaluated)


class _Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = round(now - self._since, 3)
        self._since = now


# -------------------------------------------------------------------------------------------------- checks and samples


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


@dataclass
class _Plan:
    """Which images train a probe and which it is asked about; `asked` is filled while evaluation images go by."""

    classes: list[int]
    forget: tuple[int, ...]
    train: Tensor  # numbers of calibration images, sorted
    train_labels: Tensor
    asked: Tensor  # numbers of evaluation images (of calibration images where there are none), sorted
    asked_labels: Tensor
    held_back: bool
    limit: int
    kept: Tensor  # calibration images whose features are kept: train, and asked where they are held back; sorted

    @classmethod
    def make(
        cls, labels: Tensor, forget: tuple[int, ...], names: Sequence[str] | None, probe: Probe, *, held_back: bool
    ) -> "_Plan":
        needed = 2 * LEAST if held_back else LEAST
        counts = labels.bincount().tolist()
        for number in forget:
            have = counts[number] if number < len(counts) else 0
            if have < needed:
                raise DataError(
                    f"audit: class {_named(number, names)} has {have} calibration images, a probe needs at least "
                    f"{needed}{' without evaluation data' if held_back else ''}; give more labelled images of it "
                    "(data.num_samples, or another source)."
                )
        others = [n for n, have in enumerate(counts) if have >= needed and n not in forget]
        room = max(1, probe.classes - len(forget))
        if not others:
            raise DataError(
                f"audit: no class but the forgotten has {needed} calibration images, which a probe needs; give more "
                "labelled images (data.num_samples, or another source)."
            )
        if len(others) > room:
            others = [others[number * len(others) // room] for number in range(room)]
        chosen = sorted([*forget, *others])
        train, asked = [], []
        for number in chosen:
            own = (labels == number).nonzero().flatten()
            train.append(own[::2][: probe.samples] if held_back else own[: probe.samples])
            asked.append(own[1::2][: probe.held_out] if held_back else own[:0])
        train_at, asked_at = torch.cat(train).sort().values, torch.cat(asked).sort().values
        return cls(
            classes=chosen,
            forget=forget,
            train=train_at,
            train_labels=labels[train_at],
            asked=asked_at,
            asked_labels=labels[asked_at],
            held_back=held_back,
            limit=probe.held_out,
            kept=torch.cat([train_at, asked_at]).sort().values,
        )

    def of_calibration(self, start: int, batch_size: int) -> Tensor:
        """Numbers, within the batch that begins at `start`, of the images whose features are kept."""
        return self.kept[(self.kept >= start) & (self.kept < start + batch_size)] - start

    def of_evaluation(self, labels: Tensor | None, start: int) -> Tensor:
        """The same for evaluation images, the first of every class that a probe knows."""
        if labels is None:
            raise DataError("evaluation_data: an audit needs a label for every image, got images without labels.")
        labels = labels.cpu()
        had = {cls: int((self.asked_labels == cls).sum()) for cls in self.classes}
        rows = torch.cat([(labels == cls).nonzero().flatten()[: self.limit - had[cls]] for cls in self.classes])
        rows = rows.sort().values
        self.asked = torch.cat([self.asked, rows + start])
        self.asked_labels = torch.cat([self.asked_labels, labels[rows]])
        return rows

    def check_held_out(self, names: Sequence[str] | None) -> None:
        """Raise where there are too few held-out images of a forgotten class, or of all others."""
        for number in self.forget:
            have = int((self.asked_labels == number).sum())
            if have < LEAST:
                raise DataError(
                    f"audit: class {_named(number, names)} has {have} evaluation images, a probe needs at least "
                    f"{LEAST} held-out ones; give more labelled images of it (evaluation_data)."
                )
        if not bool((~torch.isin(self.asked_labels, torch.tensor(self.forget))).any()):
            raise DataError(
                "audit: there are evaluation images of the forgotten classes only; give those of others too."
            )

    def sets(self, readings: Mapping[str, Mapping[str, Reading]], model: str, depth: str) -> tuple[Tensor, Tensor]:
        """Features ``[images, features]`` of the images that train and of those that are asked about."""
        features = readings["calibration"][model].features[depth]
        train = features[torch.searchsorted(self.kept, self.train)]
        if self.held_back:
            return train, features[torch.searchsorted(self.kept, self.asked)]
        return train, readings["evaluation"][model].features[depth]


def _named(cls: int, names: Sequence[str] | None) -> str:
    return str(cls) if names is None else f"{cls} ({names[cls]})"


def _depths(models: Mapping[str, nn.Module], example: Tensor, probe: Probe) -> dict[str, tuple[Depth, ...]]:
    """The dense network's depths; in the others those that they have too, and their own penultimate features."""
    found = find_depths(models["dense"], example, depths=probe.depths, features=probe.features)
    depths = {"dense": found}
    for name, model in models.items():
        if name != "dense":
            known = dict(model.named_modules())
            places = [at for at in found if at.module in known and at.name != PENULTIMATE]
            depths[name] = (*places, Depth(PENULTIMATE, classifier_of(model, example)))
    return depths


def _sides(
    plan: _Plan,
    calibration: ImageSource,
    evaluation: ImageSource | None,
    labels: Mapping[str, Tensor],
    forget: Sequence[int],
    settings: Relearn,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Sides, Sides]:
    """The attacker's images, drawn from what trains a probe, and those that accuracy is measured on."""
    source = calibration if evaluation is None else evaluation
    found = []
    for images, at, of, limit in (
        (calibration, plan.train, plan.train_labels, settings.samples),
        (source, plan.asked, plan.asked_labels, settings.held_out),
    ):
        absent = torch.isin(of, torch.tensor(list(forget)))
        chosen = [_spread(at[side], of[side], limit) for side in (absent, ~absent)]
        wanted = torch.cat(chosen).sort().values
        pixels = _images(images, wanted).to(device=device, dtype=dtype)
        all_labels = labels["calibration" if images is calibration else "evaluation"]
        parts = [torch.searchsorted(wanted, side) for side in chosen]
        found.append(
            Sides(
                pixels[parts[0]], all_labels[chosen[0]].to(device), pixels[parts[1]], all_labels[chosen[1]].to(device)
            )
        )
    return found[0], found[1]


def _spread(at: Tensor, labels: Tensor, limit: int) -> Tensor:
    """Up to `limit` of the images `at`, as many of one class as of another, the first of each."""
    turn = torch.zeros(len(at), dtype=torch.int64)
    for cls in labels.unique():
        own = labels == cls
        turn[own] = torch.arange(int(own.sum()))
    return at[turn.argsort(stable=True)[:limit]]


def _images(source: ImageSource, wanted: Tensor) -> Tensor:
    """The images with these numbers (sorted), ``[images, channels, height, width]``."""
    found, start = [], 0
    for images, _ in source.batches(256):
        inside = wanted[(wanted >= start) & (wanted < start + len(images))] - start
        found.append(images[inside])
        start += len(images)
        if start > int(wanted[-1]):
            break
    return torch.cat(found)


# ------------------------------------------------------------------------------------------------------------- figures


def _without(logits: Tensor, forget: Sequence[int]) -> Tensor:
    """The control's logits: those of the forgotten classes cannot win."""
    removed = logits.clone()
    removed[:, list(forget)] = -torch.inf
    return removed


def _accuracies(
    scores: Mapping[str, Mapping[str, Tensor]],
    labels: Mapping[str, Tensor],
    names: Sequence[str],
    forget: Sequence[int],
    count: int,
) -> tuple[dict, dict, dict]:
    accuracy: dict[str, Any] = {name: {} for name in names}
    per_class: dict[str, Any] = {name: {} for name in names}
    becomes: dict[str, Any] = {name: {} for name in names}
    for where, of in labels.items():
        absent = torch.isin(of, torch.tensor(list(forget)))
        for name in names:
            given = scores[where][name].argmax(1)
            right = (given == of).double()
            accuracy[name][where] = {"forget": _mean(right[absent]), "retain": _mean(right[~absent])}
            per_class[name][where] = [_mean(right[of == cls]) for cls in range(count)]
            becomes[name][where] = given[absent].bincount(minlength=count).tolist()
    return accuracy, per_class, becomes


def _mean(right: Tensor) -> float | None:
    return 100 * float(right.mean()) if len(right) else None


def _read_out(
    plan: _Plan,
    readings: Mapping[str, Mapping[str, Reading]],
    model: str,
    at: Depth,
    forget: Sequence[int],
    probe: Probe,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Recalls at one depth of one network, and which forget images either readout got right, ``[images]`` float64."""
    train, asked = plan.sets(readings, model, at.name)
    given = {
        "probe": readout.linear_probe(
            train, plan.train_labels, asked, strength=probe.strength, iterations=probe.iterations
        ),
        "class_mean": readout.nearest_class_mean(train, plan.train_labels, asked),
    }
    absent = torch.isin(plan.asked_labels, torch.tensor(list(forget)))
    found: dict[str, Any] = {"model": model, "depth": at.name, "features": train.shape[1]}
    right = {}
    for name, classes in given.items():
        recalls = readout.recall(classes, plan.asked_labels)
        right[name] = (classes == plan.asked_labels)[absent].double()
        found[name] = 100 * float(right[name].mean())
        found[f"{name}_balanced"] = 100 * sum(recalls.values()) / len(recalls)
    apart = torch.isin(plan.train_labels, torch.tensor(list(forget)))
    found["tv"] = _apart((train[apart], train[~apart]), (asked[absent], asked[~absent]))
    return found, right


def _apart(train: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor]) -> float:
    """Lower bound (method.md, D3') on the total variation between two sets of features, 0 … 1.

    The direction Σ⁻¹Δ comes from other images than mean and variance along it: in as many dimensions as here the best
    direction of a sample looks good on that sample even in noise.
    """
    (first, second), (first_asked, second_asked) = (tuple(side.double() for side in pair) for pair in (train, asked))
    shared = torch.atleast_2d(torch.cov(first.T, correction=0) + torch.cov(second.T, correction=0))
    ridge = 1e-2 * float(shared.diagonal().mean())
    if ridge == 0:
        return 0.0
    direction = torch.linalg.solve(shared + ridge * torch.eye(len(shared)).to(shared), first.mean(0) - second.mean(0))
    along = [side @ direction for side in (first_asked, second_asked)]
    moments = [m for side in along for m in (side.mean()[None], side.var(correction=0)[None, None])]
    return float(discriminability.minimax_bound(*moments))


def _distances(
    plan: _Plan,
    readings: Mapping[str, Mapping[str, Reading]],
    scores: Mapping[str, Mapping[str, Tensor]],
    labels: Mapping[str, Tensor],
    depths: Mapping[str, Sequence[Depth]],
    forget: Sequence[int],
) -> dict[str, Any]:
    where = "evaluation" if "evaluation" in scores else "calibration"
    chances = {name: values.softmax(1) for name, values in scores[where].items()}
    absent = torch.isin(labels[where], torch.tensor(list(forget)))
    pairs = [(first, second) for first in ("dense", "reference") for second in ("head_only", "edited")]
    output = {}
    for first, second in [*pairs, ("reference", "dense")]:
        if first in chances:
            moved = (chances[first] - chances[second]).abs().sum(1) / 2
            output[f"{first}, {second}"] = {
                "forget": float(moved[absent].mean()), "retain": float(moved[~absent].mean())
            }  # fmt: skip
    features = {}
    trained, asked = (torch.isin(of, torch.tensor(list(forget))) for of in (plan.train_labels, plan.asked_labels))
    for at in depths["edited"]:
        before, after = plan.sets(readings, "dense", at.name), plan.sets(readings, "edited", at.name)
        if before[0].shape[1] == after[0].shape[1]:
            features[at.name] = _apart((before[0][trained], after[0][trained]), (before[1][asked], after[1][asked]))
    return {"output": output, "features": features}


def _membership(
    scores: Mapping[str, Mapping[str, Tensor]],
    labels: Mapping[str, Tensor],
    names: Sequence[str],
    forget: Sequence[int],
    settings: Membership,
    seed: int,
    evaluated: bool,
) -> tuple[dict[str, dict[str, Any]], str]:
    """What the attacks find by network, and why they were left out if they were."""
    if settings.members == "none":
        return {}, "left out (audit.membership.members=none)"
    if not evaluated:
        return {}, "left out: without evaluation data there are no images that are known not to be members"
    absent = {where: torch.isin(of, torch.tensor(list(forget))) for where, of in labels.items()}
    if min(int((~side).sum()) for side in absent.values()) < 8:
        return {}, "left out: fewer than eight calibration or evaluation images of the other classes"
    found = {}
    for name in names:
        chance = {w: values[name].softmax(1).gather(1, labels[w][:, None])[:, 0] for w, values in scores.items()}
        loss = {w: -values[name].log_softmax(1).gather(1, labels[w][:, None])[:, 0] for w, values in scores.items()}
        by_confidence = membership.confidence_attack(
            chance["calibration"][~absent["calibration"]],
            chance["evaluation"][~absent["evaluation"]],
            {w: chance[w][absent[w]] for w in chance},
            samples=settings.samples,
            seed=seed,
        )
        found[name] = {
            "confidence_accuracy": 100 * by_confidence.accuracy,
            "confidence_accuracy_error": 100 * by_confidence.error,
            "forget_as_non_members": 100 * by_confidence.as_non_members["calibration"],
            "forget_evaluation_as_non_members": 100 * by_confidence.as_non_members["evaluation"],
            "trained_on": by_confidence.trained_on,
            "asked": by_confidence.asked,
        }
        for side, of in (("forget", absent), ("retain", {w: ~of for w, of in absent.items()})):
            area, error = membership.area_under_curve(
                loss["calibration"][of["calibration"]], loss["evaluation"][of["evaluation"]]
            )
            found[name] |= {f"loss_{side}": 100 * area, f"loss_{side}_error": 100 * error}
    return found, ""


def _figures(
    name: str,
    accuracy: Mapping[str, Mapping[str, float | None]],
    readouts: Sequence[Mapping[str, Any]],
    attacks: Mapping[str, Any] | None,
    relearnt: Mapping[str, Any] | None,
) -> dict[str, float | None]:
    """The figures of one network by the names in `DEFINITIONS`."""
    seen, fresh = accuracy["calibration"], accuracy.get("evaluation")
    figures: dict[str, float | None] = {
        "FA": (fresh or seen)["forget"],
        "UA": None if seen["forget"] is None else 100 - seen["forget"],
        "RA": seen["retain"],
        "TA": None if fresh is None else fresh["retain"],
    }
    for one in readouts:
        if one["model"] == name:
            figures[f"probe, {one['depth']}"] = one["probe"]
    for one in readouts:
        if one["model"] == name:
            figures[f"class mean, {one['depth']}"] = one["class_mean"]
    for one in readouts:
        if one["model"] == name:
            figures[f"TV, {one['depth']}"] = one["tv"]
    figures["relearn steps"] = 0.0 if name == "dense" else relearnt["steps"] if relearnt else None
    if attacks:
        figures |= {
            "MIA": attacks["forget_as_non_members"],
            "MIA check": attacks["confidence_accuracy"],
            "loss forget": attacks["loss_forget"],
            "loss retain": attacks["loss_retain"],
        }
    return figures


def _gap(figures: Mapping[str, float | None], reference: Mapping[str, float | None]) -> dict[str, float | None]:
    gaps = {}
    for name, value in figures.items():
        theirs = reference.get(name)
        gaps[name] = None if value is None or theirs is None else value - theirs
    return gaps


def _criteria(
    readouts: Sequence[Mapping[str, Any]],
    correct: Mapping[tuple[str, str], Mapping[str, Tensor]],
    relearnt: Mapping[str, Mapping[str, Any]],
    reference: bool,
    classes: int,
    relearn: Relearn,
) -> list[Criterion]:
    """Linear probe and class mean on the penultimate features, and relearn steps: control, edited, target."""
    at = {one["model"]: one for one in readouts if one["depth"] == PENULTIMATE}
    found = []
    for key, name in (
        ("probe", "linear probe on the penultimate features"),
        ("class_mean", "nearest class mean there"),
    ):
        control = correct["dense", PENULTIMATE][key]
        theirs = correct["reference", PENULTIMATE][key] if reference else torch.full_like(control, 1 / classes)
        # The same images were asked of both, so the error is that of the paired difference.
        error = 100 * float((control - theirs).std()) / sqrt(len(control))
        target = at["reference"][key] if reference else 100 / classes
        found.append(Criterion(name, "%", at["head_only"][key], at["edited"][key], target, 2 * error))
    most = float(relearn.steps)
    taken = {name: one["steps"] for name, one in relearnt.items()}
    target = taken.get("reference") if reference else most
    found.append(
        Criterion(
            "relearning",
            "steps",
            most if taken["head_only"] is None else taken["head_only"],
            most if taken["edited"] is None else taken["edited"],
            most if target is None else target,
            _STEPS_RESOLUTION,
            edited_more=taken["edited"] is None,
            target_more=target is None,
        )
    )
    return found


@torch.inference_mode()
def _share(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(128), labels.split(128), strict=True))
    return 100 * right / len(images)


def _pairs(sides: Sides) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (sides.forget, sides.forget_labels), (sides.retain, sides.retain_labels)
