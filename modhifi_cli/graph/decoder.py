"""Causal decoders by the roles of their modules: layers, gated and plain MLPs, attention with its heads.

A decoder layer is taken apart by what its modules are to each other, never by the name of the model family: who writes
the hidden neurons and who reads them, who writes queries, keys and values and who reads the heads. Where several
layouts of a fused projection are possible, each is a candidate, and the slicing law on a randomised float64 copy of one
layer decides. A module that plays no known role is refused by its name.
"""

import copy
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, UnsupportedModelError, first_line, nearest
from modhifi_cli.graph.components import ComponentGroup, Layout, Refusal, Slot, input_size, is_linear, output_size
from modhifi_cli.graph.experts import Experts, common_width, of_experts
from modhifi_cli.graph.heads import TAKEN
from modhifi_cli.graph.law import SEED, KeepsDouble, Verdict, randomise_
from modhifi_cli.graph.mixers import is_mixer, ways
from modhifi_cli.graph.parts import BareTensor, integers, is_part, part_of
from modhifi_cli.graph.surgery import set_attribute_, slice_module_

KINDS = ("attention", "mlp", "experts")  # in the order in which a decoder layer runs them
UNITS = ("auto", "kv_group", "query_head")
_NEVER = 1e5  # logits below all others: their exponential is zero
_FEW_KV_GROUPS = 4  # below this many, removing one whole KV group is too coarse a step

# Roles: who writes (one name per projection), who reads. Tried in this order.
_MLP_ROLES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("c_fc",), "c_proj"),
    (("up_proj",), "down_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
    (("intermediate",), "output"),
    (("Wi",), "Wo"),
    (("input_linear",), "output_linear"),
    (("proj_up_gate", "proj_up"), "proj_down"),
    (("w_in.w_0", "w_in.w_1"), "w_out"),
    (("layer_1",), "layer_2"),
    (("ffn.0",), "ffn.2"),
    (("feed_forward.key",), "feed_forward.value"),
)
_ATTENTION_ROLES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("q_b_proj", "kv_b_proj"), "o_proj"),  # heads that unfold keys and values from a common latent vector
    (("q_gate_proj", "kv_b_proj"), "o_proj"),
    (("q_proj", "kv_b_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("q_proj", "k_proj", "v_proj"), "dense"),
    (("q_proj", "k_proj", "v_proj"), "Wo"),
    (("q_proj.linear", "k_proj.linear", "v_proj.linear"), "o_proj.linear"),
    (("query_proj", "key_proj", "value_proj"), "out_proj"),
    (("project_q", "project_k", "project_v"), "attention_out"),
    (("Wq", "Wk", "Wv"), "dense"),
    (("qkv_proj",), "o_proj"),
    (("qkv_proj",), "out_proj"),
    (("query_key_value",), "dense"),
    (("c_attn",), "c_proj"),
    (("Wqkv",), "out_proj"),
    (("self.query", "self.key", "self.value"), "output.dense"),
)
_ROUTER = re.compile(r"gate|router|classifier")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("top_k", "num_experts_per_tok", "moe_topk", "topk", "num_selected_experts")
_ROUTER_GROUPS = ("num_group", "n_group", "num_expert_group")
_GATES = ("gate_proj", "g_proj", "q_gate_proj")
_DEVICES = 4  # a fused projection may hold queries, values and keys of the heads of one device after the other
_HEAD_COUNTS = ("num_heads", "n_head", "num_attention_heads", "n_heads")
_WIDTHS = ("embed_dim", "hidden_size")
_HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "dim_head")


