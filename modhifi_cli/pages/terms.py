"""The words of every page and table: what a term is called, how a number is rounded, the table before and after."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modhifi_cli.pages.page import one_line
from modhifi_cli.records import Measurement

# What shares are counted in, by the name of the target.
COUNTED = {"params": "parameters", "flops": "FLOPs", "components": "components", "latency": "time"}

# What a reader calls it, and whether more of it is better (True), less (False) or neither (None).
_TERMS = {
    "top1": ("top-1 accuracy", True),
    "top5": ("top-5 accuracy", True),
    "forget_accuracy": ("forget accuracy", None),
    "retain_accuracy": ("retain accuracy", True),
    "forgotten_rank": ("rank of the forgotten class on its own images", None),
    "forgotten_gap": ("its logit above the best class that stays, own images", None),
    "others_rank": ("rank of the forgotten class on all other images", None),
    "others_gap": ("its logit above the best class that stays, other images", None),
    "others_agreement": ("agreement with dense, other images", True),
    "token_perplexity": ("token perplexity", False),
    "token_agreement": ("tokens predicted as by dense", True),
    "token_kl": ("mean KL from dense, nats a token", False),
    "prefill_tokens_per_second": ("prefill, tokens/s", True),
    "decode_tokens_per_second": ("decode, tokens/s", True),
    "prefill_speedup": ("prefill speedup", True),
    "decode_speedup": ("decode speedup", True),
    "first_token_ms": ("time to the first token", False),
    "agreement": ("agreement with dense", True),
    "kl": ("mean KL from dense", False),
    "parameters": ("parameters", False),
    "macs": ("FLOPs (MACs)", False),
    "file_bytes": ("file size", False),
    "latency_ms": ("latency", False),
    "speedup": ("speedup", True),
}


# Terms that are measured in several runtimes or with several batches: all but the first have a name with an ending.
_REPEATED = (
    "latency_ms", "speedup", "first_token_ms", "prefill_tokens_per_second", "decode_tokens_per_second",
    "prefill_speedup", "decode_speedup",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table before/after/change.

    Attributes:
        name: The measurement's term, ``top1``.
        label: The same for readers, ``top-1 accuracy``.
        before: Value of the reference network with its unit, or "" where it has none.
        after: Value of the edited network with its unit, or "".
        change: Points for percentages; otherwise the relative change and the factor; "" where one side is missing.
        better: Whether the change is an improvement; None where nothing changed or nobody can say.
    """

    name: str
    label: str
    before: str
    after: str
    change: str
    better: bool | None


def table(measurements: Iterable[Measurement], *, reference: str = "dense") -> tuple[Row, ...]:
    """One row per measured term, in the order in which the terms were first measured.

    Args:
        measurements: Of the reference network and at most one edited one.
        reference: The network that counts as before.

    Returns:
        The rows. Where only one network was measured, its values stand in its column and nothing changes.
    """
    terms: dict[str, dict[bool, Measurement]] = {}
    for measurement in measurements:
        terms.setdefault(measurement.name, {})[measurement.model == reference] = measurement
    rows = []
    for name, sides in terms.items():
        before, after = sides.get(True), sides.get(False)
        label, more_is_better = _term(name, before or after)
        moved = None if before is None or after is None or after.value == before.value else after.value > before.value
        # Of two times only their ratio within a round is told, as the speedup: a second ratio would contradict it. What
        # is told in words (a rank, a count of few images) has no points and no factor either.
        compared = before is not None and after is not None and not _timed(name) and "told" not in after.protocol
        rows.append(
            Row(
                name=name,
                label=label,
                before="" if before is None else before.protocol.get("told") or quantity(before.value, before.unit),
                after="" if after is None else after.protocol.get("told") or quantity(after.value, after.unit),
                change=change(before.value, after.value, before.unit) if compared else "",
                better=None if moved is None or more_is_better is None or not compared else moved == more_is_better,
            )
        )
    return tuple(rows)


def _timed(name: str) -> bool:
    return name.startswith(("latency_ms", "first_token_ms")) or "_tokens_per_second" in name


def _term(name: str, measured: Measurement) -> tuple[str, bool | None]:
    """What a reader calls a measurement and whether more is better; times are told with their runtime and batch."""
    known = name if name in _TERMS else next((term for term in _REPEATED if name.startswith(f"{term}_")), name)
    label, better = _TERMS.get(known, (name.replace("_", " "), None))
    prompts = measured.protocol.get("sequences")
    if known in _REPEATED and prompts is not None:
        label += f", {prompts} prompt{'s' if prompts > 1 else ''}"
    batch, runtime = measured.protocol.get("batch"), measured.protocol.get("runtime")
    if known in ("latency_ms", "speedup") and runtime is not None:
        label += f", {runtime}" + (f", batch {batch}" if known == "latency_ms" else "")
    return label, better


