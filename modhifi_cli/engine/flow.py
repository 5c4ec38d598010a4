"""Calibration tokens on their way through a decoder, standing in front of one layer, and what is looked at there.

Only the layer at work is on the device; the network stays where it was. Hidden states wait in the network's own
precision, on the device or offloaded. What lies in front of the layer at work is never computed again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.engine.team import Team
from modhifi_cli.evaluation.visiting import free_memory, size_of
from modhifi_cli.graph.answers import mapped, tensors_of
from modhifi_cli.graph.decoder import Call, enter, run_layer
from modhifi_cli.records import ImageSource, Progress

TOKENS_AT_ONCE = 8192  # of one forward through a layer
Look = Callable[[Tensor], None]


_SHARE = 8  # of the free memory at most is taken for what modules of one layer give


class Seen(Exception):
    """Everything that was to be looked at has been seen."""


def rows_read(module: nn.Module, read: Tensor, shape: Sequence[int]) -> Tensor:
    """What a module read as ``[batch, rows, features]``: a row for each token, or several.

    Some families flatten sequences and tokens before their MLP. An expert reads the tokens that were given to it; the
    others are rows of zeros, since it says nothing to them.
    """
    rows = getattr(module, "rows", None)
    if rows is not None:
        read = read.new_zeros(shape[0] * shape[1], read.shape[-1]).index_copy_(0, rows, read)
    return read.reshape(shape[0], -1, read.shape[-1])


class Flow:
    """The calibration set inside a decoder.

    Args:
        model: Network in evaluation mode; its layers may be edited when the flow stands in front of them.
        layers: Names of its decoder layers.
        calibration: Token windows.
        batch_size: Sequences a forward, at most; never more than 8,192 tokens.
        device: Where layers run.
        offload: Whether hidden states wait on the CPU instead.
        team: Other processes with a share of the calibration set.

    Raises:
        ConfigError: If there are more processes than sequences.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        calibration: ImageSource,
        *,
        batch_size: int,
        device: torch.device,
        offload: bool,
        team: Team,
    ) -> None:
        team.refuse_idle(len(calibration), "sequences", "data.sequences")
        self.team = team
        self.first, self._behind = team.share(len(calibration))
        self.model = model
        self.layers = layers
        self.device = device
        self._home = next(model.parameters()).device
        self._ends = self._home
        self._resident: set[int] | None = None
        self._store = torch.device("cpu") if offload else device
        self._source = calibration
        self.batch_size = batch_size
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._hidden: list[Tensor] = []
        self._kept: list[dict[str, Any]] = []  # of each batch, what modules of the layer at work give
        self._resumes: dict[tuple[str, ...], bool] = {}
        self.tokens = 0

    def restart(self) -> Iterator[Progress]:
        """Stand in front of the first layer."""
        self._hidden, self._kept, self.tokens = [], [], 0
        total, number = self._behind - self.first, 0
        for batch, _ in self._source.batches(self.batch_size):
            own = batch[max(self.first - number, 0) : max(self._behind - number, 0)]
            number += len(batch)
            for part in own.split(max(1, TOKENS_AT_ONCE // batch.shape[1])) if len(own) else ():
                hidden, calls = enter(self.model, self.layers, part.to(self._ends))
                self._hidden.append(hidden.to(self._store))
                self._calls.setdefault(tuple(part.shape), [call.to(self.device) for call in calls])
                self.tokens += part.numel()
            yield Progress("tokens", "embedding", sum(map(len, self._hidden)), total)

    def copied(self) -> "Flow":
        """Another flow standing at the same place, for the dense network beside the edited one."""
        other = object.__new__(Flow)
        other.__dict__ |= self.__dict__
        other._hidden, other._kept = list(self._hidden), []
        return other

    @contextmanager
    def at_work(self, number: int, *, keep: bool = False) -> Iterator[nn.Module]:
        """The layer on the device; afterwards it is back where it was, unless it is to be kept there."""
        layer = self.model.get_submodule(self.layers[number])
        layer.to(self.device)
        try:
            yield layer
        finally:
            if self._resident is not None and self._has_room(layer):
                self._resident.add(number)
            elif not keep:
                layer.to(self._home)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Within it layers stay on the device once they were there, as long as half of it is free, and so does the head.

        For walks that come back to layers again and again, and leave them as they are.
        """
        self._resident = set()
        self._move_ends_(self.device)
        try:
            yield
        finally:
            stayed, self._resident = self._resident, None
            self._move_ends_(self._home)
            for number in stayed:
                self.model.get_submodule(self.layers[number]).to(self._home)

    def _has_room(self, layer: nn.Module) -> bool:
        if self.device.type != "cuda":
            return self.device == self._home
        return free_memory(self.device) - size_of(layer) > torch.cuda.mem_get_info(self.device)[1] / 2

    def _move_ends_(self, device: torch.device) -> None:
        """Put what stands in front of the layers and behind them on a device: embedding, last norm, head."""
        inside = {id(module) for name in self.layers for module in self.model.get_submodule(name).modules()}
        for module in self.model.modules():
            if id(module) not in inside:
                module._apply(lambda tensor: tensor.to(device), recurse=False)
        self._ends = device

    def call(self, number: int, hidden: Tensor) -> Call:
        """How a layer is called for hidden states of any number of sequences, on the device."""
        shape = hidden.shape[0], hidden.shape[1]
        if shape not in self._calls:
            tokens = torch.zeros(shape, dtype=torch.int64, device=self._ends)
            self._calls[shape] = [call.to(self.device) for call in enter(self.model, self.layers, tokens)[1]]
        return self._calls[shape][number]

    @torch.no_grad()
    def look(
        self, layer: nn.Module, number: int, looks: Mapping[nn.Module, Look], item: str
    ) -> Iterator[Progress]:
        """Show looks the inputs of modules of one layer, over all tokens; the layer stops when all have seen.

        On a processor, whose memory is large and whose time is short, what the layer's own parts (its attention, norms)
        have given by then is kept, so that `advance` need not compute it again.

        Args:
            layer: The layer at work.
            number: Its number.
            looks: For each module who looks at its input, ``[batch, length, features]``.
            item: For progress.
        """
        self._kept = []
        kept = [name for name, _ in layer.named_children()] if self.device.type == "cpu" else []
        for hidden, call, done in self.batches(number):
            given: dict[str, Any] = {}
            seen: dict[nn.Module, Tensor] = {}

            def keep_input(module: nn.Module, inputs: tuple, seen: dict = seen, shape: tuple = hidden.shape[:2]) -> None:
                seen[module] = rows_read(module, inputs[0], shape)
                if len(seen) == len(looks):
                    raise Seen

            handles = [module.register_forward_pre_hook(keep_input) for module in looks]
            handles += [layer.get_submodule(name).register_forward_hook(_giving(given, name)) for name in kept]
            try:
                run_layer(layer, hidden, call)
            except Seen:
                pass
            finally:
                for handle in handles:
                    handle.remove()
            if kept and done == 1 and self.parts * sum(map(_bytes, given.values())) > free_memory() / _SHARE:
                kept, given = [], {}
            if kept:
                self._kept.append(given)
            for module, show in looks.items():
                show(seen[module])
            yield Progress("tokens", item, done, self.parts)

    @torch.no_grad()
    def advance(self, layer: nn.Module, number: int, item: str) -> Iterator[Progress]:
        """Go on to behind a layer, as it is now."""
        kept, self._kept = self._kept or [{}] * self.parts, []
        for place, (hidden, call, done) in enumerate(self.batches(number)):
            given, kept[place] = kept[place], {}
            if given and not self._can_resume(layer, hidden, call, given):
                given = {}
            with _answering(layer, given):
                behind = run_layer(layer, hidden, call)
            self._hidden[place] = behind.to(self._store)
            yield Progress("tokens", item, done, self.parts)

    def waiting(self, hidden: Tensor) -> Tensor:
        """Hidden states where they wait."""
        return hidden.to(self._store)

    def arrive(self, hidden: list[Tensor]) -> None:
        """Stand behind the layer at work, whose answers to all batches are known already."""
        self._hidden, self._kept = hidden, []

    def edited(self, modules: Sequence[str]) -> None:
        """Forget what is kept of modules of the layer at work that were edited, by their full names."""
        for given in self._kept:
            for name in list(given):
                if any(f".{name}." in f"{module}." for module in modules):
                    del given[name]

    def _can_resume(self, layer: nn.Module, hidden: Tensor, call: Call, given: Mapping[str, Any]) -> bool:
        """Whether a layer whose modules answer at once gives what it gives without; tried once for a set of modules."""
        names = tuple(sorted(given))
        if names not in self._resumes:
            own = run_layer(layer, hidden, call)
            try:
                with _answering(layer, {name: mapped(answer, Tensor.clone) for name, answer in given.items()}):
                    resumed = run_layer(layer, hidden, call)
                near = 1e-4 if own.dtype == torch.float32 else 2e-2
                self._resumes[names] = bool((resumed - own).abs().max() <= near * own.abs().max())
            except (RuntimeError, TypeError, ValueError, AttributeError):
                self._resumes[names] = False  # slower, not wrong
        return self._resumes[names]

    @property
    def parts(self) -> int:
        """Number of batches."""
        return len(self._hidden)

    def batches(self, number: int) -> Iterator[tuple[Tensor, Call, int]]:
        """Hidden states on the device, how the layer is called, batches done."""
        for done, hidden in enumerate(list(self._hidden), start=1):
            yield hidden.to(self.device), self._calls[hidden.shape[0], hidden.shape[1]][number], done

    def chosen(self, numbers: Tensor) -> Tensor:
        """Hidden states of those of the given sequences that are this process's own.

        Args:
            numbers: In the whole calibration set, ``[chosen]`` int64.

        Returns:
            ``[own, length, width]`` on the device.
        """
        own = torch.arange(self.first, self.first + sum(map(len, self._hidden)))
        wanted = torch.isin(own, numbers).split([len(hidden) for hidden in self._hidden])
        rows = [hidden[some.to(hidden.device)] for hidden, some in zip(self._hidden, wanted, strict=True)]
        return torch.cat(rows).to(self.device)


def _giving(found: dict[str, Any], name: str) -> Callable:
    """A hook that keeps what a module gives; of one that runs twice in a layer nothing, since it gives two answers."""
    runs = 0

    def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
        nonlocal runs
        runs += 1
        found[name] = output
        if runs > 1:
            del found[name]

    return hook


@contextmanager
def _answering(layer: nn.Module, given: Mapping[str, Any]) -> Iterator[None]:
    """Within it modules of a layer give at once what they are known to give."""
    patched = [layer.get_submodule(name) for name in given]
    try:
        for module, answer in zip(patched, given.values(), strict=True):
            module.forward = lambda *_, answer=answer, **__: answer
        yield
    finally:
        for module in patched:
            del module.forward


def _bytes(answer: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(answer))
