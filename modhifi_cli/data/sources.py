"""Images as the network wants them: pixels in memory or files decoded on the way, behind one `ImageSource` interface.

Pixels are kept as ``[images, height, width, channels]`` uint8 (or float32 on the 0..1 scale, where that is what the
user has) and become float32 ``[batch, channels, height, width]`` only batch by batch.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from modhifi_cli.errors import ConfigError, DataError, is_whole, nearest
from modhifi_cli.records import Preprocess

_ORIENTATION = 0x0112  # EXIF's tag
_DECODERS = 4  # Threads; PIL lets go of the interpreter lock while it decodes.


# ModHiFi, arXiv:2511.19566: 2 % of 100,000 synthetic images.
PAPER_SAMPLES = 2000


@dataclass(frozen=True)
class ArrayImages:
    """Images held in memory; an `ImageSource`.

    Attributes:
        images: ``[images, height, width, channels]``, uint8 in 0..255 or float32 in 0..1; channels 1 or 3.
        labels: ``[images]`` int64, or None.
        preprocess: What the model wants.
        protocol: As `ImageSource`.
        prepared: Whether `images` are already resized and cropped.
        classes: Number of classes that the labels count, or None where the data do not say.
    """

    images: np.ndarray
    labels: np.ndarray | None
    preprocess: Preprocess
    protocol: Mapping[str, Any]
    prepared: bool = False
    classes: int | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """As `ImageSource.batches`."""
        for start in range(0, len(self.images), batch_size):
            pixels = self.images[start : start + batch_size]
            if not self.prepared:
                pixels = prepare_pixels(pixels, self.preprocess)
            labels = None if self.labels is None else torch.from_numpy(self.labels[start : start + batch_size].copy())
            yield normalise(pixels, self.preprocess), labels


@dataclass(frozen=True)
class FileImages:
    """Image files decoded again on every walk, for sets that do not fit in memory; an `ImageSource`.

    Attributes:
        root: Folder that the files lie under.
        files: Names relative to `root`.
        labels: ``[files]`` int64, or None.
        preprocess: What the model wants.
        protocol: As `ImageSource`.
        classes: Number of classes that the labels count, or None where the data do not say.
    """

    root: Path
    files: Sequence[str]
    labels: np.ndarray | None
    preprocess: Preprocess
    protocol: Mapping[str, Any]
    classes: int | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """As `ImageSource.batches`; raises DataError naming the first image that cannot be decoded."""
        with ThreadPoolExecutor(_DECODERS) as pool:
            for start in range(0, len(self.files), batch_size):
                chosen = self.files[start : start + batch_size]
                pixels = list(pool.map(lambda name: decode(self.root / name, self.preprocess), chosen))
                labels = None
                if self.labels is not None:
                    labels = torch.from_numpy(self.labels[start : start + batch_size].copy())
                yield normalise(np.stack(pixels), self.preprocess), labels


LABELS = ("auto", "given", "model")


def settings_group(*, labelled: bool, labels: str | None = None) -> str:
    """The settings that a source was asked for by, for messages; only calibration data say where labels come from."""
    return "evaluation_data" if labelled and labels is None else "data"


def labels_to_read(*, labelled: bool, labels: str | None) -> str:
    """Whether a source opens its labels: ``"never"``, ``"optional"`` (if there are any) or ``"required"``.

    Args:
        labelled: Whether whoever asks for the images needs labels at all.
        labels: Where the labels of calibration images come from: ``"auto"`` (the source, or else the model),
            ``"given"`` (the source) or ``"model"``. None for evaluation images, which need their own.

    Raises:
        ConfigError: If `labels` is none of these.
    """
    if labels is not None and labels not in LABELS:
        raise ConfigError(f"data.labels: expected auto, given or model, got {labels!r}; {nearest(str(labels), LABELS)}")
    if not labelled or labels == "model":
        return "never"
    return "optional" if labels == "auto" else "required"


def samples_wanted(available: int, num_samples: int | str | None) -> int | None:
    """What ``num_samples="auto"`` means here: 2,000 as in the paper, or all (None) where there are no more than that.

    Args:
        available: How many samples there are.
        num_samples: A number or None, which are returned as they are, or ``"auto"``.
    """
    if num_samples != "auto":
        return num_samples
    return PAPER_SAMPLES if available > PAPER_SAMPLES else None


def choose(available: int, num_samples: int | None, *, seed: int, place: str) -> np.ndarray:
    """Which samples to take: a seeded draw without replacement, or all of them in their own order.

    Args:
        available: How many there are.
        num_samples: How many to draw; None takes all.
        seed: Of the draw. A smaller draw with the same seed is the beginning of a larger one.
        place: The data's name for messages.

    Returns:
        Indices ``[num_samples]`` int64 in the order of the draw.

    Raises:
        ConfigError: If `num_samples` is not a whole number above 0.
        DataError: If fewer are available.
    """
    if num_samples is None:
        return np.arange(available, dtype=np.int64)
    if not is_whole(num_samples) or num_samples < 1:
        raise ConfigError(
            f"num_samples: expected a whole number above 0, auto, or null for all images, got {num_samples!r}."
        )
    if num_samples > available:
        raise DataError(
            f"{place}: num_samples={num_samples} asked for, but there are {available} images; "
            f"set num_samples to {available} or less, or to auto or null for all."
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(available, generator=generator)[:num_samples].numpy()


def decode(file: Path, preprocess: Preprocess) -> np.ndarray:
    """One image file as pixels of the network's input size; `decode_turned` without its second answer."""
    return decode_turned(file, preprocess)[0]


