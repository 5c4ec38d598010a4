"""What of a network can be pruned, found by pruning it: groups, the slicing law, and a cut of every group.

The weights say nothing here, so they are drawn at working scale and components are removed at random: what is tested is
whether the right numbers are cut everywhere, not whether the right components go.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.engine.plan import discover
from modhifi_cli.errors import UnsupportedModelError, first_line
from modhifi_cli.graph.answers import flattened
from modhifi_cli.graph.components import ComponentGroup, Layout, Refusal, is_transposed, weight_of
from modhifi_cli.graph.decoder import Part, find_parts, slice_part_
from modhifi_cli.graph.experts import Experts, open_experts_
from modhifi_cli.graph.heads import free_heads_
from modhifi_cli.graph.law import KeepsDouble, randomise_, zero_consumers_
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


def cut_decoder_(model: nn.Module, *, share: float = 0.3, seed: int = 0) -> Cut:
    """Remove a random share of every lawful part of a causal decoder, in place: heads, and neurons of MLPs and experts.

    Args:
        model: Dense decoder in evaluation mode, float32; its weights are drawn anew, its experts taken apart.
        share: Share of the components of every part that goes, 0 … 1; heads go in steps of one of every KV head.
        seed: For weights and components.

    Returns:
        As of an image network; `Cut.carried` and `Cut.removed` count linear layers and experts of the decoder layers, in
        float64, and `Cut.logits` are those in float32.

    Raises:
        UnsupportedModelError: If it is no decoder, or nothing of it can be pruned.
    """
    open_experts_(model)
    free_heads_(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = find_parts(model, components=("attention", "mlp"))
    inside = [model.get_submodule(name) for name in found.layers]
    settings: Any = model.config  # transformers' configuration, which PyTorch takes for a tensor or a module
    tokens = torch.arange(16)[None] % settings.get_text_config().vocab_size
    ran = _that_run(model, tokens)  # a decoder of pairs has attention to an encoder, which is not there
    weights = {id(module): module for layer in inside for module in layer.modules() if _holds_weights(module)
               and (id(module) in ran or not isinstance(module, nn.Linear))}  # fmt: skip
    touched = {id(model.get_submodule(name)) for part in found.parts for name in part.group.modules if _is_module(model, name)}
    dense = sum(map(_own, weights.values()))
    carried = sum(_own(module) for key, module in weights.items() if key in touched) / max(dense, 1)
    randomise_(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    layout = Layout(model, [part.group for part in found.parts])
    model.double()
    with torch.inference_mode(), KeepsDouble():
        scale = float(_words(model, tokens).abs().max().clamp(min=1e-30))
        removed = [_drawn_evenly(part, share, generator) for part in found.parts]
        for part, gone in zip(found.parts, removed, strict=True):
            _zero_(model, part, gone)
        zeroed = _words(model, tokens)
    for part, gone in zip(found.parts, removed, strict=True):
        kept = torch.ones(part.components, dtype=torch.bool)
        kept[gone] = False
        slice_part_(model, layout, part, kept.nonzero().flatten())
    with torch.inference_mode(), KeepsDouble():
        narrow = _words(model, tokens)
    model.float()
    with torch.inference_mode():
        logits = _words(model, tokens)
    return Cut(
        groups=len(found.parts),
        components=sum(part.components for part in found.parts),
        refused=found.refused,
        parameters=parameters,
        carried=carried,
        removed=1 - sum(map(_own, weights.values())) / max(dense, 1),
        law_dtype="float64",
        difference=float((narrow - zeroed).abs().max()) / scale,
        logits=logits,
    )


def _that_run(model: nn.Module, tokens: Tensor) -> set[int]:
    """Modules that a forward calls, by identity; all of those inside of experts, whoever is chosen."""
    seen: set[int] = set()
    handles = [module.register_forward_pre_hook(lambda module, _: seen.add(id(module))) for module in model.modules()]
    try:
        with torch.inference_mode():
            _words(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen | {id(part) for module in model.modules() if isinstance(module, Experts) for part in module.modules()}


def _is_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:  # a bare tensor that follows the heads
        return False
    return True


def _holds_weights(module: nn.Module) -> bool:
    """Whether a module is a linear layer of attention or an MLP, or holds several in one tensor; not the sum of experts."""
    if isinstance(module, nn.Linear):
        return module.out_features > 1
    return is_transposed(module) or any(tensor.dim() == 3 for tensor in module.parameters(recurse=False))


def _own(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _zero_(model: nn.Module, part: Part, gone: Tensor) -> None:
    for slot in part.group.consumers:
        reader, entries = model.get_submodule(slot.module), slot.index[gone].flatten()
        if isinstance(reader, nn.Linear):
            reader.weight[:, entries] = 0
        else:
            weight_of(reader)[entries] = 0


def _drawn_evenly(part: Part, share: float, generator: torch.Generator) -> Tensor:
    """The same number of each run, at least one where more than one is there."""
    each = part.components // part.balanced
    count = min(max(1, round(share * each)), each - 1)
    runs = [torch.randperm(each, generator=generator)[:count] + run * each for run in range(part.balanced)]
    return torch.cat(runs).sort().values


def _words(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


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
    error: Exception = ValueError("no size was given")
    for height, width in sizes:
        drawn = torch.randn(images, channels, height, width, generator=torch.Generator().manual_seed(0))
        try:
            with torch.inference_mode():
                _answer(model, drawn)
            return drawn
        # A network's own complaint about a size can be of any type.
        except Exception as caught:
            error = caught
    words = first_line(error)
    raise UnsupportedModelError(
        f"the network {type(model).__name__} does not take an image batch of shape "
        f"{(images, channels, *sizes[-1])}: {words.rstrip('.')}."
    )


def _drawn(group: ComponentGroup, share: float, generator: torch.Generator) -> Tensor:
    count = min(round(share * group.components), group.components - 1)
    return torch.randperm(group.components, generator=generator)[:count].sort().values


def _answer(model: nn.Module, images: Tensor) -> Tensor:
    return flattened(model(images))
