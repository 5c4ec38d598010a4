"""Reading and writing files so that each is whole or absent, and what is damaged is named.

Every file is written beside its place and then moved there. Nothing is pickled: tensors are safetensors, the rest is
JSON or text.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from modhifi_cli.errors import DataError

FORMAT_VERSION = 1


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        DataError: If that is not possible.
    """
    with disk(path):
        path.mkdir(parents=True, exist_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent: beside its place, flushed, then moved there.

    Raises:
        DataError: If the disk is full or the place cannot be written.
    """
    temporary = path.with_name(path.name + ".writing")
    with disk(path):
        try:
            with open(temporary, "wb") as file:
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


def read_text(path: Path) -> str:
    """Text of a file of a run.

    Raises:
        DataError: If it is missing or unreadable.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore the run folder.") from error


def read_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON object that a run wrote.

    Args:
        path: The file.
        what: What it should be, for messages.

    Raises:
        DataError: If it is missing or damaged.
    """
    return read_json(path, what)


def read_json(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path.parent}: not {what}, {path.name} is missing.")
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: damaged, not JSON ({error}); restore the run folder.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: damaged, expected a JSON object; restore the run folder.")
    if content.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
        raise DataError(
            f"{path}: written in format {content['format_version']}, this version reads up to {FORMAT_VERSION}; "
            "install a newer modhifi."
        )
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); restore the run folder.") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{path}: damaged, not a whole safetensors file ({error}); restore the run folder.") from error


def read_metadata(path: Path) -> Mapping[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return file.metadata() or {}


def to_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    # clone: safetensors refuses tensors that share memory (tied weights, slices of one storage).
    apart = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    return tensors_to_bytes(apart, metadata)


@contextmanager
def disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot be written ({reason}); free the place or set output_dir=FOLDER.") from error


def as_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if hasattr(value, "item"):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset, Mapping)):
        return dict(value) if isinstance(value, Mapping) else sorted(value)
    return str(value)