@dataclass(frozen=True)
class Part:
    """What can be pruned of one decoder layer together: hidden neurons of an MLP, heads of its attention, or experts.

    Attributes:
        group: The components in the coordinates of the dense network. The first consumer is the one that is repaired;
            further ones, of state spaces alone, only lose what they read of them.
        kind: ``"mlp"`` (of an expert, too), ``"attention"`` or ``"experts"``.
        layer: Number of the decoder layer.
        unit: What one component is, in words.
        parent: Name of the module that holds the attributes (head counts) which change with the widths.
        heads: Dense query heads, 0 for an MLP.
        kv_heads: Dense key/value heads, 0 for an MLP.
        least: Components that must be left: as many experts as the router chooses for a token.
        share: Share of the tokens that it works for, 0 … 1: those that the router gives an expert.
    """

    group: ComponentGroup
    kind: str
    layer: int
    unit: str
    parent: str
    heads: int = 0
    kv_heads: int = 0
    least: int = 1
    share: float = 1.0

    @property
    def name(self) -> str:
        """Name of the group: that of its consumer."""
        return self.group.name

    @property
    def components(self) -> int:
        """Number of components in the dense network."""
        return self.group.components

    @property
    def balanced(self) -> int:
        """Equal runs of components that must keep the same number each (`ComponentGroup`)."""
        return self.group.balanced

    @property
    def consumer(self) -> Slot:
        """Where the components are read: what of them reaches the stream."""
        return self.group.consumers[0]

    def head_counts(self, keep: int) -> tuple[int, int]:
        """Query heads and KV heads when `keep` components are left."""
        if self.balanced > 1 or self.components != self.kv_heads:
            return keep, self.kv_heads
        return keep * (self.heads // self.kv_heads), keep


@dataclass(frozen=True)
class Decoder:
    """The layers of a causal decoder and what of them can be pruned.

    Attributes:
        layers: Names of the decoder layers in execution order.
        parts: In execution order.
        refused: What is left alone, and why.
    """

    layers: tuple[str, ...]
    parts: tuple[Part, ...]
    refused: tuple[Refusal, ...]


@dataclass(frozen=True)
class Call:
    """How the network calls one of its decoder layers, apart from the hidden states.

    Attributes:
        args: What follows them by place.
        kwargs: What follows by name.
        shape: Of the hidden states; ``[batch, length, width]``, or more where a network keeps several streams.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Call":
        """The same with tensors on a device, floating ones in another dtype if one is given."""
        return Call(_moved(self.args, device, dtype), _moved(self.kwargs, device, dtype), self.shape)


def decoder_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the decoder layers: the one list of modules that is as long as the configuration says.

    Raises:
        UnsupportedModelError: If the network is no causal decoder of transformers.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    # The second and third of pairs, the last where the first counts how often layers run.
    counts = [getattr(text, key, None) for key in ("num_hidden_layers", "decoder_layers", "num_decoder_layers", "num_layers", "num_layers_per_stack")]
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a sequence-to-sequence model; only causal decoders can be pruned as language "
            "models."
        )
    others = tuple(f"{name}." for name, module in model.named_modules()  # parts that read pictures or sound
                   if name and getattr(module, "main_input_name", "input_ids") != "input_ids")  # fmt: skip
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
             and len(module) in counts and any(parameter.dim() > 1 for parameter in module[0].parameters())]  # fmt: skip
    # Layers are of one class, or each of the class of its kind.
    for name, module in sorted(lists, key=lambda each: (each[0].startswith(others), len({type(m) for m in each[1]}) > 1)):
        return tuple(f"{name}.{number}" for number in range(len(module)))
    raise UnsupportedModelError(
        f"{type(model).__name__}: no list of {counts[0]} decoder layers was found; only causal decoders whose layers stand "
        "in one list can be pruned as language models."
    )


class _Enough(Exception):
    """The forward has shown what was wanted."""


@contextmanager
def short_circuited(
    model: nn.Module, layers: Sequence[str], answer: Callable[[int, Tensor, Call], Any]
) -> Iterator[None]:
    """Within it each decoder layer answers with ``answer(number, hidden states, call)`` instead of computing."""

    def stand_in(number: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return answer(number, hidden_states, Call(args, kwargs, tuple(hidden_states.shape)))

        return forward

    modules = [model.get_submodule(name) for name in layers]
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for number, module in enumerate(modules):
            module.forward = stand_in(number)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.forward = forward


def _either_way(
    model: nn.Module, layers: Sequence[str], answer: Callable[[int, Tensor, Call], Tensor], forward: Callable[[], Any]
) -> Any:
    """A short-circuited forward of a network whose layers give hidden states alone, or beside attention's weights."""
    try:
        with short_circuited(model, layers, answer):
            return forward()
    except (ValueError, TypeError, AttributeError):  # it unpacks what its layers give, or takes the first of it
        try:
            with short_circuited(model, layers, lambda *given: (answer(*given), None)):
                return forward()
        except ValueError:  # a state beside them
            with short_circuited(model, layers, lambda *given: (answer(*given), None, None)):
                return forward()


@torch.no_grad()
def enter(model: nn.Module, layers: Sequence[str], tokens: Tensor) -> tuple[Tensor, list[Call]]:
    """What the first decoder layer is given, and how every layer is called, without running any layer.

    Args:
        model: The network.
        layers: As `decoder_layers`.
        tokens: ``[batch, length]`` int64.

    Returns:
        Hidden states ``[batch, length, width]``, and one call for each layer.
    """
    entered: list[Tensor] = []
    calls: list[Call] = []

    def answer(number: int, hidden: Tensor, call: Call) -> Tensor:
        if number == 0:
            entered.append(hidden)
        elif hidden.dim() < entered[0].dim():
            raise ValueError("the network takes the first of what its layers give")
        calls.append(call)
        if number == len(layers) - 1:
            raise _Enough
        return hidden

    def forward() -> None:
        entered.clear(), calls.clear()
        try:
            model(input_ids=tokens, use_cache=False)
        except _Enough:
            pass

    _either_way(model, layers, answer, forward)
    if len(calls) < len(layers):
        raise UnsupportedModelError(
            f"{type(model).__name__}: only {len(calls)} of its {len(layers)} decoder layers run on text alone; only decoders "
            "that run whole on it can be pruned as language models."
        )
    return entered[0], calls


@torch.no_grad()
def leave(model: nn.Module, layers: Sequence[str], hidden: Tensor) -> Tensor:
    """Logits from the hidden states behind the last decoder layer, ``[batch, length, vocabulary]``."""
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)

    def answer(number: int, given: Tensor, _: Call) -> Tensor:
        if number and given.dim() < hidden.dim():
            raise ValueError("the network takes the first of what its layers give")
        return hidden

    return _either_way(model, layers, answer, lambda: model(input_ids=tokens, use_cache=False).logits)


