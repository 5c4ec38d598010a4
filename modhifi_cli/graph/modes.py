"""How a network is run once to be looked at: without gradients of its parameters, in dispatch modes without the compiler.

The first operation inside a dispatch mode makes torch load its whole compiler, only to tell it to leave the mode alone:
two seconds of processor time and 100 MB in every run, although nothing is compiled.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Within it no parameter asks for a gradient; afterwards those do that did."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)


@contextmanager
def compiler_left_out(mode: type) -> Iterator[None]:
    """Within it a dispatch mode runs without loading the compiler; nothing is changed where that is loaded already.

    Args:
        mode: Subclass of `TorchDispatchMode`. A torch that wraps its `__torch_dispatch__` in another way loads as before.
    """
    dispatch = getattr(mode.__dict__.get("__torch_dispatch__"), "__wrapped__", None)
    if dispatch is None or "torch._dynamo" in sys.modules or hasattr(dispatch, _KNOWN):
        yield
        return
    setattr(dispatch, _KNOWN, dispatch)
    try:
        yield
    finally:
        delattr(dispatch, _KNOWN)


_KNOWN = "__dynamo_disable"  # where torch keeps the function that the compiler is to leave alone
