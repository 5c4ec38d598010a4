"""Finding the groups of coupled channels of any network through Torch-Pruning's dependency graph.

Torch-Pruning traces which channels have to go together (residual sums, concatenations, flattening). What we add: the
option-A shortcut as a consumer of one stream and producer of the next; grouped convolutions as followers whose
component is a whole convolution group; and a reason for everything that is left out.
"""

import contextlib
import io
import warnings
from collections.abc import Collection, Iterable, Sequence

import torch
import torch_pruning
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, UnsupportedModelError, nearest
from modhifi_cli.graph.components import ComponentGroup, Refusal, Slot, input_size, output_size
from modhifi_cli.graph.modules import ChannelPadShortcut
from modhifi_cli.graph.trace import Trace

_PRODUCERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, ChannelPadShortcut)


class _ShortcutPruner(torch_pruning.BasePruningFunc):
    """Tells Torch-Pruning that the shortcut map reads one stream and writes another; nothing is pruned through it."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        return layer

    def get_out_channels(self, layer: nn.Module) -> int:
        return layer.out_channels

    def get_in_channels(self, layer: nn.Module) -> int:
        return layer.in_channels


def find_groups(
    model: nn.Module,
    trace: Trace,
    example: Tensor,
    *,
    exclude: Iterable[str] = (),
    claimed: tuple[Collection[str], Collection[str]] = ((), ()),
) -> tuple[tuple[ComponentGroup, ...], tuple[Refusal, ...]]:
    """All groups of coupled channels of a network, in the order in which their first consumer runs.

    Args:
        model: Dense network in evaluation mode; left as found.
        trace: Its trace.
        example: One input batch, ``[batch, channels, height, width]``.
        exclude: Module names to leave alone; a name stands for the modules inside it too.
        claimed: Layers whose outputs, and layers whose inputs, belong to groups that were found otherwise.

    Returns:
        The groups that can be edited, and what was left out with its reason. Outputs of the network (the classifier's
        logits) have no consumer and are neither.

    Raises:
        ConfigError: If an excluded name is no module of the network.
        UnsupportedModelError: If the network cannot be traced.
    """
    names = {module: name for name, module in model.named_modules() if name}
    excluded = excluded_modules(model, exclude)
    coupled = _union_grouped(model, _primitive_groups(model, names, trace, example, claimed))
    groups, refused = [], []
    for links in coupled:
        group, reason = _as_group(model, links, trace)
        if group is None:
            if reason is not None:
                refused.append(reason)
        elif touched := [name for name in group.modules if name in excluded]:
            refused.append(Refusal(group.name, f"excluded by the setting exclude ({touched[0]})"))
        else:
            groups.append(group)
    groups.sort(key=lambda group: min(trace.visits[slot.module].enter for slot in group.consumers))
    return tuple(groups), tuple(refused)


def excluded_modules(model: nn.Module, exclude: Iterable[str]) -> set[str]:
    """Names of all modules that the setting exclude names, or that lie inside them.

    Raises:
        ConfigError: If a name is no module of the network.
    """
    known = {name for name, _ in model.named_modules() if name}
    excluded: set[str] = set()
    for name in exclude:
        inside = {module for module in known if module == name or module.startswith(name + ".")}
        if not inside:
            raise ConfigError(f"exclude: the network has no module '{name}'; {nearest(name, known)}")
        excluded |= inside
    return excluded


# A link says: channel `root` of the group is entry `position` of dimension `dim` of `module`.
_Link = tuple[str, str, list[int], list[int]]  # module, dim ("out" | "in" | "both" | other), positions, roots


def _primitive_groups(
    model: nn.Module,
    names: dict[nn.Module, str],
    trace: Trace,
    example: Tensor,
    claimed: tuple[Collection[str], Collection[str]],
) -> list[tuple[int, list[_Link]]]:
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    mode = model.training
    found: list[tuple[int, list[_Link]]] = []
    try:
        for parameter in required:
            parameter.requires_grad_(True)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(
                model, example, customized_pruners={ChannelPadShortcut: _ShortcutPruner()}, verbose=False
            )
            covered: dict[str, set[int]] = {}
            for module, name in names.items():
                if not isinstance(module, _PRODUCERS) or module not in graph.module2node or name in claimed[0]:
                    continue
                size = output_size(module)
                if len(covered.get(name, ())) == size:
                    continue
                pruner = graph.get_pruner_of_module(module)
                items = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(size))).items
                links = [link for item in items if (link := _link(graph, item, names)) is not None]
                for target, dim, positions, _ in links:
                    if dim in ("out", "both"):
                        covered.setdefault(target, set()).update(positions)
                if not any(target in claimed[dim == "in"] for target, dim, *_ in links if dim in ("in", "out")):
                    found.append((size, links))
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError) as error:
        raise UnsupportedModelError(
            f"the network {type(model).__name__} could not be traced for coupled channels: {error}; "
            "its forward must be plain tensor operations on modules."
        ) from error
    finally:
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
        model.train(mode)
    return found


def _link(graph: object, item: object, names: dict[nn.Module, str]) -> _Link | None:
    target, handler = item.dep.target.module, item.dep.handler
    if isinstance(target, nn.Parameter):
        return (item.dep.target.name, "parameter", list(item.idxs), list(item.root_idxs))
    if target not in names:
        return None  # sums, activations, concatenations: no tensors of their own
    if isinstance(target, nn.modules.batchnorm._BatchNorm):
        dim = "both"
    elif isinstance(target, nn.modules.conv._ConvNd) and target.groups > 1:
        dim = "both" if target.groups == target.in_channels == target.out_channels else ""
        dim = dim or ("out" if graph.is_out_channel_pruning_fn(handler) else "in")
    elif isinstance(target, _PRODUCERS):
        dim = "out" if graph.is_out_channel_pruning_fn(handler) else "in"
    elif not list(target.parameters(recurse=False)) and not list(target.buffers(recurse=False)):
        return None
    else:
        dim = type(target).__name__
    return (names[target], dim, list(item.idxs), list(item.root_idxs))


def _union_grouped(model: nn.Module, found: list[tuple[int, list[_Link]]]) -> list[list[_Link]]:
    """Join groups that meet in a grouped convolution, and number components: a whole convolution group is one.

    Returns one list of links a group, whose roots are component numbers.
    """
    offsets = [0]
    for size, _ in found:
        offsets.append(offsets[-1] + size)
    parent = list(range(offsets[-1]))

    def root(element: int) -> int:
        while parent[element] != element:
            parent[element] = parent[parent[element]]
            element = parent[element]
        return element

    owner = list(range(len(found)))

    def group_root(number: int) -> int:
        while owner[number] != number:
            owner[number] = owner[owner[number]]
            number = owner[number]
        return number

    first: dict[tuple[str, int], int] = {}
    for number, (_, links) in enumerate(found):
        for module_name, dim, positions, roots in links:
            module = model.get_submodule(module_name) if dim in ("in", "out", "both") else None
            grouped = isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1
            if not grouped and dim not in ("out", "both"):
                continue
            for position, channel in zip(positions, roots, strict=True):
                element = offsets[number] + channel
                key = (module_name + ("" if grouped else "/out"), position)
                if grouped:
                    width = (module.in_channels if dim == "in" else module.out_channels) // module.groups
                    key = (module_name, position // width)
                other = first.setdefault(key, element)
                if root(other) != root(element):
                    parent[root(element)] = root(other)
                theirs = next(i for i in range(len(found)) if offsets[i] <= other < offsets[i + 1])
                owner[group_root(number)] = group_root(theirs)
    merged: dict[int, list[_Link]] = {}
    numbers: dict[int, dict[int, int]] = {}
    for number, (_, links) in enumerate(found):
        group = group_root(number)
        component_of = numbers.setdefault(group, {})
        for module_name, dim, positions, roots in links:
            component = [component_of.setdefault(root(offsets[number] + r), len(component_of)) for r in roots]
            merged.setdefault(group, []).append((module_name, dim, positions, component))
    return list(merged.values())


def _as_group(
    model: nn.Module, links: list[_Link], trace: Trace
) -> tuple[ComponentGroup | None, Refusal | None]:
    kinds: dict[str, dict[str, dict[int, set[int]]]] = {"producers": {}, "followers": {}, "consumers": {}}
    producers = [n for n, dim, *_ in links if dim == "out"]
    name = min(producers or [links[0][0]], key=lambda n: trace.visits[n].enter if n in trace.visits else 0)
    components = 1 + max(component for *_, roots in links for component in roots)
    for module_name, dim, positions, roots in links:
        if dim not in ("in", "out", "both"):
            kind = "a bare parameter" if dim == "parameter" else f"a {dim}"
            return None, Refusal(name, f"{module_name} is {kind} across these channels")
        if module_name in trace.reused or module_name not in trace.visits:
            return None, Refusal(name, f"{module_name} runs more than once in one forward, so its channels are shared")
        module = model.get_submodule(module_name)
        grouped = isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1
        if grouped and dim == "in":
            continue  # the output side of a grouped convolution says all: whole convolution groups go
        kind = "followers" if grouped or dim == "both" else "producers" if dim == "out" else "consumers"
        entries = kinds[kind].setdefault(module_name, {})
        for position, component in zip(positions, roots, strict=True):
            entries.setdefault(component, set()).add(position)
    if not kinds["consumers"]:
        return None, None  # nothing reads these channels: they are the network's output
    slots: dict[str, tuple[Slot, ...]] = {}
    for kind, modules in kinds.items():
        made = []
        for module_name, entries in modules.items():
            widths = {len(positions) for positions in entries.values()}
            if len(entries) != components or len(widths) != 1:
                return None, Refusal(name, f"{module_name} holds only some of these channels, or unequal numbers")
            made.append(Slot(module_name, torch.tensor([sorted(entries[i]) for i in range(components)])))
        slots[kind] = tuple(sorted(made, key=lambda slot: trace.visits[slot.module].enter))
    if not slots["producers"]:
        return None, Refusal(name, "no layer of the network writes these channels")
    for slot in slots["consumers"]:
        module = model.get_submodule(slot.module)
        if reason := _unreadable(module):
            return None, Refusal(name, f"{slot.module} {reason}")
        if (input_size(module) - slot.index.numel()) % slot.entries:
            return None, Refusal(name, f"the other inputs of {slot.module} do not divide into components of equal size")
    return ComponentGroup(name, components, slots["producers"], slots["followers"], slots["consumers"]), None


def _unreadable(module: nn.Module) -> str | None:
    """Why the rows that a consumer reads cannot be told from its settings, or None."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return None
    if not isinstance(module, nn.Conv2d):
        return f"is a {type(module).__name__}, whose input rows are not known here"
    if module.padding_mode != "zeros" and max(module.kernel_size) > 1:
        return f"pads with {module.padding_mode}, not with zeros"
    overridden = type(module).forward is not nn.Conv2d.forward
    if overridden and (max(module.kernel_size) > 1 or max(module.stride) > 1):
        return f"is a {type(module).__name__} that changes its input before the convolution"
    return None
