"""Attention modules that can hold fewer heads: what they keep for each head, and the classes that make them able to.

The heads of a module are its only channel dimension here, as the channels are of a BatchNorm: cutting them cuts every
parameter that the module itself holds for each head and says so in its attributes. Projections are layers of their own
and are cut as layers. Some classes take the number of features of a head from the width of their input, or hand the
weights of their projections to a function, so that nothing is seen running; `adopt_` gives those a class that
computes the same from the same parameters and can lose heads.
"""

import ast
import functools
import inspect
import math
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from modhifi_cli.errors import is_whole
from modhifi_cli.graph.derived import derived
from modhifi_cli.graph.standardised import computes_weight, settle_

COUNTS = ("num_heads", "heads", "num_attention_heads")  # attributes that hold the number of heads
# The number of features of all heads, where a view lays them side by side; the others say so in transformers alone.
MERGED = ("all_head_size", "embed_dim", "hidden_size_output")
# Attributes that hold the number of heads times a number of features, where they are read.
_WIDTHS = (
    "attn_dim", "all_head_dim", "kv_dim", "val_attn_dim", "key_attn_dim", "inner_dim", "o_proj_inpdim", "dim_out",
    "out_dim", "dh",
)  # fmt: skip
_ALSO_COUNTS = ("num_kv_heads",)
_COUNTS_OF_TEXT = ("n_heads", "n_head", "num_attn_heads")  # such attributes in language models
_SHAPE = "bias_shape"  # of a position bias that is made in a module of its own, heads first or last
_TABLE = "relative_position_bias_table"
# Tensors with entries for each head, by the dimension in which they lie. Others are told by their shape.
_PER_HEAD = {
    _TABLE: -1,
    "logit_scale": 0,
    "temperature": 0,
    "attention_biases": 0,
    "gating_param": 0,
    "q_bias": 0,
    "k_bias": 0,
    "v_bias": 0,
    "in_proj_weight": 0,
    "in_proj_bias": 0,
}
_THRICE = ("in_proj_weight", "in_proj_bias")  # queries, keys and values one behind the other
# Arguments of an attention's forward that hold something for each head and come from outside, where others use them,
# too: queries (heads and their features in the last dimension) and what is added to scores (heads third from behind).
_QUERIES = ("q_global",)
_SCORES = ("shared_rel_pos", "shared_rel_pos_bias")
_HANDED = (*_QUERIES, *_SCORES)
_BIASES = ("alibi", "position_bias")  # such scores, where layers of language models are handed them
_DENSE = "heads_when_dense"  # number of heads of an attention before it lost any
TAKEN = "taken_heads"  # buffer of an attention: which of the heads from outside are its own


_Function = TypeVar("_Function", bound=Callable[..., Any])


def cached(function: _Function) -> _Function:
    """`functools.cache` that keeps the signature: type checkers do not take classes of modules for hashable."""
    return cast(_Function, functools.cache(function))


def head_count(module: nn.Module) -> int | None:
    """Number of heads that a module says it has, or None for a module that is no attention and no part of one."""
    if type(module).__module__.startswith("transformers.") and not _holds_any(module):
        return None  # the layers of language models are taken apart in `decoder.py`
    for name in COUNTS:
        count = getattr(module, name, None)
        if is_whole(count) and _holds_heads(module, count):
            return count
    table = getattr(module, _TABLE, None)
    if isinstance(table, Tensor):  # a position bias that stands in a module of its own
        return table.shape[_table_dim(table)]
    return None


def _holds_any(module: nn.Module) -> bool:
    """Whether a module itself has something for each head under a name that says so, as attention to pictures does."""
    return any(name in _PER_HEAD for name in (*module._parameters, *module._buffers))