def run_layer(layer: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Hidden states behind one decoder layer."""
    output = layer(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple | list) else output


def find_parts(
    model: nn.Module,
    *,
    components: Sequence[str] = KINDS,
    unit: str = "auto",
    exclude: Sequence[str] = (),
    check: bool = True,
) -> Decoder:
    """What of each decoder layer can be pruned, checked against the slicing law.

    The law is checked once for each kind of layer (same modules, same shapes) on a randomised float64 copy of that
    layer alone.

    Args:
        model: Dense network; left as found. Experts are looked into where they are taken apart (`open_experts_`).
        components: Which of `KINDS`. Neurons are counted for each expert by itself.
        unit: What is removed of attention: ``"kv_group"`` a KV head with all its query heads, ``"query_head"`` the same
            number of query heads from every KV head, ``"auto"`` the former from 4 KV heads on.
        exclude: Names of modules (or their beginnings) to leave alone.
        check: Whether the law is asked; without it the network's tensors may be on ``meta``, and fused projections
            count as laid out in the first way that is known.

    Raises:
        ConfigError: If an excluded module does not exist.
        UnsupportedModelError: If the network is no decoder, or nothing of it is understood.
    """
    names = [name for name, _ in model.named_modules() if name]
    for asked in exclude:
        if not any(name == asked or name.startswith(f"{asked}.") for name in names):
            raise ConfigError(f"exclude: the network has no module '{asked}', {nearest(asked, names)}")
    layers = decoder_layers(model)
    device = next(model.parameters()).device
    calls: list[Call] = []
    if check:
        _, calls = enter(model, layers, torch.arange(8, device=device)[None] % model.config.get_text_config().vocab_size)
    parts: list[Part] = []
    refused: list[Refusal] = []
    verdicts: dict[Any, int | str] = {}
    for number, name in enumerate(layers):
        ran = _ran(model.get_submodule(name), name, calls[number], model) if check else None
        every = [each for kind in KINDS if kind in components for each in _played(model, name, number, kind, unit, ran)]
        for found in every:
            if isinstance(found, Refusal):
                refused.append(found)
                continue
            asked = next((word for word in exclude if _touches(found[0], word)), None)
            if asked is not None:
                refused.append(Refusal(found[0].name, f"it touches {asked}, which is excluded"))
                continue
            if not check:
                parts.append(found[0])
                continue
            layer = model.get_submodule(name)
            shapes = tuple((key, tuple(tensor.shape)) for key, tensor in layer.named_parameters())
            inside = re.sub(r"(?<=\.)\d+(?=\.)", "N", found[0].name.removeprefix(name))  # experts of a layer are alike
            signature = (type(layer).__name__, inside, shapes, _plain(calls[number]))
            if signature not in verdicts:
                verdicts[signature] = _lawful(layer, name, found, calls[number])
            verdict = verdicts[signature]
            if isinstance(verdict, str):
                refused.append(Refusal(found[0].name, verdict))
            else:
                parts.append(found[verdict])
    if not parts:
        reasons = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in refused[:3])
        raise UnsupportedModelError(
            f"{type(model).__name__} has nothing that can be pruned ({reasons or 'no component was asked for'})."
        )
    return Decoder(layers, tuple(parts), tuple(refused))


def attributes_at(model: nn.Module, part: Part, keep: int) -> dict[str, int]:
    """Attributes of the attention module that follow from its number of heads, at a width.

    Args:
        model: The network.
        part: One of its parts.
        keep: Components that are left.

    Returns:
        Attribute → value; empty for an MLP, of experts what their block reads in its configuration. ``config.…`` is an
        attribute of the module's own copy of the configuration, for modules whose forward reads its head count there.
    """
    module = model.get_submodule(part.parent)
    if part.kind == "experts":
        source = _source(type(module))
        return {f"config.{name}": keep for name in _EXPERT_COUNTS if f"config.{name}" in source}
    if part.kind != "attention":
        return {}
    heads, kv_heads = part.head_counts(keep)
    dim = part.consumer.index.numel() // part.heads
    values = {
        "num_heads": heads,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_kv_heads": kv_heads,
        "num_key_value_groups": heads // kv_heads,
        "split_size": heads * dim,
        "all_head_size": heads * dim,
        "num_q_heads": heads,
        "n_heads": heads,
        "n_head": heads,
        "num_attn_heads": heads,
    }
    found = {name: value for name, value in values.items() if isinstance(getattr(module, name, None), int)}
    source = _source(type(module))
    if "config.num_attention_heads" in source:
        found["config.num_attention_heads"] = heads
    if "config.num_key_value_heads" in source:
        found["config.num_key_value_heads"] = kv_heads
    return found


def slice_part_(model: nn.Module, layout: Layout, part: Part, kept: Tensor) -> tuple[dict, dict, dict[str, int]]:
    """Cut one part to the kept components (positions among the living ones), in place.

    Returns:
        Kept outputs and kept inputs by module name, before the cut, and the attributes of `part.parent`.
    """
    outputs, inputs = layout.keep_(part.group, kept)
    for name in dict.fromkeys((*outputs, *inputs)):
        slice_module_(part_of(model, name), outputs=outputs.get(name), inputs=inputs.get(name))
    attributes = attributes_at(model, part, kept.numel())
    for name, value in attributes.items():
        set_attribute_(model.get_submodule(part.parent), name, value)
    return outputs, inputs, attributes


def component_parameters(model: nn.Module, part: Part) -> int:
    """Parameters that go with one component: rows of its producers with their biases, columns of its consumer."""
    if part.kind == "experts":
        touched = [part_of(model, slot.module) for slot in part.group.followers]
        whole = 0
        for each in touched:
            if is_part(each):
                whole += each.parameters
            else:
                single = [each.expert(number) for number in each.numbers] if isinstance(each, Experts) else [each]
                whole += sum(tensor.numel() for module in single for tensor in module.parameters())
        return whole // part.components
    total = sum(slot.entries * output_size(model.get_submodule(slot.module)) for slot in part.group.consumers[1:])
    for slot in part.group.producers:
        module = model.get_submodule(slot.module)
        total += slot.entries * (input_size(module) + (module.bias is not None))
    return total + part.consumer.entries * output_size(model.get_submodule(part.consumer.module))


def shape_of(model: nn.Module, number: int) -> dict[str, int]:
    """Widths of one decoder layer as it stands, as far as they are known.

    These are ``neurons``, ``heads``, ``kv_heads``, ``head_dim``, ``experts``, and ``expert_neurons`` (0 where they differ).
    """
    name = decoder_layers(model)[number]
    layer = model.get_submodule(name)
    found: dict[str, int] = {}
    for mlp in _played(model, name, number, "mlp", "auto"):
        if not isinstance(mlp, Refusal) and of_experts(model, mlp[0].name) is None:
            found["neurons"] = mlp[0].components
            break
    attention = _candidates(model, name, number, "attention", "auto")
    # Heads that stand for something else than the configuration's are left out.
    if not isinstance(attention, Refusal) and not is_mixer(model.get_submodule(attention[0].parent)):
        part = attention[0]
        dim = part.consumer.index.numel() // part.heads
        found |= {"heads": part.heads, "kv_heads": part.kv_heads}
        if not _is_latent(part):  # there it is not what the configuration calls so
            found["head_dim"] = dim
    experts = next((module for module in layer.modules() if isinstance(module, Experts)), None)
    if experts is not None:
        found |= {"experts": experts.num_experts, "expert_neurons": common_width(experts) or 0}
    return found


def _is_latent(part: Part) -> bool:
    return any(slot.module.endswith("kv_b_proj") for slot in part.group.producers)


def attention_attributes(model: nn.Module) -> dict[str, dict[str, int]]:
    """Counts of heads and experts as they stand, by the module that holds them: what widths alone do not say."""
    found: dict[str, dict[str, int]] = {}
    for number, name in enumerate(decoder_layers(model)):
        for kind in ("attention", "experts"):
            candidates = _candidates(model, name, number, kind, "auto")
            if not isinstance(candidates, Refusal):
                part = candidates[0]
                values = attributes_at(model, part, part.components)
                if values:
                    found[part.parent] = found.get(part.parent, {}) | values
    return found


# ------------------------------------------------------------------------------------------------------------- roles


def _played(
    model: nn.Module, layer: str, number: int, kind: str, unit: str, ran: frozenset[str] | None = None
) -> list[list[Part] | Refusal]:
    """Everything that plays the role of a kind in one layer.

    For each the part once for each possible layout of fused projections, or why there is none. A layer may have several
    (an MLP beside the experts, attention to another text).

    Args:
        model: The network.
        layer: Name of the layer.
        number: Of the layer.
        kind: One of `KINDS`.
        unit: As of `find_parts`.
        ran: Modules that ran when the layer was called; others are left out. None takes all.
    """
    roles = _MLP_ROLES if kind == "mlp" else _ATTENTION_ROLES
    root = model.get_submodule(layer)
    if kind == "experts":
        return [_expert_candidates(model, f"{layer}.{path}", number) for path, module in root.named_modules()
                if isinstance(module, Experts)]  # fmt: skip
    found: list[list[Part] | Refusal] = []
    for path, module in root.named_modules():
        parent = f"{layer}.{path}" if path else layer
        if kind == "attention" and is_mixer(module):
            found.append(_mixer_candidates(model, parent, number))
            continue
        for writers, reader in roles:
            if all(is_linear(_inside(module, name)) for name in (*writers, reader)):
                names, last = [f"{parent}.{name}" for name in writers], f"{parent}.{reader}"
                mixed = of_experts(root, f"{path}.{reader}")
                if ran is not None and mixed is None and last not in ran:
                    break
                holder = ".".join(os.path.commonprefix([each.split(".")[:-1] for each in names]))
                if kind == "mlp":
                    found.append(_mlp_candidates(model, holder, names, last, number, mixed))
                else:
                    found.append(_attention_candidates(model, holder, names, last, number, unit))
                break
    if kind == "mlp" and (experts := _experts(root)):
        path, weight = experts
        told = f"{weight} [{', '.join(map(str, root.get_parameter(f'{path}.{weight}').shape))}]"
        said = f"its experts hold the weights of all in one tensor ({told}), which is left alone"
        found.append(Refusal(f"{layer}.{path}", said))
    return found or [_stranger(root, layer, kind)]


def _candidates(model: nn.Module, layer: str, number: int, kind: str, unit: str) -> list[Part] | Refusal:
    """The first that plays the role of a kind in one layer (`_played`)."""
    return next(iter(_played(model, layer, number, kind, unit)), Refusal(layer, "it has no experts"))


def _inside(module: nn.Module, path: str) -> object:
    """A module's module by its path, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _experts(root: nn.Module) -> tuple[str, str] | None:
    """Name of a module that holds several experts' weights in one tensor ``[experts, …, …]``, and of the first such."""
    for path, module in root.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and "expert" in f"{path} {type(module).__name__}".lower():
                return path, leaf
    return None


def _stranger(root: nn.Module, layer: str, kind: str) -> Refusal:
    strangers = [name for name, module in root.named_modules() if isinstance(module, nn.Linear) or is_linear(module)]
    here = "attn" in layer or "attention" in layer
    first = next((name for name in strangers if (here or "attn" in name or "attention" in name) == (kind != "mlp")), None)
    stranger = f"{layer}.{first}" if first else layer
    if first is not None and not is_linear(root.get_submodule(first)):
        kind_of = type(root.get_submodule(first)).__name__
        return Refusal(stranger, f"it is a {kind_of}, which computes something else than its weight times its input")
    bare = next((name for name, module in root.named_modules() if "attn" in name or "attention" in name
                 if any(tensor.dim() > 1 for tensor in module.parameters(recurse=False))), None)  # fmt: skip
    if kind == "attention" and first is None and bare is not None:
        return Refusal(f"{layer}.{bare}", "this attention holds its projections as bare tensors, which are left alone")
    if kind == "attention" and first is None:
        return Refusal(layer, "it has no attention: what mixes its tokens (a state space, a recurrence) is left alone")
    return Refusal(stranger, f"no modules with the roles of {'an' if kind[0] == 'a' else 'a'} {kind} were found")


@torch.no_grad()
def _ran(layer: nn.Module, name: str, call: Call, model: nn.Module) -> frozenset[str] | None:
    """Names of the linear layers that run when the network calls the layer; None where that cannot be tried here."""
    parameter = next((each for each in layer.parameters() if each.dim() > 1), None)
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    if parameter is None or not isinstance(width, int) or parameter.is_meta:
        return None
    seen: set[str] = set()

    def note(path: str) -> Callable[..., None]:
        return lambda *_: seen.add(f"{name}.{path}")

    handles = [each.register_forward_pre_hook(note(path)) for path, each in layer.named_modules() if path]
    try:
        hidden = torch.ones(call.shape or (1, 8, width), device=parameter.device, dtype=parameter.dtype)
        run_layer(layer, hidden, call.to(parameter.device, parameter.dtype))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, ArithmeticError, KeyError):
        return None  # the law will say
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(seen)


