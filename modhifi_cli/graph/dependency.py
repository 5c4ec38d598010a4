"""Finding the groups of coupled channels of any network from the labels of one forward pass.

`labels.py` says which channels meet where (residual sums, concatenations, shuffles, flattening). Here they become
groups: what one layer writes stays together, layers that write into the same sum are joined, a grouped convolution
makes whole convolution groups the component; and everything that is left out has a reason.
"""

import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, UnsupportedModelError, nearest
from modhifi_cli.graph.components import ComponentGroup, Refusal, Slot, input_size
from modhifi_cli.graph.labels import Labelling, Link, label
from modhifi_cli.graph.trace import Trace

_DIVIDED = re.compile(r"\w+\s*//\s*(?:self\.)?\w*heads?\b")


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
    excluded = excluded_modules(model, exclude)
    labelling = _coupled(model, example)
    groups, refused = [], []
    for bundle in _bundles(labelling):
        if any(link.module in claimed[link.dim == "in"] for link in bundle.links if link.dim in ("in", "out")):
            continue
        for found in _groups_of(model, bundle, labelling, trace):
            if isinstance(found, Refusal):
                refused.append(found)
            elif touched := [name for name in found.modules if name in excluded]:
                refused.append(Refusal(found.name, f"excluded by the setting exclude ({touched[0]})"))
            else:
                groups.append(found)
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


def _coupled(model: nn.Module, example: Tensor) -> Labelling:
    try:
        return label(model, example)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError) as error:
        raise UnsupportedModelError(
            f"the network {type(model).__name__} could not be traced for coupled channels: {error}; "
            "its forward must be plain tensor operations on modules."
        ) from error


@dataclass
class _Bundle:
    """Layers that write the same components, and everything that holds some of these."""

    labels: set[int]
    links: list[Link]


def _bundles(labelling: Labelling) -> list[_Bundle]:
    """Labels written by one layer belong together, and so do layers that share a label; in execution order."""
    written = [link for link in labelling.links if link.dim == "out"]
    owner: dict[int, int] = {}
    parent: list[int] = []

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for number, link in enumerate(written):
        parent.append(number)
        for each in set(link.labels.unique().tolist()) - {0}:
            first = owner.setdefault(each, number)
            a, b = root(first), root(number)
            parent[max(a, b)] = min(a, b)
    bundles: dict[int, _Bundle] = {}
    for each, number in owner.items():
        bundles.setdefault(root(number), _Bundle(set(), [])).labels.add(each)
    of = {each: root(number) for each, number in owner.items()}
    for link in labelling.links:
        for number in {of[each] for each in link.labels.unique().tolist() if each in of}:
            bundles[number].links.append(link)
    return [bundles[number] for number in sorted(bundles)]


def _groups_of(
    model: nn.Module, bundle: _Bundle, labelling: Labelling, trace: Trace
) -> Iterator[ComponentGroup | Refusal]:
    """The groups that one bundle makes, or why it makes none.

    Components that different modules hold are groups of their own (a split hands some channels to one branch and some
    to another); nothing is said of channels that only the network's answer holds.
    """
    layers = [link.module for link in bundle.links if link.dim == "out"]
    name = min(layers, key=lambda n: trace.visits[n].enter if n in trace.visits else 0)
    read = any(link.dim == "in" for link in bundle.links)
    if not read and (bundle.labels & labelling.answers or not bundle.labels & labelling.spoilt.keys()):
        return  # nothing reads these channels: they are the network's answer, or no part of it
    if bundle.labels & labelling.answers:
        yield Refusal(name, "the network gives these channels out as its answer")
        return
    spoilt = next((labelling.spoilt[each] for each in sorted(bundle.labels) if each in labelling.spoilt), None)
    if spoilt is not None:  # what is spoilt stays; other channels of the same layers may go
        yield Refusal(name, spoilt)
        if bundle.labels <= labelling.spoilt.keys():
            return
        bundle = _without(bundle, labelling.spoilt)
    for link in bundle.links:
        if reason := _unfit(model, link, trace):
            yield Refusal(name, f"{link.module} {reason}")
            return
    if len(bundle.labels) < 2:
        yield Refusal(name, _told_heads(model, name) or "its channels can only go all together")
        return
    places = _places(model, bundle)
    signatures: dict[tuple, list[int]] = {}
    for each, held in places.items():
        signatures.setdefault(tuple((key, len(positions)) for key, positions in held.items()), []).append(each)
    for number, components in enumerate(signatures.values()):
        yield _as_group(model, name if number == 0 else f"{name}:{number + 1}", components, places, trace)


