"""Heads and gated neurons of vision transformers, found by the roles of the modules and never by names of networks.

An attention module has a number of heads, projections that write queries, keys and values, and one that reads what the
heads have mixed. Its components are whole heads: rows of the writers, the entries that the module itself holds for each
head (position biases, temperatures), columns of the reader. Where a fused projection may lie in several ways, each is a
candidate, and the slicing law decides. A gated MLP whose gate and values come from one layer is found here, too:
halves of a tensor are nothing that a graph of channels sees.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi_cli.graph.components import ComponentGroup, Refusal, Slot, input_size, output_size
from modhifi_cli.graph.heads import READERS, adopt_, head_count, head_weights, mixes_heads, takes_queries
from modhifi_cli.graph.products import PAIRS, adopt_product_, product_writers, reading_tokens_alone
from modhifi_cli.graph.trace import Trace

# Who writes queries, keys and values: one name for each layer. Tried in this order.
_WRITERS: tuple[tuple[str, ...], ...] = (
    ("qkv",),
    ("q", "kv"),
    ("qk", "v"),
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
    ("wq", "wk", "wv"),
    ("in_proj",),
)
_GATES = ("gate",)  # what multiplies the mixed heads before they are read
_LAYER = (nn.Linear, nn.Conv2d)
_GATED = (("fc1", "fc2"), ("w12", "w3"))  # layers that write gate and neurons in one, and that read the neurons


@dataclass(frozen=True)
class Found:
    """What the roles of modules say.

    Attributes:
        groups: In order of execution, each in every way in which its fused projections may lie, the most usual first.
        refused: What was left out, and why; following the forward may still part it (`labels.py`).
        writers: Layers whose outputs belong to what was found, and to nothing else.
        readers: Layers whose inputs do.
    """

    groups: tuple[tuple[ComponentGroup, ...], ...]
    refused: tuple[Refusal, ...]
    writers: frozenset[str]
    readers: frozenset[str]


def find_heads(model: nn.Module, trace: Trace, *, excluded: Iterable[str] = ()) -> Found:
    """The heads of every attention module, and the neurons of every packed gated MLP.

    Args:
        model: Dense network whose attention modules were adopted (`heads.adopt_`).
        trace: Its trace.
        excluded: Names of modules that may not be touched.
    """
    banned = frozenset(excluded)
    groups: list[tuple[ComponentGroup, ...]] = []
    refused: list[Refusal] = []
    claimed: tuple[set[str], set[str]] = (set(), set())
    for name, module in model.named_modules():
        writers = _writers_of(module)
        made: list[tuple[ComponentGroup, ...]] | str | None = None
        if mixes_heads(module):
            made = _talking_parts(module, name)
        elif head_weights(module) is not None or (writers and head_count(module) is not None):
            made = _heads_of(module, name, writers, trace)
        if made is not None and not isinstance(made, str):
            own = f"{name}." if name else ""
            claimed[0].update(own + writer for writer in writers.values())
            claimed[1].update(own + (_layer_of(module, reader) or reader) for reader in READERS)
        elif made is None:
            made = _packed_gate(module, name)
        if isinstance(made, str):
            refused.append(Refusal(name, made))
            continue
        for ways in made or ():
            claimed[0].update(slot.module for slot in ways[0].producers)
            claimed[1].update(slot.module for slot in ways[0].consumers)
            if reason := _untouchable(ways[0], trace, banned):
                refused.append(Refusal(ways[0].name, reason))
            else:
                groups.append(ways)
    groups.sort(key=lambda ways: trace.visits[ways[0].consumers[0].module].enter)
    return Found(tuple(groups), tuple(refused), *map(frozenset, claimed))


def find_products(
    model: nn.Module, example: Tensor, *, excluded: Iterable[str] = ()
) -> tuple[ComponentGroup, ...]:
    """Features of queries and keys of every attention that can lose some, and is made able to, in place.

    Args:
        model: Network in evaluation mode.
        example: A batch it takes: attention that reads more than one tensor in its forward is left whole.
        excluded: Names of modules that may not be touched.
    """
    adopt_(model)
    banned, groups = frozenset(excluded), []
    can = {name: writers for name, module in model.named_modules() if (writers := product_writers(module))}
    alone = reading_tokens_alone(model, example, can)
    for name, leaves in can.items():
        own = f"{name}." if name else ""
        layers = [own + leaf for leaf in leaves]
        if name not in alone or {name, *layers} & banned:
            continue
        heads, features = adopt_product_(model.get_submodule(name))
        if features < 2:
            continue
        by_feature = torch.arange(heads * features).view(heads, features).T.contiguous()
        behind = heads * features if len(layers) == 1 else 0
        groups.append(
            ComponentGroup(
                layers[0] if behind else own + PAIRS, features,
                (Slot(layers[0], by_feature), Slot(layers[-1], by_feature + behind)),
                (Slot(own + PAIRS, torch.arange(features)[:, None]),), (), product=True,
            )
        )  # fmt: skip
    return tuple(groups)


def _untouchable(group: ComponentGroup, trace: Trace, banned: Collection[str]) -> str | None:
    parts = {slot.module for slot in group.followers}
    for name in group.modules:
        if name in banned:
            return f"excluded by the setting exclude ({name})"
        if name in trace.reused:
            return f"{name} runs more than once in one forward, so its channels are shared"
        # What an attention holds for its heads is cut with it, whether it runs as a module or hands over a tensor.
        if name not in trace.visits and name not in parts:
            return f"{name} does not run as a module, so what it reads cannot be seen"
    return None


def _writers_of(module: nn.Module) -> dict[str, str]:
    """Role → name of the layers that write queries, keys and values, or nothing."""
    for roles in _WRITERS:
        layers = {role: _layer_of(module, role) for role in roles}
        if all(layers.values()):
            return {role: layer for role, layer in layers.items() if layer is not None}
    return {}


def _layer_of(module: nn.Module, role: str) -> str | None:
    """Name of the layer that plays a role: the child of that name, or the only thing in it that has parameters."""
    child = getattr(module, role, None)
    if isinstance(child, _LAYER):
        return role
    if not isinstance(child, nn.Module):
        return None
    inside = [(name, one) for name, one in child.named_modules() if [*one.parameters(recurse=False)]]
    return f"{role}.{inside[0][0]}" if len(inside) == 1 and inside[0][0] and isinstance(inside[0][1], _LAYER) else None


def _heads_of(
    module: nn.Module, name: str, writers: Mapping[str, str], trace: Trace
) -> list[tuple[ComponentGroup, ...]] | str:
    heads = head_count(module)
    reader_name = next(filter(None, (_layer_of(module, role) for role in READERS)), None)
    if reader_name is None:
        return "this attention has no projection that reads its heads"
    width = input_size(module.get_submodule(reader_name))
    if heads is None or width % heads:
        return f"the {width} features that {reader_name} reads are not shared evenly by {heads} heads"
    if heads < 2:
        return "it has one head, which is all there is"
    own = f"{name}." if name else ""
    for norm, layer in module.named_children():
        if _as_wide(layer, width, width // heads) and _between(trace, own, norm, writers.values(), reader_name):
            return f"{own}{norm} is a {type(layer).__name__} across the heads"
    layouts = _layouts(module, writers, heads, width)
    if isinstance(layouts, str):
        return layouts
    extra = []
    followers = [Slot(name, torch.arange(heads)[:, None])]
    for child, layer in module.named_modules():
        if not child or child in (*writers.values(), reader_name):
            continue
        last = child.rpartition(".")[2]
        reads_heads = isinstance(layer, _LAYER) and "." not in child and layer.weight.shape[1] == heads
        if reads_heads and output_size(layer) != heads:
            return f"{own}{child} mixes the heads"
        if isinstance(layer, _LAYER) and last in _GATES and output_size(layer) == width:
            extra.append(Slot(own + child, torch.arange(width).view(heads, -1)))
        elif isinstance(layer, _LAYER) and output_size(layer) == heads and _ends(module, child):
            extra.append(Slot(own + child, torch.arange(heads)[:, None]))
        elif not isinstance(layer, _LAYER) and head_count(layer) == heads:
            followers.append(Slot(own + child, torch.arange(heads)[:, None]))
    # Nearly always the features of a head lie side by side where they are read; some lie as many heads apart.
    orders = [torch.arange(width).view(heads, -1), torch.arange(width).view(-1, heads).T.contiguous()]
    candidates = []
    for order, layout in itertools.product(orders, layouts):
        read = Slot(own + reader_name, order)
        slots = [Slot(own + writer, index) for writer, index in zip(writers.values(), layout, strict=True)]
        producers, rest = (*slots, *extra), followers
        if not slots:  # the module itself projects
            producers, rest = (followers[0], *extra), followers[1:]
        candidates.append(ComponentGroup(name, heads, tuple(producers), tuple(rest), (read,)))
    return [tuple(candidates)]


def _ends(module: nn.Module, child: str) -> bool:
    """Whether a layer is the last of its branch: the number of heads in the middle of one would be a coincidence."""
    parent, _, last = child.rpartition(".")
    layers = [n for n, m in module.get_submodule(parent).named_children() if isinstance(m, _LAYER)] if parent else []
    return not parent or layers[-1:] == [last]


def _between(trace: Trace, own: str, norm: str, writers: Collection[str], reader: str) -> bool:
    """Whether a norm lies between what writes the heads and what reads them; those of the input lie in front."""
    names = [own + one for one in (norm, *writers, reader)]
    if not writers or any(one not in trace.visits for one in names):
        return True  # nothing can be said, so the worst
    behind = any(trace.depends(names[0], writer) for writer in names[1:-1])
    return behind and not trace.depends(names[0], names[-1])


def _as_wide(layer: nn.Module, width: int, each: int) -> bool:
    """Whether a layer normalises as many features as all heads have together, not those of each."""
    shape = getattr(layer, "normalized_shape", None)
    size = shape[-1] if shape else getattr(layer, "num_features", getattr(layer, "num_channels", None))
    return size == width != each


def _layouts(module: nn.Module, writers: Mapping[str, str], heads: int, width: int) -> list[list[Tensor]] | str:
    """For each way in which the projections may lie, the positions of every writer: ``[heads, entries]`` each."""
    if not writers:
        return [[]]
    sizes = [output_size(module.get_submodule(layer)) for layer in writers.values()]
    uneven = [name for name, size in zip(writers, sizes, strict=True) if size % heads]
    if uneven:
        return f"{uneven[0]} does not write the same for each of its {heads} heads"
    runs = {"qkv": 2 if takes_queries(module) and sizes == [2 * width] else 3, "kv": 2, "qk": 2, "in_proj": 3}
    apart = [_runs(size, heads, runs.get(name, 1), width) for name, size in zip(writers, sizes, strict=True)]
    together = [torch.arange(size).view(heads, -1) for size in sizes]
    if any(one is None for one in apart):
        return [together]
    layouts = [apart]
    if any(runs.get(name, 1) > 1 for name in writers):
        layouts.append(together)
    return layouts


def _runs(size: int, heads: int, runs: int, width: int) -> Tensor | None:
    """Positions where queries, keys and values lie one behind the other, head after head; values are `width` wide."""
    if runs == 1:
        return torch.arange(size).view(heads, -1)
    widths = [width] if runs == 2 and size == 2 * width else []
    widths = [size // runs] * runs if size == runs * width else widths
    rest = size - width
    if not widths and rest > 0 and rest % (runs - 1) == 0 and rest // (runs - 1) % heads == 0:
        widths = [rest // (runs - 1)] * (runs - 1) + [width]
    if not widths:
        return None
    blocks, start = [], 0
    for each in widths if len(widths) == runs else widths * runs:
        blocks.append(torch.arange(start, start + each).view(heads, -1))
        start += each
    return torch.cat(blocks, 1)


def _talking_parts(module: nn.Module, name: str) -> list[tuple[ComponentGroup, ...]]:
    """Attention with talking heads: its values' heads, its softmax's and those of queries with keys, three groups."""
    own = f"{name}." if name else ""
    heads, width = module.num_heads, module.proj.in_features
    by_head = torch.arange(width).view(heads, -1)
    one = torch.arange(heads)[:, None]
    pairs = torch.cat([by_head, by_head + width], 1)
    qkv, before, behind, reader = (own + layer for layer in ("qkv", "proj_l", "proj_w", "proj"))
    groups = [
        ComponentGroup(f"{own}proj_l", heads, (Slot(qkv, pairs),), (), (Slot(before, one),)),
        ComponentGroup(f"{own}proj_w", heads, (Slot(before, one),), (), (Slot(behind, one),)),
        ComponentGroup(
            f"{own}proj", heads, (Slot(qkv, by_head + 2 * width), Slot(behind, one)), (), (Slot(reader, by_head),)
        ),
    ]
    return [(group,) for group in groups] if heads > 1 else []


def _packed_gate(module: nn.Module, name: str) -> list[tuple[ComponentGroup, ...]] | str | None:
    """An MLP whose first layer writes gate and values in one: twice as many as the second reads."""
    for writer_name, reader_name in _GATED:
        writer, reader = getattr(module, writer_name, None), getattr(module, reader_name, None)
        if not (isinstance(writer, _LAYER) and isinstance(reader, _LAYER)):
            continue
        hidden = input_size(reader)
        if output_size(writer) != 2 * hidden:
            continue
        for norm, layer in module.named_children():
            if _as_wide(layer, hidden, 1):
                return f"{norm} is a {type(layer).__name__} across the hidden neurons"
        own = f"{name}." if name else ""
        neurons = torch.arange(hidden)[:, None]
        halves = torch.cat([neurons, neurons + hidden], 1)
        pairs = torch.cat([2 * neurons, 2 * neurons + 1], 1)
        read = Slot(own + reader_name, neurons)
        ways = (halves, pairs)
        writer_slots = [Slot(own + writer_name, index) for index in ways]
        return [tuple(ComponentGroup(own + writer_name, hidden, (slot,), (), (read,)) for slot in writer_slots)]
    return None
