"""Images that a network calls a wanted class: calibration data for networks that store no statistics to match.

ViTs, ConvNeXts and networks without normalisation remember nothing of their training images but what their weights
answer. From procedural starts the pixels, and nothing else, follow the gradient of the wanted class's cross-entropy until
the network is sure, seen at changing shifts and mirrored so that the class is not written into single pixels, with a
weak pull towards smoothness. All classes come equally often, so that every output's features are exercised.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi_cli.data.inversion import (
    count_classes,
    drawn_shift,
    images_at_once,
    roughness,
    shifted,
    wanted_classes,
    warn_of_waiting,
)
from modhifi_cli.data.making import Making, kept_or_made
from modhifi_cli.data.procedural import KINDS, draw, made_samples, refuse_given_labels
from modhifi_cli.data.sources import ArrayImages, normalise, sha256_of_samples
from modhifi_cli.errors import ConfigError, NumericsError, is_number, is_whole, nearest
from modhifi_cli.graph.surgery import weights_hash
from modhifi_cli.records import Preprocess, Progress, TextInput

VERSION = 1  # of the procedure: another one makes other images from the same settings
_SMALL = 96  # px: larger images take seconds each
_SAMPLES, _TOGETHER = (512, 128), (64, 16)


@dataclass(frozen=True)
class ClassInversion:
    """Settings of one part of a set.

    Attributes:
        steps: Gradient steps.
        lr: Adam's first step width on the 0..1 scale of pixels; it falls along half a cosine.
        together: Images of one part, which is kept as soon as it is whole; nothing else depends on it.
        nats: Cross-entropy below which an image is not pulled further: 1 nat is a probability of 37 %.
        smoothness: Of the mean squared difference of neighbouring pixels, on the 0..1 scale, against nats.
        starts: Kind of procedural images to begin with.
        gigabytes: Activations that a forward with gradients may keep, 10⁹ bytes.
    """

    steps: int
    lr: float
    together: int
    nats: float
    smoothness: float
    starts: str
    gigabytes: float

    def __post_init__(self) -> None:
        for key in ("steps", "together"):
            value = getattr(self, key)
            if not is_whole(value) or value < 1:
                raise ConfigError(f"data.{key}: expected a whole number from 1, got {value!r}.")
        for key in ("lr", "nats", "smoothness", "gigabytes"):
            value = getattr(self, key)
            above = key in ("lr", "gigabytes")
            if not (is_number(value) and 0 <= value < float("inf")) or above and value == 0:
                raise ConfigError(f"data.{key}: expected a number {'above' if above else 'from'} 0, got {value!r}.")
        if self.starts not in KINDS:
            raise ConfigError(f"data.starts: unknown kind '{self.starts}', {nearest(str(self.starts), KINDS)}")


def load(
    *,
    preprocess: Preprocess,
    labelled: bool,
    making: Making,
    labels: str | None = None,
    num_samples: int | str | None = "auto",
    seed: int = 0,
    classes: Sequence[int] | None = None,
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

    Args:
        preprocess: What the network wants.
        labelled: Whether labels are asked for; they are the network's predictions, made by whoever needs them.
        making: The network, and who listens.
        labels: As of every source; ``"given"`` cannot be.
        num_samples: How many; ``"auto"`` and None are 512, or 128 above 96 px.
        seed: Of everything that is drawn.
        classes: Classes that the images shall show, equally often; None for all.
        cache: Where finished parts are kept: ``"auto"``, a folder, or None.
        steps, lr, together, nats, smoothness, starts, gigabytes: As in `ClassInversion`; ``together="auto"`` is 64, or
            16 above 96 px.

    Raises:
        ConfigError: If a setting is out of range, or a class is not one of the network's.
        DataError: If the cache is damaged or cannot be written.
        NumericsError: If the optimisation diverges.
        UnsupportedModelError: If the network is no classifier of one image tensor.
    """
    refuse_given_labels(labelled=labelled, labels=labels, source="class_inversion")
    if isinstance(preprocess, TextInput):
        raise ConfigError("data=class_inversion makes images, and this network reads text; choose data=generated.")
    large = max(preprocess.size) > _SMALL
    together = _TOGETHER[large] if together == "auto" else together
    how = ClassInversion(steps, lr, together, nats, smoothness, starts, gigabytes)
    count = made_samples(_SAMPLES[large] if num_samples in ("auto", None) else num_samples)
    model = copy.deepcopy(making.model).to(device=making.device, dtype=torch.float32).eval().requires_grad_(False)
    known = count_classes(model, preprocess, making.device, source="class_inversion")
    wanted = wanted_classes(classes, known, together=together, seed=seed)
    identity = {
        "method": "class_inversion",
        "version": VERSION,
        "weights_sha256": weights_hash(making.model),
        "size": list(preprocess.size),
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "seed": seed,
        "classes": wanted,
        **{key: getattr(how, key) for key in ClassInversion.__dataclass_fields__},
    }
    store = making.store(cache, making.name, identity)
    parts = -(-count // together)
    found, anew = [], 0
    for number in range(parts):
        make = partial(
            invert_classes, model, preprocess, how, wanted=wanted, number=number, parts=parts, seed=seed, making=making
        )
        part, new = kept_or_made(store, number, make)
        anew += new
        found.append(part)
    if store.place is not None:
        made = "taken from" if not anew else "made and kept in"
        making.note(f"{count} images that the network calls {len(set(wanted))} classes, {made} {store.place}")
    images = np.concatenate([part["images"].numpy() for part in found])[:count]
    sure = torch.cat([part["confidence"] for part in found])[:count]
    right = torch.cat([part["predicted"] == part["wanted"] for part in found])[:count]
    protocol = {
        "source": "class_inversion",
        "path": "made from the network's own answers",
        "num_samples": count,
        "available": count,
        "seed": seed,
        "sha256": sha256_of_samples(image.tobytes() for image in images),
        "settings": {key: identity[key] for key in ClassInversion.__dataclass_fields__} | {"classes": classes},
        "predicted_as_wanted": round(float(right.float().mean()), 4),
        "mean_confidence": round(float(sure.mean()), 4),
        "weights_sha256": identity["weights_sha256"],
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
    starts = draw(count, preprocess, kind=how.starts, seed=seed, first=number * count)
    at = torch.arange(number * count, (number + 1) * count)
    aims = torch.tensor(wanted)[at % len(wanted)]
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (preprocess.mean, preprocess.std))
    pixels = torch.from_numpy(starts).permute(0, 3, 1, 2).to(device=device, dtype=torch.float32).div(255)
    size = images_at_once(model, (pixels[:1] - mean) / std, how.gigabytes)
    chunks = list(zip(pixels.split(size), aims.split(size), strict=True))
    images, found, before = [], [], 0.0
    began = time.perf_counter()
    for place, (start, aim) in enumerate(chunks):
        # A generator of its own: what one image becomes must not depend on how many fit into memory together.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        chunk, aim = start.contiguous().requires_grad_(True), aim.to(device)
        optimiser = torch.optim.Adam([chunk], lr=how.lr, betas=(0.9, 0.99))
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, how.steps, eta_min=how.lr / 20)
        for step in range(how.steps):
            if step == 1 and place == number == 0:
                waiting = (time.perf_counter() - began) * how.steps * parts * len(chunks)
                warn_of_waiting(making, waiting, how.together)
            seen = shifted(chunk, drawn_shift(preprocess.size, generator), mirrored=step % 2 == 1)
            costs = F.cross_entropy(model((seen - mean) / std), aim, reduction="none")
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
        made = chunk.detach().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()
        with torch.no_grad():
            found.append(model(normalise(made.numpy(), preprocess).to(device)).cpu())
        images.append(made)
    logits = torch.cat(found)
    after = float(F.cross_entropy(logits, aims))
    if not after <= before:
        raise _diverged(number, how.steps, how, f"the cost of the wanted classes rose from {before:.3g} to {after:.3g}")
    sure, predicted = logits.softmax(1).max(1)
    return {"images": torch.cat(images), "wanted": aims, "predicted": predicted, "confidence": sure}


def _diverged(number: int, step: int, how: ClassInversion, what: str) -> NumericsError:
    return NumericsError(
        f"data=class_inversion: the optimisation diverged in part {number + 1} at step {step} ({what}); lower data.lr "
        f"(now {how.lr:g}) or data.smoothness (now {how.smoothness:g})."
    )