def _mlp_candidates(
    model: nn.Module, parent: str, writers: Sequence[str], reader: str, number: int, mixed: Experts | None = None
) -> list[Part] | Refusal:
    neurons = input_size(model.get_submodule(reader))
    own = torch.arange(neurons)[:, None]
    layouts: list[list[Tensor]]
    sizes = {output_size(model.get_submodule(name)) for name in writers}
    if sizes == {neurons}:
        layouts = [[own] * len(writers)]
    elif len(writers) == 1 and sizes == {2 * neurons}:
        layouts = [[torch.cat([own, own + neurons], 1)], [torch.cat([2 * own, 2 * own + 1], 1)]]
    else:
        return Refusal(reader, f"it reads {neurons} neurons, its writers have {sorted(sizes)}")
    return [
        Part(
            _group(reader, neurons, [Slot(n, i) for n, i in zip(writers, index, strict=True)], Slot(reader, own)),
            "mlp",
            number,
            "hidden neuron" if mixed is None else "hidden neuron of an expert",
            parent,
            share=1.0 if mixed is None else min(1.0, _chosen(model, parent.rpartition(".")[0]) / mixed.num_experts),
        )
        for index in layouts
    ]


def _chosen(model: nn.Module, experts: str) -> int:
    """How many experts the router gives a token: what it, its block or the configuration says."""
    block = model.get_submodule(experts.rpartition(".")[0])
    holders = [*block.children(), block, getattr(block, "config", None), model.config.get_text_config()]
    values = (getattr(holder, name, None) for holder in holders for name in _CHOSEN)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), 1)


