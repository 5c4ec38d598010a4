"""Calibration tokens on their way through a decoder, standing in front of one layer, and what is looked at there.

Only the layer at work is on the device; the network stays where it was. Hidden states wait in the network's own
precision, on the device or offloaded. What lies in front of the layer at work is never computed again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi_cli.graph.decoder import Call, enter, run_layer
from modhifi_cli.numerics.moments import RowMoments, merge
from modhifi_cli.records import ImageSource, Progress
from modhifi_cli.tasks.gathering import Gathered, held_out_images

_TOKENS_AT_ONCE = 8192  # of one forward through a layer
Look = Callable[[int, Tensor], None]  # (number of the first sequence, inputs [batch, length, features])


class _Seen(Exception):
    """Everything that was to be looked at has been seen."""


class Flow:
    """The calibration set inside a decoder.

    Args:
        model: Network in evaluation mode; its layers may be edited when the flow stands in front of them.
        layers: Names of its decoder layers.
        calibration: Token windows.
        batch_size: Sequences a forward, at most; never more than 8,192 tokens.
        device: Where layers run.
        offload: Whether hidden states wait on the CPU instead.
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
    ) -> None:
        self.model = model
        self.layers = layers
        self.device = device
        self._home = next(model.parameters()).device
        self._store = torch.device("cpu") if offload else device
        self._source = calibration
        self._batch_size = batch_size
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._hidden: list[Tensor] = []
        self.tokens = 0

    def restart(self) -> Iterator[Progress]:
        """Stand in front of the first layer."""
        self._hidden, self.tokens = [], 0
        total = len(self._source)
        for batch, _ in self._source.batches(self._batch_size):
            for part in batch.split(max(1, _TOKENS_AT_ONCE // batch.shape[1])):
                hidden, calls = enter(self.model, self.layers, part.to(self._home))
                self._hidden.append(hidden.to(self._store))
                self._calls.setdefault(tuple(part.shape), [call.to(self.device) for call in calls])
                self.tokens += part.numel()
            yield Progress("tokens", "embedding", sum(map(len, self._hidden)), total)

    @property
    def bytes_waiting(self) -> int:
        """Memory of all hidden states."""
        return sum(hidden.numel() * hidden.element_size() for hidden in self._hidden)

    def copied(self) -> "Flow":
        """Another flow standing at the same place, for the dense network beside the edited one."""
        other = object.__new__(Flow)
        other.__dict__ |= self.__dict__
        other._hidden = list(self._hidden)
        return other

    @contextmanager
    def at_work(self, number: int, *, keep: bool = False) -> Iterator[nn.Module]:
        """The layer on the device; afterwards it is back where it was, unless it is to be kept there."""
        layer = self.model.get_submodule(self.layers[number])
        layer.to(self.device)
        try:
            yield layer
        finally:
            if not keep:
                layer.to(self._home)

    def call(self, number: int, hidden: Tensor) -> Call:
        """How a layer is called for hidden states of any number of sequences, on the device."""
        shape = tuple(hidden.shape[:2])
        if shape not in self._calls:
            tokens = torch.zeros(shape, dtype=torch.int64, device=self._home)
            self._calls[shape] = [call.to(self.device) for call in enter(self.model, self.layers, tokens)[1]]
        return self._calls[shape][number]

    @torch.no_grad()
    def look(self, layer: nn.Module, number: int, looks: Mapping[nn.Module, Look], item: str) -> Iterator[Progress]:
        """Show looks the inputs of modules of one layer, over all tokens; the layer stops when all have seen."""
        for start, hidden, call, done in self.batches(number):
            waiting = set(looks)

            shape = hidden.shape[:2]  # some families flatten sequences and tokens before their MLP

            def seen(
                module: nn.Module, inputs: tuple, start: int = start, waiting: set = waiting, shape: tuple = shape
            ) -> None:
                looks[module](start, inputs[0].reshape(*shape, -1))
                waiting.discard(module)
                if not waiting:
                    raise _Seen

            handles = [module.register_forward_pre_hook(seen) for module in looks]
            try:
                run_layer(layer, hidden, call)
            except _Seen:
                pass
            finally:
                for handle in handles:
                    handle.remove()
            yield Progress("tokens", item, done, len(self._hidden))

    @torch.no_grad()
    def advance(self, layer: nn.Module, number: int, item: str) -> Iterator[Progress]:
        """Go on to behind a layer, as it is now."""
        for place, (_, hidden, call, done) in enumerate(self.batches(number)):
            self._hidden[place] = run_layer(layer, hidden, call).to(self._store)
            yield Progress("tokens", item, done, len(self._hidden))

    def batches(self, number: int) -> Iterator[tuple[int, Tensor, Call, int]]:
        """Number of the first sequence, hidden states on the device, how the layer is called, batches done."""
        start = 0
        for done, hidden in enumerate(list(self._hidden), start=1):
            yield start, hidden.to(self.device), self._calls[tuple(hidden.shape[:2])][number], done
            start += len(hidden)


@dataclass
class TokenMoments:
    """Moments of the tokens at one module's input, those of every fifth sequence also apart.

    Attributes:
        name: Module name, for messages.
        features: Of a token.
        hold_out: Whether every fifth sequence is kept apart.
    """

    name: str
    features: int
    hold_out: bool

    def __post_init__(self) -> None:
        self._fitted = RowMoments(self.features, name=self.name)
        self._held = RowMoments(self.features, name=self.name)
        self._any_held = False

    def update(self, start: int, inputs: Tensor) -> None:
        """Add the tokens of one batch, ``[batch, length, features]``.

        Raises:
            NumericsError: If a value is not finite.
        """
        if not self.hold_out:
            self._fitted.update(inputs.flatten(0, 1))
            return
        held = held_out_images(torch.arange(start, start + len(inputs), device=inputs.device))
        self._fitted.update(inputs[~held].flatten(0, 1))
        if bool(held.any()):
            self._any_held = True
            self._held.update(inputs[held].flatten(0, 1))

    def result(self) -> Gathered:
        """Moments of everything so far.

        Raises:
            NumericsError: If there was no token.
        """
        fitted = self._fitted.result()
        if not self._any_held:
            return Gathered(fitted, None)
        held = self._held.result()
        return Gathered(merge(fitted, held), held)
