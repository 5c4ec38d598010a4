"""The relearn attack: a copy of a network is given a few images of the forgotten classes and a few gradient steps.

What comes back within a few steps was still inside. Plain SGD on all parameters with normalisation statistics frozen;
half of every batch is of the forgotten classes, half of the others, so that answering "forgotten class" to everything
is no success. The attacker may keep the classifier's row of a forgotten class or put in a fresh one (no weights, the
mean bias), whichever is faster: a row that was pushed far down hides nothing.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, is_number, is_whole
from modhifi_cli.records import Progress


@dataclass(frozen=True)
class Relearn:
    """How the attack is made.

    Attributes:
        samples: Images of the forgotten classes that the attacker has, and as many of the others.
        batch: Images of either side in a step.
        steps: Most steps of one attack.
        learning_rate: Of plain SGD.
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
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise ConfigError(f"audit.relearn.{name} must be a whole number from 1; got {value!r}.")
        for name, expected, fits in (
            ("learning_rate", "a number above 0", lambda v: v > 0),
            ("threshold", "a number with 0 < threshold <= 1", lambda v: 0 < v <= 1),
        ):
            value = getattr(self, name)
            if not is_number(value) or not fits(value):
                raise ConfigError(f"audit.relearn.{name} must be {expected}; got {value!r}.")


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


def attack(
    model: nn.Module,
    classifier: str,
    forget: Sequence[int],
    *,
    own: Sides,
    held_out: Sides,
    aim: tuple[float, float],
    fresh: bool,
    settings: Relearn,
    most: int | None = None,
    seed: int,
    item: str,
    result: list[Curve],
) -> Iterator[Progress]:
    """Relearn on a copy of `model`, which is left as it is; the curve is appended to `result`.

    The attack ends at the second measurement in a row at which the classes are back, or where its loss diverges.

    Args:
        model: Network in evaluation mode.
        classifier: Its last linear layer.
        forget: The forgotten classes.
        own: The attacker's images.
        held_out: Images that accuracy is measured on.
        aim: Forget and retain accuracy that count as back, %.
        fresh: Whether the rows of the forgotten classes begin anew.
        settings: How many steps and how large.
        most: Fewer steps than the settings': a slower attack than one already made is not of interest.
        seed: Of the batches.
        item: What the progress is called.
        result: Takes the curve.
    """
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
            of_forget.append(_accuracy(copied, held_out.forget, held_out.forget_labels))
            of_retain.append(_accuracy(copied, held_out.retain, held_out.retain_labels))
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
    result.append(Curve(row, seed, tuple(steps), tuple(of_forget), tuple(of_retain), reached))


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


def _is_checked(step: int, last: int) -> bool:
    """Every step at first, then ever fewer: the measuring costs more than the steps."""
    return step == last or step <= 8 or (step <= 16 and step % 2 == 0) or step % 4 == 0


@torch.inference_mode()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 128) -> float:
    right = 0
    for start in range(0, len(images), batch):
        right += int((model(images[start : start + batch]).argmax(1) == labels[start : start + batch]).sum())
    return 100 * right / len(images)
