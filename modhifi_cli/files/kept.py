"""What is kept of long work: cells named by what made them, and runs that are skipped, continued or recorded as failed.

A *cell* is a JSON file; what cannot be read as one, or was asked in another way, is as good as none and is made again.
A *job* is a run folder: finished ones are skipped, an interrupted one goes on, and how it ended stands in a record.
"""

import hashlib
import json
import shutil
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from modhifi_cli.errors import ModHiFiError
from modhifi_cli.files.artifacts import INCOMPLETE, write_json, write_text

FINISHED = ("finished", "finished before")


def digest(plain: Any, length: int = 16) -> str:
    """A name for what made a cell: the same for equal plain values.

    Args:
        plain: JSON-able; anything else counts by its text.
        length: Hexadecimal digits, at most 64.
    """
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:length]


def read_cell(path: Path, needs: Collection[str], **same: Any) -> dict[str, Any] | None:
    """A finished cell, or None.

    Args:
        path: Its file.
        needs: Keys that it must have.
        same: What it must hold to be the one that is asked for.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and set(needs) <= found.keys()
    # What was asked has been through JSON in the file, so it is compared as JSON leaves it.
    wanted = json.loads(json.dumps(same, default=str))
    return found if whole and all(found.get(key) == value for key, value in wanted.items()) else None


def kept_cell(
    path: Path, make: Callable[[], dict[str, Any]], needs: Collection[str], **same: Any
) -> dict[str, Any]:
    """A cell from its file, or made, written and read back as a later command will read it; arguments as `read_cell`."""
    found = read_cell(path, needs, **same)
    if found is None:
        write_json(path, make())
        found = read_cell(path, needs, **same)
        assert found is not None, f"{path} does not hold what was written"
    return found


def keep_job(
    final: Path, record: Path, about: Mapping[str, Any], make: Callable[[str | None], None], *, resumable: bool = True,
    known: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Make one run unless it is finished, continue it if it was interrupted, and record how it ended.

    Args:
        final: The run's folder.
        record: JSON file of the record; the traceback of a defect lies beside it as text.
        about: What else the record says.
        make: Makes the run, given the folder to resume or None.
        resumable: Whether the run can be continued.
        known: Called where the run is finished already; may refuse it.

    Returns:
        The record: `about` with ``status`` (``finished``, ``finished before`` or ``failed``) and ``message``.

    Raises:
        KeyboardInterrupt: After the record says so.
    """
    outcome = {**about, "status": "running", "message": ""}
    write_json(record, outcome)
    try:
        if final.is_dir():
            known()
            outcome["status"] = "finished before"
        else:
            interrupted = final.with_name(final.name + INCOMPLETE)
            going_on = resumable and (interrupted / "config.yaml").exists()
            if interrupted.exists() and not going_on:
                shutil.rmtree(interrupted)  # it ended before anything that is worth keeping
            make(str(interrupted) if going_on else None)
            outcome["status"] = "finished"
    except KeyboardInterrupt:
        outcome["status"] = "interrupted"
        raise
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, ModHiFiError):
            # A defect of ours must not be hidden by the others: its traceback is kept beside the record.
            beside = record.with_suffix(".txt")
            write_text(beside, traceback.format_exc())
            told = f"{type(error).__name__}: {told} (see {beside.parent.name}/{beside.name})."
        outcome |= {"status": "failed", "message": told}
    finally:
        write_json(record, outcome)
    return outcome
