"""PyTorch as it is: the network's own forward."""

import io
import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn

from modhifi_cli.evaluation.runtimes import NotPortable

PACKAGES: tuple[str, ...] = ()
ON_A_CARD = True
QUICK = True
BLOCK = 8  # of the blocked layout of its convolutions on a CPU


def pack(model: nn.Module, inputs: Tensor) -> bytes:
    """The pickled module."""
    file = io.BytesIO()
    try:
        torch.save(model, file)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise NotPortable(f"{type(model).__name__}: {error}") from error
    return file.getvalue()


def load(packed: bytes, inputs: Tensor, threads: int) -> Callable[[], object]:
    """Its forward, without gradients."""
    return program(unpacked(packed, inputs), inputs, threads)


def program(model: nn.Module, inputs: Tensor, threads: int) -> Callable[[], object]:
    """The network's forward, without gradients."""

    def run() -> object:
        with torch.inference_mode():
            return model(inputs)

    return run


def unpacked(packed: bytes, inputs: Tensor) -> nn.Module:
    """The module, in evaluation mode where the inputs lie."""
    try:
        # What this process wrote a moment ago; files of others never come here.
        model = torch.load(io.BytesIO(packed), map_location=inputs.device, weights_only=False)
    except (ImportError, AttributeError) as error:
        raise NotPortable(str(error)) from error
    return model.eval()
