"""Where a block ends: which layer writes the last of its output, and what else is in that output.

Behind a block all paths of the network run through one tensor, a cut. Where the cut's output is o + s, or the positive
part of it, with o what one layer (or the BatchNorm behind it) gives and s the residual stream, that layer can be solved
so that the whole output, stream included, becomes what is wanted; so it can where a layer scale stands between, γ o + s
with a number for each channel. Found by looking at one example, not declared.
"""

from collections.abc import Callable, Generator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from modhifi_cli.engine.activations import Activations
from modhifi_cli.graph.segments import Segments, inputs_seen
from modhifi_cli.records import Progress

_LEAST_SCALE = 1e-3  # of the largest γ of a layer scale, below which a channel cannot be steered


@dataclass(frozen=True)
class Closing:
    """How one layer ends a block.

    Attributes:
        place: The cut behind it.
        stream: Module whose output s is; None with `summed`: s is what the place holds beside o; None without: s = 0.
        summed: Whether the place's output is o + s itself, without an activation behind the sum.
        last: Whether only the classifier and what has no weights of its own to solve come behind it.
        scale: γ, ``[channels]``, where the place's output is γ o + s; None for o + s.
        axis: Of the channels that `scale` is for.
        pooled: Whether the classifier sees the place's mean over positions, so that nothing has to be told apart from
            position to position there.
    """

    place: str
    stream: str | None
    summed: bool
    last: bool = False
    pooled: bool = False
    scale: Tensor | None = None
    axis: int = -1

    @property
    def reads(self) -> tuple[str, ...]:
        """Modules whose outputs have to be seen to know s."""
        if self.stream is not None:
            return (self.stream,)
        return (self.place,) if self.summed else ()

    def beside(self, own: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """s for a batch.

        Args:
            own: o, ``[batch, …]``.
            given: Outputs of `reads` in the same forward.
        """
        if self.stream is not None:
            return as_shaped(given[self.stream], own)
        if self.scale is not None:
            return as_shaped(given[self.place], own) - own * self._broadcast(own)
        return as_shaped(given[self.place], own) - own if self.summed else torch.zeros_like(own)

    def solved(self, wanted: Tensor, own: Tensor) -> Tensor:
        """What the layer must give for γ o to be `wanted`; channels whose γ is next to nothing keep what they give.

        Args:
            wanted: Of the place, s left out, ``[batch, …]``.
            own: o as it is, ``[batch, …]``.
        """
        if self.scale is None:
            return wanted
        scale = self._broadcast(own)
        usable = scale.abs() > _LEAST_SCALE * scale.abs().max()
        return torch.where(usable, wanted / torch.where(usable, scale, torch.ones_like(scale)), own)

    def _broadcast(self, like: Tensor) -> Tensor:
        assert self.scale is not None
        shape = [1] * like.dim()
        shape[self.axis] = -1
        return self.scale.to(like).view(shape)


def as_shaped(tensor: Tensor, own: Tensor) -> Tensor:
    """Tokens on a grid as the layer has them, in a row, or what has the layer's shape as it is.

    Args:
        tensor: ``[batch, …, channels]``, or of the layer's own layout.
        own: The layer's output.
    """
    return tensor.reshape(own.shape) if _in_other_rows(tensor, own) else tensor


def _in_other_rows(tensor: Tensor, own: Tensor) -> bool:
    """Whether two tensors hold the same number of tokens of as many channels, in other rows."""
    alike = len(tensor) == len(own) and tensor.shape[-1] == own.shape[-1] and tensor.numel() == own.numel()
    return alike and tensor.dim() != own.dim()


@torch.no_grad()
def find_closings(
    model: nn.Module, segments: Segments, example: Tensor, layers: Mapping[str, str | None], classifier: str
) -> dict[str, Closing]:
    """The layers that end a block, in execution order.

    Args:
        model: Network in evaluation mode.
        segments: Its cuts.
        example: A batch of at least two images.
        layers: Convolutions and linear layers in front of the classifier, in execution order → BatchNorm behind or None.
        classifier: The linear layer that gives the logits.
    """
    trace = segments.trace
    visits = trace.visits
    ends: dict[str, list[str]] = {}  # first cut behind → layers in front of it
    for name in layers:
        first = next((cut for cut in trace.cuts if visits[cut].leave >= visits[name].leave), None)
        if first is not None:
            ends.setdefault(first, []).append(name)
    streams = {name: join.stream for name, join in trace.joins.items() if not join.read and join.gamma is None}
    seen = _outputs(model, example, {*layers, *filter(None, layers.values()), *trace.cuts, *streams.values()})
    found = {}
    for first, names in ends.items():
        behind = min((visits[name].enter for name in layers if visits[name].enter > visits[first].leave), default=None)
        places = [
            cut
            for cut in trace.cuts
            if visits[cut].leave >= visits[first].leave and (behind is None or visits[cut].leave < behind)
        ]
        # A shortcut's own convolution may end the block as well; the layer that reads more can give more.
        names = sorted(names, key=lambda name: (-model.get_submodule(name).weight[0].numel(), -visits[name].enter))
        tried = ((name, place) for name in names for place in reversed(places))
        for name, place in tried:
            closing = _closing(model, example, layers[name] or name, place, streams, seen)
            if closing is not None:
                found[name] = closing
                break
    ordered = [name for name in layers if name in found]
    if ordered:
        end = found[ordered[-1]]
        read: list[Tensor] = []
        with inputs_seen(model, {classifier: read.append}):
            model(example)
        whole = seen[end.place]
        pooled = whole.dim() == 4 and whole.shape[1] == read[0].shape[-1] and _is_close(whole.mean((2, 3)), read[0])
        found[ordered[-1]] = replace(end, last=True, pooled=pooled)
    return {name: found[name] for name in ordered}


def class_means(
    activations: Activations, closings: Mapping[str, Closing], labels: Tensor, wanted: Tensor, classes: int
) -> Generator[Progress, None, dict[str, Tensor]]:
    """Mean output of every class at the place of every closing, by layer, ``[classes, …]`` float32.

    A place that the classifier sees pooled has the mean over positions at every position.

    Args:
        activations: Of the dense network, in front of all places.
        closings: By layer.
        labels: ``[images]`` int64.
        wanted: Which images count, ``[images]`` bool.
        classes: How many there are; a class without images has zeros.
    """
    places = tuple(dict.fromkeys(closing.place for closing in closings.values()))
    sums: dict[str, Tensor] = {}
    counts = torch.bincount(labels[wanted], minlength=classes).clamp(min=1)
    start = 0
    for _, given, done, total in activations.seen(outputs=places):
        numbers = torch.arange(start, start + len(given[places[0]]))
        member = torch.nn.functional.one_hot(labels[numbers], classes) * wanted[numbers, None]
        for place, output in given.items():
            summed = (member.to(output).T @ output.flatten(1)).double().view(classes, *output.shape[1:])
            sums[place] = summed if place not in sums else sums[place].add_(summed)
        start += len(numbers)
        yield Progress("images", "class means", done, total)
    means = {
        place: (total / counts.to(total).view(-1, *[1] * (total.dim() - 1))).float() for place, total in sums.items()
    }
    for closing in closings.values():
        if closing.pooled:
            mean = means[closing.place]
            means[closing.place] = mean.mean((2, 3), keepdim=True).expand_as(mean)
    return {name: means[closing.place] for name, closing in closings.items()}


def read_positions(model: nn.Module, example: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Of linear layers over tokens, the tokens of their output that the logits depend on, where those are not all.

    In the last block of a transformer that is read at its class token only that one counts; the others would take part
    of what a layer can be fitted to.

    Args:
        model: Network in evaluation mode.
        example: A batch of at least two images.
        names: The layers.

    Returns:
        Layer → positions, ``[read]`` int64 sorted; layers that are read everywhere, or nowhere, are left out.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if output.dim() == 3 and len(output) == len(example):
                outputs[name] = output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        with torch.enable_grad():
            logits = model(example.detach().clone().requires_grad_())
            # Not the plain sum: a normalisation in front of the head could make its gradient vanish.
            weights = torch.linspace(1, 2, logits.numel(), device=logits.device, dtype=logits.dtype).view_as(logits)
            score = (logits * weights).square().sum()
            slopes = torch.autograd.grad(score, list(outputs.values()), allow_unused=True) if outputs else ()
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, slope in zip(outputs, slopes, strict=True):
        if slope is not None:
            read = (slope != 0).any(2).any(0).nonzero().flatten().cpu()
            if 0 < len(read) < slope.shape[1]:
                found[name] = read
    return found


def _closing(
    model: nn.Module, example: Tensor, own: str, place: str, joins: Mapping[str, str], seen: Mapping[str, Tensor]
) -> Closing | None:
    if own not in seen or place not in seen:
        return None
    mine, whole, stream = seen[own], as_shaped(seen[place], seen[own]), joins.get(own)
    if mine.shape != whole.shape:
        return None
    if stream in seen and seen[stream].shape == mine.shape and _is_sum(whole, mine + seen[stream]):
        return Closing(place, stream, summed=False)
    if _is_sum(whole, mine):
        return Closing(place, None, summed=False)
    halved = as_shaped(_outputs(model, example, {place}, halve=own)[place], mine)
    if _is_close(halved - 0.5 * mine, whole - mine):
        return Closing(place, None, summed=True)
    axis = -1 if isinstance(model.get_submodule(own), nn.Linear) else 1
    scale = _scale(2 * (whole - halved), mine, axis)
    return None if scale is None else Closing(place, None, summed=True, scale=scale, axis=axis)


def _scale(part: Tensor, own: Tensor, axis: int) -> Tensor | None:
    """γ for which γ o is a part of the output, a number for each channel, or None if there is none."""
    over = [dim for dim in range(own.dim()) if dim != axis % own.dim()]
    scale = (part * own).sum(over, keepdim=True) / own.square().sum(over, keepdim=True).clamp(min=1e-30)
    return scale.flatten() if bool(scale.any()) and _is_close(scale * own, part) else None


def _is_sum(output: Tensor, whole: Tensor) -> bool:
    return any(_is_close(output, one) for one in (whole, whole.relu()))


def _is_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def _outputs(model: nn.Module, example: Tensor, names: Set[str], *, halve: str | None = None) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor):
                seen[name] = output.clone()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    if halve is not None:
        handles.append(model.get_submodule(halve).register_forward_hook(lambda module, inputs, output: 0.5 * output))
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    return seen
