"""The attacks of an audit: relearning, and guessing which images the network was trained on.

The relearn attack gives a copy of a network a few images of the forgotten classes and a few gradient steps.

What comes back within a few steps was still inside. Plain SGD on all parameters with normalisation statistics frozen;
half of every batch is of the forgotten classes, half of the others, so that answering "forgotten class" to everything
is no success. The attacker may keep the classifier's row of a forgotten class or put in a fresh one (no weights, the
mean bias), whichever is faster: a row that was pushed far down hides nothing.
"""

import copy
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi_cli.auditing.depths import classifier_of
from modhifi_cli.auditing.plan import Seen
from modhifi_cli.errors import ConfigError, is_number, need_whole
from modhifi_cli.numerics import membership
from modhifi_cli.records import ImageSource, Progress

_SHORTER = (1.0, 0.1, 0.01)  # of the learning rate: the first with which the control comes back


@dataclass(frozen=True)
class Relearn:
    """How the attack is made.

    Attributes:
        samples: Images of the forgotten classes that the attacker has, and as many of the others.
        batch: Images of either side in a step.
        steps: Most steps of one attack.
        learning_rate: Of plain SGD; a tenth, or a hundredth of it, where the control does not come back otherwise.
        threshold: The class counts as back when forget and retain accuracy are both at least this share of the dense
            network's.
        held_out: Images of either side that accuracy is measured on; none of them is the attacker's.
        seeds: How many draws of batches; steps are the mean over them.
    """

    samples: int = 64
    batch: int = 16
    steps: int = 32
    learning_rate: float = 0.01
    threshold: float = 0.5
    held_out: int = 150
    seeds: int = 1

    def __post_init__(self) -> None:
        for name in ("samples", "batch", "steps", "held_out", "seeds"):
            need_whole(f"audit.relearn.{name}", getattr(self, name), 1)
        for name, expected, fits in (
            ("learning_rate", "a number above 0", lambda v: v > 0),
            ("threshold", "a number with 0 < threshold <= 1", lambda v: 0 < v <= 1),
        ):
            value = getattr(self, name)
            if not is_number(value) or not fits(value):
                raise ConfigError(f"audit.relearn.{name} must be {expected}; got {value!r}.")


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
        need_whole("audit.membership.samples", self.samples, 8)


@dataclass(frozen=True)
class Sides:
    """Images of the forgotten classes and of the others with their labels, as the attack needs them.

    Attributes:
        forget: ``[images, channels, height, width]``.
        forget_labels: ``[images]`` int64.
        retain: ``[images, channels, height, width]``.
        retain_labels: ``[images]`` int64.
    """

    forget: Tensor
    forget_labels: Tensor
    retain: Tensor
    retain_labels: Tensor


@dataclass(frozen=True)
class Curve:
    """One attack.

    Attributes:
        row: ``as saved`` or ``fresh``: the classifier's rows of the forgotten classes at the start.
        seed: Of the batches.
        steps: Steps after which accuracy was measured, from 0.
        forget: Accuracy on held-out images of the forgotten classes after them, %.
        retain: The same for the other classes.
        reached: First of `steps` at which both are back, or None.
    """

    row: str
    seed: int
    steps: tuple[int, ...]
    forget: tuple[float, ...]
    retain: tuple[float, ...]
    reached: int | None


@dataclass(frozen=True)
class Relearnt:
    """What relearning found.

    Attributes:
        networks: Network → ``steps`` (None: never) and ``curves``.
        protocol: JSON-able account of the images, steps and aims.
    """

    networks: Mapping[str, Mapping[str, Any]]
    protocol: Mapping[str, Any]


@dataclass(frozen=True)
class Arena:
    """What all attacks of one audit share.

    Attributes:
        own: The attacker's images.
        held_out: Images that accuracy is measured on.
        aim: Forget and retain accuracy that count as back, %.
        settings: How many steps and how large.
    """

    own: Sides
    held_out: Sides
    aim: tuple[float, float]
    settings: Relearn