def _expert_candidates(model: nn.Module, name: str, number: int) -> list[Part] | Refusal:
    """The experts of a layer with the rows of their router."""
    experts = model.get_submodule(name)
    assert isinstance(experts, Experts)
    parent, count = name.rpartition(".")[0], experts.num_experts
    block = model.get_submodule(parent)
    every = torch.arange(count)[:, None]
    followers, rows = [Slot(name, every)], False
    for path, module in block.named_modules(prefix=parent):
        if path == name or path.startswith(f"{name}.") or (path != parent and not _ROUTER.search(path.rpartition(".")[2])):
            continue
        if isinstance(module, nn.Linear):
            if module.out_features == count:
                followers.append(Slot(path, every))
                rows = True
            continue
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.dim() in (1, 2) and len(tensor) == count:
                followers.append(Slot(f"{path}.{leaf}", every))
                rows = rows or tensor.dim() == 2
        held = integers(module)
        followers += [Slot(f"{path}.{leaf}", every) for leaf in _EXPERT_COUNTS if held.get(leaf) == count]
    if not rows:
        return Refusal(name, "whole experts stay: no router with a row for each of them stands beside them")
    runs = next((n for m in (*block.children(), block) for key in _ROUTER_GROUPS if (n := integers(m).get(key, 1)) > 1), 1)
    reader = f"{name}.mix"
    group = ComponentGroup(reader, count, (), tuple(followers), (Slot(reader, every),), runs)
    least = _chosen(model, name)
    return [Part(group, "experts", number, "expert with its row of the router", parent, least=max(least, 2 * runs))]


def _attention_candidates(
    model: nn.Module, parent: str, writers: Sequence[str], reader: str, number: int, unit: str
) -> list[Part] | Refusal:
    module = model.get_submodule(parent)
    across = _norm_across_heads(module)
    if across is not None:
        return Refusal(parent, f"{across} normalises all its heads together, so that none of them can go")
    if writers[-1].endswith("kv_b_proj"):  # as `_is_latent`
        return _latent_candidates(model, parent, writers, reader, number)
    counted = _heads_and_sizes(model, parent, writers, reader)
    if isinstance(counted, Refusal):
        return counted
    heads, kv_heads, dim, sizes = counted
    width = heads * dim
    share = heads // kv_heads
    whole = unit == "kv_group" or share == 1 or (unit == "auto" and kv_heads >= _FEW_KV_GROUPS)
    query = torch.arange(width).view(heads, dim)
    if len(writers) == 3:
        layouts = [[torch.arange(size).view(count, -1) for size, count in zip(sizes, (heads, kv_heads, kv_heads), strict=True)]]
        names = list(writers)
    else:
        own = torch.arange(kv_heads * dim).view(kv_heads, dim)
        blocks = [query, own + width, own + width + kv_heads * dim]
        layouts = [blocks]
        if share == 1:
            interleaved = torch.arange(3 * width).view(heads, 3, dim)
            layouts.append([interleaved[:, 0], interleaved[:, 1], interleaved[:, 2]])
            if heads % _DEVICES == 0 and heads > _DEVICES:
                layouts.append(list(torch.arange(3 * width).view(_DEVICES, 3, -1, dim).transpose(0, 1).flatten(1, 2)))
        names = [writers[0]] * 3
    parts = []
    for number_of, (queries, keys, values) in enumerate(layouts):
        if whole:
            producers = [queries.reshape(kv_heads, -1), keys, values]
            consumed, count = query.reshape(kv_heads, -1), kv_heads
            said = "head" if share == 1 else f"KV head with its {share} query heads"
            slots = [Slot(name, index) for name, index in zip(names, producers, strict=True)]
        else:
            slots, consumed, count = [Slot(names[0], queries)], query, heads
            said = f"query head, the same number of each of {kv_heads} KV heads"
        more, followers = _beside_heads(module, parent, width, heads, count)
        slots += more if len(writers) == 3 else []
        runs = _DEVICES if number_of == 2 else 1  # the third layout splits the heads into as many runs of equal length
        group = _group(reader, count, slots, Slot(reader, consumed), followers, balanced=runs if whole else kv_heads)
        parts.append(Part(group, "attention", number, said, parent, heads, kv_heads))
    return _with_more(model, parts, writers, reader)


