"""Images of the user's own generator: a diffusion pipeline or any other function, named by module and name."""

import importlib
import os
import sys
from typing import Any

import numpy as np

from modhifi_cli.data.procedural import made_samples, refuse_given_labels
from modhifi_cli.data.sources import ArrayImages, sha256_of_samples
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.records import Preprocess


def load(
    *,
    function: str,
    preprocess: Preprocess,
    labelled: bool,
    labels: str | None = None,
    num_samples: int | str | None = "auto",
    seed: int = 0,
) -> ArrayImages:
    """Images that a function returns.

    Args:
        function: ``module:name``, found as Python finds modules, and in the present folder. It is called once as
            ``name(count, seed)`` and returns ``[count, height, width, channels]`` uint8 (or floats in 0..1), or a list
            of Pillow images of one size.
        preprocess: What the network wants; the images are resized to it.
        labelled: Whether labels are asked for; these images never have any of their own.
        labels: As of every source; ``"given"`` cannot be.
        num_samples: How many; ``"auto"`` and None are 512.
        seed: Handed to the function.

    Raises:
        ConfigError: If the function cannot be found, or `num_samples` is out of range.
        DataError: If it fails, or returns anything else.
    """
    refuse_given_labels(labelled=labelled, labels=labels, source="generator")
    count = made_samples(num_samples)
    make = _found(function)
    try:
        made: Any = make(count, seed)
    except Exception as error:  # the user's own code may raise anything
        raise DataError(f"data.function={function}: it failed with {type(error).__name__}: {error}.") from error
    images = _checked(made, count, function)
    protocol = {
        "source": "generator",
        "path": function,
        "num_samples": count,
        "available": count,
        "seed": seed,
        "sha256": sha256_of_samples(image.tobytes() for image in images),
    }
    return ArrayImages(images, None, preprocess, protocol)


def _found(function: str) -> Any:
    module, _, name = str(function).partition(":")
    if not module or not name:
        raise ConfigError(f"data.function: expected module:name, such as mine:sample, got {function!r}.")
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())  # an installed command does not look there by itself
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"data.function={function}: it cannot be found ({error}); give module:name.") from error
    finally:
        sys.path[:] = before
    if not callable(found):
        raise ConfigError(f"data.function={function}: expected a function, got {type(found).__name__}.")
    return found


def _checked(made: Any, count: int, function: str) -> np.ndarray:
    try:
        images = np.stack([np.asarray(one) for one in made]) if isinstance(made, (list, tuple)) else np.asarray(made)
    except (ValueError, TypeError) as error:
        raise DataError(f"data.function={function}: its images cannot be put into one array ({error}).") from error
    images = images[..., None] if images.ndim == 3 else images
    fits = images.ndim == 4 and len(images) == count and images.shape[3] in (1, 3)
    floats = images.dtype.kind == "f"
    if floats and fits:
        fits = bool(np.isfinite(images).all()) and float(images.min()) >= 0 and float(images.max()) <= 1
    if not fits or not floats and images.dtype != np.uint8:
        raise DataError(
            f"data.function={function}: expected {count} images [count, height, width, 1 or 3], uint8 or floats in 0..1,"
            f" got {images.dtype} {list(images.shape)}."
        )
    return images.astype(np.float32) if floats else images
