"""Measurements as tables and as the page of a run: plain values and strings, nothing printed, nothing written."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean, stdev
from typing import Any

from modhifi_cli.errors import DataError
from modhifi_cli.pages.page import markdown_table, one_line
from modhifi_cli.records import Chart, Measurement, Series

# What a reader calls it, and whether more of it is better (True), less (False) or neither (None).
_TERMS = {
    "top1": ("top-1 accuracy", True),
    "top5": ("top-5 accuracy", True),
    "forget_accuracy": ("forget accuracy", False),
    "retain_accuracy": ("retain accuracy", True),
    "token_perplexity": ("token perplexity", False),
    "token_agreement": ("tokens predicted as by dense", True),
    "token_kl": ("mean KL from dense, nats a token", False),
    "prefill_tokens_per_second": ("prefill, tokens/s", True),
    "decode_tokens_per_second": ("decode, tokens/s", True),
    "first_token_ms": ("time to the first token", False),
    "agreement": ("agreement with dense", True),
    "kl": ("mean KL from dense", False),
    "parameters": ("parameters", False),
    "macs": ("FLOPs (MACs)", False),
    "file_bytes": ("file size", False),
    "latency_ms": ("latency", False),
    "speedup": ("speedup", True),
}


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
        # Of two times only their ratio within a round is told, as the speedup: a second ratio would contradict it.
        compared = before is not None and after is not None and not _timed(name)
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
    return name.startswith("latency_ms")


def _term(name: str, measured: Measurement) -> tuple[str, bool | None]:
    """What a reader calls a measurement and whether more is better; times are told with their runtime and batch."""
    known = next((term for term in ("latency_ms", "speedup") if name == term or name.startswith(f"{term}_")), name)
    label, better = _TERMS.get(known, (name.replace("_", " "), None))
    batch, runtime = measured.protocol.get("batch"), measured.protocol.get("runtime")
    if known in ("latency_ms", "speedup") and runtime is not None:
        label += f", {runtime}" + (f", batch {batch}" if _timed(name) else "")
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
    """What happened between two values: points for percentages, otherwise relative change and factor.

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
        return f"{_signed(after - before, 2)} points"
    if before <= 0 or after <= 0:
        return _signed(after - before, 4)
    factor, word = (before / after, "less") if after < before else (after / before, "more")
    return f"{_signed(100 * (after / before - 1), 1)} % ({factor:.2f}× {word})"


