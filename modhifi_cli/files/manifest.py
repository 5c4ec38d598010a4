"""The list of a folder's files with their SHA-256, ``checksums.json``: written when the folder is whole, asked on reading.

A file that the list names is never used with other bytes than were written. The list also carries a mark that only a
secret of this user on this machine can make, so a folder that was made here is told from one that came from elsewhere;
settings of the latter may not lead out of it (`settings/foreign.py`).
"""

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from modhifi_cli.errors import DataError
from modhifi_cli.files.disk import (
    FORMAT_VERSION,
    as_object,
    as_tensors,
    as_text,
    digest_of,
    read_bytes,
    read_object,
    refuse_links,
    write_json,
)

NAME = "checksums.json"
_KEY_BYTES = 32
_WEIGHTS = re.compile(r"(weights|model(-\d+-of-\d+)?)\.safetensors")  # files of a saved network's weights
_WORTH_A_THREAD = 4 * 2**20  # bytes; fewer are hashed in less time than a busy machine takes to start one


@dataclass(frozen=True)
class Checked:
    """A folder's files as they were written.

    Attributes:
        folder: The folder.
        digests: SHA-256 by path below it, with ``/``; None for a folder without a list, whose files are read as they are.
        replaced: A file of weights, as in `digests`, that the caller brings in place of what was written; or "".
    """

    folder: Path
    digests: Mapping[str, str] | None
    replaced: str = ""

    def bytes_of(self, name: str) -> bytes:
        """A file's content, if it is what was written.

        Raises:
            DataError: If it is missing, unreadable, changed, or not listed.
        """
        path = self.folder / name
        if not os.path.lexists(path):
            raise DataError(f"{self.folder}: not whole, {name} is missing; restore the folder.")
        content = read_bytes(path)
        if self.digests is not None:
            self._compare(name, hashlib.sha256(content).hexdigest())
        return content

    def text(self, name: str) -> str:
        """As `bytes_of`, as text."""
        return as_text(self.bytes_of(name), self.folder / name)

    def object(self, name: str) -> dict[str, Any]:
        """As `bytes_of`, a JSON object."""
        return as_object(self.bytes_of(name), self.folder / name)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As `bytes_of`, a safetensors file's."""
        return as_tensors(self.bytes_of(name), self.folder / name)

    @contextmanager
    def tensors_meanwhile(self, name: str) -> Iterator[dict[str, Tensor]]:
        """As `tensors`, compared in another thread while the block works with them.

        Building a network and hashing its weights take about as long, and hashing needs no lock of the interpreter. What
        the block makes counts only if it is left without an error.

        Raises:
            DataError: As `bytes_of`, at the end of the block, and instead of what damaged tensors made the block raise.
        """
        path = self.folder / name
        if not os.path.lexists(path) or os.lstat(path).st_size < _WORTH_A_THREAD:
            yield self.tensors(name)
            return
        content = read_bytes(path)
        with self._meanwhile(lambda: self._compare(name, hashlib.sha256(content).hexdigest())):
            yield as_tensors(content, path)

    @contextmanager
    def checked_meanwhile(self, names: Iterable[str]) -> Iterator[None]:
        """As `check`, in another thread while the block reads the same files; errors as `tensors_meanwhile`."""
        with self._meanwhile(lambda: self.check(names)):
            yield

    @contextmanager
    def _meanwhile(self, compare: Callable[[], None]) -> Iterator[None]:
        if self.digests is None:
            yield
            return
        with ThreadPoolExecutor(1) as other:
            comparison = other.submit(compare)
            try:
                yield
            except Exception:
                comparison.result()
                raise
            comparison.result()

    def check(self, names: Iterable[str] | None = None) -> None:
        """Compare files with the list.

        Args:
            names: Of files; None for all that are listed.

        Raises:
            DataError: About the first that is missing or changed.
        """
        for name in self.digests or () if names is None else names:
            if not os.path.lexists(self.folder / name):
                raise DataError(f"{self.folder}: not whole, {name} is missing; restore the folder.")
            if self.digests is not None:
                self._compare(name, digest_of(self.folder / name))

    def strangers(self) -> list[str]:
        """Files in the folder that the list does not name, sorted; none without a list."""
        if self.digests is None:
            return []
        return sorted(set(_files(self.folder)) - self.digests.keys() - {NAME, f"model/{NAME}"})

    def _compare(self, name: str, found: str) -> None:
        assert self.digests is not None
        written = self.digests.get(name)
        if written is None:
            raise DataError(f"{self.folder / name}: not in {NAME}, so it was not written with the rest; remove it.")
        if found != written and name != self.replaced:
            path = self.folder / name
            told = f"its sha256 is {found[:12]} and was {written[:12]} when it was written"
            if _holds_weights(path):
                raise DataError(
                    f"{path}: holds other weights than were saved, {told}; to go on with them (the network was trained "
                    f"since) say model=run model.run={self.folder} model.weights={path}, else restore the run folder."
                )
            raise DataError(f"{path}: damaged or changed, {told}; restore the run folder.")