def _with_more(model: nn.Module, parts: Sequence[Part], writers: Sequence[str], reader: str) -> list[Part]:
    """The same heads, and further ways to tell what goes with them, to be tried after those."""
    first, found = parts[0], list(parts)
    module, heads = model.get_submodule(first.parent), first.heads
    width, read = input_size(model.get_submodule(reader)), output_size(model.get_submodule(reader))
    own = torch.arange(heads).view(first.components, -1)
    # All else in it that reads the stream may write something for each head: sinks of a token, biases for distances.
    known = {*writers, reader, *(slot.module for part in parts for slot in part.group.producers)}
    inside = [(f"{first.parent}.{path}", child) for path, child in module.named_modules() if path]
    more = [Slot(name, torch.arange(output_size(child)).view(first.components, -1)) for name, child in inside
            if name not in known and is_linear(child) and input_size(child) == read and output_size(child) % heads == 0]  # fmt: skip
    if more:
        said = [(name, leaf) for name, child in inside for leaf in _HEAD_COUNTS if integers(child).get(leaf) == heads]
        said += [(name, leaf) for name, child in inside for leaf, _ in child.named_parameters(recurse=False)
                 if leaf not in ("weight", "bias") and BareTensor(child, leaf).size == heads]  # fmt: skip
        followers = [Slot(f"{name}.{leaf}", own) for name, leaf in said]
        found += [_extended(part, more, followers) for part in found]
    # Where the width of all heads has a name of its own that the forward reads, it follows them.
    named = [Slot(f"{first.parent}.{leaf}", first.consumer.index) for leaf in _WIDTHS if integers(module).get(leaf) == width]
    return found + [_extended(part, (), named) for part in found] if named else found


def _extended(part: Part, producers: Sequence[Slot], followers: Sequence[Slot]) -> Part:
    group = part.group
    group = replace(group, producers=(*group.producers, *producers), followers=(*group.followers, *followers))
    return replace(part, group=group)


def _heads_and_sizes(
    model: nn.Module, parent: str, writers: Sequence[str], reader: str
) -> tuple[int, int, int, list[int]] | Refusal:
    """Query heads, KV heads, features of each that are read, and outputs of the writers; or why they do not fit together."""
    module = model.get_submodule(parent)
    dim = next((d for d in (getattr(module, n, None) for n in ("v_head_dim", *_HEAD_SIZES)) if isinstance(d, int)), None)
    width = input_size(model.get_submodule(reader))
    count = next((n for n in (integers(module).get(name, 0) for name in _HEAD_COUNTS) if n > 1), 0)
    dim = width // count if dim is None and count and width % count == 0 else dim
    if dim is None or width % dim:
        return Refusal(parent, f"its head dimension is unknown, or does not divide the {width} features it reads")
    heads = width // dim
    sizes = [output_size(model.get_submodule(name)) for name in writers]
    if len(writers) == 3:
        kv_heads = sizes[2] // dim
        each = sizes[1] // kv_heads if kv_heads and sizes[1] % kv_heads == 0 else 0
        # Queries are as wide as keys; a gate for the head's answer may lie beside each of them.
        if sizes[2] % dim or not each or sizes[0] not in (heads * each, 2 * heads * each):
            return Refusal(parent, f"its query, key and value projections have {sizes} outputs, its reader {width}")
    else:
        rest = sizes[0] - width
        if rest <= 0 or rest % (2 * dim):
            return Refusal(writers[0], f"its {sizes[0]} outputs are no queries, keys and values of {heads} heads")
        kv_heads = rest // (2 * dim)
    if heads % kv_heads:
        return Refusal(parent, f"{heads} query heads are not shared evenly by {kv_heads} KV heads")
    return heads, kv_heads, dim, sizes


def _beside_heads(module: nn.Module, parent: str, width: int, heads: int, count: int) -> tuple[list[Slot], list[Slot]]:
    """What attention's answer is multiplied with, head by head, and numbers for each head that it holds, such as sinks."""
    gates = [(leaf, output_size(gate)) for leaf in _GATES if is_linear(gate := getattr(module, leaf, None))]
    slots = [Slot(f"{parent}.{leaf}", torch.arange(size).view(count, -1)) for leaf, size in gates if size in (width, heads)]
    held = [leaf for leaf, tensor in module.named_parameters(recurse=False) if tuple(tensor.shape) == (heads,)]
    held += [TAKEN] if TAKEN in module._buffers else []
    return slots, [Slot(f"{parent}.{leaf}", torch.arange(heads).view(count, -1)) for leaf in held]


def _mixer_candidates(model: nn.Module, parent: str, number: int) -> list[Part] | Refusal:
    """Heads, or channels, of what mixes tokens without attention's scores."""
    found = ways(model.get_submodule(parent), parent)
    if isinstance(found, str):
        return Refusal(parent, found)
    return [
        Part(ComponentGroup(way.reader, way.count, way.producers, way.followers, (Slot(way.reader, way.read), *way.others)),
             "attention", number, way.unit, parent, way.heads, way.count)  # fmt: skip
        for way in found
    ]