def not_faster(measurements: Sequence[Measurement]) -> str | None:
    """A sentence where fewer multiply-accumulates have not become less time, or None.

    Time is said to lag where it fell by less than half of the share that the FLOPs fell by, at the upper end of the
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
    if fewer < 0.1 or noisy or max(saved, 1 - 1 / high) >= fewer / 2:
        return None
    time = f"only {saved:.1%} less time" if saved > 0 else f"no less time ({-saved:.1%} more)"
    return (
        f"{fewer:.1%} fewer FLOPs are {time} in {told.protocol.get('runtime')} here (batch of "
        f"{told.protocol.get('batch')}, {low:.2f} to {high:.2f} times as fast): narrow or oddly sized layers cost what "
        "wide ones do; try round_to=auto, or ask for time itself with target=latency."
    )


def model_card(
    name: str,
    *,
    origin: str,
    native: bool,
    achieved: Mapping[str, float],
    measurements: Sequence[Measurement],
    calibration: Mapping[str, Any],
    repeat: str,
    trained: str = "",
) -> str:
    """The page that lies beside a pruned language model's weights: what it is, how it loads, its numbers.

    Args:
        name: Of the dense network.
        origin: Where its weights came from.
        native: Whether plain transformers opens the folder.
        achieved: Shares removed.
        measurements: Of the dense and the pruned network.
        calibration: Protocol of the calibration text.
        repeat: The command that made it.
        trained: A sentence about training after the cut; empty where there was none.

    Returns:
        Markdown with the header that model hubs read.
    """
    loading = (
        'AutoModelForCausalLM.from_pretrained("FOLDER")   # from transformers; no other code is needed'
        if native
        else 'modhifi_cli.load_model("RUN")   # the run folder; layers differ in width, so plain transformers cannot'
    )
    shares = ", ".join(f"{100 * share:.1f} % of {term}" for term, share in achieved.items())
    read = ", ".join(f"{key} {calibration[key]}" for key in ("path", "sequences", "length", "seed") if key in calibration)
    rows = [f"| {row.label} | {row.before} | {row.after} | {row.change} |" for row in table(measurements)]
    numbers = ["|  | dense | pruned | change |", "| --- | --- | --- | --- |", *rows] if rows else ["Nothing was measured."]
    return "\n".join(
        [
            "---",
            f"library_name: {'transformers' if native else 'modhifi'}",
            "tags: [pruned, modhifi]",
            "pipeline_tag: text-generation",
            "---",
            f"# {name}, pruned",
            "",
            f"Made from {origin} by structured pruning with closed-form repair (ModHiFi-P, arXiv:2511.19566)"
            f"{'. It was ' + trained if trained else ', without training.'} Removed: {shares} "
            "(params: of the decoder layers; model_params: of the whole network).",
            "",
            f"    {loading}",
            "",
            f"Calibration text: {read}.",
            "",
            *numbers,
            "",
            *(f"- {line}" for line in protocol_lines(measurements)),
            "",
            "Made with:",
            "",
            f"    {repeat}",
            "",
        ]
    )


# Columns of a comparison: term → (head, unit); those that were measured are shown, in this order.
_COMPARED = {
    "calibration_images": ("images", ""),
    "batchnorm_distance": ("BatchNorm distance", ""),
    "removed_params": ("parameters removed", "%"),
    "removed_model_params": ("of the whole network", "%"),
    "removed_flops": ("FLOPs removed", "%"),
    "removed_components": ("components removed", "%"),
    "removed_latency": ("time removed", "%"),
    "top1": ("top-1", "%"),
    "token_perplexity": ("perplexity", ""),
    "token_agreement": ("tokens as dense", "%"),
    "token_kl": ("KL a token", "nats"),
    "agreement": ("agreement", "%"),
    "kl": ("KL", "nats"),
    "speedup": ("speedup", "×"),
}
_OF_A_CELL = ("method", "budget", "seed", "status", "message", "folder")


def comparison_rows(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds for every method and budget.

    Args:
        cells: ``method``, ``budget``, ``seed``, ``status``, ``message``, ``folder``, and one number per measured term.

    Returns:
        One row per (method, budget) in order of appearance: ``method``, ``budget``, ``seeds`` (finished), ``failed``,
        and for every term its mean and, as ``TERM_sd``, its standard deviation (over seeds − 1; None with one seed).
    """
    grouped: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for cell in cells:
        grouped.setdefault((cell["method"], cell["budget"]), []).append(cell)
    rows = []
    for (method, budget), members in grouped.items():
        finished = [cell for cell in members if cell["status"] != "failed"]
        row = {"method": method, "budget": budget, "seeds": len(finished), "failed": len(members) - len(finished)}
        for term in dict.fromkeys(key for cell in finished for key in cell if key not in _OF_A_CELL):
            values = [float(cell[term]) for cell in finished if cell.get(term) is not None]
            row[term] = fmean(values)
            row[f"{term}_sd"] = stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def comparison_table(
    rows: Sequence[Mapping[str, Any]],
    dense: Mapping[str, float],
    *,
    leave_out: Sequence[str] = (),
    head: str = "method",
) -> list[dict[str, str]]:
    """The rows of a comparison for readers, the dense network first: ``92.31 ± 0.12``.

    Args:
        rows: As `comparison_rows` makes them.
        dense: Measured terms of the dense network.
        leave_out: Terms that are not shown (a terminal is narrow).
        head: What is compared.
    """
    terms = [term for term in _COMPARED if any(term in row for row in rows) and term not in leave_out]
    heads = {term: f"{name}, {unit}" if unit else name for term, (name, unit) in _COMPARED.items()}
    shown = []
    if dense:
        first = {heads[term]: _mean(dense.get(term), None, term) for term in terms}
        shown.append({head: "dense", "budget": "", "seeds": ""} | first)
    for row in rows:
        seeds = f"{row['seeds']}" + (f" ({row['failed']} failed)" if row["failed"] else "")
        line = {heads[term]: _mean(row.get(term), row.get(f"{term}_sd"), term) for term in terms}
        shown.append({head: row["method"], "budget": f"{row['budget']:g}", "seeds": seeds} | line)
    return shown


