"""What mixes tokens without attention's scores: linear attention, state spaces, recurrences and short convolutions.

Such a module has a convolution over time for each channel by itself, and a layer that reads its channels, which belong to
heads (others may read them, too). Everything it holds is as large as its keys, its values or its heads, so sizes say what goes with a head; where a
fused projection may lie in two ways, each is a candidate, and the slicing law decides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi_cli.graph.components import Slot, input_size, is_linear, output_size
from modhifi_cli.graph.parts import BareTensor, integers

_READERS = ("o_proj", "out_proj", "linear_out", "output")
_HEADS = ("num_heads", "num_attention_heads")
# Integers of the module and of what it holds that are the number of what is cut, where they are as large.
_SIZES = ("num_heads", "num_k_heads", "num_v_heads", "num_attention_heads", "key_dim", "value_dim", "qkv_dim", "conv_dim",
          "intermediate_size", "linear_width")  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way in which a mixer's heads may lie.

    Attributes:
        reader: Name of the layer that reads them.
        count: Heads of keys, which go with all heads of values that use them.
        producers: Layers that write what belongs to them.
        followers: Convolution, bare tensors and numbers.
        read: Their positions in what the reader reads, ``[count, entries]``.
        others: Further layers that read them, such as what writes a state space's steps from its own channels.
        heads: Heads of values.
        unit: What one is, in words.
    """

    reader: str
    count: int
    producers: tuple[Slot, ...]
    followers: tuple[Slot, ...]
    read: Tensor
    others: tuple[Slot, ...]
    heads: int
    unit: str


def is_mixer(module: nn.Module) -> bool:
    """Whether a module mixes each channel by itself, by a convolution or a decay, and reads what comes of it."""
    return _reader(module) is not None and (_convolution(module) is not None or hasattr(module, "time_decay"))


def ways(module: nn.Module, name: str) -> list[Way] | str:
    """Every way in which the heads of a mixer may lie, or why none of them can go.

    Args:
        module: The mixer.
        name: Its name in the network.
    """
    reader = _reader(module)
    assert reader is not None
    value = input_size(module.get_submodule(reader))
    conv, channels = _convolution(module) or (None, value)
    keys, heads = _counts(module, value)
    if value % heads or heads % keys or channels < value:
        return f"its {channels} channels and the {value} that {reader} reads are not those of {heads} heads"
    for path, inside in module.named_modules():
        weight = inside._parameters.get("weight")
        if weight is not None and weight.dim() == 1 and len(weight) == value > value // heads:
            return f"{path} normalises all its heads together, so that none of them can go"
    rest = channels - value
    spans = []
    if rest % 2 == 0 and rest // 2 % keys == 0:
        spans += [_Spans(keys, heads, value, rest // 2, together) for together in (False, True)]
    if rest:
        spans.append(_Spans(keys, heads, value, 0, False, shared=rest))
    unit = "channel that is mixed over time" if heads == value else "head of linear attention or of a state space"
    return [_way(module, name, reader, conv, span, unit) for span in spans]


@dataclass(frozen=True)
class _Spans:
    """Where heads lie in something of a size.

    Attributes:
        keys: Heads of keys.
        heads: Heads of values.
        value: Channels of all heads of values.
        key: Channels of all heads of keys; 0 where keys are shared by all heads.
        together: Whether a fused projection writes head after head, or span after span.
        shared: Channels behind the values that belong to no head.
    """

    keys: int
    heads: int
    value: int
    key: int
    together: bool
    shared: int = 0

    def of(self, size: int) -> Tensor | None:
        """Positions of each head's entries, ``[keys, entries]``, in something of so many; None where it is no such size."""
        value, key, heads, shared = self.value, self.key, self.heads, self.shared
        if size in (value, key, heads, self.keys):
            return self._laid([(size, True)])
        if shared:
            last = [(value, True), (shared, False)]  # values come first, what is shared behind them
            layouts = [last, [(value, True), *last], [*last, (heads, True)], [(value, True), *last, (heads, True)]]
        else:
            layouts = [[(key, True), (key, True), (value, True)]] if key else []
            fused = [[*layouts[0], (value, True)]] if key else []
            fused += [[(heads, True)] * 2, [(value, True)] * 2, [(value, True)] * 3]
            if self.together and any(sum(each for each, _ in layout) == size for layout in fused):
                return self._laid([(size, True)])
            layouts += fused
        return next((self._laid(each) for each in layouts if sum(length for length, _ in each) == size), None)

    def of_convolution(self) -> Tensor:
        """Positions of each head's channels in the convolution: keys of two kinds and values, or values and what is shared."""
        keys = [(self.key, True)] * 2 if self.key else []
        return self._laid([*keys, (self.value, True), (self.shared, False)])

    def _laid(self, runs: Sequence[tuple[int, bool]]) -> Tensor:
        found, start = [], 0
        for length, mine in runs:
            if mine:
                found.append(torch.arange(start, start + length).view(self.keys, -1))
            start += length
        return torch.cat(found, 1)


def _way(module: nn.Module, name: str, reader: str, conv: str | None, span: _Spans, unit: str) -> Way:
    producers, followers, others = [], [], []
    read = torch.arange(span.value).view(span.keys, -1)
    width = output_size(module.get_submodule(reader))
    for path, inside in module.named_modules():
        full = f"{name}.{path}" if path else name
        if is_linear(inside):
            if path == reader:
                continue
            if input_size(inside) == span.value != width:  # where channels are as many as the stream's, the law says
                others.append(Slot(full, read))
            elif (index := span.of(output_size(inside))) is not None:
                producers.append(Slot(full, index))
            continue
        if path == conv:
            followers.append(Slot(full, span.of_convolution()))
            continue
        followers += _held(inside, full, span)
    return Way(f"{name}.{reader}", span.keys, tuple(producers), tuple(followers), read, tuple(others), span.heads, unit)


def _held(module: nn.Module, name: str, span: _Spans) -> Iterator[Slot]:
    """What a module itself holds for each head: tensors, but for the weight of a norm of each head, and numbers."""
    for leaf, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        bare = BareTensor(module, leaf)
        # Where each channel is one by itself, what has further dimensions scales what the layers read.
        read = span.heads == span.value and bare.tensor.dim() > 1 and bare.tensor.shape[0] == 1
        if leaf != "weight" and bare.size > 1 and not read and (index := span.of(bare.size)) is not None:
            yield Slot(f"{name}.{leaf}", index)
    for leaf, held in integers(module).items():
        if leaf in _SIZES and held > 1 and (index := span.of(held)) is not None:
            yield Slot(f"{name}.{leaf}", index)


def _reader(module: nn.Module) -> str | None:
    return next((name for name in _READERS if is_linear(getattr(module, name, None))), None)


def _convolution(module: nn.Module) -> tuple[str, int] | None:
    """Name of the module's own convolution of each channel by itself, and its channels; None without just one."""
    found = [(name, child.out_channels) for name, child in module.named_children()
             if isinstance(child, nn.Conv1d) and child.groups == child.in_channels == child.out_channels > 1]  # fmt: skip
    return found[0] if len(found) == 1 else None


def _counts(module: nn.Module, value: int) -> tuple[int, int]:
    """Heads of keys and of values; every channel is one by itself where the module speaks of no heads."""
    own = integers(module)
    if "num_k_heads" in own and "num_v_heads" in own:
        return own["num_k_heads"], own["num_v_heads"]
    for holder in (module, *module.children()):
        held = integers(holder)
        if count := next((held[name] for name in _HEADS if held.get(name, 0) > 1), None):
            return count, count
    return value, value
