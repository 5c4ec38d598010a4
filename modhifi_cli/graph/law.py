"""The law every group must obey: slicing gives the logits of zeroing the consumers' weights of the removed components.

Zeroing the producer's output would be wrong, since BatchNorm's bias would leak through. So that the law cannot hold
by accident, the check first draws every parameter and buffer anew at working scale (zero-initialised scales and
identity statistics hide wrong slicing) and demands that zeroing itself moves the logits. Features of queries and keys are
read by no layer: there what writes them is zeroed, and the logits must be the same in any basis of them.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modhifi_cli.errors import first_line
from modhifi_cli.graph.answers import flattened
from modhifi_cli.graph.components import ComponentGroup, Layout, bias_of, complement, inputs_first, weight_of
from modhifi_cli.graph.heads import forget_tables_, head_count
from modhifi_cli.graph.modules import ChannelPadShortcut
from modhifi_cli.graph.parts import is_part, part_of
from modhifi_cli.graph.surgery import slice_module_

TOLERANCE = 1e-8  # of the logits' scale; the check runs in float64
TOLERANCE_FLOAT32 = 1e-4
SEED = 0
_LARGEST_SINGLE = torch.finfo(torch.float32).max
_BLOCK = 1_000_003  # a prime


@dataclass(frozen=True)
class Verdict:
    """How one group, or several at once, stand before the law.

    Attributes:
        difference: Largest difference between sliced and zeroed logits, as a share of the logits' scale.
        moved: Largest change of the logits by zeroing, as a share of the same scale.
        failure: What went wrong in the attempt, or None.
        tolerance: Largest difference allowed.
    """

    difference: float
    moved: float
    failure: str | None = None
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether slicing equals zeroing, and zeroing was visible."""
        return self.failure is None and self.difference <= self.tolerance and self.moved >= 100 * self.tolerance


def randomise_(model: nn.Module, *, seed: int = SEED) -> None:
    """Draw every parameter and floating buffer anew at a scale at which signals pass through deep networks."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(draw: Callable, shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        # Beyond a block whose length no channel count divides, its numbers come again: drawing them all would cost
        # more than the forward passes.
        few = draw(min(count, _BLOCK), generator=generator, dtype=torch.float64)
        return (few if count <= _BLOCK else few.repeat(-(-count // _BLOCK))[:count]).view(shape)

    def normal_(tensor: Tensor, mean: float, std: float) -> None:
        tensor.copy_(drawn(torch.randn, tensor.shape)).mul_(std).add_(mean)

    def uniform_(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(drawn(torch.rand, tensor.shape)).mul_(high - low).add_(low)

    forget_tables_(model)
    with torch.no_grad():
        for module in model.modules():
            norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm)
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    normal_(parameter, 0.0, 0.3)
                elif norm or parameter.dim() < 2:
                    uniform_(parameter, 0.5, 1.0)
                else:
                    normal_(parameter, 0.0, (2.0 / max(parameter[0].numel(), 1)) ** 0.5)
            for name, buffer in module.named_buffers(recurse=False):
                if name == "running_mean":
                    normal_(buffer, 0.0, 0.3)
                elif name == "running_var":
                    uniform_(buffer, 0.5, 1.5)


def zero_consumers_(model: nn.Module, group: ComponentGroup, removed: Tensor) -> None:
    """Set the consumers' weights of the removed dense components to zero, in place; of a product what writes it."""
    with torch.no_grad():
        for slot in group.producers if group.product else ():
            layer = model.get_submodule(slot.module)
            for tensor in (weight_of(layer), bias_of(layer)):
                if tensor is not None:
                    tensor[slot.index[removed].flatten()] = 0
        for slot in group.consumers:
            module = model.get_submodule(slot.module)
            entries = slot.index[removed].flatten()
            if isinstance(module, ChannelPadShortcut):
                module.source[torch.isin(module.source, entries)] = -1
            elif inputs_first(module):
                module.weight[entries] = 0
            else:
                module.weight[:, entries] = 0


