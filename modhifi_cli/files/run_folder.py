"""The folder of a run: under another name until it is finished, each edit as it is made, reopened to go on.

A run works in ``NAME.incomplete`` and takes its name when it is finished, so a folder with a plain name is whole.
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from modhifi_cli.errors import DataError
from modhifi_cli.files.disk import (
    FORMAT_VERSION,
    disk,
    make_folder,
    to_bytes,
    write_bytes,
    write_json,
)
from modhifi_cli.files.edits import load_edits, pack_edit
from modhifi_cli.records import Edit

INCOMPLETE = ".incomplete"


class RunDirectory:
    """The folder of one run, under a temporary name until `finish`.

    Attributes:
        final: Where the folder will be.
        path: Where it is now.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = final.with_name(final.name + INCOMPLETE)

    @classmethod
    def create(cls, final: Path) -> "RunDirectory":
        """Make a new, empty run folder.

        Raises:
            DataError: If it exists already or cannot be made.
        """
        run = cls(final)
        if final.exists() or run.path.exists():
            raise DataError(f"{final}: exists already; choose another output_dir or remove it.")
        make_folder(run.path)
        make_folder(run.path / "edits")
        return run

    @classmethod
    def reopen(cls, directory: str | os.PathLike[str]) -> "RunDirectory":
        """Open an interrupted run, named with or without ``.incomplete``.

        Raises:
            DataError: If there is no such run, or it is finished already.
        """
        given = Path(directory)
        run = cls(given.with_name(given.name.removesuffix(INCOMPLETE)))
        if run.final.is_dir():
            raise DataError(f"resume={given}: this run is finished; there is nothing to resume.")
        if not run.path.is_dir():
            raise DataError(f"resume={given}: no such folder; give the folder of an interrupted run (…{INCOMPLETE}).")
        return run

    def log(self, text: str) -> None:
        """Add a line with the time to ``run.log``."""
        with disk(self.path / "run.log"), open(self.path / "run.log", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def save_edit(self, edit: Edit, dense_hash: str) -> None:
        """Put one edit on disk, numbered in order; it is whole or absent, never half."""
        tensors, described = pack_edit(edit)
        number = len(list((self.path / "edits").glob("*.safetensors")))
        metadata = {"edit": json.dumps(described), "dense_sha256": dense_hash, "format_version": str(FORMAT_VERSION)}
        write_bytes(self.path / "edits" / f"{number:04d}.safetensors", to_bytes(tensors, metadata))

    def load_edits(self) -> tuple[tuple[Edit, ...], str | None]:
        """Edits saved so far, in order, and the hash of the dense weights they belong to (None without edits)."""
        return load_edits(self.path)

    def inside(self, name: str) -> "RunDirectory":
        """A place for edits of its own inside this folder, such as a trial's; it goes when this run is finished."""
        inner = RunDirectory(self.path / name)
        inner.path = inner.final
        make_folder(inner.path / "edits")
        return inner

    def discard_if_empty(self) -> None:
        """Remove the folder of a run that ended before its first edit: nothing in it is worth resuming."""
        if not any(self.path.glob("**/edits/*.safetensors")):
            self.discard()

    def discard(self) -> None:
        """Remove the folder of a run that has come to nothing."""
        shutil.rmtree(self.path, ignore_errors=True)

    def finish(self, *, edits: bool = True) -> Path:
        """Gather the edits into one file and give the folder its name.

        Args:
            edits: False for a run that edits nothing.

        Returns:
            The folder under its final name.
        """
        if edits:
            self._gather_edits()
        with disk(self.final):
            for passing in ("edits", "trials"):
                shutil.rmtree(self.path / passing, ignore_errors=True)
            os.replace(self.path, self.final)
        self.path = self.final
        return self.final

    def _gather_edits(self) -> None:
        edits, dense_hash = self.load_edits()
        tensors: dict[str, Tensor] = {}
        described = []
        for index, edit in enumerate(edits):
            own, about = pack_edit(edit)
            tensors |= {f"{index}/{key}": value for key, value in own.items()}
            described.append(about)
        write_bytes(self.path / "edits.safetensors", to_bytes(tensors))
        write_json(
            self.path / "edits.json",
            {"format_version": FORMAT_VERSION, "dense_sha256": dense_hash, "edits": described},
        )


def run_folder(
    directory: str | os.PathLike[str],
    *,
    needs: Sequence[str] = ("config.yaml", "results.json", "edits.json", "edits.safetensors", "model"),
) -> Path:
    """Check that a folder holds a finished run with the files that are needed.

    Raises:
        DataError: If it does not exist, is interrupted, or lacks files.
    """
    folder = Path(directory)
    if folder.name.endswith(INCOMPLETE) or folder.with_name(folder.name + INCOMPLETE).is_dir():
        raise DataError(f"run={folder}: this run was interrupted; finish it with the same command and resume={folder}.")
    if not folder.is_dir():
        raise DataError(f"run={folder}: no such folder; give the folder that a run named at its end.")
    for name in needs:
        if not (folder / name).exists():
            raise DataError(f"run={folder}: not a whole run, {name} is missing; restore the folder or run again.")
    return folder
