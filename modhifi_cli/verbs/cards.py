"""Which card a job runs on, and what the processes of one run owe each other when it ends.

Jobs of a sweep that run side by side each hold a card's lock for as long as they last, so a job takes a card that is
free and waits where none is. Processes that `torchrun` started for one run end together: the one that fails says why.
"""

import contextlib
import copy
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from modhifi_cli.errors import ConfigError, EndedElsewhere

_FAILED = "modhifi/failed"  # where a process leaves word for the others before it ends
_WAIT = 0.5  # seconds between two looks for a free card


@contextlib.contextmanager
def own_card(settings: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings with a card that no other job holds, for jobs of a sweep side by side; else as they are.

    Args:
        settings: Of the job.
        facts: Of the command; ``"parallel"`` where other jobs run at the same time.
    """
    chosen = copy.deepcopy(dict(settings))
    side_by_side = facts.get("parallel") and chosen["runtime"]["device"] == "cuda" and torch.cuda.is_available()
    if not side_by_side:
        yield chosen
        return
    with _first_free([_identity(number) for number in range(torch.cuda.device_count())]) as number:
        chosen["runtime"]["device"] = f"cuda:{number}"
        yield chosen


@contextlib.contextmanager
def _first_free(names: list[str]) -> Iterator[int]:
    """Number of a card whose lock nobody held; it is held until the block ends, also where the process is killed."""
    folder = Path(tempfile.gettempdir()) / f"modhifi-cards-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ConfigError(
            f"{folder}: expected a folder of your own for the locks of cards, got somebody else's; set TMPDIR."
        )
    while True:
        for number, name in enumerate(names):
            with (folder / name).open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue
                yield number
                return
        time.sleep(_WAIT)


def _identity(number: int) -> str:
    """A card's own name, whatever it is called in this process (CUDA_VISIBLE_DEVICES)."""
    named = getattr(torch.cuda.get_device_properties(number), "uuid", None)
    return str(named or f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')}-{number}").replace("/", "_")


def leave_word(sentence: str) -> None:
    """Tell the other processes of a run why this one ends; nothing where it is alone."""
    if _in_team():
        with contextlib.suppress(RuntimeError):  # whoever kept the words may have ended first
            _store().set(_FAILED, f"process {torch.distributed.get_rank()}: {sentence}")


def ended_elsewhere(error: BaseException) -> EndedElsewhere | None:
    """What to say where an exchange broke off since another process of the run ended; None for any other error."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "TCPStore")
    if not (_in_team() and isinstance(error, RuntimeError) and any(word in str(error) for word in words)):
        return None
    told = "another process of this run ended without a word (was it killed?)"
    with contextlib.suppress(RuntimeError):
        if _store().check([_FAILED]):
            told = _store().get(_FAILED).decode()
    return EndedElsewhere(told)


def part() -> None:
    """Leave the processes of a run, as torch asks for; nothing where there was one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _in_team() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()
