"""Attention whose queries and keys can have fewer features than its values: which classes can, and how they are made to.

The features of queries and keys are seen by nothing but their product, so zeros may stand for those that are gone: they
are put behind what the projections write, and what attention computes with it, by whatever kernel and with whatever scale,
stays the library's own. A fused projection is one layer (timm, PyTorch's own attention); apart, queries, keys and values
have a layer each (transformers).
"""

import ast
import inspect
import math
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from modhifi_cli.errors import is_whole
from modhifi_cli.graph.answers import tensors_of
from modhifi_cli.graph.derived import derived
from modhifi_cli.graph.heads import COUNTS, READERS, HeadwiseAttention, by_head, cached, rewritten
from modhifi_cli.graph.inputs import FORWARD_ERRORS

PAIRS = "query_dim"  # attribute of an attention: features of a head's queries and keys, which its values may exceed
_APART = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
_FEATURES = ("head_dim", "attention_head_size", "dim_of_head")  # attributes that hold the features of a head's values
_INNER = "in_proj"  # what the projection of PyTorch's attention is called once it is a layer


def product_writers(module: nn.Module) -> tuple[str, ...]:
    """Names of the layers that write queries and keys of an attention that can lose features of both.

    Returns:
        One name where one layer writes both, and the values behind them; two where each has its own; none where the class
        is none of those known, or its logits may be more than the plain product.
    """
    if isinstance(module, _Apart):
        return module.writers
    if isinstance(module, _Products) or _is_timms(module):
        return ("qkv",)
    if type(module) is HeadwiseAttention:
        return (_INNER,)
    names = next((one[:2] for one in _APART if _has_apart(module, one)), ())
    return names if names and _filling(type(module), names) is not None else ()


def adopt_product_(module: nn.Module) -> tuple[int, int]:
    """Give an attention with `product_writers` a class whose queries and keys may lose features, in place.

    What it computes stays the same, and so do names and tensors; only the projection of PyTorch's own attention becomes a
    layer of its own, ``in_proj``.

    Returns:
        Its heads, and the features that each one's queries and keys have.
    """
    writers = product_writers(module)
    if getattr(module, PAIRS, None) is None:
        setattr(module, PAIRS, _features(module))
        if type(module) is HeadwiseAttention:
            _project_by_layer_(module)
        elif len(writers) == 1:
            module.__class__ = _with_products(type(module))
        else:
            filling = _filling(type(module), writers)
            assert filling is not None, "product_writers has tried it"
            module.__class__ = filling
    features, heads = getattr(module, PAIRS), getattr(module, "num_heads", 0)
    written = getattr(module.get_submodule(writers[0]), "out_features", 0)
    values = heads * _features(module) if len(writers) == 1 else 0
    return (written - values) // ((2 if values else 1) * features), features


