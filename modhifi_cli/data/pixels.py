"""Pixels that follow a gradient: what every source shares that makes its images by moving pixels, and nothing else.

The sources differ in what they make the network see or say (`inversion`, `class_inversion`). Settings and their checks,
what a set is kept under, starts, how images are seen in a step and what becomes of them are the same.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi_cli.data.making import Making, Store, kept_or_made
from modhifi_cli.data.procedural import KINDS, draw, made_samples, refuse_given_labels
from modhifi_cli.data.sources import sha256_of_samples
from modhifi_cli.errors import (
    ConfigError,
    UnsupportedModelError,
    first_line,
    is_number,
    is_whole,
    nearest,
    whole_numbers,
)
from modhifi_cli.graph.surgery import weights_hash
from modhifi_cli.records import Preprocess, TextInput

SUITS = "data=procedural needs no statistics and suits every network that reads images"
_SMALL = 96  # px: larger images take seconds or minutes each, so fewer are made, in smaller parts
_SAMPLES = (512, 128)  # what "auto" makes up to 96 px, and above
_LONG = 120  # seconds that are worth a word beforehand
_FINE = 0.3  # step width of single pixels, relative to that of larger squares
_LEAST_SQUARES = 4  # along the shorter side, on the coarsest scale
_SHIFT = 16  # images are seen shifted by up to 1/16 of their side


@dataclass(frozen=True, kw_only=True)
class Moving:
    """Settings that every source has whose pixels follow a gradient.

    Attributes:
        steps: Gradient steps.
        lr: Adam's first step width on the 0..1 scale of pixels; it falls along half a cosine.
        together: Images of one part, which is kept as soon as it is whole.
        smoothness: Of the mean squared difference of neighbouring pixels, on the 0..1 scale.
        starts: Kind of procedural images to begin with.
        gigabytes: Activations that a forward with gradients may keep, 10⁹ bytes.
    """

    steps: int
    lr: float
    together: int
    smoothness: float
    starts: str
    gigabytes: float

    least_together: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for key, low in (("steps", 1), ("together", self.least_together)):
            value = getattr(self, key)
            if not is_whole(value) or value < low:
                raise ConfigError(f"data.{key}: expected a whole number from {low}, got {value!r}.")
        if self.starts not in KINDS:
            raise ConfigError(f"data.starts: unknown kind '{self.starts}', {nearest(str(self.starts), KINDS)}")
        for key, value in asdict(self).items():
            if key in ("steps", "together", "starts"):
                continue
            above = key in ("lr", "gigabytes")
            fits = is_number(value) and 0 <= value < float("inf")
            if not fits or above and value == 0:
                raise ConfigError(f"data.{key}: expected a number {'above' if above else 'from'} 0, got {value!r}.")


def together_or(together: int | str, preprocess: Preprocess, auto: tuple[int, int]) -> int:
    """Images of a part; ``"auto"`` is one of `auto`, up to 96 px and above."""
    return auto[_is_large(preprocess)] if together == "auto" else together


def count_of(num_samples: int | str | None, preprocess: Preprocess) -> int:
    """How many images to make; ``"auto"`` and None are 512, or 128 above 96 px.

    Raises:
        ConfigError: If it is no whole number above 0.
    """
    return made_samples(num_samples, auto=_SAMPLES[_is_large(preprocess)])


def _is_large(preprocess: Preprocess) -> bool:
    return max(preprocess.size) > _SMALL


def refuse_what_is_not_made(preprocess: Any, *, labelled: bool, labels: str | None, source: str) -> None:
    """Refuse text, and labels of the images' own.

    Raises:
        ConfigError: If the network reads text, or `labels` is unknown.
        DataError: If labels of the source's own are asked for.
    """
    refuse_given_labels(labelled=labelled, labels=labels, source=source)
    if isinstance(preprocess, TextInput):
        raise ConfigError(f"data={source} makes images, and this network reads text; choose data=generated.")


def frozen_copy(making: Making) -> nn.Module:
    """The network on its device, float32, evaluation mode, without gradients for its parameters."""
    model = copy.deepcopy(making.model).to(device=making.device, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@dataclass
class Parts:
    """The parts of one set, from the cache or made: what both ways to invert a network share.

    Attributes:
        model: The network with gradients off for its parameters, on the device.
        preprocess: What it wants.
        how: Settings of a part.
        wanted: Classes in turn.
        seed: Of everything that is drawn.
        making: Who listens.
        identity: Everything that decides what the parts look like.
        store: Where they are kept.
        made: How many had to be made.
    """

    model: nn.Module
    preprocess: Preprocess
    how: Moving
    wanted: list[int]
    seed: int
    making: Making
    identity: dict[str, Any]
    store: Store
    made: int = 0

    @classmethod
    def of(
        cls, source: str, version: int, how: Moving, making: Making, preprocess: Preprocess, *,
        classes: Sequence[int] | int | None, seed: int, cache: str | None,
    ) -> "Parts":  # fmt: skip
        """Look at the network and find the set's place.

        Args:
            source: Name of the data source.
            version: Of its procedure.
            how: Settings of a part.
            making: The network, and who listens.
            preprocess: What the network wants.
            classes: That the images shall show, one or several; None for all.
            seed: Of everything that is drawn.
            cache: Where parts are kept.

        Raises:
            ConfigError: If a class is not one of the network's.
            DataError: If the cache cannot be opened.
            UnsupportedModelError: If the network is no classifier of one image tensor.
        """
        model = frozen_copy(making)
        known = count_classes(model, preprocess, making.device, source=source)
        wanted = wanted_classes(classes, known, together=how.together, seed=seed)
        identity = identity_of(source, version, making, preprocess, how, wanted=wanted, seed=seed)
        return cls(model, preprocess, how, wanted, seed, making, identity, making.store(cache, making.name, identity))

    def part(self, number: int, parts: int, make: Callable[..., Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """One part: `make` is called as `inversion.invert` where it is not kept already; `parts` is for progress."""
        own = partial(
            make, self.model, self.preprocess, self.how, wanted=self.wanted, number=number, parts=parts,
            seed=self.seed, making=self.making,
        )  # fmt: skip
        found, new = kept_or_made(self.store, number, own)
        self.made += new
        return found

    def tell(self, what: str) -> None:
        """Say where the set lies, if it is kept: `what` was taken from there, or made and kept."""
        if self.store.place is not None:
            self.making.note(f"{what}, {'made and kept in' if self.made else 'taken from'} {self.store.place}")


def identity_of(
    method: str, version: int, making: Making, preprocess: Preprocess, how: Moving, *, wanted: Sequence[int], seed: int
) -> dict[str, Any]:
    """Everything that decides what a set's parts look like: what the cache keeps them under."""
    return {
        "method": method,
        "version": version,
        "weights_sha256": weights_hash(making.model),
        "size": list(preprocess.size),
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "seed": seed,
        "classes": list(wanted),
        **asdict(how),
    }


