"""Images made from a network's own BatchNorm statistics: pixels move until every layer sees what it saw in training.

Every BatchNorm remembers mean and variance of each of its channels over the training images. From procedural starts the
pixels, and nothing else, follow the gradient of the distance between those and the statistics of the images at hand.
Where classes matter a weak pull makes the network call every image a wanted class, all classes equally often (Yin et
al., "Dreaming to distill", arXiv:1912.08795, without its adversary). Distances are taken over a whole part of the set,
however many images fit into one forward: the sums of the others stand in for them.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi_cli.data.making import Making
from modhifi_cli.data.pixels import (
    SUITS,
    Moved,
    Moving,
    Parts,
    as_bytes,
    begin,
    count_of,
    drawn_shift,
    falling_adam,
    generator_of,
    images_at_once,
    outside,
    protocol_of,
    refuse_what_is_not_made,
    roughness,
    shifted,
    together_or,
    warn_of_waiting,
)
from modhifi_cli.data.sources import ArrayImages, normalise
from modhifi_cli.errors import ConfigError, DataError, NumericsError, UnsupportedModelError
from modhifi_cli.records import Preprocess, Progress

VERSION = 3  # of the procedure: another one makes other images from the same settings
# Images matched together where "auto" is said, up to 96 px and above: a part is what an interruption can cost.
_TOGETHER = (256, 64)
_CLASS_WEIGHT = 0.01  # where classes matter
_CONFIDENT = 0.1  # nats: an image that its class costs less is not pulled further
_DIVERGED = 2.0  # times the distance it began with
_IN_RANGE = 10.0  # of the pull back into 0 … 1
_MOST_PARTS = 4  # times the parts that would do if every image passed the filter


@dataclass(frozen=True, kw_only=True)
class Inversion(Moving):
    """Settings of one part of a set, whose joint statistics are matched; beside those of `Moving`.

    Attributes:
        class_weight: Of the pull towards the wanted class, in nats against the distance of the statistics.
    """

    class_weight: float

    least_together: ClassVar[int] = 2


def load(
    *,
    preprocess: Preprocess,
    labelled: bool,
    making: Making,
    labels: str | None = None,
    num_samples: int | str | None = "auto",
    seed: int = 0,
    classes: Sequence[int] | int | None = None,
    confidence: float = 0.0,
    cache: str | None = "auto",
    steps: int = 50,
    lr: float = 0.02,
    together: int | str = "auto",
    class_weight: float | str = "auto",
    smoothness: float = 0.0,
    starts: str = "mixture",
    gigabytes: float = 2.0,
) -> ArrayImages:
    """Images whose BatchNorm statistics match the stored ones and, where classes matter, that the network calls these.

    One parameter for each key of the YAML, and for what every one of the kind is given.

    Args:
        preprocess: What the network wants.
        labelled: Whether labels are asked for; they are the network's predictions, made by whoever needs them.
        making: The network, and who listens.
        labels: As of every source; ``"given"`` cannot be.
        num_samples: How many; ``"auto"`` and None are 512, or 128 above 96 px.
        seed: Of everything that is drawn.
        classes: Number of the class that the images shall show, or several, equally often; None for all.
        confidence: Only images that the network calls their class with at least this probability are taken, 0 … 1.
        cache: Where finished parts are kept: ``"auto"``, a folder, or None.
        steps, lr, together, class_weight, smoothness, starts, gigabytes: As in `Inversion`; ``together="auto"`` is 256,
            or 64 above 96 px; ``class_weight="auto"`` is 0.01 where labels, classes or a confidence are asked for and 0
            elsewhere, since what makes an image look like a class makes it less like a photograph.

    Raises:
        ConfigError: If a setting is out of range, or a class is not one of the network's.
        DataError: If too few images pass the filter, or the cache is damaged or cannot be written.
        NumericsError: If the optimisation diverges.
        UnsupportedModelError: If the network has no BatchNorm statistics, or takes anything but one image tensor.
    """
    refuse_what_is_not_made(preprocess, labelled=labelled, labels=labels, source="inversion")
    asked = labelled or classes is not None or confidence != 0
    weight = _CLASS_WEIGHT * asked if class_weight == "auto" else class_weight
    inversion = Inversion(
        steps=steps,
        lr=lr,
        together=together_or(together, preprocess, _TOGETHER),
        class_weight=weight,
        smoothness=smoothness,
        starts=starts,
        gigabytes=gigabytes,
    )
    count = count_of(num_samples, preprocess)
    if not isinstance(confidence, (int, float)) or isinstance(confidence, bool) or not 0 <= confidence < 1:
        raise ConfigError(f"data.confidence: expected a probability with 0 <= confidence < 1, got {confidence!r}.")
    require_statistics(making.model)
    own = Parts.of("inversion", VERSION, inversion, making, preprocess, classes=classes, seed=seed, cache=cache)
    own.model.to(memory_format=torch.channels_last)  # a quarter faster on processors
    found, facts = _made(own, inversion, count, confidence)
    own.tell(f"{count} images inverted from BatchNorm statistics")
    images = np.concatenate(found)[:count]
    protocol = protocol_of(
        images, own.identity, inversion, path="made from the network's BatchNorm statistics",
        classes=own.wanted, confidence=confidence,
    ) | {
        "distance_before": round(float(np.mean([fact["before"] for fact in facts])), 5),
        "distance_after": round(float(np.mean([fact["after"] for fact in facts])), 5),
    }  # fmt: skip
    if inversion.class_weight:
        protocol["predicted_as_wanted"] = round(float(np.mean([fact["as_wanted"] for fact in facts])), 4)
    return ArrayImages(images, None, preprocess, protocol, prepared=True)


def _made(
    own: Parts, inversion: Inversion, count: int, confidence: float
) -> tuple[list[np.ndarray], list[dict[str, float]]]:
    """Parts until there are enough images that the network is sure of, and what is known of each part."""
    found: list[np.ndarray] = []
    facts: list[dict[str, float]] = []
    have, number, parts = 0, 0, -(-count // inversion.together)
    while have < count:
        if number == _MOST_PARTS * parts:
            raise DataError(
                f"data.confidence={confidence:g}: only {have} of {number * inversion.together} images made are called "
                f"their class with that probability, {count} were asked for; lower it, or raise data.class_weight."
            )
        part = own.part(number, max(parts, number + 1), invert)
        sure = (part["predicted"] == part["wanted"]) & (part["confidence"] >= confidence)
        images = part["images"][sure] if confidence > 0 else part["images"]
        found.append(images.numpy())
        have += len(images)
        before, after = part["distance"].tolist()
        facts.append(
            {"before": before, "after": after, "as_wanted": float((part["predicted"] == part["wanted"]).float().mean())}
        )
        number += 1
    return found, facts


def batchnorms(model: nn.Module) -> dict[str, nn.Module]:
    """BatchNorms of a network that store a mean and a variance, by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: m for name, m in model.named_modules() if isinstance(m, kind) and m.running_mean is not None}


