"""The handwritten digits that scikit-learn ships, with a fixed split: the images of the embedded default.

1,797 grey images of 8 × 8 pixels (the test part of the UCI set "Optical Recognition of Handwritten Digits"). 450 of
them, drawn once for all, are held out: `scripts/train_embedded.py` never sees them. Calibration draws from the rest.
"""

import numpy as np
import torch

from modhifi_cli.data.sources import (
    ArrayImages,
    choose,
    labels_to_read,
    samples_wanted,
    settings_group,
    sha256_of_samples,
)
from modhifi_cli.errors import ConfigError, nearest
from modhifi_cli.records import Preprocess

HELD_OUT = 450
_SPLIT_SEED = 2511  # Never change it: the weights in the package were trained on the split that it makes.
_SPLITS = ("train", "test")


def load(
    *,
    preprocess: Preprocess,
    labelled: bool,
    labels: str | None = None,
    split: str | None = None,
    path: str | None = None,
    num_samples: int | str | None = None,
    seed: int = 0,
) -> ArrayImages:
    """Digits of one side of the fixed split.

    Args:
        preprocess: What the model wants; the digits are resized to it.
        labelled: Whether labels are given.
        labels: For calibration images: ``"auto"``, ``"given"`` or ``"model"`` (`labels_to_read`); None for others.
        split: ``"train"`` (1,347) or ``"test"`` (450); None is the latter for evaluation and else the former.
        path: Must be None; the digits lie inside scikit-learn.
        num_samples: How many to draw; None takes all, ``"auto"`` 2,000 or all where there are fewer.
        seed: Of the draw.

    Raises:
        ConfigError: If `split` is unknown or a path is given.
        DataError: If fewer images are there than asked for.
    """
    group = settings_group(labelled=labelled, labels=labels)
    reads = labels_to_read(labelled=labelled, labels=labels)
    if path is not None:
        raise ConfigError(
            f"{group}.path: the digits come inside scikit-learn and have no path, got {path}; leave it out, or choose "
            f"{group}=folder or {group}=arrays for your own images."
        )
    if split is None:
        split = "test" if group == "evaluation_data" else "train"
    if split not in _SPLITS:
        raise ConfigError(f"{group}.split: unknown split '{split}', {nearest(split, _SPLITS)}")
    images, targets = read(split)
    num_samples = samples_wanted(len(images), num_samples)
    chosen = choose(len(images), num_samples, seed=seed, place=f"digits ({split})")
    images = images[chosen]
    protocol = {
        "source": "digits",
        "path": f"scikit-learn load_digits, {split} split",
        "num_samples": len(chosen),
        "available": len(targets),
        "seed": None if num_samples is None else seed,
        "sha256": sha256_of_samples(image.tobytes() for image in images),
    }
    return ArrayImages(
        images=images,
        labels=None if reads == "never" else targets[chosen],
        preprocess=preprocess,
        protocol=protocol,
        classes=10,
    )


def read(split: str) -> tuple[np.ndarray, np.ndarray]:
    """All digits of one side of the split.

    Args:
        split: ``"train"`` or ``"test"``.

    Returns:
        Images ``[images, 8, 8, 1]`` uint8 (the set's 17 grey levels spread over 0..255) and labels ``[images]`` int64.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED)).numpy()
    chosen = order[:HELD_OUT] if split == "test" else order[HELD_OUT:]
    return images[chosen], digits.target[chosen].astype(np.int64)