def turn_(model: nn.Module, group: ComponentGroup, *, seed: int = SEED) -> None:
    """Write the features of a product in another basis, drawn for every head, in place: the product stays."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = group.producers
    drawn = torch.randn((queries.entries, group.components, group.components), generator=generator, dtype=torch.float64)
    bases = torch.linalg.qr(drawn).Q * torch.linspace(0.5, 2, group.components, dtype=torch.float64)
    with torch.no_grad():
        for slot, turns in ((queries, bases), (keys, torch.linalg.inv(bases).mT)):
            layer = model.get_submodule(slot.module)
            for tensor in (weight_of(layer), bias_of(layer)):
                if tensor is None:
                    continue
                for head, turn in enumerate(turns):
                    rows = slot.index[:, head]
                    tensor[rows] = turn.mT.to(tensor) @ tensor[rows]


def slice_groups_(model: nn.Module, groups: Sequence[ComponentGroup], removed: Sequence[Tensor]) -> None:
    """Remove the given dense components of each group from a dense network by real slicing, in place."""
    layout = Layout(model, groups)
    for group, gone in zip(groups, removed, strict=True):
        outputs, inputs = layout.keep_(group, complement(gone, group.components))
        for name in dict.fromkeys((*outputs, *inputs)):
            slice_module_(part_of(model, name), outputs=outputs.get(name), inputs=inputs.get(name))


def check(
    model: nn.Module,
    groups: Sequence[ComponentGroup],
    example: Tensor,
    *,
    seed: int = SEED,
    dtype: torch.dtype = torch.float64,
) -> Verdict:
    """Put groups before the law, all in one attempt, on a randomised copy of the network.

    Args:
        model: Dense network; left as found.
        groups: The groups that lose components together in this attempt (a third of each, drawn by `seed`).
        example: A batch, ``[batch, channels, height, width]``.
        seed: For the drawn parameters and the drawn components.
        dtype: Of the copy. With float32, for networks too large for float64, the tolerance is `TOLERANCE_FLOAT32`.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    removed = [
        torch.randperm(group.components, generator=generator)[: max(1, group.components // 3)].sort().values
        for group in groups
    ]
    images = example.to(dtype)
    tolerance = TOLERANCE if dtype == torch.float64 else TOLERANCE_FLOAT32
    copied = copy.deepcopy(model).cpu().to(dtype)
    randomise_(copied, seed=seed)
    copied.train().eval()  # some attention keeps what it computed from its weights until it is trained again
    try:
        before = turned = _logits(copied, images)
        products = [group for group in groups if group.product]
        for group in products:
            turn_(copied, group, seed=seed)
        if products:
            turned = _logits(copied, images)
        for group, gone in zip(groups, removed, strict=True):
            zero_consumers_(copied, group, gone)
        zeroed = _logits(copied, images)
        # The zeroed copy itself is sliced: what slicing leaves was not zeroed, and a second copy would cost memory.
        slice_groups_(copied, groups, removed)
        narrow = _logits(copied, images)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, ArithmeticError, AssertionError) as error:
        return Verdict(float("inf"), 0.0, first_line(error))
    if narrow.shape != zeroed.shape:
        failure = f"the logits changed shape from {zeroed.numel()} to {narrow.numel()} numbers"
        return Verdict(float("inf"), 0.0, failure)
    scale = float(before.abs().max().clamp(min=1e-300))
    differs, moves = float((narrow - zeroed).abs().max()), float((zeroed - before).abs().max())
    differs = max(differs, float((turned - before).abs().max()))
    return Verdict(differs / scale, moves / scale, tolerance=tolerance)


def lawful(
    model: nn.Module,
    candidates: Sequence[Sequence[ComponentGroup]],
    example: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[tuple[ComponentGroup, ...], dict[str, Verdict]]:
    """Split groups into those that obey the law and the verdicts of those that do not.

    All are tried in one attempt first, since networks that pass are the rule. Where that fails, halves are added to
    what has passed so far, and halves of halves, until the groups that break the law are found alone: what is returned
    has passed together.

    Args:
        model: Dense network; left as found.
        candidates: For each group the ways in which it may lie, the most usual first. The first that obeys is taken;
            where a group of heads obeys in another, those in attention modules of its class are tried in that first.
        example: A batch, ``[batch, channels, height, width]``.
        dtype: As in `check`.
    """
    failed: dict[str, Verdict] = {}
    raised: dict[tuple, Verdict] = {}
    usual: dict[tuple | None, int] = {}  # the way in which another group of the same kind lies

    def ordered(ways: Sequence[ComponentGroup]) -> list[ComponentGroup]:
        likely = usual.get(_kind(model, ways[0]), 0)
        return sorted(ways, key=lambda way: way is not ways[likely % len(ways)])

    def grown(
        passed: tuple[ComponentGroup, ...], more: Sequence[Sequence[ComponentGroup]]
    ) -> tuple[ComponentGroup, ...]:
        failed.update({ways[0].name: raised[kind] for ways in more if (kind := _kind(model, ways[0])) in raised})
        more = [ways for ways in more if ways[0].name not in failed]
        if not more:
            return passed
        first = (*passed, *(ordered(ways)[0] for ways in more))
        verdict = check(model, first, example, dtype=dtype)
        if verdict.holds:
            return first
        if len(more) == 1:
            cannot_run = verdict.failure is not None
            for other in ordered(more[0])[1:]:
                next_verdict = check(model, (*passed, other), example, dtype=dtype)
                if next_verdict.holds:
                    if (kind := _kind(model, more[0][0])) is not None:
                        usual[kind] = next(place for place, way in enumerate(more[0]) if way is other)
                    return (*passed, other)
                cannot_run = cannot_run and next_verdict.failure is not None
            failed[more[0][0].name] = verdict
            if cannot_run and (kind := _kind(model, more[0][0])) is not None:
                raised[kind] = verdict  # what cannot run on fewer heads here cannot in another module of this class
            return passed
        half = len(more) // 2
        return grown(grown(passed, more[:half]), more[half:])

    return grown((), candidates), failed


def _kind(model: nn.Module, group: ComponentGroup) -> tuple | None:
    """What groups of heads have in common that stand in attention modules of one class; None for other groups."""
    followers = [(slot.module, part_of(model, slot.module)) for slot in group.followers]
    owners = [name for name, part in followers if not is_part(part)] + [slot.module for slot in group.producers]
    attention = next((name for name in owners if head_count(model.get_submodule(name)) is not None), None)
    if attention is not None:
        layers = (slot.module.removeprefix(attention) for slot in (*group.producers, *group.consumers))
        return type(model.get_submodule(attention)), *layers
    # Heads that were found from the forward follow a size of their attention; who reads them may stand outside.
    for owner in (name.removesuffix(f".{part.leaf}") for name, part in followers if is_part(part)):
        if all(slot.module.startswith(f"{owner}.") for slot in group.producers):
            layers = (slot.module.removeprefix(owner) for slot in group.producers)
            return type(model.get_submodule(owner)), group.components, *layers
    return None


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with KeepsDouble():
        return flattened(model(images))


class KeepsDouble(TorchFunctionMode):
    """Leaves float64 tensors as they are where a forward asks for float32, as attention does that guards its sums.

    Rounding to float32 in the middle would hide whether slicing is exact.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        value = args[func is torch.full] if func in (torch.tensor, torch.full) and len(args) > (func is torch.full) else 0.0
        if isinstance(value, float) and _LARGEST_SINGLE < abs(value) < float("inf"):
            kwargs = {"dtype": torch.float64, **kwargs}  # the least number there is, which hides a token
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func in (Tensor.to, Tensor.type):
                args = (args[0], *(torch.float64 if value is torch.float32 else value for value in args[1:]))
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)
