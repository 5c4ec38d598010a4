"""A folder of image files, at any depth.

Without labels every image below the folder is taken. With labels the class is that of the first folder on the way to the
image (`classes.classes_of_folders`), or what a JSON file says.
Sets whose prepared pixels fit in memory are decoded once, at the start; larger ones are decoded on every walk.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from modhifi_cli.data.classes import ORDERS, Folders, Known, classes_of_folders, instead
from modhifi_cli.data.making import made_ahead
from modhifi_cli.data.sources import (
    ArrayImages,
    FileImages,
    choose,
    decode_turned,
    labels_to_read,
    samples_wanted,
    settings_group,
    sha256_of_samples,
)
from modhifi_cli.errors import ConfigError, DataError, is_whole, nearest
from modhifi_cli.records import ImageSource, Preprocess

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
_LABELS_FILE = "labels.json"
_IN_MEMORY_BYTES = 1024**3
_DECODERS = 4


def load(
    *,
    path: str,
    preprocess: Preprocess,
    labelled: bool,
    labels: str | None = None,
    num_samples: int | str | None = None,
    seed: int = 0,
    skip_corrupt: bool = False,
    class_order: str = "auto",
    labels_path: str | None = None,
    known: Known = Known(),
) -> ImageSource:
    """Images, and labels if asked for, of a folder.

    One parameter for each key of the YAML, and for what every one of the kind is given.

    Args:
        path: The folder.
        preprocess: What the model wants.
        labelled: Whether to read labels. Without it the labels file is not opened.
        labels: For calibration images: ``"auto"``, ``"given"`` or ``"model"`` (`labels_to_read`); None for others.
        num_samples: How many to draw; None takes all, ``"auto"`` 2,000 or all where there are fewer. Images
            that are skipped are replaced by the next of the draw.
        seed: Of the draw.
        skip_corrupt: Whether images that cannot be decoded are left out and counted in the protocol; otherwise the
            first one is an error.
        class_order: Which class a folder is: ``"auto"``, ``"sorted"``, ``"text"`` or ``"imagenet"``
            (`classes.classes_of_folders`).
        labels_path: JSON ``{file: class_index}`` or ``{file: {"class_index": class_index}}``, files relative to `path`;
            None takes ``labels.json`` of the folder where there is one.
        known: What is known of the network's classes.

    Returns:
        The source; its protocol counts ``skipped`` images and names the first ones, says how many were
        ``turned`` as their cameras noted (None where images are decoded on the way, and turned there), and in
        ``class_folders`` which folder is which class and how that was found.

    Raises:
        ConfigError: If `class_order` or `num_samples` is out of range.
        DataError: If the folder is missing or has no images, an image cannot be decoded, a label is missing or no class
            index, or fewer images are there than asked for.
    """
    group = settings_group(labelled=labelled, labels=labels)
    reads = labels_to_read(labelled=labelled, labels=labels)
    if class_order not in ORDERS:
        raise ConfigError(f"{group}.class_order: unknown order '{class_order}', {nearest(class_order, ORDERS)}")
    root = Path(os.path.expanduser(path))
    files = _find(root, group)
    targets, folders = None, None
    if reads == "required" or reads == "optional" and _has_labels(root, files, labels_path):
        targets, folders = _labels(root, files, class_order, labels_path, group, known)
    num_samples = samples_wanted(len(files), num_samples)
    drawn = choose(len(files), num_samples, seed=seed, place=path)
    wanted = len(drawn)
    if skip_corrupt and num_samples is not None:
        # A draw of all has the smaller one as its beginning; what follows replaces images that are skipped.
        drawn = choose(len(files), len(files), seed=seed, place=path)
    fits = wanted * preprocess.size[0] * preprocess.size[1] * len(preprocess.mean) <= _IN_MEMORY_BYTES
    pixels: np.ndarray | None = None
    skipped: list[str] = []
    turned: int | None = None
    if fits or skip_corrupt:
        drawn, pixels, skipped, turned = _decode(root, files, drawn, wanted, preprocess, skip_corrupt=skip_corrupt, keep=fits)
        if not len(drawn) or (num_samples is not None and len(drawn) < num_samples):
            raise DataError(
                f"{path}: only {len(drawn)} images can be decoded ({len(skipped)} cannot, {skipped[0]} the first), "
                f"{wanted} were asked for; set {group}.num_samples={max(1, len(drawn))} or repair them."
            )
    names = [files[index] for index in drawn]
    protocol = {
        "source": "folder",
        "path": str(path),
        "num_samples": len(names),
        "available": len(files),
        "seed": None if num_samples is None else seed,
        "skipped": len(skipped),
        "turned": turned,
        "skipped_files": skipped[:10],
        **_digest(root, names, content=fits),
        **made_ahead(root),
    }
    if folders is not None:
        protocol["class_folders"] = {"taken_by": folders.how, **folders.classes}
        protocol["labels"] = folders.account
    classes = None if folders is None else folders.count
    chosen_labels = None if targets is None else targets[drawn]
    if pixels is not None:
        return ArrayImages(pixels, chosen_labels, preprocess, protocol, prepared=True, classes=classes)
    return FileImages(root, names, chosen_labels, preprocess, protocol, classes=classes)


def _find(root: Path, group: str) -> list[str]:
    """Image files below the folder by their names relative to it, sorted; hidden ones are left out."""
    if not root.is_dir():
        raise DataError(f"{group}.path: no folder at {root}, expected a folder with images.")
    files = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = Path(folder).relative_to(root)
        files += [
            (inside / name).as_posix()
            for name in names
            if name.lower().endswith(_SUFFIXES) and not name.startswith(".")
        ]
    if not files:
        raise DataError(
            f"{group}.path: {root} has no images at any depth (looked for {', '.join(_SUFFIXES[:5])} …); give the "
            f"folder that holds them, or use {group}=arrays for array files."
        )
    return sorted(files)


def _has_labels(root: Path, files: Sequence[str], labels_path: str | None) -> bool:
    """Whether there is a file of labels, or an image lies in a folder. Nothing is opened."""
    return labels_path is not None or (root / _LABELS_FILE).is_file() or any("/" in name for name in files)


def _labels(
    root: Path, files: Sequence[str], class_order: str, labels_path: str | None, group: str, known: Known
) -> tuple[np.ndarray, Folders | None]:
    """The label of every file, and what the class folders stand for (None where a file of labels says it)."""
    file = root / _LABELS_FILE if labels_path is None else Path(os.path.expanduser(labels_path))
    if labels_path is not None or file.is_file():
        return _labels_from_json(file, files), None
    folders = [name.partition("/")[0] if "/" in name else None for name in files]
    for name, folder in zip(files, folders, strict=True):
        if folder is None:
            raise DataError(
                f"{root}: {name} lies in no class folder and there is no {_LABELS_FILE}, so its label is unknown; put "
                f"images into one folder per class, or set {group}.labels_path=FILE.json{instead(group)}."
            )
    named = sorted({folder for folder in folders if folder})
    beside = {one.name for one in root.iterdir() if one.is_dir() and not one.name.startswith((".", "__"))}
    found = classes_of_folders(
        named, known, order=class_order, root=root, group=group, empty=sorted(beside.difference(named))
    )
    return np.array([found.classes[folder] for folder in folders if folder], dtype=np.int64), found


def _labels_from_json(file: Path, files: Sequence[str]) -> np.ndarray:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: the labels cannot be read ({type(error).__name__}: {error}); write JSON "
            "{file: class_index}."
        ) from error
    labels = []
    for name in files:
        entry = content.get(name) if isinstance(content, Mapping) else None
        index = entry.get("class_index") if isinstance(entry, Mapping) else entry
        if not is_whole(index) or index < 0:
            raise DataError(
                f"{file}: expected a class index from 0 for {name}, got {entry!r}; add it as {{file: class_index}}, or "
                "take the image out of the folder."
            )
        labels.append(index)
    return np.array(labels, dtype=np.int64)


def _decode(
    root: Path,
    files: Sequence[str],
    drawn: np.ndarray,
    wanted: int,
    preprocess: Preprocess,
    *,
    skip_corrupt: bool,
    keep: bool,
) -> tuple[np.ndarray, np.ndarray | None, list[str], int]:
    """Decodes in the order of the draw until `wanted` images are good.

    Returns:
        Their indices, pixels if kept, names of skipped images, and how many had to be turned.
    """
    shape = (wanted, *preprocess.size, len(preprocess.mean))
    pixels = np.empty(shape, dtype=np.uint8) if keep else None
    good: list[int] = []
    skipped: list[str] = []
    turned, first = 0, ""
    remaining = iter(drawn.tolist())

    def attempt(index: int) -> tuple[int, tuple[np.ndarray, bool] | DataError]:
        try:
            return index, decode_turned(root / files[index], preprocess)
        except DataError as error:
            return index, error

    with ThreadPoolExecutor(_DECODERS) as pool:
        while len(good) < wanted:
            # In blocks, so that no more is decoded and held at once than a few threads need.
            block = list(islice(remaining, min(64, wanted - len(good))))
            if not block:
                break
            for index, result in pool.map(attempt, block):
                if isinstance(result, DataError):
                    if not skip_corrupt:
                        raise result
                    skipped.append(files[index])
                    first = first or str(result).partition("; ")[0]
                    continue
                if pixels is not None:
                    pixels[len(good)] = result[0]
                turned += result[1]
                good.append(index)
    tried = len(good) + len(skipped)
    if len(skipped) > tried / 2:
        raise DataError(
            f"{root}: {len(skipped)} of {tried} images cannot be used, so something is wrong with all of them rather than "
            f"with some; the first: {first}; convert them to 8-bit PNG or JPEG."
        )
    indices = np.array(good, dtype=np.int64)
    return indices, None if pixels is None else pixels[: len(good)], skipped, turned


def _digest(root: Path, names: Sequence[str], *, content: bool) -> dict[str, str]:
    """Of the files' bytes; for sets too large to read twice, of their names and sizes, and says so."""

    def samples() -> Iterator[bytes]:
        for name in names:
            if content:
                yield (root / name).read_bytes()
            else:
                yield f"{name} {(root / name).stat().st_size}\n".encode()

    return {"sha256": sha256_of_samples(samples()), "sha256_of": "file contents" if content else "names and sizes"}
