"""ONNX: one graph from images to logits for ONNX Runtime, OpenVINO, TensorRT and the like."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, need_packages, need_whole
from modhifi_cli.files.exports.written import ExportReport, Graph, Way, traced, written
from modhifi_cli.records import LoadedModel, Preprocess

PACKAGES = ("onnx", "onnxscript")  # of extras; looked for before a run begins
_LARGEST_SINGLE_FILE = 1 << 30  # bytes of tensors; a protobuf file ends at 2 GB, so larger ONNX weights lie beside it
_RUNTIMES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Onnx(Graph):
    """Input ``images`` ``[batch, channels, height, width]``, output ``logits``, both with the free size ``batch``.

    The file says what it is: ``model``, ``preprocess`` and ``classes`` (JSON) and what the run adds lie in its metadata.
    Weights above 1 GB lie in ``<file>.data`` beside it.

    Attributes:
        tolerance: Largest difference of a logit allowed, as a share of the largest logit, > 0.
        opset: ONNX operator set, or None for PyTorch's default.
        runtimes: What the file has to run in: ``"onnxruntime"``, ``"openvino"`` or both.

    Raises:
        ConfigError: If the operator set is no whole number from 1, or a runtime is none of those.
    """

    opset: int | None = None
    runtimes: Sequence[str] = ("onnxruntime",)

    def __post_init__(self) -> None:
        if self.opset is not None:
            need_whole("export.onnx.opset", self.opset, 1)
        names = list(self.runtimes)
        if not names or not set(names) <= set(_RUNTIMES):
            raise ConfigError(f"export.onnx.runtimes: expected some of {', '.join(_RUNTIMES)}, got {names}.")

    def __call__(self, loaded: LoadedModel, *, example: Tensor, path: Path, facts: Mapping[str, str]) -> ExportReport:
        """Write the network as ONNX, run it, and compare; errors as `written`."""
        running = {name: _runtime(name) for name in self.runtimes}
        (first, run), *more = running.values()
        told = {"model": loaded.name, "weights": loaded.weights, **preprocessing(loaded), **facts}
        way = Way(
            "onnx",
            "model.onnx",
            lambda network, images, file: _write(network, images, file, self.opset, told),
            run,
            first,
            'onnxruntime.InferenceSession("model.onnx")',
            dict(more),
        )
        return written(loaded.model, example, path, way, tolerance=self.tolerance)


def _write(network: nn.Module, images: Tensor, file: Path, opset: int | None, told: Mapping[str, str]) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    # Given the network itself, the exporter falls back to a fixed batch size when a free one fails; not so here.
    program = torch.onnx.export(
        traced(network, images),
        (),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        opset_version=opset,
        verbose=False,
    )
    model = program.model
    for value in (*model.graph.inputs, *model.graph.outputs):  # torch calls the free size s77
        if value.shape is not None:
            value.shape[0] = "batch"
    model.metadata_props.clear()
    model.metadata_props.update(told)
    program.save(file, external_data=size > _LARGEST_SINGLE_FILE)


def preprocessing(loaded: LoadedModel) -> dict[str, str]:
    """What an image goes through before it becomes the input, and the classes, as JSON."""
    told = {}
    if isinstance(loaded.preprocess, Preprocess):
        own = loaded.preprocess
        told["preprocess"] = json.dumps(
            {
                "resize": own.resize,
                "crop": list(own.size),
                "interpolation": own.interpolation,
                "scale": "x / 255",
                "mean": list(own.mean),
                "std": list(own.std),
                "channels": "RGB" if len(own.mean) == 3 else "grey",
            }
        )
    if loaded.classes is not None:
        told["classes"] = json.dumps(list(loaded.classes))
    return told


def _runtime(name: str) -> tuple[str, Callable[[Path, Tensor], Tensor]]:
    """What runs a file, called by its name with version, and the function that does."""
    need_packages(f"export.onnx.runtimes=[{name}]", name)
    if name == "onnxruntime":
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}", _in_onnxruntime
    import openvino

    return f"openvino {openvino.__version__.partition('-')[0]}", _in_openvino


def _in_onnxruntime(file: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _in_openvino(file: Path, images: Tensor) -> Tensor:
    import openvino

    # f32: on processors with half precision it would round what the comparison looks at.
    compiled = openvino.Core().compile_model(os.fspath(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled({"images": images.numpy()})["logits"].copy())
