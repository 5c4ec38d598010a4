"""Error curves of a decoder's parts for uneven widths: a part's own shape, on a scale that the logits give.

One walk over the dense network gathers the moments of every part, one layer at a time. A part's curve has the shape of
its relative error under backward elimination (M10). Its scale is measured: the part alone is cut to a few depths with
joint weights, and the mean KL divergence of the network's predictions from the dense ones, in nats a token, is set
against that error. Nats of different parts then add up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modhifi_cli.engine.impact import scaled_curve
from modhifi_cli.engine.token_walk import TokenMoments
from modhifi_cli.graph.components import is_transposed
from modhifi_cli.graph.decoder import Part, leave, run_layer
from modhifi_cli.numerics.compensation import Joint
from modhifi_cli.numerics.elimination import elimination
from modhifi_cli.numerics.linalg import feature_index
from modhifi_cli.records import Consumer, Progress

if TYPE_CHECKING:
    from modhifi_cli.engine.prune_decoder import DecoderRun

_TRIAL_TOKENS = 512  # of the calibration text, on which a trial runs: each costs half a forward on average
_TRIAL_DEPTHS = (0.2, 0.5)  # shares of a part whose removal is tried


def decoder_curves(run: "DecoderRun", curves: list[list[float]]) -> Iterator[Progress]:
    """What it costs every part to lose 0, 1, 2, … components, in nats a token; appended to `curves`.

    Args:
        run: The run; its network stands as it is and is given back so.
        curves: Filled with one list for each part, from 0, never falling.
    """
    from modhifi_cli.engine.prune_decoder import consumer_of, features_of_reader

    flow, decoder = run.flow, run.decoder
    yield from flow.restart()
    trial = _Trial(run)
    for number, name in enumerate(decoder.layers):
        parts = [part for part in decoder.parts if part.layer == number]
        readers = [run.model.get_submodule(part.consumer.module) for part in parts]
        moments = [
            TokenMoments(part.name, features_of_reader(reader), False)
            for part, reader in zip(parts, readers, strict=True)
        ]
        with flow.at_work(number) as layer:
            if parts:
                looks = {
                    reader: (part.kind, own.update) for part, reader, own in zip(parts, readers, moments, strict=True)
                }
                yield from flow.look(layer, number, looks, name, weighted=run.weighted)
            for part, reader, own in zip(parts, readers, moments, strict=True):
                yield Progress("error curves", part.name, number, len(decoder.layers))
                alive = run.layout.alive(part.group)
                order = run.layout.input_order(part.consumer, alive)
                consumer = consumer_of(run, part, reader, alive, order, own.result(flow.team, flow.device))
                path = elimination([consumer], keep=1)
                errors = path.errors.tolist()
                moved = {}
                for depth in sorted({_depth(part, alive.numel(), share) for share in _TRIAL_DEPTHS} - {0}):
                    kept = path.kept(alive.numel() - depth).cpu()
                    with _hollow(reader, consumer, kept, order):
                        moved[depth] = flow.team.first(trial.measure(number), flow.device)
                curves.append(scaled_curve(errors, moved))
            if number + 1 < len(decoder.layers):
                yield from flow.advance(layer, number, name)
        trial.advance()
    yield Progress("error curves", "done", len(decoder.layers), len(decoder.layers))


class _Trial:
    """Some calibration tokens in the dense network, which are tried from the layer at work to the logits."""

    def __init__(self, run: "DecoderRun") -> None:
        self._run = run
        _, hidden, _, _ = next(iter(run.flow.batches(0)))
        self._hidden = hidden[: max(1, _TRIAL_TOKENS // hidden.shape[1])]
        self._calls = [run.flow.call(number, self._hidden) for number in range(len(run.decoder.layers))]
        self._at = 0
        self._dense = self._predictions(0)

    @torch.no_grad()
    def advance(self) -> None:
        """Go on behind the layer at work, which is dense again."""
        with self._run.flow.at_work(self._at) as layer:
            self._hidden = run_layer(layer, self._hidden, self._calls[self._at])
        self._at += 1

    def measure(self, number: int) -> float:
        """Mean KL(dense ‖ present) over the trial's tokens, nats, when the layer at work is edited."""
        changed = self._predictions(number)
        return float((self._dense.exp() * (self._dense - changed)).sum(-1).mean().clamp(min=0))

    @torch.no_grad()
    def _predictions(self, number: int) -> Tensor:
        hidden = self._hidden
        for later in range(number, len(self._run.decoder.layers)):
            with self._run.flow.at_work(later, keep=later == self._at) as layer:
                hidden = run_layer(layer, hidden, self._calls[later])
        model = self._run.model
        home = next(model.parameters()).device
        return leave(model, self._run.decoder.layers, hidden.to(home)).float().log_softmax(-1)


def _depth(part: Part, alive: int, share: float) -> int:
    """Components that a trial removes: a multiple of what must stay even, leaving at least one of each."""
    step = part.balanced
    return min(max(round(alive * share / step) * step, step), alive - step)


@contextmanager
def _hollow(reader: nn.Module, consumer: Consumer, kept: Tensor, order: Tensor) -> Iterator[Any]:
    """Within it the consumer behaves as if cut and repaired, without changing a shape."""
    solved = Joint(ridge=1e-2)(consumer, kept)
    width = consumer.weight.shape[1] // consumer.components
    wide = torch.zeros_like(consumer.weight)
    wide[:, feature_index(kept, width).to(wide.device)] = solved
    natural = wide[:, torch.argsort(order).to(wide.device)]
    before = reader.weight.detach().clone()
    with torch.no_grad():
        reader.weight.copy_(natural.T if is_transposed(reader) else natural)
    try:
        yield
    finally:
        with torch.no_grad():
            reader.weight.copy_(before)

