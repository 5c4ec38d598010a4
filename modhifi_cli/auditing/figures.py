"""The figures of an audit: accuracies, what probes read at every depth, how far networks are apart, and their names."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from modhifi_cli.auditing.depths import PENULTIMATE
from modhifi_cli.auditing.plan import Probe, Seen
from modhifi_cli.auditing.verdict import Criterion
from modhifi_cli.numerics import discriminability, readout
from modhifi_cli.records import Progress

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
    "neighbour": "balanced accuracy of a linear probe that tells, from a network's answers without those of the forgotten "
    "classes, held-out images of these from real images of the class that they are given most; 50 % is chance and the aim; "
    "mean over draws",
    "TV": "lower bound, 0 to 1, on the total variation between the features of the forgotten classes and those of the "
    "others, from mean and variance of held-out images along the direction that separates calibration images best: "
    "some test errs in at most (1 − TV) / 2 of the cases; a large value proves that the classes can still be told "
    "apart, a small one proves nothing",
    "head-only": "control: the dense network with the classifier's rows of the forgotten classes removed, nothing else",
    "reference": "a network trained from scratch without the forgotten classes",
}


@dataclass(frozen=True)
class Accuracies:
    """What the networks answer; fields as in `AuditReport`."""

    accuracy: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    per_class: Mapping[str, Mapping[str, list[float | None]]]
    becomes: Mapping[str, Mapping[str, list[int]]]


def accuracies(seen: Seen) -> Accuracies:
    """Accuracy of every network on forget and retain images, by class, and what the forget images become."""
    found: tuple[dict[str, Any], ...] = tuple({name: {} for name in seen.names} for _ in range(3))
    for where, of in seen.labels.items():
        absent = seen.plan.absent(of)
        for name in seen.names:
            given = seen.scores[where][name].argmax(1)
            right = (given == of).double()
            accuracy = {"forget": _mean(right[absent]), "retain": _mean(right[~absent])}
            per_class = [_mean(right[of == cls]) for cls in range(seen.count)]
            becomes = given[absent].bincount(minlength=seen.count).tolist()
            for kind, value in zip(found, (accuracy, per_class, becomes), strict=True):
                kind[name][where] = value
    return Accuracies(*found)


@dataclass(frozen=True)
class Readouts:
    """What probes read.

    Attributes:
        rows: One mapping per network and depth, as in `AuditReport.readouts`.
        correct: (network, depth) → readout → which forget images it got right, ``[images]`` float64.
    """

    rows: tuple[Mapping[str, Any], ...]
    correct: Mapping[tuple[str, str], Mapping[str, Tensor]]

    def penultimate(self, model: str) -> Mapping[str, Any]:
        """The row of one network's penultimate features."""
        return next(one for one in self.rows if one["model"] == model and one["depth"] == PENULTIMATE)


def read_out(seen: Seen, probe: Probe) -> Generator[Progress, None, Readouts]:
    """Train probes on every network at every depth."""
    rows, correct = [], {}
    places = [(name, at.name) for name, depths in seen.depths.items() for at in depths]
    for number, (name, depth) in enumerate(places):
        yield Progress("audit", f"probes, {name}, {depth}", number, len(places))
        row, correct[name, depth] = _read_out(seen, name, depth, probe)
        rows.append(row)
    yield Progress("audit", "probes", len(places), len(places))
    # The control has the dense network's features: what can be read in one can be read in the other.
    rows += [{**one, "model": "head_only"} for one in rows if one["model"] == "dense"]
    return Readouts(tuple(rows), correct)


