"""Images made of nothing but random numbers that have the statistics of natural ones: edges, occlusion, 1/f spectra.

Dead leaves (Lee, Mumford and Huang, "Occlusion models for natural images", 2001) are shapes with radii of density r⁻³
laid over each other; fractal images have amplitude spectra of 1/fᵅ. No gradients, no network, no files.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from modhifi_cli.data.sources import ArrayImages, labels_to_read, sha256_of_samples
from modhifi_cli.errors import ConfigError, DataError, is_whole, nearest
from modhifi_cli.records import Preprocess

SAMPLES = 512  # what "auto" means: more changes little where the images are made up
# Of photographs at 32 and at 224 px alike (CIFAR-10, ImageNet): amplitude spectra fall faster than 1/f at both ends.
_ILLUMINATION = 0.6  # deviation of the light over a scene, relative to that of its surfaces
_BLUR = (0.3, 0.65)  # deviation of the lens's Gaussian, pixels
_OVERSAMPLING = 2  # shapes are drawn at twice the size and averaged, which gives edges their grey pixels
_LEAST_RADIUS = (0.02, 0.1)  # of the shorter side, drawn for every image; never under 1.5 drawn pixels
_MOST_RADIUS = 0.5
_LEAVES = 3000  # at most, for one image
_UNCOVERED = 0.05  # share of the ground that may still show when no further leaf is laid

# Standard deviations of natural images along brightness, blue against yellow and red against green, relative to
# brightness: colours of neighbouring surfaces vary mostly in brightness (Ruderman, Cronin and Chiao, 1998).
_COLOUR_AXES = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])
_COLOUR_SPREAD = np.array([1.0, 0.32, 0.16])
# Where a network's preprocessing says nothing of its images' statistics (mean and std of 0.5).
_MEAN, _STD = 0.45, 0.23
_PLAUSIBLE_STD = (0.1, 0.35)


def load(
    *,
    preprocess: Preprocess,
    labelled: bool,
    labels: str | None = None,
    num_samples: int | str | None = "auto",
    kind: str = "mixture",
    seed: int = 0,
) -> ArrayImages:
    """Procedural images of the network's input size.

    Args:
        preprocess: What the network wants; the images have its size, its number of channels and, where they are those
            of natural images, its mean and standard deviation.
        labelled: Whether labels are asked for; these images never have any of their own.
        labels: As of every source; ``"given"`` cannot be.
        num_samples: How many; ``"auto"`` and None are 512. Fewer with the same seed are the beginning of more.
        kind: ``"dead_leaves"``, ``"fractal"``, or ``"mixture"``: by turns leaves with fractal surfaces, plain leaves
            and fractal images alone.
        seed: Of everything that is drawn.

    Raises:
        ConfigError: If `kind` or `num_samples` is out of range.
        DataError: If labels of the source are asked for.
    """
    refuse_given_labels(labelled=labelled, labels=labels, source="procedural")
    if kind not in KINDS:
        raise ConfigError(f"data.kind: unknown kind '{kind}', {nearest(str(kind), KINDS)}")
    count = made_samples(num_samples)
    images = draw(count, preprocess, kind=kind, seed=seed)
    protocol = {
        "source": "procedural",
        "path": f"made up, {kind}",
        "num_samples": count,
        "available": count,
        "seed": seed,
        "sha256": sha256_of_samples(image.tobytes() for image in images),
    }
    return ArrayImages(images, None, preprocess, protocol, prepared=True)


def draw(count: int, preprocess: Preprocess, *, kind: str, seed: int, first: int = 0) -> np.ndarray:
    """Images ``[count, height, width, channels]`` uint8, numbers `first` … of the endless row that a seed names.

    Args:
        count: How many.
        preprocess: Size, channels, mean and std.
        kind: As in `load`.
        seed: Names the row; every image has a generator of its own, so that none depends on how many are drawn.
        first: Number of the first one.
    """
    height, width = preprocess.size
    mean, std = _target(preprocess)
    images = np.empty((count, height, width, len(mean)), np.uint8)
    for number in range(first, first + count):
        # The row says its kind so that mixtures and single kinds do not share their shapes.
        rng = np.random.default_rng([seed, number, list(KINDS).index(kind)])
        colours = KINDS[kind](rng, height, width, number)
        if len(mean) == 1:
            colours = colours[..., :1]
        # Light falls unevenly over a scene, lenses blur, and photographs differ in exposure and contrast.
        colours = _standardised(colours) + _ILLUMINATION * _noise(rng, height, width, rng.uniform(1.8, 2.6), 1)
        colours = _standardised(_blurred(colours, rng.uniform(*_BLUR)))
        contrast = rng.uniform(0.5, 1.45)
        exposure = rng.normal(0, 0.6) + rng.normal(0, 0.12, len(mean))
        pixels = mean + std * (contrast * colours + exposure)
        images[number - first] = np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8)
    return images


def made_samples(num_samples: int | str | None, *, key: str = "num_samples", auto: int = SAMPLES) -> int:
    """How many samples a source makes.

    Args:
        num_samples: What was asked for, at least 1; ``"auto"`` and None are `auto`.
        key: What the settings call it, for the message.
        auto: Samples where nothing was asked for: 512 images if not said otherwise.

    Raises:
        ConfigError: If it is no whole number above 0.
    """
    if num_samples in ("auto", None):
        return auto
    if not is_whole(num_samples) or num_samples < 1:
        raise ConfigError(f"data.{key}: expected a whole number above 0, or auto, got {num_samples!r}.")
    return num_samples


def refuse_given_labels(*, labelled: bool, labels: str | None, source: str) -> None:
    """Images that are made up have no labels but the network's predictions.

    Raises:
        ConfigError: If `labels` is unknown.
        DataError: If labels of the source's own are asked for.
    """
    if labels_to_read(labelled=labelled, labels=labels) == "required":
        raise DataError(f"data.labels=given: {source} images have no labels of their own; set data.labels=model.")


def _target(preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray]:
    mean, std = np.array(preprocess.mean, float), np.array(preprocess.std, float)
    low, high = _PLAUSIBLE_STD
    natural = bool(((std >= low) & (std <= high)).all())
    return (mean, std) if natural else (np.full(len(mean), _MEAN), np.full(len(mean), _STD))


def _dead_leaves(rng: np.random.Generator, height: int, width: int, number: int) -> np.ndarray:
    return _leaves(rng, height, width, textured=False)


def _fractal(rng: np.random.Generator, height: int, width: int, number: int) -> np.ndarray:
    return _noise(rng, height, width, rng.uniform(0.8, 1.6), 3) @ _colour_matrix(rng)


def _mixture(rng: np.random.Generator, height: int, width: int, number: int) -> np.ndarray:
    if number % 4 == 3:
        return _fractal(rng, height, width, number)
    return _leaves(rng, height, width, textured=number % 4 != 2)


KINDS: dict[str, Callable[[np.random.Generator, int, int, int], np.ndarray]] = {
    "dead_leaves": _dead_leaves,
    "fractal": _fractal,
    "mixture": _mixture,
}


def _leaves(rng: np.random.Generator, height: int, width: int, *, textured: bool) -> np.ndarray:
    """Shapes in front of each other, ``[height, width, 3]`` float64 of any scale.

    Which leaf is seen where is painted from back to front; colours, shading and surfaces then follow in one go.
    """
    high, wide = height * _OVERSAMPLING, width * _OVERSAMPLING
    shorter = min(high, wide)
    least = max(1.5, shorter * rng.uniform(*_LEAST_RADIUS))
    most = _MOST_RADIUS * shorter
    # The areas of leaves with radius density r⁻³ between the two bounds cover the ground after about this many.
    mean_area = 2 * np.pi * np.log(most / least) / (1 / least**2 - 1 / most**2)
    count = int(min(_LEAVES, np.ceil(-np.log(_UNCOVERED) * high * wide / mean_area)))
    radii = 1 / np.sqrt(1 / most**2 + rng.random(count) * (1 / least**2 - 1 / most**2))
    centres = np.stack([rng.uniform(0, wide, count), rng.uniform(0, high, count)], 1)
    canvas = Image.new("I", (wide, high), 0)
    pen = ImageDraw.Draw(canvas)
    outlines = _outlines(rng, centres, radii)
    for leaf, (outline, is_round) in enumerate(zip(outlines, rng.random(count) < 0.5, strict=True), start=1):
        if is_round:
            (x, y), radius = centres[leaf - 1], radii[leaf - 1]
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=leaf)
        else:
            pen.polygon(outline, fill=leaf)
    seen = np.asarray(canvas)
    brightness = rng.normal(0, 1, (count + 1, 3)) @ _colour_matrix(rng)
    colours = brightness[seen]
    # A surface that turns away from the light: a slope of its own over every leaf.
    slopes = rng.normal(0, 0.5, (count + 1, 2)) / np.concatenate([[shorter], 2 * radii])[:, None]
    origin = np.concatenate([[[wide / 2, high / 2]], centres])
    across = np.arange(wide)[None, :] - origin[seen, 0]
    down = np.arange(high)[:, None] - origin[seen, 1]
    shading = slopes[seen, 0] * across + slopes[seen, 1] * down
    if textured:
        rough = np.where(rng.random(count + 1) < 0.6, rng.gamma(1.5, 0.35, count + 1), 0.0)
        fields = np.stack([_noise(rng, high, wide, power, 1)[..., 0] for power in (0.3, 1.0)])
        shading = shading + rough[seen] * np.take_along_axis(fields, (seen % 2)[None], 0)[0]
    colours += shading[..., None]
    return colours.reshape(height, _OVERSAMPLING, width, _OVERSAMPLING, 3).mean((1, 3))


def _outlines(rng: np.random.Generator, centres: np.ndarray, radii: np.ndarray) -> list[list[float]]:
    """A stretched polygon of three to six corners around every centre, each as x, y, x, y and so on."""
    corners = rng.integers(3, 7, len(radii))[:, None]
    steps = np.minimum(np.arange(6), corners - 1)  # the last corner again where there are fewer than six
    angles = (steps + rng.uniform(0, 0.7, (len(radii), 1))) * 2 * np.pi / corners
    stretch, turn = rng.uniform(0.35, 1.0, (len(radii), 1)), rng.uniform(0, np.pi, (len(radii), 1))
    along, beside = radii[:, None] * np.cos(angles), stretch * radii[:, None] * np.sin(angles)
    x = centres[:, :1] + along * np.cos(turn) - beside * np.sin(turn)
    y = centres[:, 1:] + along * np.sin(turn) + beside * np.cos(turn)
    return np.stack([x, y], 2).reshape(len(radii), 12).tolist()


def _noise(rng: np.random.Generator, height: int, width: int, power: float, channels: int) -> np.ndarray:
    """Fields ``[height, width, channels]`` of mean 0 and deviation 1 with amplitude spectrum 1/f^power."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(rng.standard_normal((channels, height, width)))
    fields = np.fft.irfft2(white / frequency**power, s=(height, width))
    return np.moveaxis(fields / fields.std((1, 2), keepdims=True).clip(1e-12), 0, -1)


def _standardised(colours: np.ndarray) -> np.ndarray:
    return (colours - colours.mean((0, 1))) / max(float(colours.std()), 1e-6)


def _blurred(colours: np.ndarray, sigma: float) -> np.ndarray:
    """``[height, width, channels]`` under a Gaussian of `sigma` < 1 pixels; edges are continued."""
    taps = np.exp(-(np.arange(-2, 3) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    for axis in (0, 1):
        length = colours.shape[axis]
        edged = np.pad(colours, [(2, 2) if one == axis else (0, 0) for one in range(3)], mode="edge")
        colours = sum(tap * edged.take(range(at, at + length), axis) for at, tap in enumerate(taps))
    return colours


def _colour_matrix(rng: np.random.Generator) -> np.ndarray:
    """Independent values → red, green, blue that vary together as in photographs; some images are colourful."""
    spread = _COLOUR_SPREAD * np.array([1.0, *rng.uniform(0.4, 1.8, 2)])
    return spread[:, None] * _COLOUR_AXES