def statistics_of(model: nn.Module) -> list[nn.Module]:
    """BatchNorms of a network that remember statistics which say something; empty where none does.

    Untrained networks and those whose BatchNorm was folded into the weights have mean 0 and one variance everywhere.
    """
    norms = list(batchnorms(model).values())
    told = any(
        bool(norm.running_mean.any()) or float(norm.running_var.amax() - norm.running_var.amin()) > 0 for norm in norms
    )
    return norms if told else []


def require_statistics(model: nn.Module) -> None:
    """Refuse a network that remembers nothing of its training images.

    Raises:
        UnsupportedModelError: With what is missing and what suits instead.
    """
    if statistics_of(model):
        return
    if not batchnorms(model):
        raise UnsupportedModelError(
            f"data=inversion matches the statistics of BatchNorm layers, and this network has none; {SUITS}."
        )
    raise UnsupportedModelError(
        f"data=inversion matches stored BatchNorm statistics, and those of this network say nothing (mean 0 and one "
        f"variance everywhere: folded or untrained); {SUITS}."
    )


def invert(
    model: nn.Module,
    preprocess: Preprocess,
    inversion: Inversion,
    *,
    wanted: Sequence[int],
    number: int,
    parts: int,
    seed: int,
    making: Making,
) -> dict[str, Tensor]:
    """One part of a set: `together` images whose statistics are matched as one.

    Args:
        model: The network with gradients off for its parameters, evaluation mode, on the device.
        preprocess: What it wants.
        inversion: How.
        wanted: Classes in turn.
        number: Of the part, from 0.
        parts: How many there will be, for progress.
        seed: Of everything that is drawn.
        making: Who listens.

    Returns:
        ``images`` ``[together, height, width, channels]`` uint8; ``wanted``, ``predicted`` ``[together]`` int64;
        ``confidence`` ``[together]`` float32, the probability of the predicted class; ``distance`` ``[2]`` float64
        before and after, mean over BatchNorms of the mean squared deviation of the channel means in units of their
        deviations plus a quarter of the mean squared logarithm of the variance ratios.

    Raises:
        NumericsError: If the optimisation diverges.
    """
    count, device = inversion.together, making.device
    part = begin(preprocess, inversion, wanted=wanted, number=number, seed=seed, device=device)
    generator = generator_of(seed, number)
    with _Listening(model) as heard:
        size = images_at_once(model, part.normalised(part.pixels[:1]), inversion.gigabytes)
        heard.take()
        chunks = [Moved(chunk) for chunk in part.pixels.split(size)]
        aims = [aim.to(device) for aim in part.aims.split(size)]
        _, sums = _answers(model, heard, (part.normalised(chunk.images()) for chunk in chunks))
        before = float(heard.distance(_total(sums)))
        optimiser, falling = falling_adam([group for chunk in chunks for group in chunk.groups(inversion.lr)], inversion)
        began = time.perf_counter()
        for step in range(inversion.steps):
            if step == 1 and number == 0:
                warn_of_waiting(making, (time.perf_counter() - began) * inversion.steps * parts, inversion.together)
            shift = drawn_shift(preprocess.size, generator)
            for place, (chunk, aim) in enumerate(zip(chunks, aims, strict=True)):
                images = chunk.images()
                seen = shifted(images, shift, mirrored=step % 2 == 1)
                logits = model(part.normalised(seen))
                distance = heard.beside_(sums, place)
                loss = _loss(distance, logits, aim, images, seen, len(chunk) / count, inversion)
                if not bool(torch.isfinite(loss)):
                    raise _diverged(number, step, inversion, "the distance is no longer a finite number")
                for change, gradient in zip(chunk.changes, torch.autograd.grad(loss, chunk.changes), strict=True):
                    change.grad = gradient
            optimiser.step()
            falling.step()
            done, total = number * inversion.steps + step + 1, parts * inversion.steps
            making.progress(Progress("inversion", f"part {number + 1} of {parts}", done, total))
        images = as_bytes(torch.cat([chunk.images().detach().clamp(0, 1) for chunk in chunks]))
        seen_again = (normalise(made.numpy(), preprocess).to(device) for made in images.split(size))
        probabilities, sums = _answers(model, heard, seen_again)
        after = float(heard.distance(_total(sums)))
    if not after <= _DIVERGED * before:
        raise _diverged(
            number, inversion.steps, inversion, f"the distance of the statistics rose from {before:.3g} to {after:.3g}"
        )
    sure, predicted = torch.cat(probabilities).max(1)
    return {
        "images": images,
        "wanted": part.aims,
        "predicted": predicted,
        "confidence": sure,
        "distance": torch.tensor([before, after], dtype=torch.float64),
    }


