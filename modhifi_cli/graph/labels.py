"""Which numbers of a forward pass belong together: every element of an activation carries the label of its component.

One forward of one image runs beside a *shadow* for each tensor: an integer tensor of the same shape that says, for
every element, which channel it would disappear with. Operations that only move elements (reshape, transpose,
concatenate, roll, split, …) are run on the shadow as they are, so any way of shuffling channels is followed exactly.
A sum joins the labels that meet in it, a layer with weights reads labels and writes new ones, and whatever mixes
channels otherwise (a normalisation, a softmax, an attention product) makes one label of those it mixes: whole heads
remain where it works within each head, and where nothing is left to part, the label is spoilt, with the reason. A
spoilt label costs its own components and no other. Nothing here is trusted blindly: `law.py` checks every group that
comes of it.

How rows of channels part (a view as heads and their features, a shuffle) is decided last. Where the forward has made
one label of each row by then, rows go as wholes; otherwise the same place of each row goes.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modhifi_cli.graph.answers import tensors_of
from modhifi_cli.graph.components import is_linear
from modhifi_cli.graph.heads import COUNTS, MERGED, forget_tables_, head_count, per_head
from modhifi_cli.graph.modes import compiler_left_out
from modhifi_cli.graph.modules import ChannelPadShortcut
from modhifi_cli.graph.parts import integers, size_names

# Label 0 means: an element that stays whatever is removed.
_FIXED = 0

_MOVES = frozenset(
    "view _unsafe_view reshape _reshape_alias view_as reshape_as flatten unflatten permute transpose t numpy_T mT "
    "movedim moveaxis swapaxes swapdims squeeze unsqueeze expand expand_as slice select narrow split "
    "split_with_sizes chunk tensor_split unsafe_split unsafe_chunk unbind cat concat concatenate stack hstack "
    "vstack index_select index roll flip pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle "
    "repeat repeat_interleave unfold rot90 split_copy unbind_copy tile".split()
)
_SELECTIONS = frozenset("slice narrow select split split_with_sizes unbind tensor_split".split())
_SAME = frozenset(
    "clone alias detach contiguous to _to_copy type_as float double half lift_fresh dropout native_dropout "
    "alpha_dropout feature_dropout positive resolve_conj resolve_neg".split()
)
_POINTWISE = frozenset(
    "relu relu_ relu6 hardtanh hardtanh_ hardswish hardswish_ hardsigmoid hardsigmoid_ leaky_relu leaky_relu_ silu "
    "silu_ gelu elu elu_ selu celu mish mish_ softplus sigmoid sigmoid_ tanh tanh_ add add_ sub sub_ mul mul_ div "
    "div_ pow rsqrt sqrt exp clamp clamp_ clamp_min clamp_max where maximum minimum addcmul addcdiv lerp neg abs "
    "square prelu _prelu_kernel log log_sigmoid rsub reciprocal masked_fill masked_fill_ threshold threshold_ erf "
    "sin cos floor round sign".split()
)
_REDUCTIONS = frozenset(
    "mean sum amax amin max min var std var_mean std_mean logsumexp norm linalg_vector_norm prod argmax argmin any "
    "all median nanmean".split()
)
_WINDOWS = frozenset(
    "adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d max_pool1d max_pool2d max_pool2d_with_indices max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "lp_pool2d upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_linear1d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d replication_pad1d "
    "replication_pad2d grid_sampler grid_sampler_2d roi_align max_pool1d_with_indices".split()
)
_ALONG = frozenset("softmax _softmax log_softmax _log_softmax cumsum sort".split())
_NEW = frozenset(
    "zeros zeros_like new_zeros empty empty_like new_empty full full_like new_full ones ones_like new_ones".split()
)
_CONVOLUTIONS = frozenset("conv1d conv2d conv3d convolution _convolution".split())
_RECURRENCES = frozenset("lstm gru rnn_tanh rnn_relu mkldnn_rnn_layer _cudnn_rnn lstm_cell gru_cell".split())
_PRODUCTS = frozenset("matmul bmm mm addmm baddbmm mv dot addmv inner".split())
_ATTENTION = frozenset(
    "scaled_dot_product_attention _native_multi_head_attention _transformer_encoder_layer_fwd "
    "_scaled_dot_product_flash_attention_for_cpu".split()
)


@dataclass(frozen=True)
class Link:
    """Labels along one dimension of one module.

    Attributes:
        module: Module name, or the full name of a tensor or number where `dim` is ``"tensor"`` or ``"size"``.
        dim: ``"out"`` and ``"in"`` of a layer with weights, ``"both"`` where inputs go with outputs (BatchNorm,
            GroupNorm, grouped convolution), ``"tensor"`` for a parameter or buffer that is used by itself, ``"size"``
            for a number that the code holds, ``"heads"`` for what an attention module holds for each head.
        labels: One label per position, ``[positions]`` int64; 0 where the position stays whatever is removed.
    """

    module: str
    dim: str
    labels: Tensor


@dataclass(frozen=True)
class Labelling:
    """What one forward pass tells about coupled components.

    Attributes:
        links: Where labels live, in execution order; labels that belong together are equal.
        spoilt: Label → why nothing with it can be removed.
        answers: Labels that the network gives out as its answer.
    """

    links: tuple[Link, ...]
    spoilt: Mapping[int, str]
    answers: frozenset[int]


def label(model: nn.Module, example: Tensor) -> Labelling:
    """Follow the channels of a network through one forward pass.

    Args:
        model: Network in evaluation mode; left as found.
        example: A batch it takes, ``[batch, channels, height, width]``; only the first image is run.

    Raises:
        RuntimeError, TypeError, ValueError, …: Whatever the network's own forward raises.
    """
    flow = _Flow(model)
    handles, rewritten = [], []
    forget_tables_(model)
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(flow.entering(name)))
            handles.append(module.register_forward_hook(flow.leaving(name)))
        rewritten = [module for module in model.modules() if type(module).forward is not nn.Linear.forward
                     and isinstance(module, nn.Linear) and is_linear(module) and "forward" not in vars(module)]  # fmt: skip
        for module in rewritten:  # a product that somebody wrote out is read as the library's own
            module.forward = functools.partial(nn.Linear.forward, module)
        with torch.inference_mode():
            image = example[:1].clone()
            with compiler_left_out(_Flow), flow:
                output = model(image)
    finally:
        for handle in handles:
            handle.remove()
        for module in rewritten:
            del module.forward
        forget_tables_(model)
    return flow.result(tensors_of(output))


class _Labels:
    """Labels that may turn out to be one and the same (a union-find), and what has become of them."""

    def __init__(self) -> None:
        self._parent = [0]
        self._roots: Tensor | None = None
        self.spoilt: dict[int, str] = {}
        self.mixed: dict[int, str] = {}  # what made one of several labels, which explains a later end better

    def new(self, count: int) -> Tensor:
        """Fresh labels, ``[count]``; a lone one is `_FIXED`, since a layer's only channel can never go."""
        return self.fresh(count) if count > 1 else torch.zeros(count, dtype=torch.int64)

    def fresh(self, count: int) -> Tensor:
        """Fresh labels, ``[count]``."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        self._roots = None
        return torch.arange(first, first + count)

    def root(self, number: int) -> int:
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def roots(self, shadow: Tensor) -> Tensor:
        """The same shadow with equal numbers where labels are the same by now; constant dimensions stay constant."""
        if self._roots is None:
            parent = torch.tensor(self._parent)
            while not torch.equal(further := parent[parent], parent):
                parent = further
            self._roots = parent
        return self._roots[_small(shadow)].expand(shadow.shape)

    def join(self, one: Tensor, other: Tensor, why: str) -> Tensor:
        """Make labels equal that meet element by element (shapes that broadcast), and return the joined shadow."""
        shape = np.broadcast_shapes(one.shape, other.shape)  # torch's loads a package for symbols first, for a second
        one, other = self.roots(one.expand(shape)), self.roots(other.expand(shape))
        a, b = torch.broadcast_tensors(_small(one), _small(other))
        different = a != b
        if bool(different.any()):
            # Each pair as one number: sorting those is many times quicker than comparing rows.
            codes = (a[different] * len(self._parent) + b[different]).unique()
            pairs = torch.stack([codes // len(self._parent), codes % len(self._parent)], 1)
            fixed = (pairs == _FIXED).any(1)
            if bool(fixed.any()):
                self.spoil(pairs[fixed], why)
            for first, second in pairs[~fixed].tolist():
                first, second = self.root(first), self.root(second)
                if first != second:
                    self._parent[second] = first
            self._roots = None
        return torch.where(a == _FIXED, b, a).expand(shape)

    def spoil(self, shadow: Tensor, why: str) -> None:
        """Nothing with these labels can be removed; the first reason is kept."""
        for number in _small(shadow).unique().tolist():
            if number != _FIXED:
                self.spoilt.setdefault(number, why)

    def settled(self) -> dict[int, str]:
        """Root → why it is spoilt."""
        reasons: dict[int, str] = {}
        mixed: dict[int, str] = {}
        for number, why in self.mixed.items():
            mixed.setdefault(self.root(number), why)
        for number, why in self.spoilt.items():
            reasons.setdefault(self.root(number), mixed.get(self.root(number), why))
        return reasons


@dataclass(frozen=True)
class _Grouped:
    """A grouped convolution of several inputs and outputs in each group: ``[groups, channels of one]`` labels each."""

    owner: str
    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class _Rows:
    """An arrangement of channels into rows: a view with more dimensions along which labels vary.

    Attributes:
        shadow: What it gave, ``[…]`` labels.
        last: The last of the dimensions along which the labels varied.
        free: Those whose length follows: it was left to be counted, or it is a number of heads that a module holds.
        modules: Names of the modules it happened in, the innermost last.
    """

    shadow: Tensor
    last: int
    free: tuple[int, ...]
    modules: tuple[str, ...]


def _small(shadow: Tensor) -> Tensor:
    """The shadow with one element along every dimension in which it is the same by construction (stride 0)."""
    for dim in range(shadow.dim()):
        if shadow.stride(dim) == 0 and shadow.shape[dim] > 1:
            shadow = shadow.narrow(dim, 0, 1)
    return shadow


def _along(labels: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """A shadow of the given shape whose labels vary along one dimension."""
    view = [1] * len(shape)
    view[dim] = labels.numel()
    return labels.view(view).expand(tuple(shape))


class _Flow(TorchDispatchMode):
    """Runs beside a forward pass and labels what it computes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._labels = _Labels()
        self._links: list[Link] = []
        self._modules: list[tuple[str, nn.Module]] = []
        self._names = dict(model.named_modules())
        self._suspended = 0
        self._operation: Any = None
        self._tensor_labels: dict[int, Tensor] = {}
        self._part_labels: dict[str, Tensor] = {}
        self._rows: list[_Rows] = []
        self._grouped: list[_Grouped] = []
        self._cuts: list[tuple[Tensor, int, str]] = []
        self._runs: dict[tuple[str, str], Tensor] = {}
        self._owner: dict[int, tuple[str, str]] = {}
        for name, module in model.named_modules():
            for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                self._owner.setdefault(id(tensor), (name, leaf))

    # What the hooks say.

    def entering(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            self._modules.append((name, module))
            if isinstance(module, ChannelPadShortcut):
                if not self._suspended and inputs and (shadow := self._shadow(inputs[0])) is not None:
                    self._link(name, "in", self._channels(shadow, 1))
                self._suspended += 1

        return hook

    def leaving(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            self._modules.pop()
            if isinstance(module, ChannelPadShortcut):
                self._suspended -= 1
                if not self._suspended:
                    self._writes(name, output, 1)

        return hook

    def result(self, outputs: Iterable[Tensor]) -> Labelling:
        self._settle_groups()
        self._settle_rows()
        for shadow, dim, why in self._cuts:
            if self._varies(shadow, dim):
                self._labels.spoil(shadow, why)
        answers = set()
        for output in outputs:
            if (shadow := self._shadow(output)) is not None:
                answers |= set(_small(self._labels.roots(shadow)).unique().tolist()) - {_FIXED}
        links = tuple(Link(link.module, link.dim, self._labels.roots(link.labels)) for link in self._links)
        return Labelling(links, self._labels.settled(), frozenset(answers))

    # What every operation does.

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        if self._suspended:
            return func(*args, **kwargs)
        rule = self._rule(name, func)
        if rule is None and func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self._operation = func
        try:
            (rule or self._unknown)(name, args, kwargs, result)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            self._unknown(name, args, kwargs, result)  # called in a way that is not foreseen here
        return result

    def _rule(self, name: str, func: Any) -> Callable | None:
        rules = (
            (_CONVOLUTIONS, self._convolution), (_MOVES, self._move), (_SAME, self._same), (_WINDOWS, self._window),
            (_POINTWISE, self._pointwise), (_REDUCTIONS, self._reduction), (_ALONG, self._reduction_along),
            (_PRODUCTS, self._product), (_ATTENTION, self._attention), (_NEW, self._new),
            (_RECURRENCES, self._recurrence),
        )  # fmt: skip
        single = {
            "linear": self._linear, "batch_norm": self._batch_norm, "group_norm": self._group_norm,
            "layer_norm": self._layer_norm, "rms_norm": self._layer_norm, "instance_norm": self._instance_norm,
            "glu": self._glu, "constant_pad_nd": self._pad, "pad": None, "im2col": self._im2col, "copy_": self._copy,
        }  # fmt: skip
        if name in single:
            return single[name]
        for names, rule in rules:
            if name in names:
                return rule
        return self._pointwise if torch.Tag.pointwise in func.tags and not func._can_decompose() else None

    # Rows of channels.

    def _settle_rows(self) -> None:
        """Decide for every arrangement into rows whether whole rows go or the same place of each, and join for it."""
        waiting = list(self._rows)
        while waiting:
            first: int | None = None
            for number, rows in enumerate(waiting):
                dim, forced = self._choice(rows)
                if forced or first is None:
                    first, along = number, dim
                if forced:
                    break
            assert first is not None
            rows = waiting.pop(first)
            start = rows.shadow
            for other in self._varying(rows.shadow):
                start = start if other == along else start.narrow(other, 0, 1)
            why = f"{rows.modules[-1]} arranges them beside what stays"
            self._labels.join(start.expand(rows.shadow.shape), rows.shadow, why)
            if along in rows.free and self._varying(rows.shadow) == [along]:
                self._link_rows(rows, along)

    def _choice(self, rows: "_Rows") -> tuple[int, bool]:
        """Along which dimension the components of rows lie, and whether what was joined before leaves no other."""
        counts = {dim: self._apart(rows.shadow, dim) for dim in {*rows.free, rows.last}}
        if counts[rows.last] > 1:
            return rows.last, False
        best = max(counts, key=lambda dim: counts[dim])
        return best, counts[best] > 1

    def _apart(self, shadow: Tensor, dim: int) -> int:
        """How many components would be left if all but one dimension of an arrangement were joined."""
        rows = _small(self._labels.roots(shadow)).movedim(dim, 0).flatten(1)
        parent = list(range(rows.shape[0]))

        def root(number: int) -> int:
            while parent[number] != number:
                parent[number] = parent[parent[number]]
                number = parent[number]
            return number

        holder: dict[int, int] = {}
        for number, row in enumerate(rows.tolist()):
            for each in set(row):
                a, b = root(holder.setdefault(each, number)), root(number)
                parent[max(a, b)] = min(a, b)
        return sum(parent[number] == number for number in range(len(parent)))

    def _link_rows(self, rows: "_Rows", dim: int) -> None:
        """What a module says of its number of heads goes with the rows that are its heads."""
        labels = _small(self._labels.roots(rows.shadow)).movedim(dim, 0).flatten(1)[:, 0]
        for where in reversed(rows.modules):
            module = self._names[where]
            if head_count(module) == labels.numel():
                self._labels.join(self._heads(where, labels.numel()), labels, f"{where} has a head for what stays")
                return
            for leaf in COUNTS:
                if integers(module).get(leaf) == labels.numel():
                    self._size(where, leaf, labels)
                    return

    def _heads(self, owner: str, count: int) -> Tensor:
        """Labels of the heads of an attention module, ``[heads]``."""
        key = f"{owner}:"
        if key not in self._part_labels:
            self._part_labels[key] = self._labels.fresh(count)
            self._link(owner, "heads", self._part_labels[key])
        return self._part_labels[key]

    def _size(self, owner: str, leaf: str, labels: Tensor) -> None:
        """A number that a module holds is that of the given channels, ``[channels]``."""
        name = f"{owner}.{leaf}" if owner else leaf
        if name in self._part_labels:
            self._labels.join(self._part_labels[name], labels, f"{name} counts them with what always stays")
            return
        self._part_labels[name] = labels
        self._link(name, "size", labels)

    # Shadows.

    def _shadow(self, tensor: object) -> Tensor | None:
        return getattr(tensor, "_component_labels", None) if isinstance(tensor, Tensor) else None

    def _give(self, tensor: object, shadow: Tensor | None) -> None:
        if isinstance(tensor, Tensor) and shadow is not None and id(tensor) not in self._owner:
            tensor._component_labels = shadow

    def _own_labels(self, tensor: Tensor) -> Tensor | None:
        """Labels of a parameter or buffer that is used by itself and is as long as some channels, or None."""
        if id(tensor) not in self._owner or not tensor.is_floating_point():
            return None
        owner, leaf = self._owner[id(tensor)]
        if id(tensor) not in self._tensor_labels and (heads := head_count(self._names[owner])) is not None:
            if leaf in (held := per_head(self._names[owner], heads)):
                dim, runs, entries = held[leaf]
                labels = self._heads(owner, heads).repeat_interleave(entries).repeat(runs)
                self._tensor_labels[id(tensor)] = _along(labels, dim, tensor.shape)
        wide = [dim for dim, size in enumerate(tensor.shape) if size > 1]
        if id(tensor) not in self._tensor_labels:
            if len(wide) != 1:
                return None
            labels = self._labels.new(tensor.shape[wide[0]])
            self._tensor_labels[id(tensor)] = _along(labels, wide[0], tensor.shape)
            self._links.append(Link(".".join(part for part in self._owner[id(tensor)] if part), "tensor", labels))
        return self._tensor_labels[id(tensor)]

    def _read(self, tensor: object) -> Tensor | None:
        """The shadow of an operand, activation or bare parameter."""
        shadow = self._shadow(tensor)
        if shadow is None and isinstance(tensor, Tensor) and tensor.dim() > 0:
            shadow = self._own_labels(tensor)
        return shadow

    def _channels(self, shadow: Tensor, dim: int) -> Tensor:
        """One label for every position along a dimension that a layer with weights reads, ``[positions]``."""
        rows = self._labels.roots(shadow).movedim(dim, 0)
        small = _small(rows)
        small = small.expand(rows.shape[0], *small.shape[1:]).reshape(rows.shape[0], -1)
        first = small[:, :1]
        if bool((small == first).all()):
            return first.flatten().clone()
        if bool((small == small[:1]).all()):  # the layer works along another dimension than the labels
            self._labels.spoil(small, f"{self._here()} works across positions and keeps these channels apart")
            return torch.zeros(small.shape[0], dtype=torch.int64)
        why = f"{self._here()} reads them together with what always stays"
        self._labels.join(first.expand(small.shape), small, why)
        return self._labels.roots(first.flatten().clone())

    def _varies(self, shadow: Tensor, dim: int) -> bool:
        small = _small(self._labels.roots(shadow))
        if small.shape[dim] < 2:
            return False
        return not bool((small.narrow(dim, 1, small.shape[dim] - 1) == small.narrow(dim, 0, 1)).all())

    def _varying(self, shadow: Tensor) -> list[int]:
        return [dim for dim in range(shadow.dim()) if self._varies(shadow, dim)]

    def _together(self, shadow: Tensor, dims: Iterable[int], what: str) -> Tensor:
        """Labels along some dimensions become one, since they are mixed; if that leaves one, it is spoilt."""
        first = shadow
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        joined = self._labels.join(first.expand(shadow.shape), shadow, f"{self._here()} mixes them with what stays")
        for number in _small(self._labels.roots(joined)).unique().tolist():
            self._labels.mixed.setdefault(number, f"{self._here()} {what}")
        if _small(self._labels.roots(joined)).unique().numel() < 2:
            self._spoil(joined, what)
        return joined

    def _here(self) -> str:
        return self._modules[-1][0] or "the network itself" if self._modules else "the network"

    def _spoil(self, shadow: Tensor | None, what: str) -> None:
        if shadow is not None:
            self._labels.spoil(shadow, f"{self._here()} {what}")

    def _module_of(self, tensor: object, kind: type | tuple[type, ...]) -> str | None:
        """Name of the module of a kind that owns a weight, or None."""
        if not isinstance(tensor, Tensor) or id(tensor) not in self._owner:
            return None
        name, leaf = self._owner[id(tensor)]
        return name if isinstance(self._names[name], kind) and leaf in ("weight", "running_mean") else None

    def _link(self, module: str, dim: str, labels: Tensor) -> None:
        """Say where labels live; a module that runs again holds the same components at the same places."""
        key = (module, dim)
        if key in self._runs:
            self._labels.join(self._runs[key], labels, f"{module} also runs on what always stays")
            return
        self._runs[key] = labels
        self._links.append(Link(module, dim, labels))

    def _reads(self, name: str, shadow: Tensor | None, dim: int, size: int) -> None:
        self._link(name, "in", torch.zeros(size, dtype=torch.int64) if shadow is None else self._channels(shadow, dim))

    def _writes(self, name: str | None, output: object, dim: int) -> None:
        if not isinstance(output, Tensor):
            return
        if name is None:
            self._give(output, torch.zeros((), dtype=torch.int64).expand(output.shape))
            return
        labels = self._runs.get((name, "out"))
        if labels is None:
            labels = self._labels.new(output.shape[dim])
            self._link(name, "out", labels)
        self._give(output, _along(labels, dim, output.shape))

    # Layers with weights.

    def _convolution(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        images, weight = args[0], args[1]
        owner = self._module_of(weight, nn.modules.conv._ConvNd)
        module = self._names.get(owner) if owner is not None else None
        transposed = name in ("convolution", "_convolution") and bool(args[6])
        shadow = self._read(images)
        batched = images.dim() == weight.dim()
        dim = 1 if batched else 0
        if module is None or (transposed and (int(args[8]) > 1 or type(module) is not nn.ConvTranspose2d)):
            anew = "computes its weight anew from other tensors"
            what = "is a grouped transposed convolution" if transposed else anew
            self._spoil(shadow, what)
            self._writes(None, result, dim)
            return
        groups = 1 if transposed else images.shape[dim] // weight.shape[1]
        if groups == 1:
            self._reads(owner, shadow, dim, images.shape[dim])
            self._writes(owner, result, dim)
            return
        if shadow is None:
            self._writes(None, result, dim)
            return
        labels, each = self._channels(shadow, dim), result.shape[dim] // groups
        if each == 1 or labels.numel() == groups:
            self._through_groups(owner, labels, groups, result, dim)
            return
        outputs = self._labels.fresh(groups * each)
        self._grouped.append(_Grouped(owner, labels.view(groups, -1), outputs.view(groups, each)))
        self._give(result, _along(outputs, dim, result.shape))

    def _settle_groups(self) -> None:
        """Decide for every grouped convolution whether its groups go as wholes, or the same outputs of each group."""
        for conv in self._grouped:
            first = conv.inputs[:, :1]
            if self._apart(torch.cat([conv.inputs, conv.outputs], 1), 0) > 1 or self._apart(conv.outputs, 1) < 2:
                why = f"{conv.owner} reads them with what always stays"
                self._labels.join(first.expand(conv.inputs.shape), conv.inputs, why)
                self._labels.join(first.expand(conv.outputs.shape), conv.outputs, why)
                self._link(conv.owner, "both", conv.outputs.flatten())
                continue
            why = f"{conv.owner} joins them with what always stays"
            self._labels.join(conv.outputs[:1].expand(conv.outputs.shape), conv.outputs, why)
            self._link(conv.owner, "out", conv.outputs.flatten())
            self._labels.spoil(conv.inputs, f"{conv.owner} reads them in groups that cannot go as wholes")

    def _through_groups(self, owner: str, labels: Tensor, groups: int, result: Tensor, dim: int) -> None:
        """Whole groups of channels pass together: a grouped convolution or a GroupNorm."""
        inside = labels.view(groups, -1)
        self._labels.join(inside[:, :1].expand(inside.shape), inside, f"{owner} reads them with what always stays")
        each = result.shape[dim] // groups
        outputs = self._labels.roots(inside[:, :1]).expand(groups, each).reshape(-1)
        self._link(owner, "both", outputs)
        self._give(result, _along(outputs, dim, result.shape))

    def _linear(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        inputs, weight = args[0], args[1]
        owner = self._module_of(weight, nn.Linear)
        shadow = self._read(inputs)
        if owner is None:
            self._spoil(shadow, "reads them with a weight that is no linear layer's own")
            self._writes(None, result, result.dim() - 1)
            return
        self._reads(owner, shadow, inputs.dim() - 1, inputs.shape[-1])
        self._writes(owner, result, result.dim() - 1)

    def _batch_norm(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        shadow = self._read(args[0])
        if shadow is None:
            return
        kinds = nn.modules.batchnorm._BatchNorm
        owner = self._module_of(args[1], kinds) or self._module_of(args[3] if len(args) > 3 else None, kinds)
        if owner is None:
            self._spoil(shadow, "is a batch normalisation without a module")
            self._give(result, shadow)
            return
        labels = self._channels(shadow, 1)
        self._link(owner, "both", labels)
        self._give(result, _along(labels, 1, result.shape))

    def _group_norm(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        shadow, groups = self._read(args[0]), args[1]
        if shadow is None:
            return
        owner = self._module_of(args[2] if len(args) > 2 else None, nn.GroupNorm)
        if owner is None or groups == 1:
            self._across(shadow)
            self._give(result, shadow)
            return
        self._through_groups(owner, self._channels(shadow, 1), groups, result, 1)

    def _layer_norm(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        shadow = self._read(args[0])
        if shadow is None:
            return
        dims = range(shadow.dim() - len(args[1]), shadow.dim())
        mixed = [dim for dim in dims if self._varies(shadow, dim)]
        if mixed:
            kind = type(self._modules[-1][1]).__name__ if self._modules else "normalisation"
            shadow = self._together(shadow, mixed, f"is a {kind} across these channels")
        self._give(result, shadow)

    def _instance_norm(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        shadow = self._read(args[0])
        if shadow is None:
            return
        owner = self._modules[-1] if self._modules else ("", None)
        if not isinstance(owner[1], nn.modules.instancenorm._InstanceNorm) or args[3] is not None:
            self._spoil(shadow, "is an instance normalisation with statistics of the past, or without a module")
            self._give(result, shadow)
            return
        labels = self._channels(shadow, 1)
        self._link(owner[0], "both", labels)
        self._give(result, _along(labels, 1, result.shape))

    def _glu(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        """One half times the sigmoid of the other: the same place of both goes."""
        shadow = self._read(args[0])
        if shadow is None:
            return
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        value, gate = shadow.chunk(2, dim)
        if self._varies(shadow, dim % shadow.dim()):
            value = self._labels.join(value, gate, f"{self._here()} splits them from what always stays")
        self._give(result, value)

    def _recurrence(self, name: str, args: tuple, kwargs: dict, result: object) -> None:
        kind = type(self._modules[-1][1]).__name__ if self._modules else "recurrence"
        for tensor in tensors_of(args[0]):
            said = f"is {'an' if kind[0] in 'LR' else 'a'} {kind}, whose gates are left alone; a linear layer in between can be cut"
            self._spoil(self._shadow(tensor), said)
        for tensor in tensors_of(result):
            self._give(tensor, torch.zeros((), dtype=torch.int64).expand(tensor.shape))

    def _across(self, shadow: Tensor) -> None:
        kind = type(self._modules[-1][1]).__name__ if self._modules else "normalisation"
        self._spoil(shadow, f"is a {kind} across these channels")

    # Operations without weights.

    def _pointwise(self, name: str, args: tuple, kwargs: dict, result: object) -> None:
        if not isinstance(result, Tensor):
            self._unknown(name, args, kwargs, result)
            return
        operands = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.numel() > 1]
        activations = [(value, self._shadow(value)) for value in operands]
        if not any(shadow is not None and _touched(shadow) for _, shadow in activations):
            bare = [self._read(value) for value in operands]
            if any(shadow is not None for _, shadow in activations):
                self._give(result, torch.zeros((), dtype=torch.int64).expand(result.shape))
            elif len(operands) == 1 and bare[0] is not None:  # a scaled parameter is as long as the parameter
                self._give(result, bare[0].expand(result.shape))
            for shadow in bare if any(s is not None for _, s in activations) else ():
                self._spoil(shadow, "joins them with a tensor that always stays")
            return
        joined: Tensor | None = None
        others = []
        for value, shadow in activations:
            shadow = self._read(value) if shadow is None else shadow
            if shadow is None or not _touched(shadow) or self._stays_beside(shadow, result):
                others.append(value)
                continue
            shadow = shadow.expand(result.shape)
            why = f"{self._here()} joins them with a tensor that always stays"
            joined = shadow if joined is None else self._labels.join(joined, shadow, why)
        for value in others:
            self._beside(joined, value)
        self._give(result, joined)

    def _stays_beside(self, shadow: Tensor, result: Tensor) -> bool:
        """Whether an operand is broadcast and none of its components can go: it keeps nothing it is broadcast along."""
        if shadow.shape == result.shape:
            return False
        labels = _small(self._labels.roots(shadow)).unique().tolist()
        return set(labels) - {_FIXED} <= self._labels.settled().keys()

    def _beside(self, shadow: Tensor, value: Tensor) -> None:
        """Labels meet a tensor that always stays: harmless where that is broadcast along them."""
        seen = self._labels.roots(shadow)
        for dim, size in enumerate([1] * (shadow.dim() - value.dim()) + list(value.shape)):
            if size == 1:
                seen = seen.narrow(dim, 0, 1)
        if _small(seen).unique().numel() < 2:
            return
        if id(value) in self._owner:
            tensor = ".".join(part for part in self._owner[id(value)] if part)
            self._labels.spoil(seen, f"{tensor} is a bare parameter across these channels")
        else:
            self._spoil(seen, "joins them with a tensor that always stays")

    def _same(self, name: str, args: tuple, kwargs: dict, result: object) -> None:
        outputs = result[0] if isinstance(result, tuple) else result
        shadow = self._read(args[0])
        # A copy may be written into, and what is written must not reach the original's shadow.
        self._give(outputs, shadow.clone() if name == "clone" and shadow is not None else shadow)

    def _new(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        if result.dim() > 1 and result.numel() < 1 << 26:  # written into later, perhaps: a shadow of its own memory
            self._give(result, torch.zeros(result.shape, dtype=torch.int64))

    def _copy(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        into, source = self._shadow(args[0]), self._read(args[1])
        if into is None:
            self._give(args[0], None if source is None else source.expand(args[0].shape))
        elif any(into.stride(dim) == 0 and into.shape[dim] > 1 for dim in range(into.dim())):
            if source is None:
                self._spoil(into, "writes something else over them")
            else:
                self._labels.join(into, source, f"{self._here()} writes over them")
        else:
            into.copy_(torch.zeros((), dtype=torch.int64) if source is None else source)

    def _move(self, name: str, args: tuple, kwargs: dict, result: object) -> None:
        several = isinstance(args[0], list | tuple)
        inputs = list(args[0]) if several else [args[0]]
        shadows = [self._read(value) for value in inputs]
        if all(shadow is None for shadow in shadows):
            return
        whole = [
            shadow if shadow is not None else torch.zeros((), dtype=torch.int64).expand(value.shape)
            for value, shadow in zip(inputs, shadows, strict=True)
        ]
        before_name = name
        if name in ("view_as", "reshape_as", "view", "_unsafe_view", "_reshape_alias"):
            moved = whole[0].reshape(result.shape)  # a shadow lies otherwise in memory than its tensor
            name = "reshape"
        else:
            moved = self._operation(whole if several else whole[0], *args[1:], **kwargs)
        outputs = list(result) if isinstance(result, list | tuple) else [result]
        parts = list(moved) if isinstance(moved, list | tuple) else [moved]
        if not several:
            place = {"split": 2, "split_with_sizes": 2, "chunk": 2, "unsafe_chunk": 2, "tensor_split": 2}.get(name, 1)
            dim = kwargs.get("dim", args[place] if len(args) > place else 0)
            if name == "index":
                dim = [d for d, index in enumerate(args[1]) if index is not None]
            start = args[2] if name in ("slice", "narrow") and len(args) > 2 else 0
            dim = dim if isinstance(dim, list) else dim % max(whole[0].dim(), 1) if isinstance(dim, int) else 0
            size = whole[0].shape[dim] if isinstance(dim, int) and whole[0].dim() else 1
            start = min(start % max(size, 1) if start else 0, size)
            sizes = args[1] if before_name in ("view", "_unsafe_view", "reshape") else ()
            if name == "unflatten":
                sizes = [*whole[0].shape[:dim], *args[2]]
            self._after_move(name, whole[0], parts, dim, start, sizes)
        for output, shadow in zip(outputs, parts, strict=True):
            self._give(output, shadow)

    def _after_move(
        self, name: str, before: Tensor, parts: list[Tensor], dim: Any, start: int, sizes: Sequence[int]
    ) -> None:
        """Join or spoil labels that a reshape, a split or a selection along `dim` ties to each other by counting."""
        if not _touched(before):
            return
        if name in ("index", "index_select"):
            if any(self._varies(before, d) for d in (dim if isinstance(dim, list) else [dim])):
                self._spoil(before, "takes some of these channels by their place")
        elif name in _SELECTIONS:
            if any(part.numel() != before.numel() for part in parts) and self._varies(before, dim):
                self._select(name, before, parts, dim, start)
        elif name in ("chunk", "unsafe_chunk") and len(parts) > 1 and self._varies(before, dim):
            if any(part.shape != parts[0].shape for part in parts):
                self._spoil(before, "splits these channels into unequal parts")
                return
            for part in parts[1:]:  # equal parts stay equal when the same place of each goes
                self._labels.join(parts[0], part, f"{self._here()} splits them from what always stays")
        elif name in ("reshape", "unflatten"):
            after = parts[0]
            split = self._varying(after)
            # Rows of equal length stay equal when the same place of each goes, or whole rows.
            if len(split) > 1 and len(split) > len(self._varying(before)):
                self._rows.append(self._arranged(after, split, sizes))
            elif len(split) == 1 and self._modules and head_count(self._modules[-1][1]) == after.shape[split[0]]:
                self._rows.append(self._arranged(after, split, sizes))  # the view spells out the number of heads
            if len(split) == 1 and after.dim() < before.dim() and after.shape[split[0]] not in before.shape and self._modules:
                where, module = self._modules[-1]
                held = integers(module)
                for leaf in (leaf for leaf in MERGED if held.get(leaf) == after.shape[split[0]] and (
                        leaf == MERGED[0] or type(module).__module__.startswith("transformers."))):  # fmt: skip
                    self._size(where, leaf, self._channels(after, split[0]))

    def _arranged(self, after: Tensor, split: Sequence[int], sizes: Sequence[int]) -> "_Rows":
        modules = tuple(name for name, _ in self._modules[-2:]) or ("",)
        known = {integers(self._names[where]).get(leaf) for where in modules for leaf in COUNTS}
        free = [dim for dim in split if dim < len(sizes) and sizes[dim] == -1 or after.shape[dim] in known]
        return _Rows(_small(after), split[-1], tuple(free), modules)

    def _select(self, name: str, before: Tensor, parts: list[Tensor], dim: int, start: int) -> None:
        """Some of the channels along `dim` are taken, or all of them in parts, by numbers that the code holds."""
        why = "takes some of these channels by their place"
        if len(self._varying(before)) > 1:
            if name in ("select", "unbind"):  # one row of several: all rows lose the same places
                self._labels.join(before.narrow(dim, 0, 1).expand(before.shape), before, f"{self._here()} {why}")
            else:
                self._cuts.append((_small(before), dim, f"{self._here()} {why}"))
            return
        if name in ("select", "unbind"):
            self._spoil(before, why)
            return
        labels = self._channels(before, dim)
        sizes = [part.shape[dim] for part in parts]
        where, module = self._modules[-1] if self._modules else ("", None)
        if len(parts) > 1:
            leaves = None if module is None else size_names(module, tuple(sizes))
            taken = dict(zip((n[0] for n in leaves or () if len(n) == 1), labels.split(sizes), strict=False))
            if leaves is not None:
                for names, mine in zip(leaves, labels.split(sizes), strict=True):
                    if isinstance(names[0], int):
                        self._labels.spoil(mine, f"{self._here()} {why}")
                    elif len(names) == 1:
                        self._size(where, names[0], mine)
                    elif names[1] in taken:
                        self._size(where, names[0], torch.cat([taken[names[1]], mine]))
                    else:
                        self._spoil(before, why)
                return
        else:
            end = start + sizes[0]
            for leaf, value in ({} if module is None else integers(module)).items():
                if value == (end if start == 0 else start) and (start == 0 or end == labels.numel()):
                    self._size(where, leaf, labels[:value])
                    return
        if len(parts) == 1 or any(size != sizes[0] for size in sizes):
            self._spoil(before, why)
            return
        # A split into equal parts may count the channels itself; whether it does, the law says.
        rows = labels.view(-1, sizes[0])
        self._labels.join(rows[:1].expand(rows.shape), rows, f"{self._here()} splits them from what always stays")

    def _window(self, name: str, args: tuple, kwargs: dict, result: object) -> None:
        shadow = self._read(args[0])
        if shadow is None:
            return
        outputs = [value for value in (result if isinstance(result, tuple) else (result,)) if isinstance(value, Tensor)]
        if not _touched(shadow):
            for output in outputs:
                self._give(output, torch.zeros((), dtype=torch.int64).expand(output.shape))
            return
        spatial = 3 if "3d" in name else 1 if "1d" in name else 2
        dim = max(shadow.dim() - spatial - 1, 0)
        if any(self._varies(shadow, d) for d in range(dim + 1, shadow.dim())):
            self._spoil(shadow, f"pools or resizes across these channels ({name})")
            return
        still = self._labels.roots(shadow)
        for d in range(dim + 1, shadow.dim()):
            still = still.narrow(d, 0, 1)
        for output in outputs:
            self._give(output, still.expand(output.shape))

    def _im2col(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        shadow = self._read(args[0])
        if shadow is not None and _touched(shadow):
            labels = self._channels(shadow, 1)
            self._give(result, _along(labels.repeat_interleave(result.shape[1] // labels.numel()), 1, result.shape))

    def _pad(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        shadow = self._read(args[0])
        if shadow is None:
            return
        pads = list(args[1])
        moved = shadow
        for number in range(len(pads) // 2):
            before, behind = pads[2 * number], pads[2 * number + 1]
            dim = moved.dim() - 1 - number
            if before == behind == 0:
                continue
            varying = self._varying(moved)
            if min(before, behind) >= 0 and dim in varying and len(varying) > 1:
                # What is put beside the features of each row goes with its row, if rows go.
                rows = _small(self._labels.roots(moved.narrow(dim, 0, 1)))
                beside = self._labels.fresh(rows.numel()).view(rows.shape)
                shapes = [(*moved.shape[:dim], count, *moved.shape[dim + 1 :]) for count in (before, behind)]
                moved = torch.cat([beside.expand(shapes[0]), moved, beside.expand(shapes[1])], dim)
                continue
            if min(before, behind) < 0 or dim in varying:
                self._spoil(moved, "pads or crops these channels")
                self._give(result, torch.zeros((), dtype=torch.int64).expand(result.shape))
                return
            shape = list(moved.shape)
            shape[dim] += before + behind
            moved = moved.narrow(dim, 0, 1).expand(shape)
        self._give(result, moved)

    def _reduction(self, name: str, args: tuple, kwargs: dict, result: object) -> None:
        shadow = self._read(args[0])
        if shadow is None:
            return
        if len(args) > 1 and isinstance(args[1], Tensor):  # max and min of two tensors
            self._pointwise(name, args, kwargs, result)
            return
        place = 2 if name in ("norm", "linalg_vector_norm") else 1
        dims = kwargs.get("dim", args[place] if len(args) > place else None)
        dims = [dims] if isinstance(dims, int) else list(dims) if isinstance(dims, list | tuple) else []
        dims = [d % shadow.dim() for d in dims if isinstance(d, int)] or list(range(shadow.dim()))
        mixed = [d for d in dims if self._varies(shadow, d)]
        if mixed:
            plain = name in ("sum", "mean")
            what = f"takes the {name} over these channels" if plain else f"reduces these channels to one ({name})"
            shadow = self._together(shadow, mixed, what)
        for output in result if isinstance(result, tuple) else (result,):
            if not isinstance(output, Tensor):
                continue
            small = self._labels.roots(shadow)
            for d in sorted(dims, reverse=True):
                small = small.narrow(d, 0, 1) if output.dim() == shadow.dim() else small.select(d, 0)
            self._give(output, small)

    def _reduction_along(self, name: str, args: tuple, kwargs: dict, result: object) -> None:
        shadow = self._read(args[0])
        if shadow is None:
            return
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        if isinstance(dim, int) and self._varies(shadow, dim % shadow.dim()):
            what = f"sets these channels in relation to each other ({name})"
            shadow = self._together(shadow, [dim % shadow.dim()], what)
        for output in result if isinstance(result, tuple) else (result,):
            self._give(output, shadow)

    def _product(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> None:
        tensors = [value for value in args if isinstance(value, Tensor)][-2:]
        shadows: list[Any] = [self._shadow(value) for value in tensors]  # None where nothing is followed
        if all(shadow is None for shadow in shadows):
            return
        nothing = torch.zeros((), dtype=torch.int64).expand(result.shape)
        shadows = [None if shadow is None or not _touched(shadow) else shadow for shadow in shadows]
        if all(shadow is None for shadow in shadows):
            self._give(result, nothing)
            return
        if all(shadow is not None for shadow in shadows):
            left, right = shadows
            several = any(self._varies(s, d) for s in shadows for d in range(s.dim() - 2))
            inner = self._varies(left, left.dim() - 1) or right.dim() < 2 or self._varies(right, right.dim() - 2)
            if several or inner:
                self._give(result, self._mixed_in_heads(shadows, result))
                return
            # Each row of one meets each column of the other: one of the two can stay as it is.
            counts = [_small(self._labels.roots(shadow)).unique().numel() for shadow in shadows]
            stays = 0 if counts[0] < counts[1] else 1
            self._spoil(shadows[stays], "multiplies these channels with other activations, as attention does")
            shadows[stays] = None
        left, right = shadows
        labels, contracted = (left, -1) if left is not None else (right, -2)
        if not _touched(labels) or labels.dim() < 2:
            self._spoil(labels, "multiplies these channels with a tensor that is no layer's weight")
            self._give(result, nothing)
            return
        if self._varies(labels, labels.dim() + contracted):
            self._spoil(labels, "multiplies these channels with a tensor that is no layer's weight")
            self._give(result, nothing)
            return
        kept = labels.narrow(labels.dim() + contracted, 0, 1)
        self._give(result, kept.expand(result.shape) if kept.dim() <= result.dim() else nothing)

    def _mixed_in_heads(self, shadows: Sequence[Tensor], result: Tensor) -> Tensor:
        """Matrices are multiplied for each of several heads: all that meets in one head goes together."""
        nothing = torch.zeros((), dtype=torch.int64).expand(result.shape)
        heads: Tensor | None = None
        if any(shadow.dim() != result.dim() or result.dim() < 3 for shadow in shadows):
            heads = nothing[..., :1, :1]
        for shadow in shadows if heads is None else ():
            first = shadow[..., :1, :1]
            self._labels.join(first.expand(shadow.shape), shadow, f"{self._here()} mixes them with what always stays")
            heads = first if heads is None else self._labels.join(heads, first, f"{self._here()} adds what stays")
        heads = self._labels.roots(heads)
        if _small(heads).unique().numel() < 2:
            for shadow in shadows:
                self._spoil(shadow, "multiplies these channels with other activations, as attention does")
            return nothing
        return heads.expand(result.shape)

    def _attention(self, name: str, args: tuple, kwargs: dict, result: object) -> None:
        shadows = [self._shadow(value) for value in args[:3]]
        outputs = list(tensors_of(result))
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        plain = name.startswith(("scaled_dot", "_scaled_dot")) and all(shadow is not None for shadow in shadows)
        if plain and all(_touched(shadow) for shadow in shadows):
            if isinstance(mask, Tensor) and (added := self._read(mask)) is not None and _touched(added):
                shadows.append(added)
            elif isinstance(mask, Tensor):
                self._beside(shadows[0][..., :1, :1], mask)
            self._give(outputs[0], self._mixed_in_heads(shadows, outputs[0]))
            return
        for value in args:
            self._spoil(self._shadow(value), "multiplies these channels with other activations, as attention does")
        for output in tensors_of(result):
            self._give(output, torch.zeros((), dtype=torch.int64).expand(output.shape))

    def _unknown(self, name: str, args: tuple, kwargs: dict, result: object) -> None:
        seen = False
        for value in (*args, *kwargs.values()):
            for tensor in tensors_of(value):
                if (shadow := self._shadow(tensor)) is not None:
                    seen = True
                    self._spoil(shadow, f"does something with these channels that is not known here ({name})")
        if seen:
            for output in tensors_of(result):
                self._give(output, torch.zeros((), dtype=torch.int64).expand(output.shape))


def _touched(shadow: Tensor) -> bool:
    """Whether any element carries a label."""
    return bool(_small(shadow).any())
