"""Machines whose time is known: stopwatches that compute milliseconds from what a module does, for tests of latency."""

import math

import torch
from torch import Tensor, nn


class Machine:
    """Takes a time for every pair of channels of a convolution or linear layer, and something for every module.

    Args:
        tile: Widths are rounded up to a multiple of it, as vector units do.
        fixed: Milliseconds of a whole network that no width changes.
        per_element: Milliseconds for each output element of a layer inside a whole network.
    """

    def __init__(self, *, tile: int = 1, fixed: float = 0.0, per_element: float = 0.0) -> None:
        self.tile, self.fixed, self.per_element = tile, fixed, per_element
        self.calls = 0

    def __call__(self, module: nn.Module, images: Tensor) -> float:
        self.calls += 1
        spent = [self.fixed if list(module.children()) else 0.0]
        whole = bool(list(module.children()))

        def seen(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
            pairs = self._tiles(layer.weight.shape[0]) * self._tiles(layer.weight.shape[1])
            positions = output.numel() // layer.weight.shape[0]
            taps = layer.weight[0, 0].numel()
            spent[0] += 1e-5 * pairs * taps * positions
            spent[0] += self.per_element * output.numel() if whole else 0.0

        handles = [m.register_forward_hook(seen) for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        with torch.no_grad():
            module(images)
        for handle in handles:
            handle.remove()
        return spent[0]

    def _tiles(self, width: int) -> int:
        return math.ceil(width / self.tile) * self.tile

    def share(self, dense: nn.Module, narrow: nn.Module, images: Tensor) -> float:
        """Share of the dense network's time that the narrow one saves here."""
        return 1 - self(narrow, images) / self(dense, images)
