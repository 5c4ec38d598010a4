"""Images in memory and a network that returns what it is given, so that expected values can be written by hand."""

import pytest
import torch
from torch import nn

from modhifi_cli.records import Progress


class ListedImages:
    """An `ImageSource` over tensors."""

    def __init__(self, images, labels=None):
        self.images, self.labels = images, labels
        self.protocol = {"source": "listed", "num_samples": len(images)}

    def __len__(self):
        return len(self.images)

    def batches(self, batch_size):
        for start in range(0, len(self.images), batch_size):
            part = slice(start, start + batch_size)
            yield self.images[part], None if self.labels is None else self.labels[part]


class Answers(nn.Module):
    """Reads the logits from the image: `scale` × pixel values + `shift`."""

    def __init__(self, scale=1.0, shift=0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.shift = nn.Parameter(torch.tensor(float(shift)))

    def forward(self, images):
        return images.flatten(1) * self.scale + self.shift


@pytest.fixture
def listed():
    """Makes an `ImageSource` from images and labels."""
    return ListedImages


@pytest.fixture
def answers():
    """Makes a network whose logits are the pixels, scaled and shifted."""
    return Answers


@pytest.fixture
def measured():
    """Calls a measurement with plain defaults; what it told of its progress is in `measured.progress`."""
    told = []

    def call(measure, **settings) -> tuple:
        plain = {
            "models": {},
            "evaluation_data": None,
            "calibration_data": None,
            "example": torch.zeros(1, 1, 2, 4),
            "device": torch.device("cpu"),
            "batch_size": 3,
            "progress": told.append,
        }
        return measure(**{**plain, **settings})

    call.progress = told
    call.Progress = Progress
    return call
