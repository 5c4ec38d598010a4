"""What of a network can be pruned, found by pruning it: groups, the slicing law, and a cut of every group.

The weights say nothing here, so they are drawn at working scale and components are removed at random: what is tested is
whether the right numbers are cut everywhere, not whether the right components go.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi_cli.engine.plan import discover
from modhifi_cli.errors import UnsupportedModelError
from modhifi_cli.graph.answers import flattened
from modhifi_cli.graph.components import ComponentGroup, Layout, Refusal
from modhifi_cli.graph.law import randomise_, zero_consumers_
from modhifi_cli.graph.surgery import apply_edit_
from modhifi_cli.records import Edit, ModuleEdit, Progress

CARRIED = 0.8  # share of the parameters of convolutions and linear layers that accepted groups must touch
REMOVED = 0.2  # share of all parameters that must be gone
TOLERANCE = 1e-4  # of the logits' scale, in float32
# Above so many parameters the law is checked in float32: the float64 copy would not fit beside the network.
_LARGE = 150_000_000


@dataclass(frozen=True)
class Cut:
    """One network after all its lawful groups lost a share of their components.

    Attributes:
        groups: Number of groups that obey the slicing law.
        components: Components of them all.
        refused: What is left alone, and why.
        parameters: Of the dense network.
        carried: Share of the parameters of convolutions, linear layers and attention that lie in modules an accepted
            group touches, 0 … 1.
        removed: Share of all parameters that is gone, 0 … 1.
        law_dtype: In which all groups together passed the slicing law, with a third of their components:
            ``"float64"``, or ``"float32"`` for networks too large for that.
        difference: Largest difference between logits of the cut network and of the one whose consumers' weights are
            zeroed instead, as a share of the logits' scale, in float32.
        logits: What the narrow network answers to the example.
    """

    groups: int
    components: int
    refused: tuple[Refusal, ...]
    parameters: int
    carried: float
    removed: float
    law_dtype: str
    difference: float
    logits: Tensor


def cut_(
    model: nn.Module, example: Tensor, *, share: float = 0.3, seed: int = 0, cuts: list[Cut]
) -> Iterator[Progress | Edit]:
    """Remove a random share of the components of every lawful group of a network, in place.

    Args:
        model: Dense network in evaluation mode, float32; its weights are drawn anew.
        example: A batch that it takes, ``[batch, channels, height, width]``.
        share: Share of the components of every group that goes, 0 … 1.
        seed: For weights and components.
        cuts: Gets the result.

    Yields:
        Progress, and the edits as they are applied.

    Raises:
        UnsupportedModelError: If the network cannot be run or traced, or has no lawful group.
    """
    stages = 3
    yield Progress("coverage", "groups", 0, stages)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = torch.float64 if parameters <= _LARGE else torch.float32
    _, passed, refused = discover(model, example, dtype=dtype)
    if not passed:
        reasons = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in refused[:3])
        raise UnsupportedModelError(f"no group of channels can be pruned ({reasons or 'none was found'}).")
    carried = carried_share(model, passed)
    yield Progress("coverage", "cut", 1, stages)
    randomise_(model, seed=seed)
    model.train().eval()  # some attention keeps what it computed from its weights until it is trained again
    generator = torch.Generator().manual_seed(seed)
    layout = Layout(model, passed)
    removed = [_drawn(group, share, generator) for group in passed]
    with torch.inference_mode():
        scale = float(_answer(model, example).abs().max().clamp(min=1e-30))
    for group, gone in zip(passed, removed, strict=True):
        zero_consumers_(model, group, gone)
    with torch.inference_mode():
        zeroed = _answer(model, example)
    for group, gone in zip(passed, removed, strict=True):
        if gone.numel():
            edit = edit_of(layout, group, gone)
            apply_edit_(model, edit)
            yield edit
    yield Progress("coverage", "forward", 2, stages)
    with torch.inference_mode():
        logits = _answer(model, example)
    narrow = sum(parameter.numel() for parameter in model.parameters())
    cuts.append(
        Cut(
            groups=len(passed),
            components=sum(group.components for group in passed),
            refused=refused,
            parameters=parameters,
            carried=carried,
            removed=1 - narrow / parameters,
            law_dtype=str(dtype).removeprefix("torch."),
            difference=float((logits - zeroed).abs().max()) / scale,
            logits=logits,
        )
    )
    yield Progress("coverage", "done", stages, stages)


def edit_of(layout: Layout, group: ComponentGroup, gone: Tensor) -> Edit:
    """The edit that takes the given dense components of a group away and repairs nothing."""
    kept = torch.ones(group.components, dtype=torch.bool)
    kept[gone] = False
    outputs, inputs = layout.keep_(group, kept.nonzero().flatten())
    modules = tuple(
        ModuleEdit(name, kept_outputs=outputs.get(name), kept_inputs=inputs.get(name))
        for name in dict.fromkeys((*outputs, *inputs))
    )
    return Edit(group.name, 0, modules, kept=kept.nonzero().flatten(), removed=gone)


def carried_share(model: nn.Module, groups: Sequence[ComponentGroup]) -> float:
    """Share of the parameters of convolutions, linear layers and attention in modules that a group touches, 0 … 1."""
    touched = {name for group in groups for name in group.modules}
    whole = mine = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            count = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        elif getattr(module, "in_proj_weight", None) is not None:  # attention that holds its own projections
            count = module.in_proj_weight.numel()
        else:
            continue
        whole += count
        mine += count if name in touched else 0
    return mine / max(whole, 1)


def first_size(model: nn.Module, sizes: Sequence[tuple[int, int]], channels: int, *, images: int = 2) -> Tensor:
    """Random images of the first of the sizes that the network takes, ``[images, channels, height, width]``.

    Raises:
        UnsupportedModelError: If it takes none of them.
    """
    error: Exception | None = None
    for height, width in sizes:
        drawn = torch.randn(images, channels, height, width, generator=torch.Generator().manual_seed(0))
        try:
            with torch.inference_mode():
                _answer(model, drawn)
            return drawn
        # A network's own complaint about a size can be of any type.
        except Exception as caught:
            error = caught
    words = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UnsupportedModelError(
        f"the network {type(model).__name__} does not take an image batch of shape "
        f"{(images, channels, *sizes[-1])}: {words.rstrip('.')}."
    )


def _drawn(group: ComponentGroup, share: float, generator: torch.Generator) -> Tensor:
    count = min(round(share * group.components), group.components - 1)
    return torch.randperm(group.components, generator=generator)[:count].sort().values


def _answer(model: nn.Module, images: Tensor) -> Tensor:
    return flattened(model(images))
