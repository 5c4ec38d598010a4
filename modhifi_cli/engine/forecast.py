"""What pruning a decoder will take, from its shapes alone: memory of card and host, traffic, operations, and time.

Nothing is loaded or run: the network's tensors may be on ``meta``. Bytes of statistics and solves are counted from what
the engine holds at its fullest moment, which tests compare with measured peaks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from modhifi_cli.engine.flow import TOKENS_AT_ONCE
from modhifi_cli.evaluation.visiting import size_of
from modhifi_cli.graph.components import input_size, matrices, output_size
from modhifi_cli.graph.decoder import Decoder, Part

# Float64 matrices of features × features that are alive at once. While tokens are seen: the sums (held-out ones apart),
# one product and its float64 copy. When they are summed up: the sums, the moments made of them, and those of all tokens.
_SEEING, _SUMMED_UP = 3.5, 5.0
_SEEING_WHOLE, _SUMMED_UP_WHOLE = 2.0, 2.3  # where no sample is held out
_TRIAL_DEPTHS, _TRIAL_TOKENS = 3, 1536
_RECTANGLES = 6.0  # of outputs × features, in a solve
_SINGLE, _DOUBLE = 4, 8.0  # bytes of an element
# What cards do in practice, operations (multiply-accumulates) and bytes a second; a guess to divide by, not a promise.
SPEEDS = {
    "multiply-accumulates of forwards": 60e12,
    "multiply-accumulates of statistics": 15e12,
    "multiply-accumulates of solves": 5e12,
    "bytes copied": 15e9,
}


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to take.

    Attributes:
        card: Bytes at the most where the layers run, by what they are for.
        host: Bytes at the most of the process, libraries left out, by what they are for.
        traffic: Bytes copied to the card and from it, in all.
        operations: Multiply-accumulates by kind.
        seconds: Time at `SPEEDS`.
    """

    card: Mapping[str, float]
    host: Mapping[str, float]
    traffic: float
    operations: Mapping[str, float]
    seconds: float

    def on_the_card(self) -> str:
        """What is needed where the layers run, in words."""
        parts = ", ".join(f"{what} {count / 1e9:.2f}" for what, count in self.card.items() if count)
        return f"memory where the layers run, estimated: {sum(self.card.values()) / 1e9:.2f} GB at most ({parts})"

    def does_not_fit(self, free: float) -> str | None:
        """What to do where so many bytes are free and more are needed; None where they are enough."""
        if sum(self.card.values()) <= free:
            return None
        return (
            f"only {free / 1e9:.2f} GB are free where the layers run: set decoder.offload=true or fewer data.sequences, "
            "or take a larger card"
        )


@dataclass(frozen=True)
class Run:
    """What of a run decides how much memory and time it takes.

    Attributes:
        sequences: Calibration sequences.
        length: Tokens of each.
        batch_size: Sequences a forward, at most.
        passes: Of the schedule.
        reference: Of the compensation: ``"none"`` without a repair, ``"current"`` or ``"dense"``.
        hold_out: Whether every fifth sequence is kept apart.
        uneven: Whether widths come from error curves.
        statistics: Whether any step looks at what layers read.
        offload: Whether hidden states wait on the host.
        dense_copies: Further whole copies of the network on the host, to be measured beside it.
        room: Bytes that are free on the card, half of which layers may take that trials come back to; None where that
            is not known: then trials fetch them again.
    """

    sequences: int
    length: int
    batch_size: int
    passes: int
    reference: str
    hold_out: bool
    uneven: bool
    statistics: bool
    offload: bool
    dense_copies: int
    room: float | None = None

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.sequences * self.length

    @property
    def walks(self) -> int:
        """Times that the network is walked through."""
        return self.passes * (2 if self.uneven else 1)