def protocol_of(images: np.ndarray, identity: Mapping[str, Any], how: Moving, *, path: str, **settings: Any) -> dict:
    """What a source of made images says of itself."""
    return {
        "source": identity["method"],
        "path": path,
        "num_samples": len(images),
        "available": len(images),
        "seed": identity["seed"],
        "sha256": sha256_of_samples(image.tobytes() for image in images),
        "settings": asdict(how) | settings,
        "weights_sha256": identity["weights_sha256"],
    }


@dataclass(frozen=True)
class Part:
    """What one part of a set begins with.

    Attributes:
        pixels: ``[images, channels, height, width]`` float32 in 0 … 1, on the device.
        aims: Wanted class of every image, ``[images]`` int64, on the CPU.
        mean, std: Of the network's preprocessing, ``[1, channels, 1, 1]``, on the device.
    """

    pixels: Tensor
    aims: Tensor
    mean: Tensor
    std: Tensor

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels as the network takes them."""
        return (pixels - self.mean) / self.std


def begin(
    preprocess: Preprocess, how: Moving, *, wanted: Sequence[int], number: int, seed: int, device: torch.device
) -> Part:
    """Procedural starts and wanted classes of part `number`, which depend on nothing but it and the seed."""
    count = how.together
    starts = draw(count, preprocess, kind=how.starts, seed=seed, first=number * count)
    at = torch.arange(number * count, (number + 1) * count)
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (preprocess.mean, preprocess.std))
    pixels = torch.from_numpy(starts).permute(0, 3, 1, 2).to(device=device, dtype=torch.float32).div(255)
    return Part(pixels, torch.tensor(wanted)[at % len(wanted)], mean, std)


def generator_of(seed: int, number: int) -> torch.Generator:
    """Of the shifts of a part."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def falling_adam(
    pixels: Sequence[Tensor] | Sequence[dict[str, Any]], how: Moving
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam over pixels (or groups of `Moved`), and the schedule of its step widths."""
    optimiser = torch.optim.Adam(pixels, lr=how.lr, betas=(0.9, 0.99))
    return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, how.steps, eta_min=how.lr / 20)


class Moved:
    """Images as starts plus changes on several scales, the gradient of each of which is followed.

    Adam moves every number by about its step width, whatever its gradient: pixels that move alone turn rough long before
    a larger structure has moved. Changes of whole squares of pixels move it in as few steps, and fine ones get a
    smaller width.

    Args:
        start: ``[images, channels, height, width]`` in 0 … 1.
    """

    def __init__(self, start: Tensor) -> None:
        self._start = start.contiguous()
        images, channels, *sides = start.shape
        scales = [2**power for power in range(16) if 2**power == 1 or 2**power * _LEAST_SQUARES <= min(sides)]
        shapes = [(images, channels, *(-(-side // scale) for side in sides)) for scale in scales]
        self.changes = [start.new_zeros(shape).requires_grad_(True) for shape in shapes]

    def __len__(self) -> int:
        return len(self._start)

    def images(self) -> Tensor:
        """As they are now, with gradients towards the changes."""
        sides = tuple(self._start.shape[2:])
        coarse = (F.interpolate(one, sides, mode="bilinear", align_corners=False) for one in self.changes[1:])
        return sum(coarse, self._start + self.changes[0])

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """The changes for an optimiser, each scale with its step width."""
        fine = _FINE if len(self.changes) > 2 else 1.0  # images of a few pixels have no coarse structure to speak of
        return [{"params": [one], "lr": lr * (1.0 if at else fine)} for at, one in enumerate(self.changes)]


def as_bytes(pixels: Tensor) -> Tensor:
    """Pixels ``[images, channels, height, width]`` in 0 … 1 as ``[images, height, width, channels]`` uint8."""
    return pixels.detach().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def warn_of_waiting(making: Making, seconds: float, together: int) -> None:
    """Say beforehand what takes minutes, and what would not."""
    if seconds > _LONG:
        making.note(
            f"inverting will take about {seconds / 60:.0f} minutes here; it can be interrupted, parts of {together} images "
            "are kept once they are whole; data=procedural takes seconds"
        )


def drawn_shift(size: Sequence[int], generator: torch.Generator) -> list[int]:
    """Pixels down and right that images shall be seen shifted by, up to 1/16 of their sides."""
    return [int(torch.randint(-(side // _SHIFT), side // _SHIFT + 1, (1,), generator=generator)) for side in size]


def shifted(images: Tensor, shift: Sequence[int], *, mirrored: bool) -> Tensor:
    """Images as a network shall see them in one step, ``[batch, channels, height, width]``, what leaves comes back."""
    seen = torch.roll(images, tuple(shift), (2, 3))
    return seen.flip(3) if mirrored else seen


def outside(images: Tensor) -> Tensor:
    """Mean square of what is below 0 or above 1, a scalar: only clipped, images turn black and white in large areas."""
    return (images - images.clamp(0, 1)).square().mean()


def roughness(images: Tensor, axis: int) -> Tensor:
    """Mean squared difference of neighbouring pixels along an axis; a scalar."""
    return images.diff(dim=axis).square().mean()


def count_classes(model: nn.Module, preprocess: Preprocess, device: torch.device, *, source: str) -> int:
    """Number of logits of a network that takes one image tensor.

    Raises:
        UnsupportedModelError: If it takes anything else or returns anything but ``[images, classes]``.
    """
    example = torch.zeros((2, len(preprocess.mean), *preprocess.size), device=device)
    try:
        with torch.no_grad():
            logits = model(example)
    except Exception as error:  # networks fail in their own ways on inputs they were not made for
        detail = first_line(error)[:150]
        raise UnsupportedModelError(
            f"data={source} makes one image tensor of {tuple(example.shape[1:])} for a forward, and this network does "
            f"not take that ({detail}); give a network with a single image input, or set model.preprocess.size."
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModelError(
            f"data={source} balances classes, which needs logits of shape [images, classes], got {got}; {SUITS}."
        )
    return logits.shape[1]


def wanted_classes(classes: Sequence[int] | int | None, known: int, *, together: int, seed: int) -> list[int]:
    """The classes that images shall show, in turn.

    Neighbouring classes of large sets are alike (the first 400 of ImageNet are animals), so a part that cannot hold them
    all draws its own.

    Raises:
        ConfigError: If `classes` is no class number below `known` and no list of such.
    """
    if classes is None:
        if known <= together:
            return list(range(known))
        return torch.randperm(known, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = whole_numbers(classes)
    if not chosen:
        raise ConfigError(f"data.classes: expected a list of class numbers such as [3,5], or one number, got {classes!r}.")
    wrong = [one for one in chosen if not 0 <= one < known]
    if wrong:
        raise ConfigError(
            f"data.classes: the network has {known} logits, so classes are 0 to {known - 1}; got {wrong[0]}."
        )
    return list(dict.fromkeys(chosen))


def images_at_once(model: nn.Module, image: Tensor, gigabytes: float) -> int:
    """How many images a forward with gradients may hold: what its modules put out, twice, is what autograd keeps."""
    values = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal values
        values += output.numel() if isinstance(output, Tensor) else 0

    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [leaf.register_forward_hook(count) for leaf in leaves]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return max(1, int(gigabytes * 1e9 / max(8 * values, 1)))
