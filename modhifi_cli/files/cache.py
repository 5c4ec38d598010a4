"""The user's cache of made calibration data: a folder per set, a file per finished part, and what they were made from.

A set's name is the hash of everything that decides its content (weights, preprocessing, settings, seed), so the same
network and settings never pay twice, more samples of the same settings pay only for what is new, and an interrupted set
goes on behind its last whole part.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from modhifi_cli.data.making import Forgetful, Store
from modhifi_cli.errors import DataError
from modhifi_cli.files import artifacts

AUTO = "auto"
_SETS = "synthetic"
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Held:
    """One set of the cache.

    Attributes:
        folder: Where it lies.
        network: Short name of the network it was made from.
        method: How it was made.
        samples: In its finished parts.
        bytes: On disk.
    """

    folder: Path
    network: str
    method: str
    samples: int
    bytes: int


def directory(asked: str = AUTO) -> Path:
    """The folder of made sets: ``$XDG_CACHE_HOME/modhifi/synthetic``, under ``~/.cache`` without that variable.

    Args:
        asked: ``"auto"``, or a folder to use instead.
    """
    if asked != AUTO:
        return Path(os.path.expanduser(asked))
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "modhifi" / _SETS


def open_store(asked: str | None, name: str, identity: Mapping[str, Any]) -> Store:
    """Where the parts of a set are kept; nothing is written before its first part.

    Args:
        asked: The setting `data.cache`: ``"auto"``, a folder, or None to keep nothing.
        name: Of the network, for the folder.
        identity: JSON-able account of everything that decides the set's content.
    """
    if asked is None:
        return Forgetful()
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    readable = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in name)
    return _Kept(directory(asked) / f"{readable}_{identity.get('method', 'set')}_{digest[:12]}", name, identity)


def held(asked: str = AUTO) -> list[Held]:
    """The sets of the cache, largest first."""
    root, found = directory(asked), []
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if not (folder / _MANIFEST).is_file():
            continue  # not ours: never counted, never removed
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        try:
            told = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            samples = sum(int(part["samples"]) for part in told["parts"].values())
            found.append(Held(folder, str(told["network"]), str(told["identity"]["method"]), samples, size))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            found.append(Held(folder, "damaged", "", 0, size))
    return sorted(found, key=lambda one: -one.bytes)


def clean(asked: str = AUTO) -> int:
    """Remove every set of the cache, damaged ones too; the bytes that were freed.

    Raises:
        DataError: If something cannot be removed.
    """
    freed = 0
    for one in held(asked):
        try:
            shutil.rmtree(one.folder)
        except OSError as error:
            raise DataError(
                f"{one.folder}: cannot be removed ({error.strerror or error}); remove it by hand."
            ) from error
        freed += one.bytes
    return freed


class _Kept:
    """A set's folder."""

    def __init__(self, folder: Path, network: str, identity: Mapping[str, Any]) -> None:
        self._folder, self._network, self._identity = folder, network, identity

    @property
    def place(self) -> str:
        return str(self._folder)

    def read(self, number: int) -> Mapping[str, Tensor] | None:
        """A finished part; DataError if it is damaged."""
        told = self._manifest().get("parts", {}).get(str(number))
        if told is None:
            return None
        file = self._folder / told["file"]
        try:
            content = file.read_bytes()
            if hashlib.sha256(content).hexdigest() != told["sha256"]:
                raise ValueError("other bytes than were written")
            return load_tensors(content)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise self._damaged(file, error) from error

    def write(self, number: int, tensors: Mapping[str, Tensor], seconds: float) -> None:
        """Keep a part, then name it in the manifest: what is named there is whole."""
        content = tensors_to_bytes({key: tensor.contiguous().clone() for key, tensor in tensors.items()})
        file = f"part_{number:04d}.safetensors"
        about = {
            "file": file,
            "sha256": hashlib.sha256(content).hexdigest(),
            "samples": len(next(iter(tensors.values()))),
            "seconds": round(seconds, 2),
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        manifest = self._manifest()
        parts = {**manifest.get("parts", {}), str(number): about}
        try:
            artifacts.make_folder(self._folder)
            artifacts.write_bytes(self._folder / file, content)
            told = {"network": self._network, "identity": dict(self._identity), "parts": parts}
            artifacts.write_json(self._folder / _MANIFEST, told)
        except DataError as error:
            reason = str(error).partition(";")[0]
            raise DataError(
                f"{reason}; give another cache with data.cache=FOLDER, or keep nothing with data.cache=null."
            ) from error

    def _manifest(self) -> dict[str, Any]:
        file = self._folder / _MANIFEST
        if not file.is_file():
            return {}
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            if not all(isinstance(part["file"], str) for part in told["parts"].values()):
                raise ValueError("parts without files")
            return told
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(file, error) from error

    def _damaged(self, file: Path, error: Exception) -> DataError:
        return DataError(
            f"{file}: the cache is damaged ({error}); empty it with modhifi synthesize cache=clean, or give another "
            "with data.cache=FOLDER."
        )
