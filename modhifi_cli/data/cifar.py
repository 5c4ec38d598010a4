"""CIFAR-10 and CIFAR-100 as torchvision lays them out on disk."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from modhifi_cli.data.sources import (
    ArrayImages,
    choose,
    labels_to_read,
    samples_wanted,
    settings_group,
    sha256_of_samples,
)
from modhifi_cli.errors import ConfigError, DataError, first_line, nearest
from modhifi_cli.records import Preprocess

_SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
_SPLITS = ("train", "test")


def load(
    *,
    name: str,
    path: str,
    preprocess: Preprocess,
    labelled: bool,
    labels: str | None = None,
    split: str = "train",
    num_samples: int | str | None = None,
    seed: int = 0,
    download: bool = False,
) -> ArrayImages:
    """Images of one split.

    One parameter for each key of the YAML, and for what every one of the kind is given.

    torchvision's files hold images and labels together; without `labelled` the labels are dropped unread.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        path: Folder in which torchvision's own folder lies (``cifar-10-batches-py``).
        preprocess: What the model wants.
        labelled: Whether labels are given.
        labels: For calibration images: ``"auto"``, ``"given"`` or ``"model"`` (`labels_to_read`); None for others.
        split: ``"train"`` (50,000) or ``"test"`` (10,000).
        num_samples: How many to draw; None takes all, ``"auto"`` 2,000 or all where there are fewer.
        seed: Of the draw.
        download: Whether torchvision may fetch the set into `path`.

    Raises:
        ConfigError: If the name or the split is unknown.
        DataError: If the files are missing or damaged and were not to be, or could not be, downloaded, or fewer images
            are there than asked for.
    """
    group = settings_group(labelled=labelled, labels=labels)
    reads = labels_to_read(labelled=labelled, labels=labels)
    if name not in _SETS:
        raise ConfigError(f"{group}.name: unknown set '{name}', {nearest(name, _SETS)}")
    if split not in _SPLITS:
        raise ConfigError(f"{group}.split: unknown split '{split}', {nearest(split, _SPLITS)}")
    whole = _read(name, Path(os.path.expanduser(path)), train=split == "train", download=download, group=group)
    num_samples = samples_wanted(len(whole.data), num_samples)
    chosen = choose(len(whole.data), num_samples, seed=seed, place=f"{name} ({split})")
    images = np.ascontiguousarray(whole.data[chosen])
    targets = None if reads == "never" else np.asarray(whole.targets, dtype=np.int64)[chosen]
    protocol = {
        "source": name,
        "path": str(path),
        "split": split,
        "num_samples": len(chosen),
        "available": len(whole.data),
        "seed": None if num_samples is None else seed,
        "sha256": sha256_of_samples(image.tobytes() for image in images),
    }
    return ArrayImages(
        images=images, labels=targets, preprocess=preprocess, protocol=protocol, classes=int(name.removeprefix("cifar"))
    )


def _read(name: str, folder: Path, *, train: bool, download: bool, group: str) -> Any:
    import torchvision

    try:
        return getattr(torchvision.datasets, _SETS[name])(str(folder), train=train, download=download)
    # torchvision checks hashes and raises RuntimeError; a download adds URLError and OSError, a bad file unpickling's.
    except Exception as error:
        hint = (
            "torchvision could not download them; copy them there"
            if download
            else f"set {group}.download=true to fetch them, or give the folder that holds them"
        )
        raise DataError(
            f"{group}.path: the files of {name} are missing or damaged under {folder} ({type(error).__name__}: "
            f"{first_line(error, 'no message')}); {hint}."
        ) from error
