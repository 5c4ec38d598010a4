"""Measurements: one module each, one function `measure` each, named in `configs/evaluation/`.

Every one is called with the same keywords (`Measure`) plus its own parameters, receives the networks and the images as
arguments, and returns `Measurement` records. It leaves the networks as it found them: device, modes and weights.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from modhifi_cli.records import ImageSource, Measurement, Progress


class Measure(Protocol):
    """What the pipeline calls after it has bound a measurement's own parameters from its YAML file."""

    def __call__(
        self,
        *,
        models: Mapping[str, nn.Module],
        evaluation_data: ImageSource | None,
        calibration_data: ImageSource | None,
        example: Tensor,
        device: torch.device,
        batch_size: int,
        progress: Callable[[Progress], None],
    ) -> tuple[Measurement, ...]:
        """Measure all networks in one go, so that they see the same images and the same state of the machine.

        Args:
            models: The networks by the name that their measurements carry. Where there are two, the first is the
                reference (``"dense"``) that the others are compared with.
            evaluation_data: Held-out images, labelled where the measurement needs labels, or None.
            calibration_data: The images that the edit was computed from, without labels, or None.
            example: One preprocessed input, ``[1, channels, height, width]`` float32; only its shape and type matter.
            device: Where to run.
            batch_size: Images per forward pass where the batch does not change the number.
            progress: Told of every step.

        Returns:
            The records; empty where this measurement does not apply (no labelled images, nothing to compare with).
        """