def quantity(value: float, unit: str) -> str:
    """A value with its unit, rounded to what a reader uses: ``853.0 k``, ``1.54 ×``, ``93.39 %``.

    Args:
        value: The number.
        unit: As in `Measurement.unit`.
    """
    if unit == "bytes":
        return _scaled(value, ("B", "kB", "MB", "GB", "TB"))
    if unit in ("parameters", "MACs"):
        return _scaled(value, ("", "k", "M", "G", "T")).strip()
    if unit == "%":
        return f"{value:.2f} %"
    if unit in ("ms", "×"):
        # "#" keeps the zeros of 13.0; from a hundred on there is nothing behind the point to keep.
        return f"{value:#.3g} {unit}" if abs(value) < 99.95 else f"{value:.0f} {unit}"
    return f"{value:.4g} {unit}".strip()


def change(before: float, after: float, unit: str) -> str:
    """What happened between two values: points for percentages, differences of logits, else relative change and factor.

    Args:
        before: Value of the reference network.
        after: Value of the edited network.
        unit: As in `Measurement.unit`.

    Returns:
        ``−1.20 points``, or ``−40.0 % (1.67× less)``, or ``+25.0 % (1.25× more)``; ``±0`` where nothing changed.
    """
    if after == before:
        return "±0"
    if unit == "%":
        return f"{signed(after - before, 2)} points"
    if before <= 0 or after <= 0 or unit == "logits":  # a distance between logits has no zero that factors could be of
        return signed(after - before, 4)
    factor, word = (before / after, "less") if after < before else (after / before, "more")
    return f"{signed(100 * (after / before - 1), 1)} % ({factor:.2f}× {word})"


def not_faster(measurements: Sequence[Measurement]) -> str | None:
    """A sentence where fewer multiply-accumulates have not become less time, or None.

    Time is said to lag where it fell by less than a third of the share that the FLOPs fell by, at the upper end of the
    median's interval as well; below a tenth fewer FLOPs nothing is said, since no clock shows so little.

    Args:
        measurements: Of a dense and an edited network, with ``macs`` and ``speedup``.
    """
    dense = next((one.value for one in measurements if one.model == "dense" and one.name == "macs"), None)
    told = next((one for one in measurements if one.name == "speedup"), None)
    if dense is None or told is None:
        return None
    edited = next((one.value for one in measurements if one.model == told.model and one.name == "macs"), dense)
    fewer, saved = 1 - edited / dense, 1 - 1 / told.value
    low, high = (told.protocol.get(key, told.value) for key in ("low", "high"))
    noisy = str(told.protocol.get("told", "")).startswith("too noisy")
    if fewer < 0.1 or noisy or max(saved, 1 - 1 / high) >= fewer / 3:
        return None
    time = f"only {saved:.1%} less time" if saved > 0 else f"no less time ({-saved:.1%} more)"
    return (
        f"{fewer:.1%} fewer FLOPs are {time} in {told.protocol.get('runtime')} here (batch of "
        f"{told.protocol.get('batch')}, {low:.2f} to {high:.2f} times as fast): narrow or oddly sized layers cost what "
        "wide ones do; name where the network will run (runtime.serve) with round_to=auto, or ask for time itself with "
        "target=latency."
    )


def protocol_lines(measurements: Sequence[Measurement]) -> list[str]:
    """One line per protocol, with everything of one network that was measured by it."""
    shared: dict[tuple[str, str], list[str]] = {}
    for measurement in measurements:
        if measurement.protocol:
            account = "; ".join(f"{key} {told(value)}" for key, value in measurement.protocol.items())
            shared.setdefault((measurement.model, one_line(account)), []).append(measurement.name)
    return [f"{model}, {', '.join(names)}: {account}" for (model, account), names in shared.items()]


def told(value: Any) -> str:
    """A JSON value in words: ``none``, ``yes``, four digits of a number, lists and mappings on one line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {told(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(told(item) for item in value) + "]"
    return placeless(str(value))


def placeless(text: str) -> str:
    """A text without the folders of absolute paths: a page is read on other machines than the one that made it."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/,;:'\"]+/)+(?=[^\s/])", "…/", text)


def removed(achieved: Mapping[str, float]) -> str:
    """What a run took away, one way everywhere: ``40 % of parameters, 38.2 % of FLOPs``.

    Args:
        achieved: Shares by the names of targets. With ``model_params`` (language models) ``params`` are those of the
            decoder layers: ``20 % of decoder parameters (17.4 % of the network)``.
    """
    told = []
    for name, share in achieved.items():
        if name == "model_params":
            continue
        text = f"{percent(share)} of {COUNTED.get(name, name)}"
        if name == "params" and "model_params" in achieved:
            text = f"{percent(share)} of decoder parameters ({percent(achieved['model_params'])} of the network)"
        told.append(text)
    return ", ".join(told)


def percent(share: float) -> str:
    """``38.2 %``, and ``40 %`` where there is nothing behind the point."""
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(value) >= 1000 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    if step == 0:
        return f"{value:.0f} {units[0]}"
    return f"{value:.2f} {units[step]}" if abs(value) < 100 else f"{value:.1f} {units[step]}"


def signed(value: float, digits: int) -> str:
    """A number with its sign, a true minus."""
    return f"{'−' if value < 0 else '+'}{abs(value):.{digits}f}"


def class_name(cls: int, classes: Sequence[str] | None) -> str:
    """``3 (cat)``, or the number alone where nobody knows names."""
    return str(cls) if not classes or classes[cls] == str(cls) else f"{cls} ({classes[cls]})"
