"""The law every group must obey: slicing gives the logits of zeroing the consumers' weights of the removed components.

Zeroing the producer's output would be wrong, since BatchNorm's bias would leak through. So that the law cannot hold
by accident, the check first draws every parameter and buffer anew at working scale (zero-initialised scales and
identity statistics hide wrong slicing) and demands that zeroing itself moves the logits.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi_cli.graph.components import ComponentGroup, Layout
from modhifi_cli.graph.modules import ChannelPadShortcut
from modhifi_cli.graph.surgery import slice_module_
from modhifi_cli.graph.trace import tensors_of

TOLERANCE = 1e-8  # of the logits' scale; the check runs in float64
SEED = 0


@dataclass(frozen=True)
class Verdict:
    """How one group, or several at once, stand before the law.

    Attributes:
        difference: Largest difference between sliced and zeroed logits, as a share of the logits' scale.
        moved: Largest change of the logits by zeroing, as a share of the same scale.
        failure: What went wrong in the attempt, or None.
    """

    difference: float
    moved: float
    failure: str | None = None

    @property
    def holds(self) -> bool:
        """Whether slicing equals zeroing, and zeroing was visible."""
        return self.failure is None and self.difference <= TOLERANCE and self.moved >= 100 * TOLERANCE


def randomise_(model: nn.Module, *, seed: int = SEED) -> None:
    """Draw every parameter and floating buffer anew at a scale at which signals pass through deep networks."""
    generator = torch.Generator().manual_seed(seed)

    def normal_(tensor: Tensor, mean: float, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * std + mean)

    def uniform_(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm)
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    normal_(parameter, 0.0, 0.3)
                elif norm or parameter.dim() < 2:
                    uniform_(parameter, 0.5, 1.0)
                else:
                    normal_(parameter, 0.0, (2.0 / parameter[0].numel()) ** 0.5)
            for name, buffer in module.named_buffers(recurse=False):
                if name == "running_mean":
                    normal_(buffer, 0.0, 0.3)
                elif name == "running_var":
                    uniform_(buffer, 0.5, 1.5)


def zero_consumers_(model: nn.Module, group: ComponentGroup, removed: Tensor) -> None:
    """Set the consumers' weights of the removed dense components to zero, in place."""
    with torch.no_grad():
        for slot in group.consumers:
            module = model.get_submodule(slot.module)
            entries = slot.index[removed].flatten()
            if isinstance(module, ChannelPadShortcut):
                module.source[torch.isin(module.source, entries)] = -1
            else:
                module.weight[:, entries] = 0


def slice_groups_(model: nn.Module, groups: Sequence[ComponentGroup], removed: Sequence[Tensor]) -> None:
    """Remove the given dense components of each group from a dense network by real slicing, in place."""
    layout = Layout(model, groups)
    for group, gone in zip(groups, removed, strict=True):
        kept = torch.ones(group.components, dtype=torch.bool)
        kept[gone] = False
        outputs, inputs = layout.keep_(group, kept.nonzero().flatten())
        for name in dict.fromkeys((*outputs, *inputs)):
            slice_module_(model.get_submodule(name), outputs=outputs.get(name), inputs=inputs.get(name))


def check(model: nn.Module, groups: Sequence[ComponentGroup], example: Tensor, *, seed: int = SEED) -> Verdict:
    """Put groups before the law, all in one attempt, on a randomised float64 copy of the network.

    Args:
        model: Dense network; left as found.
        groups: The groups that lose components together in this attempt (a third of each, drawn by `seed`).
        example: A batch, ``[batch, channels, height, width]``.
        seed: For the drawn parameters and the drawn components.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    removed = [
        torch.randperm(group.components, generator=generator)[: max(1, group.components // 3)].sort().values
        for group in groups
    ]
    images = example.to(torch.float64)
    dense = copy.deepcopy(model).cpu().to(torch.float64).eval()
    randomise_(dense, seed=seed)
    try:
        before = _logits(dense, images)
        sliced = copy.deepcopy(dense)
        for group, gone in zip(groups, removed, strict=True):
            zero_consumers_(dense, group, gone)
        zeroed = _logits(dense, images)
        slice_groups_(sliced, groups, removed)
        narrow = _logits(sliced, images)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        return Verdict(float("inf"), 0.0, str(error).splitlines()[0] if str(error) else type(error).__name__)
    if narrow.shape != zeroed.shape:
        return Verdict(float("inf"), 0.0, f"the logits changed shape from {zeroed.numel()} to {narrow.numel()} numbers")
    scale = float(before.abs().max().clamp(min=1e-300))
    return Verdict(float((narrow - zeroed).abs().max()) / scale, float((zeroed - before).abs().max()) / scale)


def lawful(
    model: nn.Module, candidates: Sequence[Sequence[ComponentGroup]], example: Tensor
) -> tuple[tuple[ComponentGroup, ...], dict[str, Verdict]]:
    """Split groups into those that obey the law and the verdicts of those that do not.

    All are tried in one attempt first, since networks that pass are the rule; only where that fails is each tried
    alone.

    Args:
        model: Dense network; left as found.
        candidates: For each group the ways in which it may lie, the most usual first. The first that obeys is taken.
        example: A batch, ``[batch, channels, height, width]``.
    """
    first = tuple(ways[0] for ways in candidates)
    if not first or check(model, first, example).holds:
        return first, {}
    passed: list[ComponentGroup] = []
    failed: dict[str, Verdict] = {}
    for ways in candidates:
        verdicts = [check(model, (ways[0],), example)]
        for group in ways[1:]:
            if verdicts[-1].holds:
                break
            verdicts.append(check(model, (group,), example))
        if verdicts[-1].holds:
            passed.append(ways[len(verdicts) - 1])
        else:
            failed[ways[0].name] = verdicts[0]
    if passed and not check(model, passed, example).holds:
        # Each alone is right, together they are not: refuse rather than guess.
        return (), dict.fromkeys((group.name for group in first), check(model, passed, example))
    return tuple(passed), failed


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors_of(model(images)) if tensor.is_floating_point()])