def distances(seen: Seen) -> dict[str, Any]:
    """How far networks are apart, at the output and inside; as in `AuditReport.distances`."""
    chances = {name: values.softmax(1) for name, values in seen.scores[seen.judged].items()}
    absent = seen.plan.absent(seen.labels[seen.judged])
    pairs = [(first, second) for first in ("dense", "reference") for second in ("head_only", "edited")]
    output = {}
    for first, second in [*pairs, ("reference", "dense")]:
        if first in chances:
            moved = (chances[first] - chances[second]).abs().sum(1) / 2
            output[f"{first}, {second}"] = {
                "forget": float(moved[absent].mean()), "retain": float(moved[~absent].mean())
            }  # fmt: skip
    features = {}
    trained, asked = (seen.plan.absent(of) for of in (seen.plan.train_labels, seen.plan.asked_labels))
    for at in seen.depths["edited"]:
        before, after = seen.sets("dense", at.name), seen.sets("edited", at.name)
        if before[0].shape[1] == after[0].shape[1]:
            features[at.name] = _apart((before[0][trained], after[0][trained]), (before[1][asked], after[1][asked]))
    return {"output": output, "features": features}


def figures_of(
    name: str,
    accuracy: Mapping[str, Mapping[str, float | None]],
    readouts: Readouts,
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
    own = [one for one in readouts.rows if one["model"] == name]
    for key, title in (("probe", "probe"), ("class_mean", "class mean"), ("tv", "TV")):
        figures |= {f"{title}, {one['depth']}": one[key] for one in own}
    figures["relearn steps"] = 0.0 if name == "dense" else relearnt["steps"] if relearnt else None
    if attacks:
        figures |= {
            "MIA": attacks["forget_as_non_members"],
            "MIA check": attacks["confidence_accuracy"],
            "loss forget": attacks["loss_forget"],
            "loss retain": attacks["loss_retain"],
        }
    return figures


def gap(figures: Mapping[str, float | None], reference: Mapping[str, float | None]) -> dict[str, float | None]:
    """Figures minus the reference's, None where either is missing."""
    gaps = {}
    for name, value in figures.items():
        theirs = reference.get(name)
        gaps[name] = None if value is None or theirs is None else value - theirs
    return gaps


def criteria(
    readouts: Readouts, relearnt: Mapping[str, Mapping[str, Any]], *, reference: bool, classes: int, most: float
) -> list[Criterion]:
    """Linear probe and class mean on the penultimate features, and relearn steps: control, edited, target.

    Args:
        readouts: What probes read.
        relearnt: As in `AuditReport.relearn`.
        reference: Whether there is one; otherwise chance is the target.
        classes: That a probe tells apart.
        most: Steps of an attack that never got there.
    """
    found = []
    for key, name in (
        ("probe", "linear probe on the penultimate features"),
        ("class_mean", "nearest class mean there"),
    ):
        control = readouts.correct["dense", PENULTIMATE][key]
        theirs = readouts.correct["reference", PENULTIMATE][key] if reference else torch.full_like(control, 1 / classes)
        # The same images were asked of both, so the error is that of the paired difference.
        error = 100 * float((control - theirs).std()) / sqrt(len(control))
        target = readouts.penultimate("reference")[key] if reference else 100 / classes
        head_only, edited = (readouts.penultimate(model)[key] for model in ("head_only", "edited"))
        found.append(Criterion(name, "%", head_only, edited, target, 2 * error))
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


def _read_out(seen: Seen, model: str, depth: str, probe: Probe) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Recalls at one depth of one network, and which forget images either readout got right, ``[images]`` float64."""
    plan = seen.plan
    train, asked = seen.sets(model, depth)
    given = {
        "probe": readout.linear_probe(
            train, plan.train_labels, asked, strength=probe.strength, iterations=probe.iterations
        ),
        "class_mean": readout.nearest_class_mean(train, plan.train_labels, asked),
    }
    absent = plan.absent(plan.asked_labels)
    found: dict[str, Any] = {"model": model, "depth": depth, "features": train.shape[1]}
    right = {}
    for name, classes in given.items():
        recalls = readout.recall(classes, plan.asked_labels)
        right[name] = (classes == plan.asked_labels)[absent].double()
        found[name] = 100 * float(right[name].mean())
        found[f"{name}_balanced"] = 100 * sum(recalls.values()) / len(recalls)
    apart = plan.absent(plan.train_labels)
    found["tv"] = _apart((train[apart], train[~apart]), (asked[absent], asked[~absent]))
    return found, right


def _mean(right: Tensor) -> float | None:
    return 100 * float(right.mean()) if len(right) else None


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
