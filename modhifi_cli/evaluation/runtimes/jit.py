"""PyTorch's older compiler: traced and frozen, as the paper's latencies were taken (arXiv:2511.19566)."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from modhifi_cli.errors import UnsupportedModelError
from modhifi_cli.evaluation.runtimes.eager import BLOCK, pack, unpacked

__all__ = ["BLOCK", "ON_A_CARD", "PACKAGES", "QUICK", "load", "pack", "program"]

PACKAGES: tuple[str, ...] = ()
ON_A_CARD = True
QUICK = True


def load(packed: bytes, inputs: Tensor, threads: int) -> Callable[[], object]:
    """The traced and frozen network."""
    return program(unpacked(packed, inputs), inputs, threads)


def program(model: nn.Module, inputs: Tensor, threads: int) -> Callable[[], object]:
    """The same of a network that is here."""
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # torch marks tracing as deprecated
            frozen = torch.jit.freeze(torch.jit.trace(model, inputs))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # tracing raises whatever the forward does
        told = next(iter(str(error).strip().splitlines()), "no message")
        raise UnsupportedModelError(
            f"the network cannot be traced ({type(error).__name__}: {told}); choose another runtime."
        ) from error

    def run() -> object:
        with torch.inference_mode():
            return frozen(inputs)

    return run