def _norm_across_heads(module: nn.Module) -> str | None:
    """Name of a normalisation of queries or keys that is as wide as all of them."""
    for name in ("q_norm", "k_norm", "query_norm", "q_layernorm"):
        norm = getattr(module, name, None)
        writer = getattr(module, f"{name[0]}_proj", None)
        weight = getattr(norm, "weight", None)
        dim = next((d for d in (getattr(module, n, None) for n in _HEAD_SIZES) if isinstance(d, int)), None)
        if isinstance(writer, nn.Linear) and isinstance(weight, Tensor) and dim is not None and weight.dim() == 1:
            if len(weight) == writer.out_features > dim:
                return name
    return None


def _latent_candidates(
    model: nn.Module, parent: str, writers: Sequence[str], reader: str, number: int
) -> list[Part] | Refusal:
    """Heads that each unfold their keys and values from one latent vector (multi-head latent attention)."""
    module = model.get_submodule(parent)
    heads = next((h for h in (getattr(module, n, None) for n in ("num_heads", "num_attention_heads")) if isinstance(h, int)),
                 getattr(getattr(module, "config", None), "num_attention_heads", 0))  # fmt: skip
    width = input_size(model.get_submodule(reader))
    sizes = [output_size(model.get_submodule(name)) for name in writers]
    if not heads or any(size % heads for size in (width, *sizes)):
        return Refusal(parent, f"its projections have {sizes} outputs and its reader {width}, not so many for each of {heads} heads")
    slots = [Slot(name, torch.arange(size).view(heads, -1)) for name, size in zip(writers, sizes, strict=True)]
    more, followers = _beside_heads(module, parent, width, heads, heads)
    consumer = Slot(reader, torch.arange(width).view(heads, -1))
    group = _group(reader, heads, [*slots, *(slot for slot in more if slot.module not in writers)], consumer, followers)
    return [Part(group, "attention", number, "head", parent, heads, heads)]


def _group(
    reader: str,
    count: int,
    producers: Sequence[Slot],
    consumer: Slot,
    followers: Sequence[Slot] = (),
    *,
    balanced: int = 1,
) -> ComponentGroup:
    merged: dict[str, list[Tensor]] = {}
    for slot in producers:
        merged.setdefault(slot.module, []).append(slot.index)
    slots = tuple(Slot(name, torch.cat(indices, 1)) for name, indices in merged.items())
    return ComponentGroup(reader, count, slots, tuple(followers), (consumer,), balanced)


def _touches(part: Part, asked: str) -> bool:
    return any(name == asked or name.startswith(f"{asked}.") for name in part.group.modules)


# --------------------------------------------------------------------------------------------------------------- law


def check_part(layer: nn.Module, prefix: str, part: Part, call: Call, *, seed: int = SEED) -> Verdict:
    """Put a part before the slicing law on a randomised float64 copy of its decoder layer.

    Args:
        layer: The decoder layer; left as found.
        prefix: Its name in the network.
        part: The part, with names in the network.
        call: How the network calls the layer.
        seed: For drawn parameters, hidden states and components.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    cpu = torch.device("cpu")
    dense = copy.deepcopy(layer).to(device=cpu, dtype=torch.float64).eval()
    for module in dense.modules():  # the fused products of experts are not written for float64
        if getattr(getattr(module, "config", None), "_experts_implementation", None) is not None:
            module.config._experts_implementation = "eager"
    randomise_(dense, seed=seed)
    home = _rooted(prefix, dense)
    if part.kind == "experts":
        return _check_experts(dense, home, prefix, part, call.to(cpu, torch.float64), generator)
    removed = _drawn(part, generator)
    kept = torch.ones(part.components, dtype=torch.bool)
    kept[removed] = False
    shape = call.shape or (1, 8, output_size(home.get_submodule(part.consumer.module)))
    hidden = torch.randn(shape, generator=generator, dtype=torch.float64)
    call = call.to(cpu, torch.float64)
    mixed = of_experts(home, part.consumer.module)
    if mixed is not None:  # it must be asked
        place = mixed.numbers.index(int(part.consumer.module.split(".")[-2]))
        mixed.register_forward_pre_hook(lambda _, args: (args[0], args[1].index_fill(1, torch.tensor([0]), place), args[2]))
    try:
        with torch.no_grad(), KeepsDouble():
            before = run_layer(dense, hidden, call)
            narrow = _rooted(prefix, copy.deepcopy(dense))
            for slot in part.group.consumers:
                reader, gone = home.get_submodule(slot.module), slot.index[removed].flatten()
                if isinstance(reader, nn.Linear):
                    reader.weight[:, gone] = 0
                else:
                    reader.weight[gone] = 0
            zeroed = run_layer(dense, hidden, call)
            slice_part_(narrow, Layout(narrow, [part.group]), part, kept.nonzero().flatten())
            sliced = run_layer(narrow.get_submodule(prefix), hidden, call)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        told = first_line(error).rstrip(".")
        return Verdict(float("inf"), 0.0, f"its code does not run with fewer ({told})")
    if sliced.shape != zeroed.shape:
        return Verdict(float("inf"), 0.0, "the hidden states changed shape")
    scale = float(before.abs().max().clamp(min=1e-300))
    return Verdict(float((sliced - zeroed).abs().max()) / scale, float((zeroed - before).abs().max()) / scale)


def _check_experts(
    dense: nn.Module, home: nn.Module, prefix: str, part: Part, call: Call, generator: torch.Generator
) -> Verdict:
    """Experts before their law: without one, tokens go as where the router never chooses it.

    All tokens are the same one, so that rows of the router can be set to choose none of the removed experts.
    """
    experts = home.get_submodule(part.group.followers[0].module)
    width = experts.expert(experts.numbers[0]).down_proj.out_features
    verdict = Verdict(float("inf"), 0.0, "its router chooses as many experts as there are")
    if part.components - part.balanced < part.least:
        return verdict
    try:
        with torch.no_grad(), KeepsDouble():
            for _ in range(8):  # until one of the removed experts was a chosen one
                removed = _drawn(part, generator)
                kept = torch.ones(part.components, dtype=torch.bool)
                kept[removed] = False
                shape = (1, 1, *(call.shape[2:] if len(call.shape) > 3 else [width]))
                hidden = torch.randn(shape, generator=generator, dtype=torch.float64).expand(1, 8, *shape[2:]).clone()
                never = _rooted(prefix, copy.deepcopy(dense))
                before = _never_chosen_(never, prefix, part, removed, hidden, call)
                zeroed = run_layer(never.get_submodule(prefix), hidden, call)
                narrow = _rooted(prefix, copy.deepcopy(dense))
                slice_part_(narrow, Layout(narrow, [part.group]), part, kept.nonzero().flatten())
                sliced = run_layer(narrow.get_submodule(prefix), hidden, call)
                scale = float(before.abs().max().clamp(min=1e-300))
                differs, moves = float((sliced - zeroed).abs().max()) / scale, float((zeroed - before).abs().max()) / scale
                verdict = Verdict(differs, moves)
                if verdict.holds or differs > verdict.tolerance:
                    break
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        told = first_line(error).rstrip(".")
        return Verdict(float("inf"), 0.0, f"its code does not run with fewer ({told})")
    return verdict


def _never_chosen_(
    home: nn.Module, prefix: str, part: Part, removed: Tensor, hidden: Tensor, call: Call
) -> Tensor:
    """Set the router so that it never chooses some experts for a token, in place; the layer's answer before that."""
    seen: dict[str, Tensor] = {}
    routers = {}
    for slot in part.group.followers[1:]:
        target = part_of(home, slot.module)
        owner = target if isinstance(target, nn.Module) else target.owner
        routers[slot.module if isinstance(target, nn.Module) else slot.module.rpartition(".")[0]] = owner

    def look(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], Tensor):
                seen[name] = args[0].reshape(-1, args[0].shape[-1])[0]

        return keep

    handles = [owner.register_forward_pre_hook(look(name)) for name, owner in routers.items()]
    before = run_layer(home.get_submodule(prefix), hidden, call)
    for handle in handles:
        handle.remove()
    for name, owner in routers.items():
        for tensor in (*owner.parameters(recurse=False), *owner.buffers(recurse=False)):
            if tensor.dim() == 1 and len(tensor) == part.components:
                tensor[removed] -= _NEVER
            elif tensor.dim() == 2 and len(tensor) == part.components and name in seen:
                token = seen[name]
                tensor[removed] = -_NEVER * token / token.square().sum().clamp(min=1e-30)
    return before


