"""The folder of a run: under another name until it is finished, each edit as it is made, reopened to go on.

A run works in ``NAME.incomplete`` and takes its name when it is finished, so a folder with a plain name is whole. One
process works in it at a time.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from modhifi_cli.errors import DataError
from modhifi_cli.files import manifest
from modhifi_cli.files.disk import append_line, disk, make_folder, refuse_links
from modhifi_cli.files.edits import FOLDER, gather_edits, load_edits, save_edit
from modhifi_cli.files.run_names import INCOMPLETE
from modhifi_cli.records import Edit

_PASSING = (FOLDER, "trials")  # folders that a finished run has no more
_SETTINGS, _RESULTS = "config.yaml", "results.json"  # the last thing that a run writes as it begins, and as it ends

# Folders that this process works in, by device and inode, and the handle whose lock keeps others out. The lock ends with
# the process, however it ends.
_locked: dict[tuple[int, int], int] = {}


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
        if os.path.lexists(final) or os.path.lexists(run.path):
            raise DataError(f"{final}: exists already; choose another output_dir or remove it.")
        make_folder(final.parent)
        try:
            with disk(run.path):
                run.path.mkdir()
        except DataError as error:
            if isinstance(error.__cause__, FileExistsError):
                raise DataError(f"{final}: another process is making it; choose another output_dir.") from error
            raise
        _lock(run.path)
        make_folder(run.path / FOLDER)
        return run

    @classmethod
    def reopen(cls, directory: str | os.PathLike[str], *, alone: bool = True) -> "RunDirectory":
        """Open an interrupted run, named with or without ``.incomplete``.

        Args:
            directory: Its folder.
            alone: Whether to keep other processes out; False for one that only reads beside the one that writes.

        Raises:
            DataError: If there is no such run, it is finished already, it holds nothing yet, or another process is at it.
        """
        given = Path(directory)
        if given.name in ("", ".", ".."):  # a root has no name to take .incomplete from
            raise DataError(f"resume={given}: no run folder; give the folder of an interrupted run (…{INCOMPLETE}).")
        run = cls(given.with_name(given.name.removesuffix(INCOMPLETE)))
        if run.final.is_dir():
            raise DataError(f"resume={given}: this run is finished; there is nothing to resume.")
        if not run.path.is_dir():
            raise DataError(f"resume={given}: no such folder; give the folder of an interrupted run (…{INCOMPLETE}).")
        refuse_links(run.path)
        if not (run.path / _SETTINGS).is_file():
            raise DataError(
                f"resume={given}: the run was ended before anything was saved; remove {run.path} and start again with the "
                "same command without resume."
            )
        if alone:
            _lock(run.path)
            with disk(run.path):  # of a run that was ended between listing its files and taking its name
                (run.path / manifest.NAME).unlink(missing_ok=True)
        return run

    def log(self, text: str) -> None:
        """Add a line with the time to ``run.log``."""
        append_line(self.path / "run.log", text)

    def save_edit(self, edit: Edit, dense_hash: str) -> None:
        """Put one edit on disk, numbered in order; it is whole or absent, never half."""
        save_edit(self.path, edit, dense_hash)

    def load_edits(self) -> tuple[tuple[Edit, ...], str | None]:
        """Edits saved so far, in order, and the hash of the dense weights they belong to (None without edits)."""
        return load_edits(self.path)

    def inside(self, name: str) -> "RunDirectory":
        """A place for edits of its own inside this folder, such as a trial's; it goes when this run is finished."""
        inner = RunDirectory(self.path / name)
        inner.path = inner.final
        make_folder(inner.path / FOLDER)
        return inner

    def discard_if_empty(self) -> None:
        """Remove the folder of a run that ended before its first edit: nothing in it is worth resuming."""
        if not any(self.path.glob("**/edits/*.safetensors")) and not (self.path / _RESULTS).exists():
            self.discard()

    def discard(self) -> None:
        """Remove the folder of a run that has come to nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        _unlock(self.path)

    def finish(self, *, edits: bool = True) -> Path:
        """Gather the edits into one file, list all files with their checksums, and give the folder its name.

        A folder that has appeared under that name meanwhile stays, and so does this one: under the name with a number.

        Args:
            edits: False for a run that edits nothing.

        Returns:
            The folder under its final name.
        """
        if edits:
            gather_edits(self.path)
        manifest.write(self.path, leave_out=_PASSING)
        with disk(self.final):
            final, number = self.final, 2
            while os.path.lexists(final):
                final, number = self.final.with_name(f"{self.final.name}_{number}"), number + 1
            os.rename(self.path, final)
        _unlock(final)
        self.path = self.final = final
        for passing in _PASSING:  # only now: until it has its name, the run can be finished again from them
            shutil.rmtree(self.path / passing, ignore_errors=True)
        return self.final


def run_folder(
    directory: str | os.PathLike[str],
    *,
    needs: Sequence[str] = ("config.yaml", "results.json", "edits.json", "edits.safetensors", "model"),
) -> Path:
    """Check that a folder holds a finished run with the files that are needed, and no links.

    Raises:
        DataError: If it does not exist, is interrupted, lacks files, or holds a link.
    """
    folder = Path(directory)
    named = folder if folder.name else folder.resolve()
    begun = named if named.name.endswith(INCOMPLETE) else named.parent / f"{named.name}{INCOMPLETE}"
    if begun.is_dir() and (begun == named or not folder.is_dir()):
        if not (begun / _SETTINGS).is_file():
            raise DataError(f"run={folder}: this run was ended before anything was saved; start it again.")
        raise DataError(f"run={folder}: this run was interrupted; finish it with the same command and resume={begun}.")
    if not folder.is_dir():
        raise DataError(f"run={folder}: no such folder; give the folder that a run named at its end.")
    for name in needs:
        if not (folder / name).exists():
            raise DataError(f"run={folder}: not a whole run, {name} is missing; restore the folder or run again.")
    refuse_links(folder)
    return folder


def _lock(path: Path) -> None:
    """Keep other processes out of a folder until this one ends or is done with it.

    Raises:
        DataError: If another process is at it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    place = _place(path)
    if place in _locked:  # this very process, which goes on with what it has begun
        os.close(handle)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise DataError(f"resume={path}: another process is working in this folder; wait until it has ended.") from error
    except OSError:  # a file system without locks
        os.close(handle)
        return
    _locked[place] = handle


def _unlock(path: Path) -> None:
    for place, handle in list(_locked.items()):
        known = os.fstat(handle)
        if known.st_nlink == 0 or (os.path.lexists(path) and _place(path) == place):
            os.close(handle)
            del _locked[place]


def _place(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
