"""Images that a network calls a wanted class: calibration data for networks that store no statistics to match.

ViTs, ConvNeXts and networks without normalisation remember nothing of their training images but what their weights
answer. From procedural starts the pixels, and nothing else, follow the gradient of the wanted class's cross-entropy until
the network is sure, seen at changing shifts and mirrored so that the class is not written into single pixels, with a
weak pull towards smoothness. All classes come equally often, so that every output's features are exercised.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi_cli.data.making import Making
from modhifi_cli.data.pixels import (
    Moving,
    Parts,
    as_bytes,
    begin,
    count_of,
    drawn_shift,
    falling_adam,
    generator_of,
    images_at_once,
    protocol_of,
    refuse_what_is_not_made,
    roughness,
    shifted,
    together_or,
    warn_of_waiting,
)
from modhifi_cli.data.sources import ArrayImages, normalise
from modhifi_cli.errors import NumericsError
from modhifi_cli.records import Preprocess, Progress

VERSION = 2  # of the procedure: another one makes other images from the same settings
# Images of a part where "auto" is said, up to 96 px and above; nothing else depends on it.
_TOGETHER = (64, 16)


@dataclass(frozen=True, kw_only=True)
class ClassInversion(Moving):
    """Settings of one part of a set, each image of which is moved by itself; beside those of `Moving`.

    Attributes:
        nats: Cross-entropy below which an image is not pulled further: 1 nat is a probability of 37 %.
    """

    nats: float


def load(
    *,
    preprocess: Preprocess,
    labelled: bool,
    making: Making,
    labels: str | None = None,
    num_samples: int | str | None = "auto",
    seed: int = 0,
    classes: Sequence[int] | int | None = None,
    cache: str | None = "auto",
    steps: int = 30,
    lr: float = 0.02,
    together: int | str = "auto",
    nats: float = 1.0,
    smoothness: float = 20.0,
    starts: str = "mixture",
    gigabytes: float = 2.0,
) -> ArrayImages:
    """Images from procedural starts that the network calls the wanted classes, each equally often.

    One parameter for each key of the YAML, and for what every one of the kind is given.

    Args:
        preprocess: What the network wants.
        labelled: Whether labels are asked for; they are the network's predictions, made by whoever needs them.
        making: The network, and who listens.
        labels: As of every source; ``"given"`` cannot be.
        num_samples: How many; ``"auto"`` and None are 512, or 128 above 96 px.
        seed: Of everything that is drawn.
        classes: Number of the class that the images shall show, or several, equally often; None for all.
        cache: Where finished parts are kept: ``"auto"``, a folder, or None.
        steps, lr, together, nats, smoothness, starts, gigabytes: As in `ClassInversion`; ``together="auto"`` is 64, or
            16 above 96 px.

    Raises:
        ConfigError: If a setting is out of range, or a class is not one of the network's.
        DataError: If the cache is damaged or cannot be written.
        NumericsError: If the optimisation diverges.
        UnsupportedModelError: If the network is no classifier of one image tensor.
    """
    refuse_what_is_not_made(preprocess, labelled=labelled, labels=labels, source="class_inversion")
    together = together_or(together, preprocess, _TOGETHER)
    how = ClassInversion(
        steps=steps, lr=lr, together=together, nats=nats, smoothness=smoothness, starts=starts, gigabytes=gigabytes
    )
    count = count_of(num_samples, preprocess)
    own = Parts.of("class_inversion", VERSION, how, making, preprocess, classes=classes, seed=seed, cache=cache)
    parts = -(-count // together)
    found = [own.part(number, parts, invert_classes) for number in range(parts)]
    own.tell(f"{count} images that the network calls {len(set(own.wanted))} classes")
    images = np.concatenate([part["images"].numpy() for part in found])[:count]
    sure = torch.cat([part["confidence"] for part in found])[:count]
    right = torch.cat([part["predicted"] == part["wanted"] for part in found])[:count]
    protocol = protocol_of(images, own.identity, how, path="made from the network's own answers", classes=classes) | {
        "predicted_as_wanted": round(float(right.float().mean()), 4),
        "mean_confidence": round(float(sure.mean()), 4),
    }
    return ArrayImages(images, None, preprocess, protocol, prepared=True)


def invert_classes(
    model: nn.Module,
    preprocess: Preprocess,
    how: ClassInversion,
    *,
    wanted: Sequence[int],
    number: int,
    parts: int,
    seed: int,
    making: Making,
) -> dict[str, Tensor]:
    """One part of a set; every image is moved by itself.

    Args:
        model: The network with gradients off for its parameters, evaluation mode, on the device.
        preprocess: What it wants.
        how: Settings.
        wanted: Classes in turn.
        number: Of the part, from 0.
        parts: How many there will be, for progress.
        seed: Of everything that is drawn.
        making: Who listens.

    Returns:
        ``images`` ``[together, height, width, channels]`` uint8; ``wanted``, ``predicted`` ``[together]`` int64;
        ``confidence`` ``[together]`` float32, the probability of the predicted class.

    Raises:
        NumericsError: If the cost is no longer finite, or did not fall at all.
    """
    count, device = how.together, making.device
    part = begin(preprocess, how, wanted=wanted, number=number, seed=seed, device=device)
    size = images_at_once(model, part.normalised(part.pixels[:1]), how.gigabytes)
    chunks = list(zip(part.pixels.split(size), part.aims.split(size), strict=True))
    images, found, before = [], [], 0.0
    began = time.perf_counter()
    for place, (start, aim) in enumerate(chunks):
        # A generator of its own: what one image becomes must not depend on how many fit into memory together.
        generator = generator_of(seed, number)
        chunk, aim = start.contiguous().requires_grad_(True), aim.to(device)
        optimiser, falling = falling_adam([chunk], how)
        for step in range(how.steps):
            if step == 1 and place == number == 0:
                waiting = (time.perf_counter() - began) * how.steps * parts * len(chunks)
                warn_of_waiting(making, waiting, how.together)
            seen = shifted(chunk, drawn_shift(preprocess.size, generator), mirrored=step % 2 == 1)
            costs = F.cross_entropy(model(part.normalised(seen)), aim, reduction="none")
            loss = (costs - how.nats).relu().sum()
            if how.smoothness:
                loss = loss + how.smoothness * len(chunk) * (roughness(seen, 2) + roughness(seen, 3))
            if not bool(torch.isfinite(loss)):
                raise _diverged(number, step, how, "the cost is no longer a finite number")
            before += float(costs.detach().sum()) / count if step == 0 else 0.0
            chunk.grad = torch.autograd.grad(loss, chunk)[0]
            optimiser.step()
            falling.step()
            with torch.no_grad():
                chunk.clamp_(0, 1)
            whole = how.steps * len(chunks)
            done = number * whole + place * how.steps + step + 1
            making.progress(Progress("class inversion", f"part {number + 1} of {parts}", done, parts * whole))
        made = as_bytes(chunk)
        with torch.no_grad():
            found.append(model(normalise(made.numpy(), preprocess).to(device)).cpu())
        images.append(made)
    logits = torch.cat(found)
    after = float(F.cross_entropy(logits, part.aims))
    if not after <= before:
        raise _diverged(number, how.steps, how, f"the cost of the wanted classes rose from {before:.3g} to {after:.3g}")
    sure, predicted = logits.softmax(1).max(1)
    return {"images": torch.cat(images), "wanted": part.aims, "predicted": predicted, "confidence": sure}


def _diverged(number: int, step: int, how: ClassInversion, what: str) -> NumericsError:
    return NumericsError(
        f"data=class_inversion: the optimisation diverged in part {number + 1} at step {step} ({what}); lower data.lr "
        f"(now {how.lr:g}) or data.smoothness (now {how.smoothness:g})."
    )
