"""The one way to the disk for everything in `files/`: whole or absent, no link followed, ordinary files alone.

Every file is written beside its place and then moved there. Nothing is pickled: tensors are safetensors, the rest is
JSON or text. What is read may come from a stranger: a link, a pipe or a device in place of a file is refused before it
is opened for reading, and damaged or wrong-typed content is one sentence.
"""

import dataclasses
import hashlib
import json
import os
import stat
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from modhifi_cli.errors import DataError, is_whole

FORMAT_VERSION = 1
# Large pieces: between two of them a thread has to wait for the interpreter, up to 5 ms each time.
_PIECE = 8 * 2**20
_LARGEST_TEXT = 256 * 2**20  # of JSON and YAML that a run wrote; rows of a study are the largest


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        DataError: If that is not possible.
    """
    with disk(path):
        path.mkdir(parents=True, exist_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent: beside its place, flushed, then moved there.

    A link under either name is replaced, never followed.

    Raises:
        DataError: If the disk is full or the place cannot be written.
    """
    temporary = path.with_name(path.name + ".writing")
    with disk(path):
        try:
            temporary.unlink(missing_ok=True)
            # O_EXCL: a link that appears in between is not followed either.
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with open(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, for text."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As `write_bytes`, for a JSON object."""
    write_text(path, json.dumps(content, indent=2, default=as_json) + "\n")


def append_line(path: Path, text: str) -> None:
    """Add a line with the time to a log.

    Raises:
        DataError: If it is a link or cannot be written.
    """
    with disk(path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(handle, "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def read_bytes(path: Path) -> bytes:
    """The content of an ordinary file.

    Raises:
        DataError: If it is missing, a link, no ordinary file (a pipe would wait for ever), or unreadable.
    """
    with _ordinary(path) as file:
        return file.read()


def digest_of(path: Path) -> str:
    """SHA-256 of an ordinary file, without holding it in memory.

    Raises:
        DataError: As `read_bytes`.
    """
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with _ordinary(path) as file:
        while size := file.readinto(piece):
            digest.update(piece[:size])
    return digest.hexdigest()


@contextmanager
def _ordinary(path: Path) -> Iterator[Any]:
    try:
        if stat.S_ISLNK(path.lstat().st_mode):
            raise DataError(f"{path}: a link, and no link is followed; put the file itself there.")
        # O_NONBLOCK: opening a pipe that nobody writes would wait for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise DataError(f"{path}: no ordinary file; put the file itself there.")
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); restore the run folder.") from error


def read_text(path: Path) -> str:
    """Text of a file of a run.

    Raises:
        DataError: If it is missing or unreadable.
    """
    return as_text(read_bytes(path), path)


def as_text(content: bytes, path: Path) -> str:
    """Text from what was read.

    Raises:
        DataError: If it is no UTF-8, or too long for anything that a run writes.
    """
    if len(content) > _LARGEST_TEXT:
        raise DataError(f"{path}: {len(content)} bytes are more than a run writes there; restore the run folder.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read ({error}); restore the run folder.") from error


def read_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON object that a run wrote.

    Args:
        path: The file.
        what: What it should be, for messages.

    Raises:
        DataError: If it is missing or damaged, or of a newer format.
    """
    if not os.path.lexists(path):
        raise DataError(f"{path.parent}: not {what}, {path.name} is missing.")
    return as_object(read_bytes(path), path)


def as_object(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object from what was read.

    Raises:
        DataError: If it is none, or of a newer format.
    """
    try:
        found = json.loads(as_text(content, path))
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of more than 4,300 digits
        raise DataError(f"{path}: damaged, not JSON ({error}); restore the run folder.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: damaged, expected a JSON object; restore the run folder.")
    version = found.get("format_version", FORMAT_VERSION)
    if not is_whole(version):
        raise DataError(f"{path}: damaged, its format_version is {version!r:.40}; restore the run folder.")
    if version > FORMAT_VERSION:
        raise DataError(
            f"{path}: written in format {version!r:.40}, this version reads up to {FORMAT_VERSION}; install a newer "
            "modhifi."
        )
    return found


def as_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """Tensors from the bytes of a safetensors file.

    Raises:
        DataError: If the bytes are none.
    """
    try:
        return load_tensors(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise DataError(f"{path}: damaged, not a whole safetensors file ({error}); restore the run folder.") from error


def as_metadata(content: bytes, path: Path) -> dict[str, str]:
    """The metadata of a safetensors file's header, from its bytes.

    Raises:
        DataError: If the header is damaged.
    """
    try:
        (length,) = struct.unpack("<Q", content[:8])
        return dict(json.loads(content[8 : 8 + length]).get("__metadata__") or {})
    except (struct.error, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: damaged, not a whole safetensors file ({error}); restore the run folder.") from error


def refuse_links(folder: Path) -> None:
    """Refuse a folder that holds a link, a pipe or a device anywhere: what lies in it is what it says it is.

    The folder itself may be reached through a link: that is what the user named.

    Raises:
        DataError: Naming the first.
    """
    waiting = [folder]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError as error:
            raise DataError(f"{folder}: cannot be read ({error.strerror or error}).") from error
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            elif entry.is_symlink():
                raise DataError(
                    f"{entry.path}: a link, and no link in a run folder is followed; copy the folder with the files "
                    "themselves (cp -rL)."
                )
            elif not entry.is_file(follow_symlinks=False):
                raise DataError(f"{entry.path}: no ordinary file; remove it from the run folder.")


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """What the system says about a place that cannot be written, as one sentence.

    Raises:
        DataError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot be written ({reason}); free the place or set output_dir=FOLDER.") from error


def to_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    # clone: safetensors refuses tensors that share memory (tied weights, slices of one storage).
    apart = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    return tensors_to_bytes(apart, metadata)


def as_json(value: Any) -> Any:
    """What `json` cannot write by itself, as something that it can."""
    if isinstance(value, Tensor):
        return value.tolist()
    if hasattr(value, "item"):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset, Mapping)):
        return dict(value) if isinstance(value, Mapping) else sorted(value)
    return str(value)
