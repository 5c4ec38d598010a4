"""What the runs of one comparison share: the network, the images, and the measurements of the dense network."""

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modhifi_cli.console import Console
from modhifi_cli.evaluation.forward import RememberedLogits
from modhifi_cli.files import artifacts, kept
from modhifi_cli.records import ImageSource, LoadedModel, Measurement
from modhifi_cli.verbs import pieces

_ALONE = ("top1", "size")  # measurements of one network at a time: the dense one's are taken once for all cells


class Shared:
    """What all cells of a process have in common, made when first needed: the network, images, the dense measurements.

    Args:
        settings: Of the comparison.
        file: Of the dense measurements.
        console: Told of the network and its images when they are made.
    """

    def __init__(self, settings: Mapping[str, Any], file: Path, console: Console) -> None:
        self._settings, self._kept, self._console = settings, file, console
        self._device: torch.device = pieces.device_of(settings)
        self._loaded: LoadedModel | None = None
        self._evaluation: ImageSource | None = None
        self._calibration: dict[str, ImageSource] = {}
        self._answers: RememberedLogits | None = None
        self._dense: tuple[Measurement, ...] | None = None

    def sources(self, settings: Mapping[str, Any]) -> tuple[LoadedModel, ImageSource, ImageSource | None]:
        """A cell's network (its own copy), calibration images and evaluation images."""
        labelled = pieces.wants_labels(settings)  # a method without labels must not be handed any
        key = json.dumps([settings["data"], labelled], sort_keys=True, default=str)
        if self._loaded is None:
            self._loaded, self._calibration[key], self._evaluation = pieces.sources(settings, self._console)
        if key not in self._calibration:
            self._calibration[key] = pieces.image_source(
                settings, "data", self._loaded, labelled=labelled, console=self._console
            )
        own = dataclasses.replace(self._loaded, model=copy.deepcopy(self._loaded.model))
        return own, self._calibration[key], self._evaluation

    def models(self, evaluation: str, models: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """Which networks a measurement of a cell looks at: the dense one only where it needs it."""
        if "dense" not in models:
            return models
        if evaluation in _ALONE:
            return {name: model for name, model in models.items() if name != "dense"}
        if evaluation == "agreement":
            if self._answers is None:
                self._answers = RememberedLogits(copy.deepcopy(models["dense"]))
            return {**models, "dense": self._answers}
        return models

    def dense(self, console: Console) -> tuple[Measurement, ...]:
        """Measurements of the dense network alone, taken once and kept on disk."""
        if self._dense is not None:
            return self._dense
        keys = ("model", "evaluation_data", "runtime")
        asked = {name: node for name, node in self._settings["evaluation"].items() if name in _ALONE}
        identity = kept.digest({key: self._settings[key] for key in keys} | {"evaluation": asked}, 64)

        def measured() -> dict[str, Any]:
            loaded, calibration, evaluation = self.sources(self._settings)
            found = pieces.measure(
                {**self._settings, "evaluation": asked},
                {"dense": loaded.model.to(device=self._device, dtype=pieces.dtype_of(self._settings))},
                pieces.MeasuredOn(calibration, evaluation, loaded.preprocess),
                self._device,
                console,
            )
            return {"identity": identity, "measurements": artifacts.measurements_to_json(found)}

        found = kept.kept_cell(self._kept, measured, ("measurements",), identity=identity)
        self._dense = tuple(Measurement(**one) for one in found["measurements"])
        return self._dense
