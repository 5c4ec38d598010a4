"""One run of a verb at work: what nearly every step of it looks at."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from modhifi_cli.console import Console
from modhifi_cli.files import artifacts
from modhifi_cli.records import ImageSource, LoadedModel


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
