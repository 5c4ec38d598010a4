"""Convolutions that compute their weight anew from their own parameters, such as those with weight standardisation.

Such a weight depends on every input of a filter, so taking an input away changes what the others weigh. At inference it
is a constant. `settle_` writes it down: the module becomes the convolution that it computes, with the same output.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from modhifi_cli.graph.derived import derived


def computes_weight(module: nn.Module) -> bool:
    """Whether a module is a convolution whose class standardises the weight before it is used."""
    # By name: the libraries are heavy, and whoever holds such a module has it loaded already.
    kind = type(module)
    known = kind.__module__ == "timm.layers.std_conv" or kind.__name__ == "WeightStandardizedConv2d"  # of transformers
    return isinstance(module, nn.Conv2d) and known and not _is_settled(module)


def settle_(module: nn.Conv2d) -> None:
    """Write the computed weight into the parameter and compute with it as it is from now on, in place.

    What only scaled the weight (``gain``) is in it now and goes. Training goes on from the weight itself, which is not
    standardised any more.
    """
    with torch.no_grad():
        module.weight.copy_(_computed_weight(module))
    if "gain" in module._parameters:
        del module.gain
    how = _SettledPadding if getattr(module, "same_pad", False) else _SettledOwnPadding if hasattr(module, "pad") else _Settled
    module.__class__ = _settled(type(module), how)


def _computed_weight(module: nn.Conv2d) -> Tensor:
    """The weight that the module's own forward hands to the convolution."""
    seen: list[Tensor] = []

    class Catcher(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func is functional.conv2d:
                seen.append(args[1])
            return func(*args, **(kwargs or {}))

    side = max(module.kernel_size) + 1
    weight = module.weight
    with Catcher():
        module(torch.zeros(1, module.in_channels, side, side, dtype=weight.dtype, device=weight.device))
    return seen[0].detach()


class _Settled:
    """Mark of a convolution that takes its weight as it is, though its class computed one."""


class _SettledOwnPadding(_Settled):
    """One that has a module of its own for padding, or none."""

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, channels, height, width]`` → ``[batch, channels, height, width]``."""
        return nn.Conv2d.forward(self, x if self.pad is None else self.pad(x))


class _SettledPadding(_Settled):
    """One that pads its input itself, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, channels, height, width]`` → ``[batch, channels, height, width]``."""
        down, across = (
            max((-(-size // step) - 1) * step + (taps - 1) * spread + 1 - size, 0)
            for size, taps, step, spread in zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)
        )
        x = functional.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _is_settled(module: nn.Module) -> bool:
    return isinstance(module, _Settled)


@functools.cache
def _settled(kind: type[nn.Conv2d], how: type[_Settled]) -> type[nn.Conv2d]:
    own = {} if "forward" in vars(how) else {"forward": nn.Conv2d.forward}
    return derived(kind, how, by=_settled, given=(how,), **own)