def adopt_products_(model: nn.Module, names: Iterable[str]) -> None:
    """Do so with the attention of every ``….query_dim`` and ``….in_proj`` among names of modules and parts."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        if leaf in (PAIRS, _INNER):
            try:
                module = model.get_submodule(owner)
            except AttributeError:
                continue  # whoever applies what belongs to it says so
            if product_writers(module):
                adopt_product_(module)


def reading_tokens_alone(model: nn.Module, example: Tensor, names: Iterable[str]) -> frozenset[str]:
    """Which attentions read one tensor and nothing else: no other's keys, no positions, no mask that is added to scores.

    Args:
        model: Network in evaluation mode.
        example: A batch it takes.
        names: Of the modules that are asked about; those that do not run are left out.
    """
    seen: dict[str, bool] = {}
    names = tuple(names)

    def watched(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
            read = {id(tensor) for tensor in tensors_of((*inputs, *named.values()))}
            seen[name] = seen.get(name, True) and len(read) == 1

        return hook

    if not names:
        return frozenset()
    with _hooked((model.get_submodule(name), watched(name)) for name in names), torch.no_grad():
        try:
            model(example)
        except FORWARD_ERRORS:
            return frozenset()  # whoever traces the network says what is wrong with it
    return frozenset(name for name, alone in seen.items() if alone)


@contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, Any]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _features(module: object) -> int:
    return next((size for name in _FEATURES if is_whole(size := getattr(module, name, None))), 0)


# ------------------------------------------------------------------------------------------------ one fused projection


class _Products:
    """timm's self-attention, as one fused projection writes it."""

    qkv: nn.Linear
    proj: nn.Linear
    norm: nn.Module
    gate: nn.Module
    attn_drop: nn.Dropout
    proj_drop: nn.Module
    num_heads: int
    head_dim: int
    query_dim: int
    scale: float
    training: bool

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``[batch, tokens, width]`` → the same."""
        gate = None if getattr(self, "gate", None) is None else self.gate(x).sigmoid()
        sizes = [self.num_heads * features for features in (self.query_dim, self.query_dim, self.head_dim)]
        query, key, value = by_head(*self.qkv(x).split(sizes, dim=-1), heads=self.num_heads)
        dropped = self.attn_drop.p if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, dropout_p=dropped, is_causal=is_causal, scale=self.scale
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        mixed = mixed if getattr(self, "norm", None) is None else self.norm(mixed)
        return self.proj_drop(self.proj(mixed if gate is None else mixed * gate))


@cached
def _with_products(kind: type[nn.Module]) -> type[nn.Module]:
    return derived(kind, _Products, by=_with_products)


def _is_timms(module: nn.Module) -> bool:
    """Whether this is timm's plain attention: no norm of queries or keys, no tensor of its own, nothing that turns them."""
    kind = type(module)
    if not kind.__module__.startswith("timm.") or kind.__name__ != "Attention":
        return False
    known = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
    taken = set(inspect.signature(kind.forward).parameters) - {"self"}
    plain = all(type(getattr(module, name, None)) is nn.Identity for name in ("q_norm", "k_norm"))
    if not plain or not taken <= {"x", "attn_mask", "is_causal"} or not _holds_only(module, known):
        return False
    sizes = [getattr(module, name, None) for name in ("num_heads", "head_dim")]
    fused = getattr(module, "qkv", None)
    if not isinstance(fused, nn.Linear) or not all(is_whole(size) for size in sizes):
        return False
    return fused.out_features == 3 * math.prod(size for size in sizes if size is not None)


def _holds_only(module: nn.Module, known: Iterable[str]) -> bool:
    """Whether a module has no tensors of its own, such as position biases, and no children but those of given names."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return not own and {name for name, _ in module.named_children()} <= set(known)


def _project_by_layer_(module: HeadwiseAttention) -> None:
    weight, bias = module.in_proj_weight, module.in_proj_bias
    layer = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    for name in ("in_proj_weight", "in_proj_bias"):
        module.register_parameter(name, None)
    setattr(module, _INNER, layer.train(module.training))


# --------------------------------------------------------------------------------------- a projection each for the three


class _Apart:
    """Self-attention of transformers: its own forward, in which what queries and keys are written by is filled up."""

    writers: tuple[str, ...]
    query_dim: int

    def filled(self, written: Tensor) -> Tensor:
        """Queries or keys, ``[…, heads · features]``, with zeros behind each head's, as many as values have."""
        missing = _features(self) - self.query_dim
        if not missing:
            return written
        return functional.pad(written.unflatten(-1, (-1, self.query_dim)), (0, missing)).flatten(-2)


def _has_apart(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether this is plain attention of transformers with such projections, as many queries' heads as keys'."""
    if not type(module).__module__.startswith("transformers."):
        return False
    drops = {name for name, child in module.named_children() if isinstance(child, nn.Dropout)}
    layers: list[Any] = [getattr(module, name, None) for name in names]
    if not _holds_only(module, {*names, *READERS, *drops}) or any(type(layer) is not nn.Linear for layer in layers):
        return False
    heads = next((count for name in COUNTS if is_whole(count := getattr(module, name, None))), 0)
    return {layer.out_features for layer in layers} == {heads * _features(module)} != {0}


@cached
def _filling(kind: type[nn.Module], writers: tuple[str, ...]) -> type[nn.Module] | None:
    """A subclass whose forward fills up what the writers give; None where it does not call each once, by its name."""
    forward = kind.forward
    if not isinstance(forward, types.FunctionType):
        return None

    def fill_(tree: ast.AST) -> bool:
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _own_name(node.func) in writers]
        for call in calls:
            inner = ast.copy_location(ast.Call(call.func, call.args, call.keywords), call)
            filled = ast.Attribute(ast.Name("self", ast.Load()), _Apart.filled.__name__, ast.Load())
            call.func, call.args, call.keywords = filled, [inner], []
        return len(calls) == len(writers)

    made = rewritten(forward, fill_)
    if made is None:
        return None
    return derived(kind, _Apart, by=_filling, given=(writers,), writers=writers, forward=made)


def _own_name(node: ast.AST) -> str | None:
    """``name`` of ``self.name``."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None
