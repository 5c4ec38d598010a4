"""Calibration tokens on their way through a decoder, standing in front of one layer, and what is looked at there.

Only the layer at work is on the device; the network stays where it was. Hidden states wait in the network's own
precision, on the device or offloaded. What lies in front of the layer at work is never computed again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi_cli.engine.gathering import Gathered, held_out_images
from modhifi_cli.engine.team import Team
from modhifi_cli.errors import ConfigError
from modhifi_cli.graph.decoder import Call, enter, run_layer
from modhifi_cli.numerics.moments import RowMoments, merge
from modhifi_cli.records import ImageSource, Progress

_TOKENS_AT_ONCE = 8192  # of one forward through a layer
# (number of the first sequence, inputs [batch, length, features], weights of the tokens [batch, length] or None)
Look = Callable[[int, Tensor, Tensor | None], None]


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
        if team.size > len(calibration):
            raise ConfigError(
                f"{team.size} processes share {len(calibration)} calibration sequences; start fewer of them, or raise "
                "data.sequences."
            )
        self.team = team
        self._first, self._behind = team.share(len(calibration))
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
        total, number = self._behind - self._first, 0
        for batch, _ in self._source.batches(self._batch_size):
            own = batch[max(self._first - number, 0) : max(self._behind - number, 0)]
            number += len(batch)
            for part in own.split(max(1, _TOKENS_AT_ONCE // batch.shape[1])) if len(own) else ():
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
    def look(
        self, layer: nn.Module, number: int, looks: Mapping[nn.Module, tuple[str, Look]], item: str, *, weighted: bool
    ) -> Iterator[Progress]:
        """Show looks the inputs of modules of one layer, over all tokens.

        Args:
            layer: The layer at work.
            number: Its number.
            looks: For each module the kind of its part, and who looks at its input.
            item: For progress.
            weighted: Whether tokens are weighted by the residual stream (`stream_weights`); the layer is then run to
                its end. Otherwise it stops when all have seen.
        """
        for start, hidden, call, done in self.batches(number):
            seen: dict[nn.Module, Tensor] = {}
            shape = hidden.shape[:2]  # some families flatten sequences and tokens before their MLP

            def keep(module: nn.Module, inputs: tuple, seen: dict = seen, shape: tuple = shape) -> None:
                seen[module] = inputs[0].reshape(*shape, -1)
                if len(seen) == len(looks) and not weighted:
                    raise _Seen

            handles = [module.register_forward_pre_hook(keep) for module in looks]
            behind = None
            try:
                behind = run_layer(layer, hidden, call)
            except _Seen:
                pass
            finally:
                for handle in handles:
                    handle.remove()
            for module, (kind, show) in looks.items():
                show(start, seen[module], stream_weights(kind, hidden, behind) if weighted else None)
            yield Progress("tokens", item, done, len(self._hidden))

    @torch.no_grad()
    def advance(self, layer: nn.Module, number: int, item: str) -> Iterator[Progress]:
        """Go on to behind a layer, as it is now."""
        for place, (_, hidden, call, done) in enumerate(self.batches(number)):
            self._hidden[place] = run_layer(layer, hidden, call).to(self._store)
            yield Progress("tokens", item, done, len(self._hidden))

    def batches(self, number: int) -> Iterator[tuple[int, Tensor, Call, int]]:
        """Number of the first sequence, hidden states on the device, how the layer is called, batches done."""
        start = self._first
        for done, hidden in enumerate(list(self._hidden), start=1):
            yield start, hidden.to(self.device), self._calls[tuple(hidden.shape[:2])][number], done
            start += len(hidden)


def stream_weights(kind: str, front: Tensor, behind: Tensor) -> Tensor:
    """How much a layer's error at each token counts: the inverse mean square of the residual stream it goes into.

    The norm in front of whatever reads the stream divides by that stream's size, so an error of the same length weighs
    less where the stream is long. It takes the say from the few tokens with outputs hundreds of times as large (the first
    of a sequence in most decoders), on which attention leans all the same.

    Args:
        kind: Of the part: an MLP's error goes into the stream behind the layer, attention's into that in front.
        front: ``[batch, length, width]``, in front of the layer.
        behind: The same behind it.

    Returns:
        ``[batch, length]`` float32 > 0, mean 1 over each sequence, so that batches add up in any split.
    """
    square = (behind if kind == "mlp" else front).float().square().mean(-1)
    inverse = 1 / square.clamp(min=1e-6 * square.mean(-1, keepdim=True)).clamp(min=torch.finfo(torch.float32).tiny)
    return inverse / inverse.mean(-1, keepdim=True)


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

    def update(self, start: int, inputs: Tensor, weights: Tensor | None) -> None:
        """Add the tokens of one batch, ``[batch, length, features]``, with weights ``[batch, length]`` or without.

        Raises:
            NumericsError: If a value is not finite.
        """

        def add(moments: RowMoments, chosen: Tensor | slice) -> None:
            moments.update(inputs[chosen].flatten(0, 1), None if weights is None else weights[chosen].flatten())

        if not self.hold_out:
            add(self._fitted, slice(None))
            return
        held = held_out_images(torch.arange(start, start + len(inputs), device=inputs.device))
        add(self._fitted, ~held)
        if bool(held.any()):
            self._any_held = True
            add(self._held, held)

    def result(self, team: Team, device: torch.device) -> Gathered:
        """Moments of everything so far, of all processes.

        Raises:
            NumericsError: If there was no token.
        """
        if team.size > 1:
            for moments in (self._fitted, self._held) if self.hold_out else (self._fitted,):
                moments.combine_(team.add_up_, device)
            self._any_held = self._held.rows > 0
        fitted = self._fitted.result()
        if not self._any_held:
            return Gathered(fitted, None)
        held = self._held.result()
        return Gathered(merge(fitted, held), held)
