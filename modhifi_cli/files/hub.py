"""The Hugging Face hub: a saved network's folder from it and to it."""

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from modhifi_cli.errors import ConfigError, DataError, reason
from modhifi_cli.files import cache
from modhifi_cli.files.disk import disk, make_folder

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Upload:
    """What goes to the hub.

    Attributes:
        folder: The saved network.
        repo: ``USER/NAME``.
        files: Name → bytes.
    """

    folder: Path
    repo: str
    files: Mapping[str, int]


def is_name(given: str) -> bool:
    """Whether something that is no folder here reads like a name on the hub."""
    return _NAME.fullmatch(given) is not None and not given.startswith(".")


def fetched(name: str) -> Path:
    """The folder of a network on the hub, from the cache or downloaded: a copy in this package's cache, without links.

    Args:
        name: ``"USER/NAME"``.

    Raises:
        ConfigError: If the package that fetches it is not installed.
        DataError: If there is none of that name, no connection, or the cache cannot be written.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(f"{name}: no such folder here, and the hub needs huggingface_hub ({error}).") from error
    try:
        there = Path(snapshot_download(name))
    except Exception as error:  # errors of HTTP, of the hub, of a cache without a connection
        raise DataError(
            f"{name}: no such folder here, and the hub does not give it ({type(error).__name__}: {reason(error)}); check "
            "the name, or connect once."
        ) from error
    return _with_files(there, cache.directory().parent / "hub" / name.replace("/", "--") / there.name)


def _with_files(there: Path, here: Path) -> Path:
    """A copy of a snapshot whose files are files: the hub's cache holds links, and readers of folders follow none."""
    if not here.is_dir():
        make_folder(here.parent)
        with disk(here), tempfile.TemporaryDirectory(dir=here.parent) as place:
            shutil.copytree(there, Path(place) / here.name)
            (Path(place) / here.name).replace(here)
    return here


def plan(folder: Path, repo: str) -> Upload:
    """What an upload would hold.

    Raises:
        ConfigError: If the repository's name is not USER/NAME.
    """
    if not is_name(repo):
        raise ConfigError(f"repo={repo}: expected USER/NAME, as the hub names repositories, such as repo=ada/small-llama.")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return Upload(folder, repo, {path.relative_to(folder).as_posix(): path.stat().st_size for path in files})


def upload(planned: Upload, *, private: bool) -> None:
    """Make the repository if needed and upload the folder.

    Raises:
        ConfigError: If nobody is logged in, or the login may not write there.
        DataError: If the hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise ConfigError(
            f"repo={planned.repo}: nobody is logged in to the hub here; run `hf auth login` or set HF_TOKEN, or look first "
            "with dry_run=true."
        )
    api = HfApi()
    try:
        api.create_repo(planned.repo, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=planned.folder,
            repo_id=planned.repo,
            commit_message="Add a pruned network",
            allow_patterns=list(planned.files),
        )
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ConfigError(
                f"repo={planned.repo}: the hub does not let this login write there (HTTP {status}); use a token that may, "
                "or a repository of your own."
            ) from error
        raise DataError(f"repo={planned.repo}: the hub answered {reason(error)}; try again later.") from error
    except Exception as error:  # no connection, in the words of several libraries
        whole = f"{len(planned.files)} files, {sum(planned.files.values()):,} bytes"
        raise DataError(
            f"repo={planned.repo}: the hub cannot be reached ({type(error).__name__}); {whole} from {planned.folder} would "
            "be uploaded, type the same when connected."
        ) from error