def _holds_heads(module: nn.Module, count: int) -> bool:
    """Blocks know their number of heads, too; an attention has projections, a part of one has entries for each head."""
    if count < 1:
        return False
    children = dict(module.named_children())
    readers = any(isinstance(children.get(name), nn.Module) for name in READERS)
    return readers or isinstance(getattr(module, _SHAPE, None), tuple) or bool(per_head(module, count))


READERS = ("proj", "out_proj", "o_proj", "to_out")  # the projection that reads the heads


def per_head(module: nn.Module, heads: int) -> dict[str, tuple[int, int, int]]:
    """Parameters and buffers that a module itself holds for each of its heads.

    Args:
        module: An attention module, or a part of one.
        heads: Its number of heads.

    Returns:
        Name → dimension, runs and entries: along the dimension lie so many runs (one behind the other) of `heads`
        times so many entries.
    """
    found: dict[str, tuple[int, int, int]] = {}
    tensors = dict(module.named_parameters(recurse=False))
    tensors |= {name: t for name, t in module.named_buffers(recurse=False) if name in _PER_HEAD}
    for name, tensor in tensors.items():
        if tensor is None or tensor.dim() == 0:
            continue
        if name in _PER_HEAD:
            dim = _table_dim(tensor) if name == _TABLE else _PER_HEAD[name]
            runs = 3 if name in _THRICE else 1
            if tensor.shape[dim] % (runs * heads) == 0:
                found[name] = (dim % tensor.dim(), runs, tensor.shape[dim] // (runs * heads))
            continue
        dims = [dim for dim, size in enumerate(tensor.shape) if size == heads]
        if len(dims) == 1 and heads > 1:
            found[name] = (dims[0], 1, 1)
    return found


def _table_dim(table: Tensor) -> int:
    """Swin's table is [positions, heads], MaxViT's [heads, height, width]."""
    return -1 if table.dim() == 2 else 0


def slice_heads_(module: nn.Module, kept: Tensor) -> None:
    """Keep only the given heads of what the module itself holds, in place; its projections are cut on their own.

    Args:
        module: A module with a `head_count`.
        kept: Kept heads, ``[kept]`` int64 sorted.
    """
    heads = head_count(module)
    assert heads is not None
    adopt_one_(module)
    forget_tables_(module)
    for name, (dim, runs, entries) in per_head(module, heads).items():
        old = getattr(module, name)
        steps = torch.arange(runs)[:, None, None] * heads * entries + torch.arange(entries)
        index = (steps + kept[:, None] * entries).flatten()
        new = old.detach().index_select(dim, index.to(old.device)).contiguous()
        if isinstance(old, nn.Parameter):
            setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            module._buffers[name] = new
    for name in (*COUNTS, *_ALSO_COUNTS):
        if getattr(module, name, None) == heads:
            setattr(module, name, kept.numel())
    for name in _WIDTHS:
        width = getattr(module, name, None)
        if isinstance(width, int) and width % heads == 0:
            setattr(module, name, width // heads * kept.numel())
    if isinstance(module, _OwnHeads):
        taken = module._buffers.get(TAKEN)
        where = next(module.parameters()).device
        module.register_buffer(TAKEN, kept.to(where) if taken is None else taken[kept.to(taken.device)])
    shape = getattr(module, _SHAPE, None)
    if isinstance(shape, tuple):
        table = getattr(module, _TABLE, None)
        place = (-1 if table is None else _table_dim(table)) % len(shape)
        setattr(module, _SHAPE, (*shape[:place], kept.numel(), *shape[place + 1 :]))


def forget_tables_(model: nn.Module) -> None:
    """Drop tables of position biases that modules keep from one forward to the next, in place; they are made again."""
    for module in model.modules():
        if isinstance(getattr(module, "attention_bias_cache", None), dict):
            module.attention_bias_cache = {}


def head_weights(module: nn.Module) -> Tensor | None:
    """Weights that an attention module itself projects with, by head, ``[heads, weights]``; None where it has none."""
    weight = getattr(module, "in_proj_weight", None)
    heads = head_count(module)
    if weight is None or heads is None:
        return None
    return weight.detach().view(3, heads, -1).transpose(0, 1).reshape(heads, -1)


# ----------------------------------------------------------------------------------------------------------- adoption


def adopt_(model: nn.Module) -> tuple[str, ...]:
    """Give every attention module whose projections do not run as modules, a class in which they do, in place.

    Parameters, buffers and their names stay, and so does what the module computes, up to rounding. Convolutions that
    standardise their weight are settled, too (`standardised.py`): they keep the weight that they compute.

    Returns:
        Names of the modules whose class has changed.
    """
    found = []
    for name, module in model.named_modules():
        before = type(module)
        if _hides_projections(module):
            adopt_one_(module)
        elif computes_weight(module):
            settle_(module)
        if type(module) is not before:
            found.append(name)
    return tuple(found)


def adopt_one_(module: nn.Module) -> None:
    """Give one module the class that can hold fewer heads, if its own cannot, in place."""
    if getattr(module, "qkv_bias_separate", None) is False:
        module.qkv_bias_separate = True  # timm's own switch: the projection runs as a module
    kind = type(module)
    if kind is nn.MultiheadAttention:
        if module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn:
            module.dim_of_head = module.head_dim
            module.__class__ = HeadwiseAttention
    elif _is_windowed(kind):
        module.dim_of_head = module.qkv.out_features // 3 // module.num_heads
        module.__class__ = _windowed(kind)
    elif mixes_heads(module):
        if not isinstance(module, _TalkingHeads):
            module.dim_of_head = module.proj.in_features // module.num_heads
            module.__class__ = _talking(kind)
    elif (heads := head_count(module)) is not None:
        if not hasattr(module, _DENSE):
            setattr(module, _DENSE, heads)
        module.__class__ = _choosing(_inferring(kind), _HANDED)


def free_heads_(model: nn.Module) -> None:
    """Make attention of a language model able to lose heads, in place, where its class is not; its answers stay the same.

    Heads that are handed a bias for each of them get a buffer that says which are left; it is saved once it was cut.
    """
    for module in model.modules():
        heads = next((n for name in (*COUNTS, *_COUNTS_OF_TEXT) if is_whole(n := getattr(module, name, None)) and n > 0), 0)
        if not heads or hasattr(module, _DENSE) or not any(isinstance(child, nn.Linear) for child in module.children()):
            continue
        kind = _inferring(type(module))
        handed = _handed(kind, _BIASES)
        if kind is type(module) and not handed:
            continue
        setattr(module, _DENSE, heads)
        module.__class__ = _choosing(kind, _BIASES)
        if handed:
            where = next(module.parameters()).device
            module.register_buffer(TAKEN, torch.arange(heads, device=where), persistent=False)


def _hides_projections(module: nn.Module) -> bool:
    kind = type(module)
    separate = getattr(module, "qkv_bias_separate", None) is False
    return separate or _is_windowed(kind) or kind is nn.MultiheadAttention or mixes_heads(module)


def _is_windowed(kind: type[nn.Module]) -> bool:
    """Whether this is torchvision's window attention; by name, since the library is heavy, and not yet adopted."""
    ours = issubclass(kind, _ShiftedWindows)
    return kind.__module__ == "torchvision.models.swin_transformer" and "WindowAttention" in kind.__name__ and not ours


def mixes_heads(module: nn.Module) -> bool:
    """Whether this is attention with talking heads: linear maps between the heads, in front of softmax and behind."""
    names = ("qkv", "proj_l", "proj_w", "proj")
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in names) and hasattr(module, "num_heads")


class HeadwiseAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with queries, keys and values of one width, and fewer heads than the width asks for.

    PyTorch's function asserts that heads times their features is the width of the input. Parameters and their names are
    its own; `dim_of_head` is the number of features of a head. Where queries and keys may have fewer (`products.py`), the
    projection is a layer, `in_proj`.
    """

    # An encoder layer of PyTorch takes its own fast path only where this is true.
    @property
    def _qkv_same_embed_dim(self) -> bool:
        return False

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        pass

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`: output and, if wanted, the attention weights, averaged over heads by default."""
        alone = query is key and key is value
        single = query.dim() == 2
        if single:
            query, key, value = (part.unsqueeze(0 if self.batch_first else 1) for part in (query, key, value))
        if not self.batch_first:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        parts = self._projected(query, key, value, alone=alone)
        mask = self._mask(attn_mask, key_padding_mask, parts[0])
        dropped = self.dropout if self.training else 0.0
        attention = None
        if need_weights or mask is not None:
            scores = parts[0] @ parts[1].transpose(-2, -1) * self.dim_of_head**-0.5
            attention = (scores if mask is None else scores + mask).softmax(-1)
            mixed = functional.dropout(attention, dropped, self.training) @ parts[2]
        else:
            mixed = functional.scaled_dot_product_attention(*parts, dropout_p=dropped)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not need_weights:
            attention = None
        elif average_attn_weights:
            attention = attention.mean(1)
        if not self.batch_first:
            output = output.transpose(0, 1)
        if single:
            output = output.squeeze(0 if self.batch_first else 1)
            attention = None if attention is None else attention.squeeze(0)
        return output, attention

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, *, alone: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[batch, heads, tokens, features]``; `alone` says that all three are of one tensor."""
        layer = getattr(self, "in_proj", None)
        values = self.num_heads * self.dim_of_head
        weight, bias = (self.in_proj_weight, self.in_proj_bias) if layer is None else (layer.weight, layer.bias)
        sizes = [(len(weight) - values) // 2] * 2 + [values]
        if layer is not None and alone:
            return by_head(*layer(query).split(sizes, -1), heads=self.num_heads)
        biases = (None,) * 3 if bias is None else bias.split(sizes)
        parts = zip((query, key, value), weight.split(sizes), biases, strict=True)
        return by_head(*(functional.linear(*part) for part in parts), heads=self.num_heads)

    def _mask(self, attention: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores ``[batch, heads, queries, keys]``."""
        total = None
        if attention is not None:
            total = _added(attention, like)
            total = total if total.dim() == 2 else total.view(like.shape[0], self.num_heads, *total.shape[-2:])
        if padding is not None:
            hidden = _added(padding, like)[:, None, None]
            total = hidden if total is None else total + hidden
        return total


def by_head(query: Tensor, key: Tensor, value: Tensor, *, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """What three projections wrote, ``[batch, tokens, heads · features]``, as ``[batch, heads, tokens, features]``.

    Queries and keys may have fewer features than values: zeros fill them up, since fused kernels of attention want one
    width (with two, PyTorch's takes twice as long).
    """
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    if missing := value.shape[-1] - key.shape[-1]:
        query, key = (functional.pad(part, (0, missing)) for part in (query, key))
        value = value.contiguous()  # as a slice it may begin between the addresses that a card's kernels read from
    return query, key, value


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -torch.inf)


class _TalkingHeads:
    """Attention whose heads are mixed by linear maps in front of the softmax and behind it (arXiv:2003.02436).

    The three kinds of heads (queries with keys; the softmax's; values) may differ in number: the maps' sizes say them.
    """

    qkv: nn.Linear
    proj: nn.Linear
    proj_l: nn.Linear
    proj_w: nn.Linear
    attn_drop: nn.Module
    proj_drop: nn.Module
    dim_of_head: int
    scale: float

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, width]`` → the same."""
        pairs, values = self.proj_l.in_features, self.proj_w.out_features
        sizes = [heads * self.dim_of_head for heads in (pairs, pairs, values)]
        query, key, value = (
            part.unflatten(-1, (-1, self.dim_of_head)).transpose(1, 2) for part in self.qkv(x).split(sizes, dim=-1)
        )
        scores = (query * self.scale) @ key.transpose(-2, -1)
        attention = self.proj_l(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(dim=-1)
        attention = self.attn_drop(self.proj_w(attention.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.proj_drop(self.proj((attention @ value).transpose(1, 2).flatten(2)))


@cached
def _talking(kind: type[nn.Module]) -> type[nn.Module]:
    return derived(kind, _TalkingHeads, by=_talking)


class _ShiftedWindows:
    """torchvision's shifted window attention, both versions, with its projections run as modules.

    Its own forward hands the projections' weights to a function that divides the width of the input by the heads.
    """

    window_size: list[int]
    shift_size: list[int]
    qkv: nn.Linear
    proj: nn.Linear
    dropout: float
    training: bool
    dim_of_head: int

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, height, width, channels]`` → the same."""
        height, width = x.shape[1:3]
        down, across = self.window_size
        padded = functional.pad(x, (0, 0, 0, -width % across, 0, -height % down))
        rows, columns = padded.shape[1:3]
        # A window as large as the map is not shifted.
        by, size = self.shift_size, (rows, columns)
        shift = [0 if self.window_size[axis] >= size[axis] else by[axis] for axis in (0, 1)]
        if any(shift):
            padded = padded.roll((-shift[0], -shift[1]), (1, 2))
        windows = padded.unflatten(2, (columns // across, across)).unflatten(1, (rows // down, down)).transpose(2, 3)
        mixed = self._attend(windows.flatten(3, 4).flatten(0, 2), self._hidden(rows, columns, shift, x))
        mixed = self._projected(mixed).unflatten(1, (down, across))
        mixed = mixed.unflatten(0, (-1, rows // down, columns // across)).transpose(2, 3)
        mixed = mixed.flatten(3, 4).flatten(1, 2)
        if any(shift):
            mixed = mixed.roll((shift[0], shift[1]), (1, 2))
        return mixed[:, :height, :width].contiguous()

    def _projected(self, mixed: Tensor) -> Tensor:
        return functional.dropout(self.proj(mixed), self.dropout, self.training)

    def _attend(self, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """One row of heads' features for each token of each window: ``[windows, tokens, channels]`` → the same."""
        query, key, value = (
            part.transpose(1, 2) for part in self._written(tokens).unflatten(-1, (3, -1, self.dim_of_head)).unbind(2)
        )
        scale = getattr(self, "logit_scale", None)
        if scale is None:
            scores = (query * self.dim_of_head**-0.5) @ key.transpose(-2, -1)
        else:
            scores = functional.normalize(query, dim=-1) @ functional.normalize(key, dim=-1).transpose(-2, -1)
            scores = scores * scale.clamp(max=math.log(100.0)).exp()
        scores = scores + self.get_relative_position_bias()
        if hidden is not None:
            scores = scores.unflatten(0, (-1, hidden.shape[0])) + hidden[:, None]
            scores = scores.flatten(0, 1)
        weights = functional.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        return (weights @ value).transpose(1, 2).flatten(2)

    def _written(self, tokens: Tensor) -> Tensor:
        written = self.qkv(tokens)
        if getattr(self, "logit_scale", None) is None or self.qkv.bias is None:
            return written
        # The second version has no bias for the keys: the middle third of the layer's is left out.
        queries, keys, values = self.qkv.bias.chunk(3)
        return written - torch.cat([torch.zeros_like(queries), keys, torch.zeros_like(values)])

    def _hidden(self, rows: int, columns: int, shift: list[int], like: Tensor) -> Tensor | None:
        """What is added to scores of tokens that only the shift makes neighbours: ``[windows, tokens, tokens]``."""
        if not any(shift):
            return None
        down, across = self.window_size
        bands = []
        for size, window, by in ((rows, down, shift[0]), (columns, across, shift[1])):
            place = torch.arange(size, device=like.device)
            bands.append((place >= size - window).long() + (place >= size - by).long())
        region = 3 * bands[0][:, None] + bands[1]
        region = region.view(rows // down, down, columns // across, across).transpose(1, 2).flatten(2).flatten(0, 1)
        apart = region[:, None] != region[:, :, None]
        return torch.zeros(apart.shape, dtype=like.dtype, device=like.device).masked_fill(apart, -100.0)


@cached
def _windowed(kind: type[nn.Module]) -> type[nn.Module]:
    return derived(kind, _ShiftedWindows, by=_windowed)


# ----------------------------------------------------------------------------------------- heads that others hold, too


def takes_queries(module: nn.Module) -> bool:
    """Whether an attention may be handed its queries, so that it writes keys and values alone."""
    kind = type(module)
    handed = kind._handed if isinstance(module, _OwnHeads) else _handed(kind)
    return any(name in _QUERIES for _, name in handed)


class _OwnHeads:
    """Attention that picks its own heads of what it is handed: queries or position biases that others use, too."""

    _handed: tuple[tuple[int, str], ...]

    def forward(self, *inputs: Tensor, **named: object) -> Tensor:
        taken = getattr(self, TAKEN, None)
        if taken is None or len(taken) == getattr(self, _DENSE):
            return super().forward(*inputs, **named)
        own = list(inputs)
        for place, name in self._handed:
            if place < len(own):
                own[place] = self._chosen(own[place], name, taken)
            elif name in named:
                named[name] = self._chosen(named[name], name, taken)
        return super().forward(*own, **named)

    def _chosen(self, handed: Tensor | None, name: str, taken: Tensor) -> Tensor | None:
        if handed is None:
            return None
        dense = getattr(self, _DENSE)
        if name in _QUERIES:
            return handed.unflatten(-1, (dense, -1)).index_select(-2, taken).flatten(-2)
        return handed.unflatten(-3, (-1, dense)).index_select(-3, taken).flatten(-4, -3)  # a batch may lie in front


@cached
def _choosing(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass that picks its heads of what it is handed; `kind` itself where its forward takes no such thing."""
    handed = _handed(kind, names)
    if not handed or issubclass(kind, _OwnHeads):
        return kind
    return derived(kind, _OwnHeads, by=_choosing, given=(names,), _handed=handed)


def _handed(kind: type[nn.Module], names: tuple[str, ...] = _HANDED) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments of a class's forward that hold something for each head."""
    taken = tuple(inspect.signature(kind.forward).parameters)[1:]
    return tuple((place, name) for place, name in enumerate(taken) if name in names)


# ------------------------------------------------------------------------------------ sizes that follow the heads


@cached
def _inferring(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose methods infer the heads' width where the library's class takes it from its input's.

    In every reshape with a size that is the input's last one (or that over the number of heads) and with no −1 yet,
    this size becomes −1. That is the same number on the dense network, whatever the class computes; on one with fewer
    heads it is the width of what is reshaped. Where there is a −1 already, the input's last size is divided by the
    dense number of heads. Assertions about sizes go. `kind` itself where there is no such reshape.
    """
    if "_infers" in kind.__dict__:
        return kind
    methods: dict[str, Any] = {}
    seen: set[str] = set()
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, method in vars(owner).items():
            if name in seen or name.startswith("__") or not isinstance(method, types.FunctionType):
                continue
            seen.add(name)  # what a class overrides, rewritten or not, stays overridden
            if (inferred := _inferred(method)) is not None:
                methods[name] = inferred
    if not methods:
        return kind
    return derived(kind, by=_inferring, _infers=True, **methods)


def _inferred(method: types.FunctionType) -> types.FunctionType | None:
    return rewritten(method, _infer_)


def _infer_(tree: ast.AST) -> bool:
    widths = set(_widths(tree))
    changed = False
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        if call.func.attr not in ("reshape", "view"):
            continue
        if any(_is_minus_one(argument) for argument in call.args):
            for argument in call.args:
                if isinstance(argument, ast.BinOp) and _is_width(argument, widths) and _is_count(argument.right):
                    argument.right.attr = _DENSE
                    changed = True
            continue
        places = [place for place, argument in enumerate(call.args) if _is_width(argument, widths)]
        if len(places) == 1:
            call.args[places[0]] = ast.copy_location(ast.parse("-1", mode="eval").body, call.args[places[0]])
            changed = True
    return changed


def rewritten(method: types.FunctionType, change_: Callable[[ast.AST], bool]) -> types.FunctionType | None:
    """A method of a library's class with its text changed; assertions about sizes and annotations go.

    Args:
        method: A plain function, or one that a decorator stands around.
        change_: Changes the text's tree in place and says whether it did.

    Returns:
        The new function; None where nothing was changed, the text is not there or the method closes over something.
    """
    if method.__module__.startswith("modhifi_cli"):
        return None
    if method.__closure__:
        return _rewritten_inside(method, change_)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or not change_(tree):
        return None
    function.body = [statement for statement in function.body if not _asserts_size(statement)]
    for node in ast.walk(function):
        if isinstance(node, ast.If):  # an emptied branch would be no Python
            node.body = [one for one in node.body if not _asserts_size(one)] or [ast.Pass()]
    function.decorator_list = []
    function.returns = None
    for argument in (*function.args.args, *function.args.kwonlyargs, function.args.kwarg, function.args.vararg):
        if argument is not None:
            argument.annotation = None
    ast.increment_lineno(ast.fix_missing_locations(tree), method.__code__.co_firstlineno - 1)
    scope: dict = {}
    exec(compile(tree, inspect.getsourcefile(method) or "<forward>", "exec"), method.__globals__, scope)  # noqa: S102
    made = scope[method.__name__]
    made.__defaults__, made.__kwdefaults__ = method.__defaults__, method.__kwdefaults__
    return made


def _rewritten_inside(method: types.FunctionType, change_: Callable[[ast.AST], bool]) -> types.FunctionType | None:
    """A decorated method around what it decorates, rewritten; None for other functions that close over something."""
    plain = getattr(method, "__wrapped__", None)
    cells = method.__closure__ or ()
    if not isinstance(plain, types.FunctionType) or not any(cell.cell_contents is plain for cell in cells):
        return None  # `super()`: not a plain function of its source
    if (made := rewritten(plain, change_)) is None:
        return None
    inside = tuple(types.CellType(made) if cell.cell_contents is plain else cell for cell in cells)
    again = types.FunctionType(method.__code__, method.__globals__, method.__name__, method.__defaults__, inside)
    again.__kwdefaults__ = method.__kwdefaults__
    functools.update_wrapper(again, made)
    return again


def _widths(tree: ast.AST) -> Iterator[str]:
    """Names to which a tensor's number of channels is given: C of ``B, N, C = x.shape``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            value = node.value.func if isinstance(node.value, ast.Call) else node.value
            names = [element.id for element in node.targets[0].elts if isinstance(element, ast.Name)]
            if isinstance(value, ast.Attribute) and value.attr in ("shape", "size") and names:
                yield "C" if "C" in names else names[-1]  # maps are [batch, C, height, width]


def _is_width(node: ast.AST, widths: set[str]) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv):
        return _is_width(node.left, widths)
    return isinstance(node, ast.Name) and node.id in widths


def _is_count(node: ast.AST) -> bool:
    """``self.num_heads`` or its like."""
    return isinstance(node, ast.Attribute) and node.attr in COUNTS


def _asserts_size(node: ast.AST) -> bool:
    call = node.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
    called = getattr(call, "func", None)
    asserts = isinstance(node, ast.Assert) or (isinstance(called, ast.Name) and "assert" in called.id)
    return asserts and any(isinstance(one, ast.Attribute) and one.attr == "shape" for one in ast.walk(node))


def _is_minus_one(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