def comparison_page(
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    dense: Mapping[str, float],
    failed: Sequence[str],
    figures: Mapping[str, str],
    protocol: Mapping[str, Any],
    repeat: str,
    head: str = "method",
) -> str:
    """The page of a comparison.

    Args:
        title: Headline.
        rows: As `comparison_rows` makes them.
        dense: Measured terms of the dense network.
        failed: One sentence per failed cell.
        figures: File beside the page by caption.
        protocol: What all cells share.
        repeat: The command.
        head: What is compared.

    Returns:
        Markdown, ending in a newline.
    """
    lines = comparison_table(rows, dense, head=head)
    sections = [f"# {title}"]
    if lines:
        heads = tuple(lines[0])
        table = markdown_table(heads, [tuple(line[head] for head in heads) for line in lines])
        sections.append(f"{table}\n\nMean ± standard deviation over seeds; budgets are shares of {protocol['target']}.")
    sections += [f"![{one_line(caption)}]({file})" for caption, file in figures.items()]
    if failed:
        sections.append("## Failed\n\n" + "\n".join(f"- {one_line(sentence)}" for sentence in failed))
    shared = [(name, told(value)) for name, value in protocol.items()]
    sections.append("## The same for all\n\n" + markdown_table(("", ""), shared))
    sections.append(f"## Again\n\n```\n{repeat}\n```")
    return "\n\n".join(sections) + "\n"


def coverage_markdown(content: Mapping[str, Any], environment: Mapping[str, Any], *, heading: str = "#") -> str:
    """The table of a coverage run, and what each network leaves alone.

    Args:
        content: The run's ``results.json``.
        environment: Its ``environment.json``.
        heading: Marks of the page's first heading.
    """
    rows = content["networks"]
    counted = [row for row in rows if row["counts"]]
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    seconds = sum(row.get("processor_seconds", 0) for row in rows)
    took = ""
    if content.get("examined") == len(rows):  # in one run, so that its time is that of the table
        took = f", {content['seconds'] / 60:.0f} minutes with {content['jobs']} at once"
    lines = [
        f"{heading} {content['library']}: {len(counted)} of {len(rows)} networks",
        "",
        f"{content['date']}, {versions}, {environment['system']}. `{environment['command']}`; {seconds / 60:.0f} minutes "
        f"of processor time{took}. Random weights and images; {100 * content['settings']['share']:.0f} % of the "
        "components of every group removed.",
        "",
    ]
    cells = []
    for row in rows:
        has = "groups" in row
        cells.append(
            {
                "network": row["name"],
                "file" if content["library"] == "timm" else "kind": row["kind"],
                "input": "×".join(str(size) for size in row["input"]) if has else "",
                "parameters": f"{row['parameters'] / 1e6:.1f} M" if has else "",
                "groups": str(row["groups"]) if has else "",
                "left alone": str(len(row["refused"])),
                "carried": f"{100 * row['carried']:.0f} %" if has else "",
                "removed": f"{100 * row['removed']:.0f} %" if has else "",
                "law": row["law_dtype"] if has else "",
                "difference": f"{row['difference']:.0e}" if has else "",
                "reload": "equal" if row.get("reload") == 0 else f"{row['reload']:.0e}" if row.get("reload") else "",
                "counts": "yes" if row["counts"] else "**no**",
                "why not": one_line(row["why"] or ""),
            }
            | ({"ONNX": one_line(row.get("onnx", ""))} if content["settings"].get("onnx") else {})
        )
    lines += [_as_table(cells), "", f"{heading}# What is left alone in {content['library']}, and why", ""]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for refusal in row["refused"]:
            kind = _reason_kind(refusal["reason"], refusal["name"])
            reasons.setdefault(kind, []).append(row["name"])
    told = [
        {
            "reason": reason,
            "groups": str(len(names)),
            "networks": one_line(", ".join(sorted(set(names))[:6]) + (" …" if len(set(names)) > 6 else "")),
        }
        for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1]))
    ]
    lines += [_as_table(told) if told else "Nothing.", ""]
    return "\n".join(lines)