def decode_turned(file: Path, preprocess: Preprocess) -> tuple[np.ndarray, bool]:
    """One image file as pixels of the network's input size, and whether it had to be turned.

    A camera's orientation (EXIF) is applied, as browsers do. Pixels of 16 bits are scaled to 8; floating ones are taken
    where they lie in 0..1, and everything whose scale is not known is refused instead of being cut off.

    Args:
        file: Any format that Pillow reads.
        preprocess: What the model wants; one channel in `mean` means grey.

    Returns:
        ``[height, width, channels]`` uint8, and whether the camera's orientation was another than the picture's.

    Raises:
        DataError: Naming the file, if it cannot be decoded.
    """
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(_ORIENTATION, 1) not in (0, 1)
            upright = ImageOps.exif_transpose(image) if turned else image
            channels = len(preprocess.mean)
            return _to_size(_with_channels(_eight_bits(upright, file), channels), preprocess), turned
    except DataError:
        raise
    # Pillow raises OSError, SyntaxError, ValueError, struct.error and more, one set per format, on damaged bytes.
    except Exception as error:
        raise DataError(
            f"{file}: the image cannot be decoded ({type(error).__name__}: {error}); remove or repair it, or skip "
            "such images and have them counted with skip_corrupt=true."
        ) from error


def _eight_bits(image: Image.Image, file: Path) -> Image.Image:
    """The same picture with 8 bits a channel; Pillow's own conversion cuts off what lies above 255."""
    mode = image.mode
    if mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if mode not in ("I", "F"):
        return image
    pixels = np.asarray(image)
    low, high = float(pixels.min()), float(pixels.max())
    if mode == "I" and 0 <= low and high < 65536:  # Pillow opens some 16-bit PNG files as whole numbers
        # The mode does not keep the file's depth. PNG files come here with 16 bits only; others that stay below 256 may
        # be 8-bit pictures in a wider type.
        sixteen = high > 255 or file.suffix.lower() == ".png"
        return Image.fromarray((np.rint(pixels / 257) if sixteen else pixels).astype(np.uint8))
    if mode == "F" and 0 <= low and high <= 1:
        return Image.fromarray(np.rint(pixels * 255).astype(np.uint8))
    kind = "floating" if mode == "F" else "32-bit"
    raise DataError(
        f"{file}: has {kind} pixels from {low:g} to {high:g}, whose scale is not known; save it with 8 or 16 bits, or "
        "scaled to 0..1."
    )