def _told_heads(model: nn.Module, name: str) -> str | None:
    """The reason where attention computes the width of a head from that of its input, which says nothing of its heads."""
    parent = model.get_submodule(name.rpartition(".")[0])
    try:
        source = inspect.getsource(type(parent).forward)
    except (OSError, TypeError):
        return None
    found = _DIVIDED.search(source)
    if found is None:
        return None
    return (
        f"its forward computes the width of a head from that of its input ({found[0]}), so that none can go; store head_dim, "
        "and split its answers into heads of that width (-1 of them)"
    )


def _unfit(model: nn.Module, link: Link, trace: Trace) -> str | None:
    """Why the module of a link cannot be cut, or None."""
    if link.dim in _HELD:
        return None
    kinds = nn.modules.conv._ConvNd | nn.GroupNorm  # no statistics of the past
    follows = link.dim == "both" and isinstance(model.get_submodule(link.module), kinds)
    if link.module in trace.reused and not (link.module in trace.visits or follows):
        return "runs more than once in one forward, so its channels are shared; stack its inputs in one batch"
    if link.module not in trace.visits and link.module not in trace.reused:
        return "is used without being called, so what it reads cannot be seen"
    return _unreadable(model.get_submodule(link.module)) if link.dim == "in" else None


_KINDS = {
    "out": "producers", "both": "followers", "tensor": "followers", "size": "followers", "heads": "followers",
    "in": "consumers",
}  # fmt: skip
_HELD = ("tensor", "size", "heads")  # what a module holds, whether or not it runs as a module


def _without(bundle: _Bundle, spoilt: Mapping[int, str]) -> _Bundle:
    """The same without the components that stay."""
    labels = bundle.labels - spoilt.keys()
    known = torch.tensor(sorted(labels))
    links = [link for link in bundle.links if bool(torch.isin(link.labels, known).any())]
    return _Bundle(labels, links)


def _places(model: nn.Module, bundle: _Bundle) -> dict[int, dict[tuple[str, str], list[int]]]:
    """Label → (kind, module) → positions, labels in the order in which the first layers write them."""
    places: dict[int, dict[tuple[str, str], list[int]]] = {}
    known = torch.tensor(sorted(bundle.labels))
    for link in sorted(bundle.links, key=lambda link: link.dim != "out"):
        mine = torch.isin(link.labels, known).nonzero().flatten()
        key = (_KINDS[link.dim], link.module)
        for position, each in zip(mine.tolist(), link.labels[mine].tolist(), strict=True):
            places.setdefault(each, {}).setdefault(key, []).append(position)
    return {each: dict(sorted(held.items())) for each, held in places.items()}


def _as_group(
    model: nn.Module,
    name: str,
    components: Sequence[int],
    places: Mapping[int, Mapping[tuple[str, str], Sequence[int]]],
    trace: Trace,
) -> ComponentGroup | Refusal:
    slots: dict[str, list[Slot]] = {kind: [] for kind in dict.fromkeys(_KINDS.values())}
    for kind, module in places[components[0]]:
        index = torch.tensor([sorted(places[each][kind, module]) for each in components])
        slots[kind].append(Slot(module, index))
    for found in slots.values():
        found.sort(key=lambda slot: trace.visits[slot.module].enter if slot.module in trace.visits else 0)
    if not slots["consumers"]:
        return Refusal(name, "no layer reads these channels alone")
    for slot in slots["consumers"]:
        if (input_size(model.get_submodule(slot.module)) - slot.index.numel()) % slot.entries:
            return Refusal(name, f"the other inputs of {slot.module} do not divide into components of equal size")
    return ComponentGroup(
        name, len(components), tuple(slots["producers"]), tuple(slots["followers"]), tuple(slots["consumers"])
    )


def _unreadable(module: nn.Module) -> str | None:
    """Why the rows that a consumer reads cannot be told from its settings, or None."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return None
    if type(module) is nn.ConvTranspose2d and module.groups == 1:
        return None  # a linear layer of each pixel, up to where it writes
    plain = next((kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind)), None)
    if plain is None:
        return f"is a {type(module).__name__}, whose input rows are not known here"
    overridden = type(module).forward is not plain.forward or type(module)._conv_forward is not plain._conv_forward
    if overridden and (max(module.kernel_size) > 1 or max(module.stride) > 1):
        return f"is a {type(module).__name__} that changes its input before the convolution"
    return None
