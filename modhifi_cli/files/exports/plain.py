"""A folder for machines without this package: a PyTorch program, and one Python file that loads it and prepares images."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from modhifi_cli.files.exports import torch_export
from modhifi_cli.files.exports.onnx import preprocessing
from modhifi_cli.files.exports.written import ExportReport, Graph, Way, written
from modhifi_cli.records import LoadedModel

_CODE = '''"""A network that modhifi wrote, for PyTorch alone:

    from network import load, prepare
    model = load()
    logits = model(prepare(images))      # images: uint8 [batch, height, width, channels], already cropped
"""

import json
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ABOUT = json.loads((HERE / "about.json").read_text(encoding="utf-8"))


def load():
    """The network, in evaluation mode; it takes batches of any size."""
    return torch.export.load(HERE / "model.pt2").module()


def prepare(images):
    """Pixels 0 ... 255 of the right size as the network wants them: [batch, channels, height, width] float32."""
    about = ABOUT["preprocess"]
    mean, std = torch.tensor(about["mean"]), torch.tensor(about["std"])
    return ((torch.as_tensor(images).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
'''


@dataclass(frozen=True)
class Plain(Graph):
    """``network/`` with ``network.py``, the program ``model.pt2`` and ``about.json`` (preprocessing, classes).

    Attributes:
        tolerance: Largest difference of a logit allowed, as a share of the largest logit, > 0.
    """

    def __call__(self, loaded: LoadedModel, *, example: Tensor, path: Path, facts: Mapping[str, str]) -> ExportReport:
        """Write the folder, load the program again, and compare; errors as `written`."""
        about = {"model": loaded.name, "weights": loaded.weights, **facts}
        about |= {key: json.loads(value) for key, value in preprocessing(loaded).items()}

        def write(network: nn.Module, images: Tensor, folder: Path) -> None:
            folder.mkdir()
            torch_export.write(network, images, folder / "model.pt2")
            (folder / "network.py").write_text(_CODE, encoding="utf-8")
            (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

        def run(folder: Path, images: Tensor) -> Tensor:
            return torch_export.run(folder / "model.pt2", images)

        opens = "from network import load, with the folder network/ on the path and PyTorch installed"
        way = Way("plain", "network", write, run, f"torch {torch.__version__}", opens)
        return written(loaded.model, example, path, way, tolerance=self.tolerance)