def relearn(
    models: Mapping[str, nn.Module], seen: Seen, sources: Mapping[str, ImageSource], settings: Relearn, *, seed: int
) -> Generator[Progress, None, Relearnt]:
    """Attack the control, the edited network and the reference.

    Args:
        models: ``dense``, ``edited`` and perhaps ``reference``, on their device.
        seen: What they said.
        sources: The images, ``calibration`` and perhaps ``evaluation``.
        settings: How.
        seed: Of the first draw.
    """
    parameter = next(models["dense"].parameters())
    own, held_out = _sides(seen, sources, settings, parameter)
    back = _accuracies(models["dense"], held_out)
    aim = (settings.threshold * back[0], settings.threshold * back[1])
    example = own.forget[:2] if len(own.forget) > 1 else torch.cat([own.forget, own.retain])[:2]
    # The dense network with a fresh row is the control with a fresh row; with its own row it has nothing to relearn.
    starts = {"head_only": ("dense", (True,)), "edited": ("edited", (True, False)), "reference": ("reference", (True, False))}
    networks = {}
    for name, (start, rows) in starts.items():
        if start not in models:
            continue
        made: list[list[Curve]] = []
        # In the control all is inside: where it does not come back the steps were too long, and prove nothing of others.
        for factor in _SHORTER if name == "head_only" else (1.0,):
            shorter = replace(settings, learning_rate=factor * settings.learning_rate)
            arena = Arena(own, held_out, aim, shorter)
            made.append((yield from _draws(models[start], rows, seen.forget, arena, example=example, seed=seed, name=name)))
            if steps_needed(made[-1]) is not None:
                settings = shorter
                break
        else:
            made = made[:1]
        networks[name] = {"steps": steps_needed(made[-1]), "curves": made[-1]}
    protocol = {
        "forget images": len(own.forget),
        "retain images": len(own.retain),
        "batch": 2 * settings.batch,
        "learning rate": settings.learning_rate,
        "most steps": settings.steps,
        "back at forget, retain accuracy, %": aim,
        "measured on": [len(held_out.forget), len(held_out.retain)],
    }
    return Relearnt(networks, protocol)


def _draws(
    model: nn.Module,
    rows: Sequence[bool],
    forget: Sequence[int],
    arena: Arena,
    *,
    example: Tensor,
    seed: int,
    name: str,
) -> Generator[Progress, None, list[Curve]]:
    """Attacks on one network, one for each draw of batches and each start of the forgotten rows (`rows`: fresh)."""
    classifier = classifier_of(model, example)
    curves: list[Curve] = []
    for draw in range(arena.settings.seeds):
        most = None
        for fresh in rows:
            curve = yield from attack(
                model, classifier, forget, arena, fresh=fresh, most=most, seed=seed + draw,
                item=f"{name}, {'fresh row' if fresh else 'as saved'}",
            )  # fmt: skip
            curves.append(curve)
            most = curve.reached
    return curves


def attack(
    model: nn.Module,
    classifier: str,
    forget: Sequence[int],
    arena: Arena,
    *,
    fresh: bool,
    most: int | None = None,
    seed: int,
    item: str,
) -> Generator[Progress, None, Curve]:
    """Relearn on a copy of `model`, which is left as it is.

    The attack ends at the second measurement in a row at which the classes are back, or where its loss diverges.

    Args:
        model: Network in evaluation mode.
        classifier: Its last linear layer.
        forget: The forgotten classes.
        arena: Images, aims and settings.
        fresh: Whether the rows of the forgotten classes begin anew.
        most: Fewer steps than the settings': a slower attack than one already made is not of interest.
        seed: Of the batches.
        item: What the progress is called.
    """
    own, aim, settings = arena.own, arena.aim, arena.settings
    copied = copy.deepcopy(model).eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if fresh:
        fresh_rows_(copied.get_submodule(classifier), forget)
    optimiser = torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    most = settings.steps if most is None else min(most, settings.steps)
    steps, of_forget, of_retain = [], [], []
    reached, confirmed = None, 0
    for step in range(most + 1):
        if _is_checked(step, most):
            steps.append(step)
            for found, share in zip((of_forget, of_retain), _accuracies(copied, arena.held_out), strict=True):
                found.append(share)
            if of_forget[-1] >= aim[0] and of_retain[-1] >= aim[1]:
                reached = step if reached is None else reached
                confirmed += 1
            else:
                confirmed = 0
        yield Progress("relearn", item, step, most)
        if confirmed == 2 or step == most:
            break
        ours = torch.randint(len(own.forget), (settings.batch,), generator=generator)
        others = torch.randint(len(own.retain), (settings.batch,), generator=generator)
        images = torch.cat([own.forget[ours], own.retain[others]])
        labels = torch.cat([own.forget_labels[ours], own.retain_labels[others]])
        loss = F.cross_entropy(copied(images), labels)
        if not bool(loss.isfinite()):
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    yield Progress("relearn", item, most, most)
    row = "fresh" if fresh else "as saved"
    return Curve(row, seed, tuple(steps), tuple(of_forget), tuple(of_retain), reached)


