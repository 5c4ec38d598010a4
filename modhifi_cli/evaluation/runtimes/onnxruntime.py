"""ONNX Runtime on the CPU: the network as an ONNX program of one shape."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from modhifi_cli.errors import UnsupportedModelError

PACKAGES: tuple[str, ...] = ("onnx", "onnxruntime")
ON_A_CARD = False
QUICK = True
BLOCK = 8  # of its blocked layout of convolutions (NCHWc) on processors with vectors of 256 bits

INPUT = "inputs"


def pack(model: nn.Module, inputs: Tensor) -> bytes:
    """The network as ONNX.

    PyTorch's older exporter comes first: it is thirty times as quick, which counts where hundreds of layers are timed,
    and its programs run alike. What it cannot write, the newer one is asked for.
    """
    model, inputs = copy.deepcopy(model).cpu().eval(), inputs.cpu()
    _switch_caches_off_(model)
    reasons = []
    for newer in (False, True):
        file = io.BytesIO()
        try:
            with _quiet(), torch.inference_mode(mode=False), torch.no_grad():
                names = {"input_names": [INPUT]}
                torch.onnx.export(model, (inputs,), file, dynamo=newer, **names, **({"verbose": False} if newer else {}))
            return file.getvalue()
        except Exception as error:  # exporters raise whatever their stages raise
            reasons.append(next(iter(str(error).strip().splitlines()), type(error).__name__))
    raise UnsupportedModelError(f"the network cannot be written as ONNX ({reasons[0]}); choose another runtime.")


def program(model: nn.Module, inputs: Tensor, threads: int) -> Callable[[], object]:
    """A session for a network that is here."""
    return load(pack(model, inputs), inputs.cpu(), threads)


def load(packed: bytes, inputs: Tensor, threads: int) -> Callable[[], object]:
    """A session with so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(packed, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has exceptions of its own for every reason
        told = next(iter(str(error).strip().splitlines()), "no message")
        raise UnsupportedModelError(f"ONNX Runtime refuses the network ({told}); choose another runtime.") from error
    fed = {session.get_inputs()[0].name: inputs.numpy()}
    return lambda: session.run(None, fed)


def _switch_caches_off_(model: nn.Module) -> None:
    """A language model gives logits alone: its cache is no output of the program."""
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "use_cache", False):
        config.use_cache = False


@contextlib.contextmanager
def _quiet():
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
