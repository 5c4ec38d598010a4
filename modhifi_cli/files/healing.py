"""The state of a healing that is under way, beside the run's edits: one file, replaced as a whole, gone at the end."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from modhifi_cli.engine.healing import HealingState
from modhifi_cli.errors import DataError
from modhifi_cli.files.disk import write_bytes

NAME = "healing.safetensors"


def save_state(folder: Path, state: HealingState) -> None:
    """Put a state in the run's folder, in the place of the one before.

    Raises:
        DataError: If the disk is full or the place cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
    write_bytes(folder / NAME, save(tensors, {"facts": json.dumps(dict(state.facts))}))


def load_state(folder: Path) -> HealingState | None:
    """The state that an interrupted run left, or None.

    Raises:
        DataError: If it is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            return HealingState(tensors, json.loads(file.metadata()["facts"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); remove it to begin the healing again.") from error


def forget_state(folder: Path) -> None:
    """Remove the state once its outcome is among the run's edits."""
    (folder / NAME).unlink(missing_ok=True)