def write(folder: Path, *, leave_out: Collection[str] = ()) -> None:
    """List every file of a folder that is whole.

    Args:
        folder: The folder.
        leave_out: Folders directly below it that are about to go.

    Raises:
        DataError: If a file cannot be read, or the list not be written.
    """
    names = [name for name in _files(folder) if name != NAME and name.partition("/")[0] not in leave_out]
    _put(folder, {name: digest_of(folder / name) for name in names}, mark=True)


def renew(folder: Path, names: Iterable[str]) -> None:
    """Enter files that were written into a finished folder afterwards, such as its page made again.

    Folders without a list stay without one.

    Raises:
        DataError: If the list is damaged.
    """
    if not os.path.lexists(folder / NAME):
        return
    digests = _digests(folder)
    ours = made_here(folder)  # before: somebody else's folder does not become ours by a page
    _put(folder, digests | {name: digest_of(folder / name) for name in names}, mark=ours)


def checked(folder: Path, *, unverified: bool = False, replaced: str | os.PathLike[str] | None = None) -> Checked:
    """The folder's files by its list.

    Args:
        folder: A run folder or its ``model`` folder.
        unverified: Whether a folder without a list may be read as it is.
        replaced: A file of weights that the user names himself; where it lies in the folder, its bytes are his affair.

    Raises:
        DataError: If there is no list and nobody said that it may be missing, or it is damaged.
    """
    refuse_links(folder)
    if os.path.lexists(folder / NAME):
        inside = None if replaced is None else Path(os.path.relpath(replaced, folder))
        named = inside.as_posix() if inside is not None and _WEIGHTS.fullmatch(inside.name) else ""
        return Checked(folder, _digests(folder), named)
    if not unverified:
        raise DataError(
            f"{folder}: has no {NAME}, so nobody can tell whether its files are what was written (older versions wrote "
            "none); to read it all the same say unverified=true, in Python load_model(folder, unverified=True)."
        )
    return Checked(folder, None)


def made_here(folder: Path) -> bool:
    """Whether this user made the folder on this machine, and its settings are what they were then."""
    if not os.path.lexists(folder / NAME):
        return False
    told = read_object(folder / NAME, "a folder with checksums")
    key, mark = _key(make=False), told.get("mark")
    digests = _digests(folder)
    if key is None or not isinstance(mark, str) or not hmac.compare_digest(mark, _mark(key, digests)):
        return False
    return "config.yaml" not in digests or digest_of(folder / "config.yaml") == digests["config.yaml"]


def _holds_weights(path: Path) -> bool:
    """Whether a file of a network's weights is whole and holds finite numbers."""
    if not _WEIGHTS.fullmatch(path.name):
        return False
    try:
        tensors = as_tensors(read_bytes(path), path)
    except DataError:
        return False
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values() if tensor.is_floating_point())


def _digests(folder: Path) -> dict[str, str]:
    files = read_object(folder / NAME, "a folder with checksums").get("files")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise DataError(f"{folder / NAME}: damaged, it lists no files; restore the run folder.")
    if any(name.startswith("/") or ".." in name.split("/") for name in files):
        raise DataError(f"{folder / NAME}: names a file outside the folder; it was not written by modhifi.")
    return files


def _put(folder: Path, digests: Mapping[str, str], *, mark: bool) -> None:
    files = dict(sorted(digests.items()))
    key = _key(make=True) if mark else None
    told = {"mark": _mark(key, files)} if key is not None else {}
    write_json(folder / NAME, {"format_version": FORMAT_VERSION, "files": files, **told})


def _mark(key: bytes, digests: Mapping[str, str]) -> str:
    return hmac.new(key, json.dumps(digests, sort_keys=True).encode(), "sha256").hexdigest()


def _key(*, make: bool) -> bytes | None:
    """The user's secret, ``$XDG_STATE_HOME/modhifi/key``; None where there is none and none can be made."""
    root = os.environ.get("XDG_STATE_HOME")
    path = (Path(root) if root else Path.home() / ".local" / "state") / "modhifi" / "key"
    try:
        if make and not os.path.lexists(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
            try:
                os.link(temporary, path)  # whole or absent, and the first of two processes wins
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
        key = read_bytes(path)
    except (OSError, DataError):
        return None
    return key if len(key) == _KEY_BYTES else None


def _files(folder: Path) -> list[str]:
    found = []
    for place, _, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        found += [(inside / name).as_posix() for name in names]
    return sorted(found)
