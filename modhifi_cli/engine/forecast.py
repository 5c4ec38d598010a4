"""What pruning a decoder will take, from its shapes alone: memory of card and host, traffic, operations, and time.

Nothing is loaded or run: the network's tensors may be on ``meta``. Bytes of statistics and solves are counted from what
the engine holds at its fullest moment, which tests compare with measured peaks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from modhifi_cli.engine.flow import TOKENS_AT_ONCE
from modhifi_cli.graph.components import input_size, output_size
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


def forecast(
    model: nn.Module,
    decoder: Decoder,
    *,
    sequences: int,
    length: int,
    batch_size: int,
    passes: int,
    reference: str,
    hold_out: bool,
    uneven: bool,
    statistics: bool,
    offload: bool,
    dense_copies: int,
    room: float | None = None,
) -> Forecast:
    """Expectation for one run.

    Args:
        model: The network; only shapes and types of its tensors are looked at.
        decoder: Its layers and parts.
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
    layer = max(map(_bytes, (model.get_submodule(name) for name in decoder.layers)))
    layers, whole = sum(_bytes(model.get_submodule(name)) for name in decoder.layers), _bytes(model)
    size = next(model.parameters()).element_size()
    shapes = [_shape(model, part) for part in decoder.parts]
    features, outputs = max(shapes)
    twins = 2 if reference == "dense" else 1
    waiting = float(sequences * length * outputs * size * twins)
    at_once = min(TOKENS_AT_ONCE, batch_size * length, sequences * length)
    card = {"one layer": float(layer * twins), "waiting tokens": 0.0 if offload else waiting}
    # Three tensors as wide as the reader's input, a copy in float32, and a few of the stream.
    batch = float(at_once * (3 * features * size + features * _SINGLE + 4 * outputs * size))
    if statistics:
        seeing, summed_up = (_SEEING, _SUMMED_UP) if hold_out else (_SEEING_WHOLE, _SUMMED_UP_WHOLE)
        dense = features * outputs * _DOUBLE * 4 if reference == "dense" else 0.0  # cross moments with the targets
        fullest = max(
            seeing * _DOUBLE * features**2 + batch,
            _DOUBLE * (summed_up * features**2 + _RECTANGLES * features * outputs) + at_once * features * size,
        )
        card["statistics, solves and one batch"] = fullest + dense
    else:
        card["one batch"] = batch
    if uneven:
        trial = min(_TRIAL_TOKENS, sequences * length)
        predictions = 4.0 * _SINGLE * trial * model.config.vocab_size  # dense, present, and two on the way to a sum
        card["trial"] = 3.0 * trial * outputs * size + predictions
    host = {"network": float(whole * (1 + dense_copies)), "waiting tokens": waiting if offload else 0.0}
    work = _operations(model, decoder, shapes, sequences * length, length, passes, uneven=uneven, statistics=statistics)
    trials = len(decoder.parts) * _TRIAL_DEPTHS + 1 if uneven else 0
    walks = passes * (2 if uneven else 1)
    stay = room is not None and layers < room / 2  # then layers go to the card once for all trials
    traffic = 2.0 * layers * walks + (0.0 if stay else 2.0 * layers / 2 * trials)
    if offload:
        traffic += (len(decoder.parts) * walks + 2 * len(decoder.layers) * walks) * waiting
    seconds = sum(count / SPEEDS[kind] for kind, count in work.items()) + traffic / SPEEDS["bytes copied"]
    return Forecast(card, host, traffic, work, seconds)


def _operations(
    model: nn.Module,
    decoder: Decoder,
    shapes: Sequence[tuple[int, int]],
    tokens: int,
    length: int,
    passes: int,
    *,
    uneven: bool,
    statistics: bool,
) -> dict[str, float]:
    """Multiply-accumulates of all forwards, sums and solves."""
    linear = sum(
        module.weight.numel()
        for name in decoder.layers
        for module in model.get_submodule(name).modules()
        if getattr(module, "weight", None) is not None and module.weight.dim() == 2
    )
    width = shapes[0][1]
    forward = float(tokens) * (linear + len(decoder.layers) * width * (length + 1))
    kinds = len({part.kind for part in decoder.parts})
    walks = passes * (2 if uneven else 1)
    forwards = forward * walks * (1 + (kinds if statistics else 0))
    if uneven:
        trial = min(_TRIAL_TOKENS, tokens)
        head = float(width) * model.config.vocab_size
        forwards += len(shapes) * _TRIAL_DEPTHS * trial * (forward / tokens / 2 + head)
    sums = walks * tokens * sum(float(features) ** 2 for features, _ in shapes) if statistics else 0.0
    solves = walks * sum(2.0 * features**3 + features**2 * out for features, out in shapes) if statistics else 0.0
    return {
        "multiply-accumulates of forwards": forwards,
        "multiply-accumulates of statistics": sums,
        "multiply-accumulates of solves": solves,
    }


def _shape(model: nn.Module, part: Part) -> tuple[int, int]:
    """Features and outputs of a part's reader."""
    reader = model.get_submodule(part.consumer.module)
    return input_size(reader), output_size(reader)


def _bytes(module: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
