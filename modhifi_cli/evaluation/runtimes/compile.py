"""PyTorch's compiler, `torch.compile`, for one shape."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from modhifi_cli.errors import UnsupportedModelError
from modhifi_cli.evaluation.runtimes.eager import BLOCK, pack, unpacked

__all__ = ["BLOCK", "ON_A_CARD", "PACKAGES", "QUICK", "load", "pack", "program"]

PACKAGES: tuple[str, ...] = ()
ON_A_CARD = True
QUICK = False


def load(packed: bytes, inputs: Tensor, threads: int) -> Callable[[], object]:
    """The compiled network; it is compiled here and now."""
    return program(unpacked(packed, inputs), inputs, threads)


def program(model: nn.Module, inputs: Tensor, threads: int) -> Callable[[], object]:
    """The same of a network that is here."""
    compiled = torch.compile(model, dynamic=False)

    def run() -> object:
        with torch.inference_mode():
            return compiled(inputs)

    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers raise whatever their stages raise; the sentence names the way out
        told = next(iter(str(error).strip().splitlines()), "no message")
        raise UnsupportedModelError(
            f"torch.compile cannot compile the network ({type(error).__name__}: {told}); choose another runtime, or "
            "install what the compiler asks for."
        ) from error
    return run
