"""Parameters and multiply-accumulates, counted on a network or predicted for widths that it does not have yet.

FLOPs are reported the way the pruning literature does: one multiply-accumulate (MAC) is one FLOP, per input image.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from modhifi_cli.graph.components import ComponentGroup, input_size, is_upsampling, output_size
from modhifi_cli.graph.heads import COUNTS, head_count, mixes_heads, per_head
from modhifi_cli.graph.modes import compiler_left_out, without_gradients
from modhifi_cli.graph.parts import Part, integers, is_part, part_of


@dataclass(frozen=True)
class Counts:
    """Size and work of one network.

    Attributes:
        parameters: Number of parameters (buffers left out).
        macs: Multiply-accumulates of one forward pass of one input.
    """

    parameters: int
    macs: int


def count(model: nn.Module, example: Tensor) -> Counts:
    """Count parameters and, with PyTorch's own counter, multiply-accumulates of convolutions and matrix products.

    Args:
        model: Network in evaluation mode.
        example: One input, ``[1, channels, height, width]``.
    """
    counter = _counted(model, example)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Counts(parameters, counter.get_total_flops() // (2 * example.shape[0]))


def _counted(model: nn.Module, example: Tensor) -> FlopCounterMode:
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # Which fused kernels of attention the counter knows changes from one torch to the next, and those it does not
        # know count as nothing. Written out as products of matrices, attention counts the same everywhere.
        torch.backends.mha.set_fastpath_enabled(False)
        mode = getattr(flop_counter, "_FlopCounterMode", FlopCounterMode)
        with (
            compiler_left_out(mode),
            # The counter hooks whatever asks for a gradient, and stumbles over views of parameters made without one.
            without_gradients(model),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter


class LayerWidths:
    """How wide every layer is that a group touches, for any number of components that the groups keep.

    Args:
        model: The dense network.
        groups: Its groups, in the order in which `keep` counts are given.

    Attributes:
        modules: Names of the layers, ``[layers]``.
        sizes: Components of each group in the dense network, ``[groups]`` int64.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ComponentGroup]) -> None:
        self.sizes = np.array([group.components for group in groups], dtype=np.int64)
        self.modules = list(dict.fromkeys(name for group in groups for name in group.modules))
        row = {name: i for i, name in enumerate(self.modules)}
        self._removed_out = np.zeros((len(self.modules), len(groups)), dtype=np.int64)
        self._removed_in = np.zeros_like(self._removed_out)
        for column, group in enumerate(groups):
            for slot in (*group.producers, *group.followers):
                self._removed_out[row[slot.module], column] += slot.entries
            for slot in group.consumers:
                self._removed_in[row[slot.module], column] += slot.entries
        self._overlaps = _overlaps(groups, row)
        modules = [part_of(model, name) for name in self.modules]
        self._out = np.array([output_size(module) for module in modules], dtype=np.int64)
        self._in = np.array([independent_inputs(module) for module in modules], dtype=np.int64)

    def at(self, keep: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Output and independent input widths, each ``[layers]`` int64, when group g keeps ``keep[g]`` components.

        The input width is 1 where inputs go with outputs (norms, grouped convolution).
        """
        removed = self.sizes - np.asarray(keep, dtype=np.int64)
        outputs = self._out - self._removed_out @ removed
        for layer, one, other, entries in self._overlaps:
            outputs[layer] += entries * removed[one] * removed[other]
        return outputs, self._in - self._removed_in @ removed


def _overlaps(groups: Sequence[ComponentGroup], row: Mapping[str, int]) -> list[tuple[int, int, int, int]]:
    """Outputs that two groups share, as heads and features of queries do: layer, both groups, outputs a pair shares."""
    found = []
    products = [number for number, group in enumerate(groups) if group.product]
    for one in products:
        for other, group in enumerate(groups):
            if other == one:
                continue
            for mine, its in itertools.product(groups[one].producers, group.producers):
                shared = int(torch.isin(mine.index, its.index).sum()) if mine.module == its.module else 0
                if shared:
                    found.append((row[mine.module], one, other, shared // (groups[one].components * group.components)))
    return found


class CostModel:
    """Parameters and MACs as a function of how many components each group keeps.

    Exact for convolutions, linear layers and BatchNorm, whose sizes are products of the two widths, and for attention,
    whose products of queries with keys and of weights with values go with its heads; what a forward spends elsewhere is
    carried as a constant.

    Args:
        model: The dense network in evaluation mode.
        example: One input, ``[1, channels, height, width]``.
        groups: Its groups, in the order in which `keep` counts are given.
    """

    def __init__(self, model: nn.Module, example: Tensor, groups: Sequence[ComponentGroup]) -> None:
        self.dense = count(model, example)
        self.widths = LayerWidths(model, groups)
        self._sizes = self.widths.sizes
        touched = self.widths.modules
        positions = output_positions(model, example, touched)
        modules = [part_of(model, name) for name in touched]
        self._params_pair = np.array([_pair_parameters(module) for module in modules])
        self._params_out = np.array([_output_parameters(module) for module in modules])
        self._macs_pair = self._params_pair * np.array([positions[name] for name in touched])
        work = attention_work(model, example)
        self._macs_out = np.array([work.get(name, (0.0, 0.0))[0] for name in touched])
        self._macs_in = np.array([work.get(name, (0.0, 0.0))[1] for name in touched])
        now = self._touched(self._sizes)
        self._fixed = (self.dense.parameters - now.parameters, self.dense.macs - now.macs)

    def counts(self, keep: Sequence[int]) -> Counts:
        """Predicted size and work when group g keeps ``keep[g]`` of its dense components."""
        touched = self._touched(np.asarray(keep, dtype=np.int64))
        return Counts(touched.parameters + self._fixed[0], touched.macs + self._fixed[1])

    def removed_share(self, keep: Sequence[int], target: str) -> float:
        """Share removed of ``"params"``, ``"flops"`` or ``"components"``, 0 … 1."""
        if target == "components":
            return 1.0 - float(np.sum(keep)) / float(self._sizes.sum())
        counts = self.counts(keep)
        if target == "params":
            return 1.0 - counts.parameters / self.dense.parameters
        return 1.0 - counts.macs / self.dense.macs

    def _touched(self, keep: np.ndarray) -> Counts:
        outputs, inputs = self.widths.at(keep)
        pairs = outputs * inputs
        parameters = (pairs * self._params_pair + outputs * self._params_out).sum()
        macs = (pairs * self._macs_pair + outputs * self._macs_out + inputs * self._macs_in).sum()
        return Counts(int(round(parameters)), int(round(macs)))


def independent_inputs(module: nn.Module | Part) -> int:
    """Input width that shrinks on its own: 1 where the inputs go with the outputs (norms, grouped conv, heads)."""
    if is_part(module) or _is_norm(module) or is_grouped(module) or head_count(module) is not None:
        return 1
    return input_size(module)


def is_grouped(module: nn.Module) -> bool:
    """Whether a module is a grouped (or depthwise) convolution."""
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1


def attention_work(model: nn.Module, example: Tensor) -> dict[str, tuple[float, float]]:
    """Multiply-accumulates that an attention module spends outside its layers, by what they go with.

    Args:
        model: Network in evaluation mode.
        example: One input, ``[1, channels, height, width]``.

    Returns:
        Module name (where its count of heads is cut as a number, that number's name) → MACs per output (head), MACs per
        input. With talking heads the products of queries with keys go
        with the inputs of the first map between heads, those with the values with the outputs of the second.
    """
    counter = _counted(model, example)
    totals = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    found: dict[str, tuple[float, float]] = {}
    for name, module in model.named_modules():
        heads = head_count(module)
        counted = name
        if heads is None:
            held = integers(module)
            leaf = next((leaf for leaf in COUNTS if held.get(leaf, 0) > 0), None)
            if leaf is None:
                continue
            heads, counted = held[leaf], f"{name}.{leaf}" if name else leaf
        full = f"{root}.{name}" if name else root
        inside = sum(totals.get(f"{full}.{child}", 0) for child, _ in module.named_children())
        own = (totals.get(full, 0) - inside) / (2 * example.shape[0])
        if mixes_heads(module):
            pairs, values = module.proj_l.in_features, module.proj_w.out_features
            found[f"{name}.proj_l"] = (0.0, own / (pairs + values))
            found[f"{name}.proj_w"] = (own / (pairs + values), 0.0)
        elif own:
            found[counted] = (own / heads, 0.0)
    return found


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)


def _pair_parameters(module: nn.Module | Part) -> float:
    """Weights per (output, independent input) pair."""
    if is_part(module) or _is_norm(module) or head_count(module) is not None:
        return 0.0
    weight = getattr(module, "weight", None)
    return 0.0 if weight is None else weight.numel() / (output_size(module) * independent_inputs(module))


def _output_parameters(module: nn.Module | Part) -> float:
    """Parameters per output that do not depend on the inputs (biases, BatchNorm scales)."""
    if is_part(module):
        return float(module.parameters) / module.size
    if _is_norm(module):
        return float(sum(parameter.numel() for parameter in module.parameters())) / output_size(module)
    heads = head_count(module)
    if heads is not None:
        named = dict(module.named_parameters(recurse=False))
        return sum(named[name].numel() for name in per_head(module, heads) if name in named) / heads
    return 0.0 if getattr(module, "bias", None) is None else 1.0


def output_positions(model: nn.Module, example: Tensor, names: Sequence[str]) -> dict[str, int]:
    """How many rows per input each module computes: output positions of a convolution, input ones if transposed."""
    positions = dict.fromkeys(names, 0)

    def hook(name: str) -> object:
        def seen(module: nn.Module, inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor):
                many, size = (inputs[0], input_size(module)) if is_upsampling(module) else (output, output_size(module))
                positions[name] += many.numel() // (size * example.shape[0])

        return seen

    layers = [(name, part_of(model, name)) for name in names]
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers if not is_part(layer)]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return positions