def _as_table(rows: Sequence[Mapping[str, str]]) -> str:
    return markdown_table(tuple(rows[0]), tuple(tuple(row.values()) for row in rows))


def _reason_kind(reason: str, name: str) -> str:
    """A reason without the module it names, so that the same reasons of many networks are one line."""
    words = [word for word in reason.split(" ") if "." not in word.rstrip(".,;:") and word != name]
    return one_line(" ".join(words))


def chart_to_json(chart: Chart) -> dict[str, Any]:
    """A chart as a JSON object; numbers that are not finite become null."""
    plain = dataclasses.asdict(chart)
    for series in plain["series"]:
        for axis in ("x", "y", "spread"):
            series[axis] = [None if value is None or not isfinite(value) else value for value in series[axis]]
    return plain


def chart_from_json(plain: Mapping[str, Any]) -> Chart:
    """The chart that `chart_to_json` wrote.

    Raises:
        DataError: If it is none.
    """
    try:
        series = [
            Series(**{key: tuple(value) if isinstance(value, list) else value for key, value in one.items()})
            for one in plain["series"]
        ]
        rest = {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}
        return Chart(**{**rest, "series": tuple(series)})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"a chart's file is damaged or of another version ({error}); run the study again.") from error


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a head; columns are all keys in order of appearance, absent values and None are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _mean(value: float | None, deviation: float | None, term: str) -> str:
    if value is None:
        return ""
    digits = {"kl": 3, "batchnorm_distance": 3, "calibration_images": 0}.get(term, 2)
    # Widths follow from the budget, so most methods remove the same whatever the seed: no need to say so in every line.
    asked_for = term.startswith("removed_") or term == "calibration_images"
    same = deviation is None or (asked_for and round(deviation, digits) == 0)
    return f"{value:.{digits}f}" + ("" if same else f" ± {deviation:.{digits}f}")


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
    return str(value)