def _rooted(prefix: str, layer: nn.Module) -> nn.Module:
    """One decoder layer under the name that it has in its network."""
    for name in reversed(prefix.split(".")):
        owner = nn.Module()
        owner.add_module(name, layer)
        layer = owner
    return layer


def _lawful(layer: nn.Module, prefix: str, candidates: Sequence[Part], call: Call) -> int | str:
    """Number of the first candidate that obeys the law, or why none does."""
    for number, part in enumerate(candidates):
        verdict = check_part(layer, prefix, part, call)
        # Where several layouts are possible, one draw of heads may lie so that a wrong one fits, too.
        if verdict.holds and len(candidates) > 1:
            verdict = check_part(layer, prefix, part, call, seed=SEED + 1)
        if verdict.holds:
            return number
    biased = next((key for key, value in call.kwargs.items() if "alibi" in key or "position_bias" in key
                   if isinstance(value, Tensor)), None)  # fmt: skip
    if candidates[0].kind == "attention" and biased is not None:
        return f"its network hands the layer a bias for each of its heads ({biased}), so that none of them can go"
    if norm := _norm_between(layer, prefix, candidates[0]):
        what = "heads" if candidates[0].kind == "attention" else "neurons"
        return f"{norm} normalises all its {what} together, so that none of them can go"
    reason = verdict.failure or f"sliced and zeroed hidden states differ by {verdict.difference:.1e} of their scale"
    return f"it fails the slicing law: {reason}"


def _norm_between(layer: nn.Module, prefix: str, part: Part) -> str | None:
    """Name of a norm beside the layers of a part that is as wide as all that they hand over, or says no width."""
    width = part.consumer.index.numel()
    for name, child in layer.get_submodule(part.parent.removeprefix(prefix).removeprefix(".")).named_children():
        weight = getattr(child, "weight", None)
        if "norm" in name and not name.startswith(("q", "k")) and (weight is None or tuple(weight.shape) == (width,)):
            return name
    return None


def _drawn(part: Part, generator: torch.Generator) -> Tensor:
    """A third of the components, the same number of each run where they must be balanced."""
    each = part.components // part.balanced
    count = max(1, min(each // 3, (part.components - part.least) // part.balanced))
    runs = [torch.randperm(each, generator=generator)[:count] + run * each for run in range(part.balanced)]
    return torch.cat(runs).sort().values


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if dtype is not None and value.is_floating_point() else value.dtype)
    if isinstance(value, Mapping):
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device, dtype) for item in value)
    return value


def _plain(call: Call) -> tuple[str, ...]:
    """What of a call tells layers apart: names and types of what it hands over."""
    return tuple(f"{key}:{type(value).__name__}" for key, value in call.kwargs.items())


def _source(kind: type) -> str:
    for own in kind.__mro__:  # what stands in front of the family's own forward was put there here
        if "forward" in vars(own) and not own.forward.__module__.startswith("modhifi_cli"):
            kind = own
            break
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return ""
