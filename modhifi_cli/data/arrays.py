"""Images in array files: ``.npz``, ``.npy`` and ``.safetensors``, one file or a folder of parts (as CIFAR-5M comes).

Rows are streamed from disk and only the chosen ones are kept, so that a set of millions of images costs no more memory
than the sample drawn from it.
"""

import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modhifi_cli.data.making import made_ahead
from modhifi_cli.data.sources import (
    ArrayImages,
    choose,
    labels_to_read,
    samples_wanted,
    settings_group,
    sha256_of_samples,
)
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.records import Preprocess

_SUFFIXES = (".npz", ".npy", ".safetensors")
_IMAGE_KEYS = ("images", "image", "data", "x", "X", "x_train", "x_test", "samples", "arr_0")
_LABEL_KEYS = ("labels", "label", "y", "Y", "targets", "y_train", "y_test")
_CHUNK_BYTES = 32 * 1024**2


@dataclass(frozen=True)
class _Table:
    """An array on disk: its header, and a reader of row ranges that go forward."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int], np.ndarray]  # The next n rows.


def load(
    *,
    path: str,
    preprocess: Preprocess,
    labelled: bool,
    labels: str | None = None,
    num_samples: int | str | None = None,
    seed: int = 0,
    images_key: str | None = None,
    labels_key: str | None = None,
    labels_path: str | None = None,
    layout: str = "auto",
) -> ArrayImages:
    """Images, and labels if asked for, from array files.

    One parameter for each key of the YAML, and for what every one of the kind is given.

    Args:
        path: A file, or a folder whose array files are the parts of one set, in the order of their names.
        preprocess: What the model wants.
        labelled: Whether to read labels. Without it no label array or file is opened.
        labels: For calibration images: ``"auto"``, ``"given"`` or ``"model"`` (`labels_to_read`); None for others.
        num_samples: How many to draw; None takes all, ``"auto"`` 2,000 or all where there are fewer.
        seed: Of the draw.
        images_key: Name of the images in an ``.npz`` or ``.safetensors``; None looks for the usual ones.
        labels_key: The same for labels.
        labels_path: A ``.npy`` file of labels, needed where the images come as ``.npy``.
        layout: ``"NHWC"``, ``"NCHW"``, or ``"auto"``: uint8 arrays are NHWC and float arrays NCHW.

    Returns:
        The source. Images must be uint8, or floats on the 0..1 scale, with 1 or 3 channels.

    Raises:
        ConfigError: If `layout` or `num_samples` is out of range.
        DataError: If a file is missing or unreadable, an array is missing or has another form, labels do not match the
            images, or fewer images are there than asked for.
    """
    group = settings_group(labelled=labelled, labels=labels)
    reads = labels_to_read(labelled=labelled, labels=labels)
    if layout not in ("auto", "NHWC", "NCHW"):
        raise ConfigError(f"{group}.layout: expected auto, NHWC or NCHW, got {layout!r}.")
    place = Path(os.path.expanduser(path))
    parts = _parts(place, group)
    counts = []
    for part in parts:
        with _open(part, images_key, _IMAGE_KEYS, what="images", setting=f"{group}.images_key") as table:
            _check_images(table, layout, group)
            counts.append(table.shape[0])
    total = sum(counts)
    num_samples = samples_wanted(total, num_samples)
    chosen = choose(total, num_samples, seed=seed, place=path)

    def read_images(part: Path, rows: np.ndarray) -> np.ndarray:
        with _open(part, images_key, _IMAGE_KEYS, what="images", setting=f"{group}.images_key") as table:
            return _as_nhwc(_take(table, rows), table, layout)

    images = _gather(parts, counts, chosen, read_images, place=path)
    targets = None
    if reads == "required" or reads == "optional" and _has_labels(parts, labels_key, labels_path):
        targets = _labels(parts, counts, chosen, labels_key=labels_key, labels_path=labels_path, group=group)
    protocol = {
        "source": "arrays",
        "path": str(path),
        "num_samples": len(chosen),
        "available": total,
        "seed": None if num_samples is None else seed,
        "sha256": sha256_of_samples(image.tobytes() for image in images),
        **made_ahead(place),
    }
    return ArrayImages(images=images, labels=targets, preprocess=preprocess, protocol=protocol)


def check_labels(labels: np.ndarray, *, place: str, images: int) -> np.ndarray:
    """Labels as int64 after checking that they are one class index per image.

    Args:
        labels: ``[images]`` or ``[images, 1]``, whole numbers from 0.
        place: File and key for messages.
        images: How many there must be.

    Raises:
        DataError: If the shape, kind or range is another.
    """
    flat = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.shape != (images,):
        raise DataError(
            f"{place}: expected one label per image, {images} in all, got an array of shape {list(labels.shape)}; "
            "give the labels that belong to these images."
        )
    if not np.issubdtype(flat.dtype, np.integer):
        raise DataError(f"{place}: expected whole-number class indices, got {labels.dtype}; convert the labels.")
    if images and flat.min() < 0:
        raise DataError(f"{place}: expected class indices from 0, got {flat.min()}; leave unlabelled images out.")
    return flat.astype(np.int64)


def _parts(path: Path, group: str) -> list[Path]:
    if not path.exists():
        raise DataError(
            f"{group}.path: nothing at {path}, expected an array file ({', '.join(_SUFFIXES)}) or a folder of them."
        )
    if path.is_dir():
        parts = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        if not parts:
            raise DataError(
                f"{group}.path: {path} holds no array files ({', '.join(_SUFFIXES)}); give their folder, or use "
                f"{group}=folder for image files."
            )
        return parts
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{group}.path: {path} is not an array file, expected one of {', '.join(_SUFFIXES)}.")
    return [path]


def _has_labels(parts: Sequence[Path], labels_key: str | None, labels_path: str | None) -> bool:
    """Whether labels were named, or every part holds an array of a usual name for them. No array is read."""
    if labels_key is not None or labels_path is not None:
        return True
    return all(_names(part) & set(_LABEL_KEYS) for part in parts)


def _names(file: Path) -> set[str]:
    if file.suffix == ".npz":
        with zipfile.ZipFile(file) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    if file.suffix == ".safetensors":
        import safetensors

        with safetensors.safe_open(file, framework="numpy") as content:
            return set(content.keys())
    return set()


def _labels(
    parts: Sequence[Path],
    counts: Sequence[int],
    chosen: np.ndarray,
    *,
    labels_key: str | None,
    labels_path: str | None,
    group: str,
) -> np.ndarray:
    if labels_path is not None:
        file = Path(os.path.expanduser(labels_path))
        if not file.is_file():
            raise DataError(
                f"{group}.labels_path: no file at {file}, expected a .npy file with one label per image."
            )
        with _open(file, labels_key, _LABEL_KEYS, what="labels", setting=f"{group}.labels_key") as table:
            rows = table.read(table.shape[0] if table.shape else 0)
        return check_labels(rows, place=str(file), images=sum(counts))[chosen]
    collected = []
    for part, count in zip(parts, counts, strict=True):
        if part.suffix == ".npy":
            raise DataError(f"{part}: a .npy file holds one array, so labels need {group}.labels_path=FILE.")
        with _open(part, labels_key, _LABEL_KEYS, what="labels", setting=f"{group}.labels_key") as table:
            rows = table.read(table.shape[0] if table.shape else 0)
            collected.append(check_labels(rows, place=table.name, images=count))
    return np.concatenate(collected)[chosen]


def _gather(
    parts: Sequence[Path],
    counts: Sequence[int],
    chosen: np.ndarray,
    read: Callable[[Path, np.ndarray], np.ndarray],
    *,
    place: str,
) -> np.ndarray:
    """Chosen rows over all parts, in the order of `chosen`, each part walked once."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    gathered: np.ndarray | None = None
    for number, part in enumerate(parts):
        positions = np.flatnonzero((chosen >= starts[number]) & (chosen < starts[number + 1]))
        if not positions.size:
            continue
        wanted = chosen[positions] - starts[number]
        order = np.argsort(wanted)
        rows = read(part, wanted[order])
        if gathered is None:
            gathered = np.empty((len(chosen), *rows.shape[1:]), dtype=rows.dtype)
        if rows.shape[1:] != gathered.shape[1:] or rows.dtype != gathered.dtype:
            raise DataError(
                f"{part}: images are {rows.dtype} {list(rows.shape[1:])} here but {gathered.dtype} "
                f"{list(gathered.shape[1:])} in the parts before; give parts of one set."
            )
        gathered[positions[order]] = rows
    if gathered is None:
        raise DataError(f"{place}: there are no images in it, expected at least one.")
    return gathered