def _scaled(value: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(value) >= 1000 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    if step == 0:
        return f"{value:.0f} {units[0]}"
    return f"{value:.2f} {units[step]}" if abs(value) < 100 else f"{value:.1f} {units[step]}"


def _signed(value: float, digits: int) -> str:
    return f"{'−' if value < 0 else '+'}{abs(value):.{digits}f}"


_AUDITED = {"dense": "dense", "edited": "edited", "head_only": "head-only", "reference": "reference"}
NO_AUDIT = (
    "The audit was left out (audit=none): low forget accuracy says what the outputs do, not what the features still "
    "hold. modhifi audit run=DIR makes it up."
)
_MOST_CLASSES = 30  # rows of a table of classes; the JSON file has them all


def audit_page(
    *, title: str, report: Mapping[str, Any], figures: Mapping[str, str] = {}, repeat: str = ""
) -> str:
    """The page of an audit: the verdict with its grounds, every figure beside what it means, and how it was measured.

    Args:
        title: Headline.
        report: `modhifi_cli.audit.audit.AuditReport` as plain mappings and lists.
        figures: File beside the page by caption.
        repeat: The command that does it again.

    Returns:
        Markdown, ending in a newline.
    """
    verdict, found = report["verdict"], report["figures"]
    models = [name for name in _AUDITED if name in found]
    heads = [_AUDITED[name] for name in models]
    sections = [f"# {title}", f"**{verdict['level'][:1].upper()}{verdict['level'][1:]}.**"]
    sections.append("\n".join(f"- {one_line(sentence)}" for sentence in verdict["sentences"]))
    sections += [f"![{one_line(caption)}]({file})" for caption, file in figures.items()]

    names = list(dict.fromkeys(name for model in models for name in found[model]))
    gaps = report["gaps"].get("edited", {})
    lines = []
    for name in names:
        line = [name, *(_figure_text(name, found[model].get(name)) for model in models)]
        lines.append((*line, _figure_text(name, gaps.get(name), signed=True)) if gaps else tuple(line))
    head = ("figure", *heads, "edited − reference") if gaps else ("figure", *heads)
    text = markdown_table(head, lines)
    meanings = [f"- **{name}**: {one_line(meaning)}." for name, meaning in report["definitions"].items()]
    sections.append(
        f"## Figures\n\n{text}\n\nShares in %, relearn steps in steps (– where the attack did not succeed, or was not "
        "made), TV in 0 … 1. "
        "Names behind a comma are places in the network, in execution order.\n\n" + "\n".join(meanings)
    )

    rows = [
        (
            one["depth"], _AUDITED[one["model"]], str(one["features"]), f"{one['probe']:.1f}",
            f"{one['probe_balanced']:.1f}", f"{one['class_mean']:.1f}", f"{one['class_mean_balanced']:.1f}",
            f"{one['tv']:.2f}",
        )
        for one in sorted(report["readouts"], key=lambda one: models.index(one["model"]))
    ]  # fmt: skip
    head = ("place", "network", "features", "probe, forget", "all", "class mean, forget", "all", "TV")
    sections.append(
        f"## What can be read inside\n\n{markdown_table(head, rows)}\n\nRecall in %: of the forgotten classes, and "
        f"the mean over all classes of the probe; chance is {report['protocol']['chance of a probe, %']:.1f} %."
    )

    where = "evaluation" if "evaluation" in report["accuracy"]["dense"] else "calibration"
    sections.append(_becomes_section(report, models, heads, where))
    sections.append(_per_class_section(report, models, heads, where))

    if report["membership"]:
        rows = [
            (
                _AUDITED[name], f"{one['confidence_accuracy']:.1f} ± {one['confidence_accuracy_error']:.1f}",
                f"{one['forget_as_non_members']:.1f}", f"{one['forget_evaluation_as_non_members']:.1f}",
                f"{one['loss_forget']:.1f} ± {one['loss_forget_error']:.1f}",
                f"{one['loss_retain']:.1f} ± {one['loss_retain_error']:.1f}",
            )
            for name, one in report["membership"].items()
        ]  # fmt: skip
        head = ("network", "MIA check", "MIA", "MIA of evaluation images", "loss forget", "loss retain")
        membership = markdown_table(head, rows) + "\n\nIn %, ± one standard error; "
    else:
        membership = ""
    sections.append(f"## Membership\n\n{membership}{one_line(report['protocol']['membership'])}.")

    if report.get("further"):
        sections.append(_further_section(report["further"]))

    rows = [
        (f"softmax: {pair}", f"{sides['forget']:.3f}", f"{sides['retain']:.3f}")
        for pair, sides in report["distances"]["output"].items()
    ]
    rows += [
        (f"features, {depth}: dense, edited", f"{bound:.3f}", "")
        for depth, bound in report["distances"]["features"].items()
    ]
    sections.append(
        f"## Distances between networks\n\n{markdown_table(('between', 'forget images', 'retain images'), rows)}\n\n"
        "Softmax: mean total variation between the answers to one image. Features: lower bound on the total variation "
        "between the two networks' features of the forget images."
    )
    protocol = [(name, told(value)) for name, value in report["protocol"].items()]
    protocol.append(("seconds", told(report["seconds"])))
    sections.append("## How it was measured\n\n" + markdown_table(("", ""), protocol))
    if repeat:
        sections.append(f"## Again\n\n```\n{repeat}\n```")
    return "\n\n".join(sections) + "\n"


def audit_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures of an audit that fit a terminal, one row a figure: of the places only the last one."""
    found = report["figures"]
    models = [name for name in _AUDITED if name in found]
    rows = []
    for name in dict.fromkeys(name for model in models for name in found[model]):
        if "," not in name or name.endswith(", penultimate"):
            row = {"figure": name} | {_AUDITED[model]: _figure_text(name, found[model].get(name)) for model in models}
            rows.append(row)
    return rows


def class_name(cls: int, classes: Sequence[str] | None) -> str:
    """``3 (cat)``, or the number alone where nobody knows names."""
    return str(cls) if classes is None or classes[cls] == str(cls) else f"{cls} ({classes[cls]})"


def _further_section(found: Mapping[str, Any]) -> str:
    """Intervals of the attacks that draw, and what rounding does to the accuracies."""
    drawn = {"neighbour": found["neighbour"], **found["intervals"]}
    rows = []
    for figure, by_network in drawn.items():
        for name, one in by_network.items():
            if one.get("mean") is None:
                continue
            ends = "–" if one["low"] is None else f"{one['low']:.1f} … {one['high']:.1f}"
            rows.append((figure, _AUDITED[name], f"{one['mean']:.1f}", ends, str(one["draws"])))
    parts = [markdown_table(("figure", "network", "mean", "95 % interval of the mean", "draws"), rows)]
    rounded = [
        (_AUDITED[name], bits, f"{one['forget']:.1f}", f"{one['retain']:.1f}")
        for name, each in found["rounding"].items()
        for bits, one in each.items()
    ]
    if rounded:
        parts.append(markdown_table(("network", "weights", "forget, %", "retain, %"), rounded))
    return "## Several draws, and rounded weights\n\n" + "\n\n".join(parts)


def _becomes_section(report: Mapping[str, Any], models: Sequence[str], heads: Sequence[str], where: str) -> str:
    counts = {model: report["becomes"][model][where] for model in models}
    total = sum(counts["dense"])
    order = sorted(range(len(counts["dense"])), key=lambda cls: (-counts["edited"][cls], -counts["dense"][cls], cls))
    shown = [cls for cls in order if any(counts[model][cls] for model in models)][:_MOST_CLASSES]
    rows = [(class_name(cls, report["classes"]), *(str(counts[model][cls]) for model in models)) for cls in shown]
    return (
        f"## What the forget images become\n\n{markdown_table(('given class', *heads), rows)}\n\n"
        f"Of {total} {where} images of the forgotten classes; classes that no network gives are left out."
    )


def _per_class_section(report: Mapping[str, Any], models: Sequence[str], heads: Sequence[str], where: str) -> str:
    of = {model: report["per_class"][model][where] for model in models}
    known = [cls for cls in range(len(of["dense"])) if of["dense"][cls] is not None]
    shown, left = known, ""
    if len(known) > _MOST_CLASSES:
        change = {cls: abs(of["edited"][cls] - of["dense"][cls]) for cls in known}
        shown = sorted(sorted(known, key=lambda cls: -change[cls])[:_MOST_CLASSES])
        left = f" The {_MOST_CLASSES} that changed most; audit.json has all {len(known)}."
    rows = [
        (
            class_name(cls, report["classes"]) + (", forgotten" if cls in report["forget"] else ""),
            *(f"{of[model][cls]:.1f}" for model in models),
        )
        for cls in shown
    ]
    table = markdown_table(("class", *heads), rows)
    return f"## Every class\n\n{table}\n\nAccuracy on {where} images, %.{left}"


def _figure_text(name: str, value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "–"
    digits = 2 if name.startswith("TV") else 1
    return _signed(value, digits) if signed else f"{value:.{digits}f}"
