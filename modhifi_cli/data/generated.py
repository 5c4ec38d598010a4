"""Text that a causal decoder makes for itself: sequences sampled from its own distribution, token by token.

What a language model says of its own accord is near what it was trained on, so it can calibrate on it when nobody has
text. Low temperatures fall into loops and high ones into noise: they are mixed, and loops and copies are left out.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from modhifi_cli.data.making import Making, kept_or_made
from modhifi_cli.data.sources import sha256_of_samples
from modhifi_cli.data.text import TokenWindows
from modhifi_cli.errors import ConfigError, DataError, NumericsError, is_number, is_whole
from modhifi_cli.graph.surgery import weights_hash
from modhifi_cli.records import Preprocess, Progress, TextInput

VERSION = 1  # of the procedure: another one makes other text from the same settings
SEQUENCES, LENGTH = 64, 512  # what "auto" means
TOGETHER = 16  # sequences sampled at once: one part of the set
STARTS = ("auto", "bos", "random")
_GRAM = 4  # tokens in a row that a loop repeats
_SHARED = 32  # tokens in a row that make two sequences copies
_MOST_PARTS = 4  # times the parts that would do if nothing were left out


def load(
    *,
    preprocess: TextInput | Preprocess,
    labelled: bool,
    making: Making,
    sequences: int | str | None = "auto",
    length: int | str = "auto",
    temperatures: Sequence[float] = (0.7, 1.0, 1.2),
    start: str = "auto",
    distinct: float = 0.5,
    seed: int = 0,
    cache: str | None = "auto",
) -> TokenWindows:
    """Windows of text sampled from the network itself.

    One parameter for each key of the YAML, and for what every one of the kind is given.

    Args:
        preprocess: The network's `TextInput`.
        labelled: As of every source; text has no labels.
        making: The network, and who listens.
        sequences: How many; ``"auto"`` and None are 64.
        length: Tokens of each; ``"auto"`` is 512, or as many as the network takes.
        temperatures: Of the sampling, in turn over the sequences; each above 0.
        start: ``"bos"``: the token that begins a sequence; ``"random"``: a random token, behind that token where there
            is one; ``"auto"``: by turns, or random where the vocabulary has no such token.
        distinct: Sequences of which a smaller share of four tokens in a row are different ones are loops, 0 … 1.
        seed: Of everything that is drawn.
        cache: Where finished parts are kept: ``"auto"``, a folder, or None.

    Raises:
        ConfigError: If a setting is out of range, or the network reads images.
        DataError: If too few sequences are neither loops nor copies, or the cache is damaged or cannot be written.
        NumericsError: If the network's logits are not finite.
    """
    if not isinstance(preprocess, TextInput):
        raise ConfigError(
            "data=generated samples text from a language model, and this network reads images; choose data=inversion "
            "or data=procedural."
        )
    count = SEQUENCES if sequences in ("auto", None) else sequences
    length = min(LENGTH, preprocess.max_length) if length == "auto" else length
    temperatures = _checked(count, length, temperatures, start, distinct, preprocess)
    identity = {
        "method": "generated",
        "version": VERSION,
        "weights_sha256": weights_hash(making.model),
        "length": length,
        "temperatures": temperatures,
        "start": start,
        "bos": preprocess.bos,
        "seed": seed,
    }
    store = making.store(cache, making.name, identity)
    drawn = _Drawn(int(count), distinct)
    parts = -(-int(count) // TOGETHER)
    for number in drawn.numbers(parts):
        draw = partial(_sample, making, preprocess, number, parts, length, temperatures, start, seed)
        part, new = kept_or_made(store, number, lambda draw=draw: {"tokens": draw()})
        drawn.made += new
        drawn.take(part["tokens"])
    if store.place is not None:
        how = "made and kept in" if drawn.made else "taken from"
        making.note(f"{count} sequences sampled from {making.name}, {how} {store.place}")
    windows = drawn.found[: int(count)]
    digest = sha256_of_samples(window.numpy().tobytes() for window in windows)
    protocol = {
        "source": "generated",
        "path": f"sampled from {making.name} itself",
        "sequences": len(windows),
        "available": len(windows),
        "length": length,
        "temperatures": temperatures,
        "start": start,
        "tokens": sum(len(window) for window in windows),
        "loops_left_out": drawn.loops,
        "copies_left_out": drawn.copies,
        "seed": seed,
        "sha256": digest,
    }
    return TokenWindows(windows, [0] * len(windows), protocol, preprocess)


@dataclass
class _Drawn:
    """The sequences of a set while they are sampled: neither loops nor copies of one another.

    Attributes:
        count: How many are asked for.
        distinct: Share of different runs below which a sequence is a loop.
        found: Those that are taken.
        loops, copies: Left out.
        made: Parts that were sampled now and not kept from earlier.
    """

    count: int
    distinct: float
    found: list[Tensor] = field(default_factory=list)
    loops: int = 0
    copies: int = 0
    made: int = 0
    _known: set[tuple[int, ...]] = field(default_factory=set)

    def numbers(self, parts: int) -> Iterator[int]:
        """Parts to sample until there is enough; given up where far more than `parts` have not been enough."""
        for number in itertools.count():
            if len(self.found) >= self.count:
                return
            if number == _MOST_PARTS * parts:
                raise DataError(
                    f"data=generated: of {number * TOGETHER} sequences sampled {self.loops} are loops and {self.copies} "
                    f"copies, and {self.count} others were asked for; lower data.distinct or data.sequences, or raise "
                    "data.temperatures."
                )
            yield number

    def take(self, sequences: Tensor) -> None:
        """Take of a part, ``[sequences, length]``, what is neither a loop nor a copy."""
        for tokens in sequences:
            if variety(tokens) < self.distinct:
                self.loops += 1
                continue
            ids = tokens.tolist()
            size = min(_SHARED, len(ids) - 1)
            grams = {tuple(ids[at : at + size]) for at in range(1, len(ids) - size + 1)}
            if grams & self._known:
                self.copies += 1
                continue
            self._known |= grams
            self.found.append(tokens)


def variety(tokens: Tensor) -> float:
    """Different runs of four tokens as a share of all, 0 … 1; 1 for text without repetition, near 0 for a loop.

    Args:
        tokens: ``[length]`` int64; one run at least is counted.
    """
    ids = tokens.tolist()
    size = min(_GRAM, len(ids))
    runs = [tuple(ids[at : at + size]) for at in range(len(ids) - size + 1)]
    return len(set(runs)) / len(runs)


def _checked(
    count: object, length: object, temperatures: object, start: str, distinct: object, text: TextInput
) -> list[float]:
    for key, value, least in (("sequences", count, 1), ("length", length, 2)):
        if not is_whole(value) or value < least:
            raise ConfigError(f"data.{key}: expected a whole number from {least}, or auto, got {value!r}.")
    if length > text.max_length:
        raise ConfigError(f"data.length={length}: the network was made for at most {text.max_length} tokens; lower it.")
    fits = isinstance(temperatures, Sequence) and not isinstance(temperatures, str) and len(temperatures) > 0
    if not fits or any(not is_number(t) or not 0 < t < 100 for t in temperatures):
        raise ConfigError(
            f"data.temperatures: expected a list of numbers above 0, such as [0.7,1.0], got {temperatures!r}."
        )
    if start not in STARTS:
        raise ConfigError(f"data.start: expected one of {', '.join(STARTS)}, got {start!r}.")
    if start == "bos" and text.bos is None:
        raise ConfigError("data.start=bos: the vocabulary has no token that begins a sequence; set data.start=random.")
    if not is_number(distinct) or not 0 <= distinct <= 1:
        raise ConfigError(f"data.distinct: expected a share from 0 to 1, got {distinct!r}.")
    return [float(one) for one in temperatures]


@torch.inference_mode()
def _sample(
    making: Making,
    text: TextInput,
    number: int,
    parts: int,
    length: int,
    temperatures: Sequence[float],
    start: str,
    seed: int,
) -> Tensor:
    """One part: sequences ``[TOGETHER, length]`` int64."""
    model: nn.Module = making.model
    device = next(model.parameters()).device  # a large language model stays where it is
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    rows = torch.arange(number * TOGETHER, (number + 1) * TOGETHER)
    heat = torch.tensor(temperatures)[rows % len(temperatures)][:, None]
    drawn = torch.randint(0, text.vocabulary, (TOGETHER,), generator=generator)
    if text.bos is None:
        tokens = drawn[:, None]
    else:
        tokens = torch.full((TOGETHER, 1), text.bos)
    # The second token of every other sequence is drawn from the whole vocabulary: what follows is led elsewhere.
    turns = rows // len(temperatures) % 2 == 1
    free = turns if start == "auto" else torch.full((TOGETHER,), start == "random")
    cache, fresh = None, tokens
    while tokens.shape[1] < length:
        output = model(input_ids=fresh.to(device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise NumericsError("data=generated: the network's logits are NaN or infinite; check the weights.")
        fresh = torch.multinomial((logits / heat).softmax(1), 1, generator=generator)
        if tokens.shape[1] == 1 and text.bos is not None:
            fresh = torch.where(free[:, None], drawn[:, None], fresh)
        tokens = torch.cat([tokens, fresh], 1)
        making.progress(
            Progress(
                "generated", f"part {number + 1}", number * length + tokens.shape[1], max(parts, number + 1) * length
            )
        )
    return tokens
