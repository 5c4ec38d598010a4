"""torch.export: a program that PyTorch itself loads, without the network's code."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from modhifi_cli.files.exports.written import ExportReport, Graph, Way, traced, written
from modhifi_cli.records import LoadedModel


@dataclass(frozen=True)
class TorchExport(Graph):
    """``torch.export.load(path).module()`` gives the network, with a free batch size, without this package.

    Attributes:
        tolerance: Largest difference of a logit allowed, as a share of the largest logit, > 0.
    """

    def __call__(self, loaded: LoadedModel, *, example: Tensor, path: Path, facts: Mapping[str, str]) -> ExportReport:
        """Write the network as a program, load it again, and compare; errors as `written`."""
        way = Way(
            "torch_export",
            "model.pt2",
            write,
            run,
            f"torch {torch.__version__}",
            'torch.export.load("model.pt2").module()',
        )
        return written(loaded.model, example, path, way, tolerance=self.tolerance)


def write(network: nn.Module, images: Tensor, file: Path) -> None:
    """Save the traced program."""
    torch.export.save(traced(network, images), file)


def run(file: Path, images: Tensor) -> Tensor:
    """Logits of the saved program."""
    return torch.export.load(file).module()(images)