def prepare_pixels(pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Resizes, crops and matches the channels of pixels in memory.

    Args:
        pixels: ``[images, height, width, channels]`` uint8 or float32 in 0..1, channels 1 or 3.
        preprocess: What the model wants.

    Returns:
        ``[images, *preprocess.size, len(preprocess.mean)]`` in the same dtype.
    """
    channels = len(preprocess.mean)
    fits = preprocess.resize is None and pixels.shape[1:3] == tuple(preprocess.size)
    if pixels.shape[3] == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=3)
    if fits and pixels.shape[3] == channels:
        return pixels
    if pixels.dtype == np.uint8:
        # Through Pillow like image files, so that the same picture gives the same input from both kinds of source.
        images = (Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in pixels)
        return np.stack([_to_size(_with_channels(image, channels), preprocess) for image in images])
    return _resize_floats(pixels, preprocess)


def normalise(pixels: np.ndarray, preprocess: Preprocess) -> Tensor:
    """Pixels as the network's input: (x − mean) / std on the 0..1 scale, channels first.

    Args:
        pixels: ``[batch, height, width, channels]`` uint8 in 0..255 or float32 in 0..1.
        preprocess: Its `mean` and `std` are used.

    Returns:
        ``[batch, channels, height, width]`` float32, contiguous.
    """
    inputs = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).to(torch.float32, copy=True)
    if pixels.dtype == np.uint8:
        inputs.div_(255)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (preprocess.mean, preprocess.std))
    return inputs.sub_(mean).div_(std).contiguous()


def sha256_of_samples(samples: Iterator[bytes]) -> str:
    """Hex digest over the bytes of the chosen samples in their order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample)
    return digest.hexdigest()


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    return image.convert("L" if channels == 1 else "RGB")


def _to_size(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    height, width = preprocess.size
    resample = Image.Resampling[preprocess.interpolation.upper()]
    if preprocess.resize is not None:
        new_height, new_width = _shorter_side(image.height, image.width, preprocess.resize)
        if (new_height, new_width) != (image.height, image.width):
            image = image.resize((new_width, new_height), resample)
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        # Pillow fills with black where the crop is larger than the image, as torchvision's CenterCrop does.
        image = image.crop((left, top, left + width, top + height))
    elif (image.height, image.width) != (height, width):
        image = image.resize((width, height), resample)
    pixels = np.array(image)  # A copy: Pillow's own buffer is read-only.
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _resize_floats(pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
    if len(preprocess.mean) == 1 and images.shape[1] == 3:
        # Pillow's luma weights, as for 8-bit images.
        images = (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    height, width = preprocess.size
    target = preprocess.size
    if preprocess.resize is not None:
        target = _shorter_side(images.shape[2], images.shape[3], preprocess.resize)
    if tuple(images.shape[2:]) != tuple(target):
        smooth = preprocess.interpolation != "nearest"
        options = {"align_corners": False, "antialias": True} if smooth else {}
        # Pillow takes the pixel under the middle of each new one; torch's plain "nearest" the one under its corner.
        mode = preprocess.interpolation if smooth else "nearest-exact"
        images = F.interpolate(images, size=target, mode=mode, **options).clamp_(0, 1)
    top, left = round((images.shape[2] - height) / 2), round((images.shape[3] - width) / 2)
    # Negative padding crops; positive padding is the black border of a crop larger than the image.
    below, right = height - images.shape[2] + top, width - images.shape[3] + left
    return F.pad(images, (-left, right, -top, below)).permute(0, 2, 3, 1).numpy()


def _shorter_side(height: int, width: int, resize: int) -> tuple[int, int]:
    if height <= width:
        return resize, int(resize * width / height)
    return int(resize * height / width), resize
