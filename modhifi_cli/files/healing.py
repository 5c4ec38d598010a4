"""The state of a healing that is under way, beside the run's edits: one file, replaced as a whole, gone at the end."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from modhifi_cli.engine.healing import HealingState
from modhifi_cli.errors import DataError
from modhifi_cli.files.disk import as_metadata, as_tensors, read_bytes, to_bytes, write_bytes

NAME = "healing.safetensors"


def save_state(folder: Path, state: HealingState) -> None:
    """Put a state in the run's folder, in the place of the one before.

    Raises:
        DataError: If the disk is full or the place cannot be written.
    """
    facts = json.dumps(dict(state.facts))
    metadata = {"facts": facts, "sha256": _digest(state.tensors, facts)}
    write_bytes(folder / NAME, to_bytes(state.tensors, metadata))


def load_state(folder: Path) -> HealingState | None:
    """The state that an interrupted run left, or None.

    Raises:
        DataError: If it is damaged.
    """
    path = folder / NAME
    if not os.path.lexists(path):
        return None
    try:
        content = read_bytes(path)
        tensors, metadata = as_tensors(content, path), as_metadata(content, path)
        if _digest(tensors, metadata["facts"]) != metadata["sha256"]:
            raise ValueError("its checksum is another")
        return HealingState(tensors, json.loads(metadata["facts"]))
    except (DataError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({str(error).removeprefix(f'{path}: ')}); remove it to begin the healing again.") from error


def forget_state(folder: Path) -> None:
    """Remove the state once its outcome is among the run's edits."""
    (folder / NAME).unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor], facts: str) -> str:
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(to_bytes({"": tensor}))
    return digest.hexdigest()
