"""What a source that makes its samples up from the network itself is given: the network, whom to tell, where to keep.

A source asks for it by a parameter called `making`; sources that only read files never see a network.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modhifi_cli.records import Progress

_MADE_UP = ("inversion", "class_inversion", "generated", "generator", "procedural")  # sources of such samples


def made_up(protocol: Mapping[str, Any]) -> bool:
    """Whether a set's account (`ImageSource.protocol`) says that its samples, or some of a mixture, are not of the world."""
    named = protocol.get("made_by") or protocol.get("source")
    return named in _MADE_UP or any(made_up(part) for part in protocol.get("parts", ()))


def made_ahead(path: Path) -> dict[str, str]:
    """``{"made_by": source}`` for the account of images that ``modhifi synthesize`` wrote to a file or folder, or nothing."""
    for folder in (path, path.parent):
        try:
            told = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if (source := told["images"]["source"]) in _MADE_UP:
                return {"made_by": source}
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue  # no such file, or somebody else's
    return {}


class Store(Protocol):
    """Finished parts of a set, by number, so that nothing is made twice."""

    @property
    def place(self) -> str | None:
        """Where the parts lie, for messages; None where nothing is kept."""

    def read(self, number: int) -> Mapping[str, Tensor] | None:
        """A finished part, or None where there is none yet."""

    def write(self, number: int, tensors: Mapping[str, Tensor], seconds: float) -> None:
        """Keep a finished part and what it took to make."""


def kept_or_made(
    store: Store, number: int, make: Callable[[], Mapping[str, Tensor]]
) -> tuple[Mapping[str, Tensor], bool]:
    """A part of a set from its store, or made now and kept; and whether it was made."""
    part = store.read(number)
    if part is not None:
        return part, False
    began = time.perf_counter()
    part = make()
    store.write(number, part, time.perf_counter() - began)
    return part, True


class Forgetful:
    """A store that keeps nothing."""

    place = None

    def read(self, number: int) -> None:
        """Nothing, always."""

    def write(self, number: int, tensors: Mapping[str, Tensor], seconds: float) -> None:
        """Nothing is kept."""


def _keep_nothing(cache: str | None, name: str, identity: Mapping[str, Any]) -> Store:
    return Forgetful()


@dataclass(frozen=True)
class Making:
    """Network and listeners of a source that makes its samples up.

    Attributes:
        model: The dense network in evaluation mode; it is copied, never changed.
        name: Its short name.
        device: Where to run it.
        progress: Told after every step of the work.
        note: Told a sentence for the user.
        store: ``(data.cache, name, identity)`` → where parts of the set with exactly this identity are kept.
    """

    model: nn.Module
    name: str = "network"
    device: torch.device = torch.device("cpu")
    progress: Callable[[Progress], None] = lambda step: None
    note: Callable[[str], None] = lambda text: None
    store: Callable[[str | None, str, Mapping[str, Any]], Store] = _keep_nothing