@torch.no_grad()
def fresh_rows_(layer: nn.Module, forget: Sequence[int]) -> None:
    """Give a linear classifier rows without weights, and the mean bias of the others, for these classes."""
    rows = torch.tensor(list(forget), device=layer.weight.device)
    others = torch.ones(layer.weight.shape[0], dtype=torch.bool, device=rows.device)
    others[rows] = False
    layer.weight[rows] = 0
    layer.bias[rows] = layer.bias[others].mean()


def steps_needed(curves: Sequence[Curve]) -> float | None:
    """Steps until the classes are back: per seed the faster row, the mean over seeds; None if one seed never got there.

    Args:
        curves: All attacks on one network.
    """
    fastest: dict[int, float] = {}
    for curve in curves:
        taken = float("inf") if curve.reached is None else float(curve.reached)
        fastest[curve.seed] = min(fastest.get(curve.seed, float("inf")), taken)
    if not fastest or float("inf") in fastest.values():
        return None
    return sum(fastest.values()) / len(fastest)


def infer_membership(seen: Seen, settings: Membership, *, seed: int) -> tuple[dict[str, dict[str, Any]], str]:
    """What the membership attacks find by network, and why they were left out if they were.

    Args:
        seen: What the networks said.
        settings: How.
        seed: Of the members that are drawn.
    """
    scores, labels = seen.scores, seen.labels
    if settings.members == "none":
        return {}, "left out (audit.membership.members=none)"
    if "evaluation" not in labels:
        return {}, "left out: without evaluation data there are no images that are known not to be members"
    absent = {where: seen.plan.absent(of) for where, of in labels.items()}
    if min(int((~side).sum()) for side in absent.values()) < 8:
        return {}, "left out: fewer than eight calibration or evaluation images of the other classes"
    found = {}
    for name in seen.names:
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


def _is_checked(step: int, last: int) -> bool:
    """Every step at first, then ever fewer: the measuring costs more than the steps."""
    return step == last or step <= 8 or (step <= 16 and step % 2 == 0) or step % 4 == 0


def _sides(
    seen: Seen, sources: Mapping[str, ImageSource], settings: Relearn, like: Tensor
) -> tuple[Sides, Sides]:
    """The attacker's images, drawn from what trains a probe, and those that accuracy is measured on."""
    plan, found = seen.plan, []
    for where, at, of, limit in (
        ("calibration", plan.train, plan.train_labels, settings.samples),
        (seen.judged, plan.asked, plan.asked_labels, settings.held_out),
    ):
        absent = plan.absent(of)
        chosen = [_spread(at[side], of[side], limit) for side in (absent, ~absent)]
        wanted = torch.cat(chosen).sort().values
        pixels = _images(sources[where], wanted).to(like)
        images = [pixels[torch.searchsorted(wanted, side)] for side in chosen]
        labels = [seen.labels[where][side].to(like.device) for side in chosen]
        found.append(Sides(images[0], labels[0], images[1], labels[1]))
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


@torch.inference_mode()
def _accuracies(model: nn.Module, sides: Sides, batch: int = 128) -> tuple[float, float]:
    """Accuracy on forget and on retain images, %."""

    def share(images: Tensor, labels: Tensor) -> float:
        pairs = zip(images.split(batch), labels.split(batch), strict=True)
        return 100 * sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(images)

    return share(sides.forget, sides.forget_labels), share(sides.retain, sides.retain_labels)
