"""What one forward pass tells about a network: execution order, data flow between modules, and where it can be cut.

A *cut* is a module whose output every path from the image to the logits passes through, so that everything behind it
can be computed from that one tensor. Cuts are found in the autograd graph of one tiny forward by counting paths: a
node lies on all paths exactly when (paths above it) × (paths below it) = all paths. Nothing here knows a family of
networks; `segments.py` uses the cuts and verifies each before relying on it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.graph.answers import tensors_of
from modhifi_cli.graph.inputs import FORWARD_ERRORS, not_taken
from modhifi_cli.graph.modes import without_gradients


@dataclass(frozen=True)
class Visit:
    """When a module was entered and left, on one clock that ticks at every entry and exit."""

    enter: int
    leave: int


@dataclass(frozen=True)
class Join:
    """What the output of a branch is added to, and nothing else is done with it: the end of a residual block.

    Attributes:
        stream: Module whose output the branch is added to; with `read`, whose first input is.
        read: A stream that no module gives, but one reads on the way to the branch (transformers: the second norm).
        gamma: What the branch is multiplied by before, a number for each channel (a layer scale); its channels lie where
            they lie in the output, other dimensions have length 1. None where nothing stands in between.
    """

    stream: str
    read: bool = False
    gamma: Tensor | None = None


@dataclass(frozen=True)
class Trace:
    """Order and data flow of the modules of one network.

    Attributes:
        visits: Module name → its (only) visit, in order of entry. Of the modules that ran more than once linear layers and
            convolutions without groups are in here, with their last visit.
        reused: Names of modules that ran more than once in one forward.
        cuts: Names of the cuts in order of leaving, outermost name of each tensor.
        norm_of: Conv or linear name → name of the BatchNorm that reads exactly its output.
        joins: Module name → what its output is added to, where nothing else is done with it.
        upstream: Module name → names of the modules whose output its own output depends on; a module that is missing
            could not be placed in the data flow and must be taken to depend on everything that ran before it.
        calls: Name of a module in `visits` that ran more than once → how often, and when it was first entered.
        same: Name of a cut → names of the modules that give its very tensor (an identity shortcut behind it).
    """

    visits: dict[str, Visit]
    reused: frozenset[str]
    cuts: tuple[str, ...]
    norm_of: dict[str, str]
    joins: dict[str, Join]
    upstream: dict[str, frozenset[str]]
    calls: dict[str, tuple[int, int]] = field(default_factory=dict)
    same: dict[str, frozenset[str]] = field(default_factory=dict)

    def depends(self, module: str, source: str) -> bool:
        """Whether the output of `module` may change when the output of `source` changes."""
        if module in self.upstream and source in self.upstream:
            return source in self.upstream[module]
        first = self.calls[source][1] if source in self.calls else self.visits[source].enter
        return first < self.visits[module].enter


def trace(model: nn.Module, example: Tensor) -> Trace:
    """Run `model` once on `example` and record order, data flow and cuts.

    Args:
        model: Network in evaluation mode. Left as found.
        example: A batch it takes, ``[batch, channels, height, width]``, at least two images are best.

    Raises:
        UnsupportedModelError: If the forward pass fails on such a batch.
    """
    names = {module: name for name, module in model.named_modules() if name}
    clock = 0
    enters: dict[str, int] = {}
    entries: dict[str, list[int]] = {}
    visits: dict[str, Visit] = {}
    reused: set[str] = set()
    nodes: dict[str, object] = {}
    tensors: dict[str, tuple[object, int]] = {}  # of a module's output: an autograd node has as many as it gives
    reads: dict[str, object] = {}
    produced: dict[int, str] = {}
    norm_of: dict[str, str] = {}
    alive: list[Tensor] = []  # keeps outputs alive so that an id is never given to another tensor

    def enter(module: nn.Module, inputs: tuple) -> None:
        nonlocal clock
        clock += 1
        name = names[module]
        if name in enters:
            reused.add(name)
        enters[name] = clock
        reads[name] = getattr(inputs[0], "grad_fn", None) if inputs else None
        entries.setdefault(name, []).append(clock)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and inputs and id(inputs[0]) in produced:
            norm_of[produced[id(inputs[0])]] = name

    def leave(module: nn.Module, inputs: tuple, output: object) -> None:
        nonlocal clock
        clock += 1
        name = names[module]
        visits[name] = Visit(enters[name], clock)
        if isinstance(output, Tensor):
            nodes[name] = output.grad_fn
            tensors[name] = output.grad_fn, output.output_nr
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                produced[id(output)] = name
                alive.append(output)

    handles = []
    try:
        for module in names:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        with without_gradients(model), torch.enable_grad():
            image = example.detach().clone().requires_grad_()
            output = model(image)
    except FORWARD_ERRORS as error:
        raise not_taken(model, tuple(example.shape), error) from error
    finally:
        for handle in handles:
            handle.remove()

    calls = {name: (len(entries[name]), entries[name][0]) for name in reused if _runs_often(model.get_submodule(name))}
    for name in reused - calls.keys():
        visits.pop(name, None)
    visits = dict(sorted(visits.items(), key=lambda item: item[1].enter))
    once = {name: visit for name, visit in visits.items() if name not in calls}
    order = _topological([tensor.grad_fn for tensor in tensors_of(output) if tensor.grad_fn is not None])
    # Where a layer still has to run again, the network cannot be taken up: half of what it reads would be missing.
    spans = [(first, visits[name].leave) for name, (_, first) in calls.items()]
    cuts = _cuts(order, nodes, once, spans)
    norm_of = {layer: norm for layer, norm in norm_of.items() if layer not in reused}
    same = {cut: frozenset(name for name in once if tensors.get(name) == tensors[cut]) for cut in cuts}
    joins, upstream = _joins(order, nodes, once, reads), _upstream(order, nodes, once)
    return Trace(visits, frozenset(reused), cuts, norm_of, joins, upstream, calls, same)


def _runs_often(module: nn.Module) -> bool:
    """Whether a layer may run more than once in a forward and still be cut: what it reads is rows, of all its runs."""
    return isinstance(module, nn.Linear) or isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1


def _parents(node: Any) -> list[Any]:
    return [parent for parent, _ in node.next_functions if parent is not None]


def _topological(roots: list[object]) -> list[object]:
    """Autograd nodes from the logits down to the image, every node before its inputs (iterative: graphs are deep)."""
    order: list[object] = []
    state: dict[object, bool] = {}
    for root in roots:
        stack = [(root, False)]
        while stack:
            node, expanded = stack.pop()
            if expanded:
                order.append(node)
            elif node not in state:
                state[node] = True
                stack.append((node, True))
                stack.extend((parent, False) for parent in _parents(node) if parent not in state)
    order.reverse()
    return order


def _cuts(
    order: list[object], nodes: dict[str, object], visits: dict[str, Visit], uncut: list[tuple[int, int]]
) -> tuple[str, ...]:
    """Names of the cuts in order of leaving; none is left between the clocks of a span of `uncut`."""
    children: dict[object, int] = dict.fromkeys(order, 0)
    for node in order:
        for parent in _parents(node):
            children[parent] += 1
    above: dict[object, int] = {node: int(children[node] == 0) for node in order}
    for node in order:
        for parent in _parents(node):
            above[parent] += above[node]
    below: dict[object, int] = {}
    for node in reversed(order):
        below[node] = sum(below[parent] for parent in _parents(node)) or int(not _parents(node))
    total = sum(above[node] for node in order if not _parents(node))
    found: dict[object, str] = {}
    for name in sorted(visits, key=lambda name: visits[name].leave):
        node = nodes.get(name)
        if node not in above or above[node] * below[node] != total:
            continue
        # The module that made the tensor and those around it that end with it; a later module that only hands its
        # input on (an identity shortcut) is no place to start, since others have read that tensor before it.
        if node not in found or found[node].startswith(name + "."):
            found[node] = name
    clocks = {name: visits[name].leave for name in found.values()}
    parted = (name for name, clock in clocks.items() if not any(first < clock < last for first, last in uncut))
    return tuple(sorted(parted, key=clocks.__getitem__))


def _joins(
    order: list[object], nodes: dict[str, object], visits: dict[str, Visit], reads: dict[str, object]
) -> dict[str, Join]:
    children: dict[Any, list[Any]] = {}
    for node in order:
        for parent in _parents(node):
            children.setdefault(parent, []).append(node)
    # The last module that hands a tensor on: the others may lie in front of a cut, where nothing runs any more.
    handed_on = {nodes[name]: name for name in sorted(visits, key=lambda name: visits[name].leave) if name in nodes}
    read_by: dict[object, list[str]] = {}
    for name in visits:
        read_by.setdefault(reads.get(name), []).append(name)

    def joined(node: object, name: str, gamma: Tensor | None = None) -> Join | None:
        readers = children.get(node, [])
        if len(readers) != 1 or type(readers[0]).__name__ != "AddBackward0" or readers[0]._saved_alpha != 1:
            return None
        other = [parent for parent in _parents(readers[0]) if parent is not node]
        if len(other) != 1:
            return None
        if other[0] in handed_on:
            return Join(handed_on[other[0]], gamma=gamma)
        before = (one for one in read_by.get(other[0], ()) if visits[one].enter < visits[name].enter)
        reader = next((one for one in before if not name.startswith(f"{one}.")), None)
        return None if reader is None else Join(reader, read=True, gamma=gamma)

    found: dict[str, Join] = {}
    for name in visits:
        node = nodes.get(name)
        join, gamma = joined(node, name), _scale_behind(node, children)
        if join is None and gamma is not None:
            join = joined(children[node][0], name, gamma)
        if join is not None:
            found[name] = join
    return found


def _scale_behind(node: Any, children: dict[Any, list[Any]]) -> Tensor | None:
    """What a tensor is multiplied by and nothing else is done with it: a constant with a number for each channel."""
    readers = children.get(node, [])
    if len(readers) != 1 or type(readers[0]).__name__ != "MulBackward0" or len(_parents(readers[0])) != 1:
        return None
    first = readers[0].next_functions[0][0] is node
    constant = readers[0]._saved_other if first else readers[0]._saved_self
    if not isinstance(constant, Tensor) or sum(size > 1 for size in constant.shape) != 1:
        return None
    return constant.detach().clone()


def _upstream(order: list[object], nodes: dict[str, object], visits: dict[str, Visit]) -> dict[str, frozenset[str]]:
    named: dict[object, list[str]] = {}
    for name, node in nodes.items():
        if node is not None and name in visits:
            named.setdefault(node, []).append(name)
    reached: dict[object, frozenset[str]] = {}
    for node in reversed(order):
        mine = frozenset(named.get(node, ()))
        reached[node] = mine.union(*(reached[parent] for parent in _parents(node)))
    return {name: reached[node] for name, node in nodes.items() if node in reached and name in visits}