def _take(table: _Table, rows: np.ndarray) -> np.ndarray:
    """Rows (ascending) of a table, reading forward in chunks of bounded memory."""
    row_bytes = max(1, int(np.prod(table.shape[1:])) * table.dtype.itemsize)
    chunk = max(1, _CHUNK_BYTES // row_bytes)
    taken = np.empty((len(rows), *table.shape[1:]), dtype=table.dtype)
    for start in range(0, int(rows[-1]) + 1, chunk):
        block = table.read(min(chunk, table.shape[0] - start))
        first, last = np.searchsorted(rows, [start, start + len(block)])
        taken[first:last] = block[rows[first:last] - start]
    return taken


def _check_images(table: _Table, layout: str, group: str) -> None:
    floating = np.issubdtype(table.dtype, np.floating)
    if table.dtype != np.uint8 and not floating:
        raise DataError(
            f"{table.name}: images must be uint8 in 0..255 or floats in 0..1, got {table.dtype}; convert them."
        )
    if len(table.shape) not in (3, 4):
        raise DataError(
            f"{table.name}: images must be [N, height, width, channels] uint8 or [N, channels, height, width] float, "
            f"got shape {list(table.shape)}; reshape the array."
        )
    resolved = _layout(table, layout)
    channels = 1 if len(table.shape) == 3 else table.shape[3 if resolved == "NHWC" else 1]
    if channels not in (1, 3):
        raise DataError(
            f"{table.name}: expected 1 or 3 channels in layout {resolved}, got {channels} (shape {list(table.shape)}); "
            f"set {group}.layout={'NCHW' if resolved == 'NHWC' else 'NHWC'} if the channels lie on the other axis."
        )


def _layout(table: _Table, layout: str) -> str:
    if layout != "auto":
        return layout
    return "NHWC" if table.dtype == np.uint8 else "NCHW"


def _as_nhwc(images: np.ndarray, table: _Table, layout: str) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    elif _layout(table, layout) == "NCHW":
        images = images.transpose(0, 2, 3, 1)
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    images = np.ascontiguousarray(images, dtype=np.float32)
    # Written so that NaN fails too.
    if not (images.min() >= 0 and images.max() <= 1):
        raise DataError(
            f"{table.name}: float images must lie in 0..1, got {images.min():.4g} to {images.max():.4g}; divide by "
            "255, or undo the normalisation (the model's own is applied here)."
        )
    return images


@contextmanager
def _open(file: Path, key: str | None, usual: Sequence[str], *, what: str, setting: str) -> Iterator[_Table]:
    """The wanted array of a file, ready to be read forward."""
    opener = {".npz": _open_npz, ".npy": _open_npy, ".safetensors": _open_safetensors}[
        file.suffix if file.suffix in _SUFFIXES else ".npy"
    ]
    try:
        with opener(file, key, usual, what, setting) as table:
            yield table
    except (DataError, ConfigError):
        raise
    # Damaged bytes surface as BadZipFile, zlib.error, ValueError, EOFError, SafetensorError …
    except Exception as error:
        raise DataError(
            f"{file}: the array file cannot be read ({type(error).__name__}: {error}); copy it again."
        ) from error


@contextmanager
def _open_npz(file: Path, key: str | None, usual: Sequence[str], what: str, setting: str) -> Iterator[_Table]:
    with zipfile.ZipFile(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        name = _pick(file, names, key, usual, what, setting)
        with archive.open(f"{name}.npy") as member:
            shape, fortran, dtype = _read_npy_header(member)
            _refuse_objects(file, name, dtype, fortran)
            row_bytes = math.prod(shape[1:]) * dtype.itemsize
            held = archive.getinfo(f"{name}.npy").file_size
            if shape and shape[0] * row_bytes > held:  # before memory is asked for
                raise DataError(f"{file} [{name}]: says it holds {shape}, but it has only {held} bytes; copy it again.")

            def read(rows: int) -> np.ndarray:
                content = member.read(rows * row_bytes)
                return np.frombuffer(content, dtype=dtype).reshape(rows, *shape[1:])

            yield _Table(f"{file} [{name}]", shape, dtype, read)


@contextmanager
def _open_npy(file: Path, key: str | None, usual: Sequence[str], what: str, setting: str) -> Iterator[_Table]:
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    yield _Table(str(file), array.shape, array.dtype, _forward(lambda start, end: np.asarray(array[start:end])))


@contextmanager
def _open_safetensors(file: Path, key: str | None, usual: Sequence[str], what: str, setting: str) -> Iterator[_Table]:
    import safetensors

    with safetensors.safe_open(file, framework="numpy") as content:
        name = _pick(file, list(content.keys()), key, usual, what, setting)
        rows = content.get_slice(name)
        shape = tuple(rows.get_shape())
        dtype = rows[:1].dtype if shape else np.dtype(np.float32)
        yield _Table(f"{file} [{name}]", shape, dtype, _forward(lambda start, end: rows[start:end]))


def _forward(read_range: Callable[[int, int], np.ndarray]) -> Callable[[int], np.ndarray]:
    position = 0

    def read(rows: int) -> np.ndarray:
        nonlocal position
        position += rows
        return read_range(position - rows, position)

    return read


def _read_npy_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


def _refuse_objects(file: Path, name: str, dtype: np.dtype, fortran: bool) -> None:
    if dtype.hasobject or fortran:
        raise DataError(
            f"{file} [{name}]: expected a plain C-ordered array, got "
            f"{'Python objects' if dtype.hasobject else 'Fortran order'}; save it again with numpy.ascontiguousarray."
        )


def _pick(file: Path, names: Sequence[str], key: str | None, usual: Sequence[str], what: str, setting: str) -> str:
    shown = ", ".join(names[:8]) or "nothing"
    if key is not None:
        if key not in names:
            raise DataError(f"{file}: no array named '{key}' ({setting}) in it, it holds {shown}.")
        return key
    found = [name for name in usual if name in names]
    if not found:
        raise DataError(
            f"{file}: none of its arrays has a usual name for {what} ({', '.join(usual[:5])} …), it holds {shown}; "
            f"set {setting}."
        )
    return found[0]