def _answers(
    model: nn.Module, heard: "_Listening", batches: Iterable[Tensor]
) -> tuple[list[Tensor], list[list["_Sums"]]]:
    """Probabilities of normalised images, batch by batch on the CPU, and what the BatchNorms heard of them."""
    probabilities, sums = [], []
    with torch.no_grad():
        for batch in batches:
            probabilities.append(model(batch).softmax(1).cpu())
            sums.append(heard.take())
    return probabilities, sums


def _loss(
    distance: Tensor, logits: Tensor, aim: Tensor, images: Tensor, seen: Tensor, share: float, inversion: Inversion
) -> Tensor:
    """What is lowered for one chunk, a scalar: the set's distance, and what the chunk's share of the images costs."""
    costs = F.cross_entropy(logits, aim, reduction="none")
    loss = distance + share * inversion.class_weight * (costs - _CONFIDENT).relu().mean()
    loss = loss + share * _IN_RANGE * outside(images)
    if inversion.smoothness:
        loss = loss + share * inversion.smoothness * (roughness(seen, 2) + roughness(seen, 3))
    return loss


def _diverged(number: int, step: int, inversion: Inversion, how: str) -> NumericsError:
    or_less_pull = f" or data.class_weight (now {inversion.class_weight:g})" if inversion.class_weight else ""
    return NumericsError(
        f"data=inversion: the optimisation diverged in part {number + 1} at step {step} ({how}); lower data.lr (now "
        f"{inversion.lr:g}){or_less_pull}."
    )


