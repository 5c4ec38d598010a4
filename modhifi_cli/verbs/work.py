"""One run of a verb at work: what nearly every step of it looks at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modhifi_cli.console import Console
from modhifi_cli.files import artifacts
from modhifi_cli.records import Edit, ImageSource, LoadedModel


@dataclass(frozen=True)
class Work:
    """A run once its network and samples are there and it has a folder.

    Attributes:
        settings: Of the verb, less what the run has found out to be better.
        loaded: The network as it came, with its description.
        calibration: The samples that edits are computed from.
        evaluation: What networks are measured on, or None.
        device: Where forwards run.
        place: The run's folder.
        dense_hash: SHA-256 of the weights before the first edit.
        console: Who is told.
    """

    settings: Mapping[str, Any]
    loaded: LoadedModel
    calibration: ImageSource
    evaluation: ImageSource | None
    device: torch.device
    place: artifacts.RunDirectory
    dense_hash: str
    console: Console


@dataclass(frozen=True)
class Cut:
    """What cutting came to.

    Attributes:
        summary: Of the task.
        edits: All of them in order.
        predicted: By group, the error that its width was predicted to cost; empty where nothing was predicted.
        trials: A row for every trial of a search.
    """

    summary: Any
    edits: list[Edit]
    predicted: Mapping[str, float]
    trials: Sequence[Mapping[str, Any]] = ()