def forecast(model: nn.Module, decoder: Decoder, run: Run) -> Forecast:
    """Expectation for one run.

    Args:
        model: The network; only shapes and types of its tensors are looked at.
        decoder: Its layers and parts.
        run: The run.
    """
    layer = max(map(size_of, (model.get_submodule(name) for name in decoder.layers)))
    layers, whole = sum(size_of(model.get_submodule(name)) for name in decoder.layers), size_of(model)
    size = next(model.parameters()).element_size()
    shapes = [_shape(model, part) for part in decoder.parts]
    features, outputs = max(shapes)
    twins = 2 if run.reference == "dense" else 1
    # Beside the dense network its hidden states in front of the layer at work and behind it wait together.
    waiting = float(run.tokens * outputs * size * (3 if run.reference == "dense" else 1))
    at_once = min(TOKENS_AT_ONCE, run.batch_size * run.length, run.tokens)
    card = {"one layer": float(layer * twins), "waiting tokens": 0.0 if run.offload else waiting}
    # Three tensors as wide as the reader's input, a copy in float32, and a few of the stream.
    batch = float(at_once * (3 * features * size + features * _SINGLE + 4 * outputs * size))
    if run.statistics:
        seeing, summed_up = (_SEEING, _SUMMED_UP) if run.hold_out else (_SEEING_WHOLE, _SUMMED_UP_WHOLE)
        dense = features * outputs * _DOUBLE * 4 if run.reference == "dense" else 0.0  # cross moments with the targets
        fullest = max(
            seeing * _DOUBLE * features**2 + batch,
            _DOUBLE * (summed_up * features**2 + _RECTANGLES * features * outputs) + at_once * features * size,
        )
        card["statistics, solves and one batch"] = fullest + dense
    else:
        card["one batch"] = batch
    if run.uneven:
        trial = min(_TRIAL_TOKENS, run.tokens)
        predictions = 2.0 * _SINGLE * trial * _vocabulary(model)  # dense and present
        card["trial"] = 3.0 * trial * outputs * size + predictions
    host = {"network": float(whole * (1 + run.dense_copies)), "waiting tokens": waiting if run.offload else 0.0}
    work = _operations(model, decoder, shapes, run)
    trials = len(decoder.parts) * _TRIAL_DEPTHS + 1 if run.uneven else 0
    stay = run.room is not None and layers < run.room / 2  # then layers go to the card once for all trials
    traffic = 2.0 * layers * run.walks + (0.0 if stay else 2.0 * layers / 2 * trials)
    if run.offload:
        traffic += (len(decoder.parts) * run.walks + 2 * len(decoder.layers) * run.walks) * waiting
    seconds = sum(count / SPEEDS[kind] for kind, count in work.items()) + traffic / SPEEDS["bytes copied"]
    return Forecast(card, host, traffic, work, seconds)


def _operations(
    model: nn.Module, decoder: Decoder, shapes: Sequence[tuple[int, int]], run: Run
) -> dict[str, float]:
    """Multiply-accumulates of all forwards, sums and solves."""
    linear = sum(
        weight.numel() for name in decoder.layers for *_, weight in matrices(model.get_submodule(name))
    )
    width = shapes[0][1]
    forward = float(run.tokens) * (linear + len(decoder.layers) * width * (run.length + 1))
    kinds = len({part.kind for part in decoder.parts})
    forwards = forward * run.walks * (1 + (kinds if run.statistics else 0))
    if run.uneven:
        trial = min(_TRIAL_TOKENS, run.tokens)
        head = float(width) * _vocabulary(model)
        forwards += len(shapes) * _TRIAL_DEPTHS * trial * (forward / run.tokens / 2 + head)
    sums = run.walks * run.tokens * sum(float(features) ** 2 for features, _ in shapes) if run.statistics else 0.0
    solves = run.walks * sum(2.0 * features**3 + features**2 * out for features, out in shapes) if run.statistics else 0.0
    return {
        "multiply-accumulates of forwards": forwards,
        "multiply-accumulates of statistics": sums,
        "multiply-accumulates of solves": solves,
    }


def _shape(model: nn.Module, part: Part) -> tuple[int, int]:
    """Features and outputs of a part's reader."""
    reader = model.get_submodule(part.consumer.module)
    return input_size(reader), output_size(reader)


def _vocabulary(model: nn.Module) -> int:
    config: Any = model.config  # transformers' configuration, which PyTorch takes for a tensor or a module
    return int(config.vocab_size)