@dataclass(frozen=True)
class _Sums:
    """Sums of one BatchNorm's input about its stored mean: rows, Σ(x − m), Σ(x − m)², each ``[channels]``."""

    rows: int
    first: Tensor
    second: Tensor

    def plus(self, other: "_Sums | None") -> "_Sums":
        return (
            self
            if other is None
            else _Sums(self.rows + other.rows, self.first + other.first, self.second + other.second)
        )

    def detached(self) -> "_Sums":
        return _Sums(self.rows, self.first.detach(), self.second.detach())


def _total(sums: Sequence[Sequence[_Sums]]) -> list[_Sums] | None:
    if not sums:
        return None
    total = list(sums[0])
    for more in sums[1:]:
        total = [one.plus(other) for one, other in zip(total, more, strict=True)]
    return total


class _Listening:
    """Hooks that take the sums of every BatchNorm's input, in the order in which they run; gone after the block."""

    def __init__(self, model: nn.Module) -> None:
        self._norms = statistics_of(model)
        self._heard: list[_Sums] = []
        self._order: list[nn.Module] = []

    def __enter__(self) -> "_Listening":
        self._handles = [norm.register_forward_pre_hook(self._hear) for norm in self._norms]
        return self

    def __exit__(self, *raised: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hear(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        maps = inputs[0].flatten(2) if inputs[0].ndim > 2 else inputs[0][..., None]
        # About the stored mean: plain sums of squares lose digits in float32 where the mean is large.
        about = maps - norm.running_mean[:, None]
        self._heard.append(_Sums(maps.shape[0] * maps.shape[2], about.sum((0, 2)), about.square().sum((0, 2))))
        self._order.append(norm)

    def take(self) -> list[_Sums]:
        """What was heard since the last time."""
        heard, self._heard = self._heard, []
        self._ran, self._order = self._order, []
        return heard

    def beside_(self, sums: list[list[_Sums]], place: int) -> Tensor:
        """The distance of all chunks' sums, one chunk's as they were just heard; they then stand at its place."""
        own = self.take()
        others = _total(sums[:place] + sums[place + 1 :])
        distance = self.distance(
            [mine.plus(rest) for mine, rest in zip(own, others or [None] * len(own), strict=True)]
        )
        sums[place] = [mine.detached() for mine in own]
        return distance

    def distance(self, sums: Sequence[_Sums]) -> Tensor:
        """Of the statistics that sums stand for from the stored ones, mean over BatchNorms; a scalar."""
        return torch.stack(
            [distance(norm, one.rows, one.first, one.second) for norm, one in zip(self._ran, sums, strict=True)]
        ).mean()


def distance(norm: nn.Module, rows: int, first: Tensor, second: Tensor) -> Tensor:
    """How far a BatchNorm's input is from what it remembers; a scalar, 0 where mean and variance are the same.

    Args:
        norm: The BatchNorm.
        rows: Number of values of a channel.
        first: Σ(x − m) of every channel, m the stored mean, ``[channels]``.
        second: Σ(x − m)², ``[channels]``.
    """
    off = first / rows
    variance = (second / rows - off.square()).clamp_min(0)
    stored = norm.running_var + norm.eps
    return (off.square() / stored).mean() + 0.25 * ((variance + norm.eps) / stored).log().square().mean()
