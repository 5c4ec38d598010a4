"""OpenVINO on the CPU, in float32: the network comes as ONNX."""

from collections.abc import Callable

from torch import Tensor, nn

from modhifi_cli.errors import UnsupportedModelError
from modhifi_cli.evaluation.runtimes.onnxruntime import BLOCK, pack

__all__ = ["BLOCK", "ON_A_CARD", "PACKAGES", "QUICK", "load", "pack", "program"]

PACKAGES: tuple[str, ...] = ("onnx", "openvino")
ON_A_CARD = False
QUICK = True


def program(model: nn.Module, inputs: Tensor, threads: int) -> Callable[[], object]:
    """A compiled model for a network that is here."""
    return load(pack(model, inputs), inputs.cpu(), threads)


def load(packed: bytes, inputs: Tensor, threads: int) -> Callable[[], object]:
    """A compiled model with so many threads and one stream."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"
    }  # fmt: skip
    core = openvino.Core()
    try:
        request = core.compile_model(core.read_model(packed, b""), "CPU", settings).create_infer_request()
    except Exception as error:  # one exception class for everything
        told = next(iter(str(error).strip().splitlines()), "no message")
        raise UnsupportedModelError(f"OpenVINO refuses the network ({told}); choose another runtime.") from error
    fed = [inputs.numpy()]
    return lambda: request.infer(fed)
