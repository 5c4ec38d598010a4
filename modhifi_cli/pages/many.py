"""Many runs: one row for those that differ in a draw alone, one table, frontiers, and the page of a comparison or sweep."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from modhifi_cli.pages.page import Block, Code, Drawing, Listing, Page, Section, Table, Text, sections
from modhifi_cli.pages.page import table as as_table
from modhifi_cli.pages.terms import percent, placeless, told
from modhifi_cli.records import Chart, Results, Series

# Columns of a comparison: term → (head, unit); those that were measured are shown, in this order.
_COLUMNS = {
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
    "forget_accuracy": ("forget accuracy", "%"),
    "retain_accuracy": ("retain accuracy", "%"),
    "audit_probe_penultimate": ("linear probe", "%"),
    "audit_class_mean_penultimate": ("class mean", "%"),
    "audit_relearn_steps": ("relearn", "steps"),
    "audit_MIA": ("membership attack", "%"),
}
_TERMS_OF_A_TABLE = 6
_OTHERS = {
    "macs": "FLOPs (MACs)", "file_bytes": "file size, bytes", "top5": "top-5, %", "time_saved": "time saved, %",
    "latency_ms": "latency, ms", "removed_model_params": "of the whole network, %",
}  # fmt: skip
_DIGITS = {"kl": 3, "token_kl": 3, "batchnorm_distance": 3, "calibration_images": 0, "audit_relearn_steps": 1}
_NOT_A_METHOD = (
    "sparsity", "data.seed", "runtime.seed", "seed", "console", "output_dir", "resume", "measure_dense", "forget_class",
)  # fmt: skip
# What quality is read off, and whether more of it is better.
_QUALITIES = (
    ("top1", "top-1 accuracy, %", True),
    ("token_perplexity", "token perplexity, less is better", False),
    ("agreement", "agreement with dense, % of images", True),
)
_COSTS = (
    ("flops", "removed_flops", "FLOPs (MACs) removed, % of dense"),
    ("params", "removed_params", "parameters removed, % of dense"),
    ("latency", "time_saved", "time of a forward pass saved, % of dense"),
)
# What an unlearning run's audit found in the edited network that a comparison shows.
_AUDITED = {
    "audit_probe_penultimate": "linear probe, recall of the forgotten, %",
    "audit_class_mean_penultimate": "nearest class mean, recall of the forgotten, %",
    "audit_relearn_steps": "steps until relearned",
    "audit_MIA": "membership attack, %",
}
_MEASURED_BY_THE_AUDIT = {"audit_FA": "forget_accuracy", "audit_TA": "retain_accuracy"}  # of the head-only control


@dataclass(frozen=True)
class Run:
    """One run as a comparison needs it.

    Attributes:
        method: What it is called; "" until `named`.
        budget: Share that was asked for, 0 for none.
        draw: What tells it from others of its row: seeds, forgotten classes.
        values: Measured terms of the pruned or edited network, and ``removed_TARGET``, ``time_saved``, in %.
        dense: The same of the dense network.
        control: The same of the head-only control.
        model: Name of the network.
        words: What its command says that tells methods apart.
        folder: Where it lies.
        status: ``finished``, ``finished before`` or ``failed``.
        message: Why it failed.
    """

    method: str
    budget: float
    draw: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    dense: Mapping[str, float] = field(default_factory=dict)
    control: Mapping[str, float] = field(default_factory=dict)
    model: str = "network"
    words: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    status: str = "finished"
    message: str = ""


@dataclass(frozen=True)
class Row:
    """The runs of one method and budget.

    Attributes:
        method: Their name.
        budget: Share that was asked for.
        runs: All of them, failed ones too.
        mean: Of every measured term, over those that have it.
        spread: Its standard deviation (over runs − 1), None with one run.
    """

    method: str
    budget: float
    runs: tuple[Run, ...]
    mean: Mapping[str, float]
    spread: Mapping[str, float | None]

    @property
    def seeds(self) -> int:
        """Runs that finished."""
        return sum(run.status != "failed" for run in self.runs)

    @property
    def failed(self) -> int:
        """Runs that did not."""
        return len(self.runs) - self.seeds

    def plain(self) -> dict[str, Any]:
        """For CSV and JSON: ``method``, ``budget``, ``seeds``, ``failed``, and TERM with ``TERM_sd``."""
        numbers = {key: value for term in self.mean for key, value in
                   ((term, self.mean[term]), (f"{term}_sd", self.spread[term]))}  # fmt: skip
        own = {"method": self.method, "budget": self.budget, "seeds": self.seeds, "failed": self.failed}
        return own | numbers


def run_of(results: Results, words: Sequence[str], folder: str) -> Run:
    """One run from what it wrote and the overrides of the command that made it."""
    values = {f"removed_{name}": 100 * share for name, share in results.achieved.items()}
    dense: dict[str, float] = {}
    control: dict[str, float] = {}
    taken = {"dense": dense, "head_only": control}
    for measured in results.measurements:
        taken.get(measured.model, values)[measured.name] = measured.value
    for measured in (results.audit or {}).get("measurements", ()):
        if measured["name"] in _AUDITED:
            taken.get(measured["model"], values)[measured["name"]] = measured["value"]
        elif measured["model"] == "head_only" and measured["name"] in _MEASURED_BY_THE_AUDIT:
            control[_MEASURED_BY_THE_AUDIT[measured["name"]]] = measured["value"]
    if values.get("speedup"):
        values["time_saved"] = 100 * (1 - 1 / values["speedup"])
    elif "removed_latency" in values:
        values["time_saved"] = values["removed_latency"]
    given = dict(word.partition("=")[::2] for word in words)
    return Run(
        method="",
        budget=float(results.sparsity or 0.0),
        draw=" ".join([given.get("data.seed", "0"), *map(str, results.forget)]),
        values=values,
        dense=dense,
        control=control,
        model=results.model,
        words={key: value for key, value in given.items() if key not in _NOT_A_METHOD},
        folder=folder,
    )


def named(runs: Sequence[Run]) -> list[Run]:
    """The runs, each called by what its command says that those of others do not."""
    keys = list(dict.fromkeys(key for run in runs for key in run.words))
    differing = [key for key in keys if len({run.words.get(key) for run in runs}) > 1 or len(runs) == 1]
    models = {run.model for run in runs}
    found = []
    for run in runs:
        own = [
            f"{key.rpartition('.')[2]} {run.words[key]}" if key != "preset" else run.words[key]
            for key in differing
            if key in run.words and key != "model" and "/" not in run.words[key]
        ]
        found.append(replace(run, method=", ".join(([run.model] if len(models) > 1 else []) + own) or "default"))
    return found


def grouped(runs: Iterable[Run]) -> list[Row]:
    """One row a (method, budget) in order of appearance: mean and deviation over draws and forgotten classes."""
    together: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        together.setdefault((run.method, run.budget), []).append(run)
    rows = []
    for (method, budget), members in together.items():
        terms = dict.fromkeys(term for run in members for term in run.values)
        values = {term: [float(run.values[term]) for run in members if run.values.get(term) is not None] for term in terms}
        mean = {term: fmean(found) for term, found in values.items() if found}
        spread = {term: stdev(values[term]) if len(values[term]) > 1 else None for term in mean}
        rows.append(Row(method, budget, tuple(members), mean, spread))
    return rows


def lines(
    rows: Sequence[Row], dense: Mapping[str, float] | None = None, *, leave_out: Sequence[str] = (), head: str = "method"
) -> list[dict[str, str]]:
    """The rows for readers, the dense network and the head-only control first: ``92.31 ± 0.12``.

    Args:
        rows: Of one comparison.
        dense: Measured terms of the dense network; None takes those of the runs, network by network.
        leave_out: Terms that are not shown (a terminal is narrow).
        head: What is compared.
    """
    terms = [term for term in _COLUMNS if term not in leave_out and any(term in row.mean for row in rows)]
    heads = {term: f"{name}, {unit}" if unit else name for term, (name, unit) in _COLUMNS.items()}

    def line(name: str, budget: str, seeds: str, mean: Mapping, spread: Mapping = {}) -> dict[str, str]:
        cells = {heads[term]: _rounded(mean.get(term), spread.get(term), term) for term in terms}
        return {head: name, "asked": budget, "runs": seeds} | cells

    shown = []
    runs = [run for row in rows for run in row.runs]
    for model in dict.fromkeys(run.model for run in runs):
        own = [run for run in runs if run.model == model]
        before = _means([run.dense for run in own]) if dense is None else dense
        several = len({run.model for run in runs}) > 1
        for name, found in (("dense", before), ("head-only control", _means([run.control for run in own]))):
            if found:
                shown.append(line(f"{model}, {name}" if several else name, "", "", found))
    for row in rows:
        seeds = f"{row.seeds}" + (f" ({row.failed} failed)" if row.failed else "")
        shown.append(line(row.method, percent(row.budget) if row.budget else "", seeds, row.mean, row.spread))
    return shown


def charts(rows: Sequence[Row], dense: Mapping[str, float] | None = None) -> list[Chart]:
    """Every figure that there are numbers for; `dense` as in `lines`."""
    return [*_frontiers(rows, dense), *_tradeoffs(rows)]


def page(
    rows: Sequence[Row],
    figures: Sequence[Chart],
    drawn: Mapping[str, Mapping[str, bytes]],
    *,
    command: str,
    dense: Mapping[str, float] | None = None,
    title: str = "",
    head: str = "method",
    protocol: Mapping[str, Any] | None = None,
    failed: Sequence[str] = (),
) -> Page:
    """The page of several runs: what was found, a table, the figures, where each run lies.

    One parameter for each thing that the page tells.

    Args:
        rows: As `grouped` makes them.
        figures: As `charts` makes them.
        drawn: Those of them that were drawn, by name: ``{"svg": bytes, …}``.
        command: That makes the page again.
        dense: As in `lines`.
        title: Headline; "" counts the runs.
        head: What is compared.
        protocol: What all runs share.
        failed: One sentence a failed run.
    """
    runs = [run for row in rows for run in row.runs]
    models = ", ".join(dict.fromkeys(run.model for run in runs))
    budgets = {row.budget for row in rows}
    shown = tuple(
        Drawing(chart.title, drawn[chart.name]["svg"].decode(), f"{chart.name}.svg")
        for chart in figures if drawn.get(chart.name)
    )  # fmt: skip
    over = "Mean ± standard deviation over draws and, where a run forgets, over forgotten classes."
    main: list[Block] = [as_table(lines(rows, dense, head=head)), Text(over, "note")] if rows else []
    found = findings(rows, dense)
    everything = _every_number(rows)
    places = tuple((run.method, percent(run.budget), placeless(run.folder)) for run in runs)
    return Page(
        title=title or f"{models}: {len(runs)} runs compared",
        lead=f"{len({row.method for row in rows})} {head}s" + (f", {len(budgets)} budgets." if any(budgets) else "."),
        facts=(),
        sections=sections(
            Section("What was found", tuple(Text(text) for text in found)) if found else None,
            Section("Numbers", tuple(main)) if main else None,
            Section("Figures", shown) if shown else None,
            Section("Failed", (Listing(tuple(failed), "warning"),)) if failed else None,
            Section("Every other number", everything, folded=True) if everything else None,
            Section("Runs", (Table((head, "asked", "folder"), places),), folded=True) if any(p[2] for p in places) else None,
            Section("The same for all", (Table(("", ""), tuple((k, told(v)) for k, v in protocol.items())),))
            if protocol else None,
            Section("Again", (Code(command),)),
        ),
    )  # fmt: skip


def findings(rows: Sequence[Row], dense: Mapping[str, float] | None = None) -> list[str]:
    """All that the numbers say: who kept most, and whom no other beats; empty where there is nothing to compare."""
    return [text for text in (finding(rows, dense), best_trades(rows)) if text]


def finding(rows: Sequence[Row], dense: Mapping[str, float] | None = None) -> str:
    """What the numbers say, in a sentence for each budget: who kept most; "" where there is nothing to compare."""
    quality = _quality(rows)
    if quality is None:
        return _forgotten(rows)
    term, label, more = quality
    sentences = []
    for budget in dict.fromkeys(row.budget for row in rows):
        own = [row for row in rows if row.budget == budget and term in row.mean]
        if len(own) < 2 or len({row.runs[0].model for row in own}) > 1:
            continue
        ranked = sorted(own, key=lambda row: row.mean[term], reverse=more)
        best, second = ranked[0], ranked[1]
        numbers = [_rounded(row.mean[term], row.spread[term], term) for row in (best, second)]
        height = (dense or _means([run.dense for run in best.runs])).get(term)
        beside = f" (dense {_rounded(height, None, term)})" if height is not None and term != "agreement" else ""
        spreads = [row.spread[term] or 0.0 for row in (best, second)]
        close = abs(best.mean[term] - second.mean[term]) < max(spreads)
        told_close = ", which is within the spread of the draws" if close else ""
        sentences.append(
            f"At {percent(budget)} {best.method} keeps most: {label.partition(',')[0]} {numbers[0]}{beside}; "
            f"next comes {second.method} with {numbers[1]}{told_close}."
        )
    return " ".join(sentences)


WORST = (0.0, -1e9)  # the objectives of a run that failed: worse than any other


def objectives(results: Results) -> tuple[float, float]:
    """What a search over runs makes as large as it can: the share removed of the target, %, and quality.

    Quality is top-1, else perplexity with its sign turned, else agreement with the dense network; of an unlearning run
    retain accuracy, and what is removed is forget accuracy.
    """
    run = run_of(results, (), "")
    if results.forget:
        return 100.0 - run.values.get("forget_accuracy", 100.0), run.values.get("retain_accuracy", WORST[1])
    quality = next((name for name, _, _ in _QUALITIES if name in run.values), None)
    if quality is None:
        return WORST
    more = next(more for name, _, more in _QUALITIES if name == quality)
    removed = run.values.get(f"removed_{results.target}", 0.0)
    return removed, run.values[quality] if more else -run.values[quality]


def best_trades(rows: Sequence[Row]) -> str:
    """The rows that no other row beats in share removed and quality alike, as a sentence; "" where that says nothing."""
    quality = _quality(rows)
    cost = next((key for _, key, _ in _COSTS if any(key in row.mean for row in rows)), None)
    if quality is None or cost is None or len({row.runs[0].model for row in rows}) > 1:
        return ""
    term, label, more = quality
    own = [row for row in rows if {term, cost} <= row.mean.keys()]

    def beaten(row: Row) -> bool:
        gains = [
            (other.mean[cost] - row.mean[cost], (other.mean[term] - row.mean[term]) * (1 if more else -1)) for other in own
        ]
        return any(min(gain) >= 0 and max(gain) > 0 for gain in gains)

    front = sorted((row for row in own if not beaten(row)), key=lambda row: row.mean[cost])
    if len(own) < 3 or len({row.budget for row in own}) < 2 or len(front) == len(own):
        return ""
    named = ", ".join(
        f"{row.method} at {percent(row.budget)} ({_rounded(row.mean[term], None, term)})" for row in front
    )
    return f"Nothing else is better both in {label.partition(',')[0]} and in what is removed than: {named}."


def _forgotten(rows: Sequence[Row]) -> str:
    term = next((term for term in _AUDITED if any(term in row.mean for row in rows)), None)
    own = [row for row in rows if term in row.mean] if term else []
    if len(own) < 2:
        return ""
    least = min(own, key=lambda row: row.mean[term]) if term != "audit_relearn_steps" else max(own, key=lambda r: r.mean[term])
    found = f"Least is left inside with {least.method}: {_AUDITED[term].partition(',')[0]} {_rounded(least.mean[term], None, term)}"
    kept = least.mean.get("retain_accuracy")
    return found + (f", at a retain accuracy of {kept:.2f} %." if kept is not None else ".")


def _every_number(rows: Sequence[Row]) -> tuple[Table, ...]:
    """What the first table leaves out, in tables that a window holds: every other term, a few at a time."""
    terms = [term for term in dict.fromkeys(term for row in rows for term in row.mean) if term not in _COLUMNS]
    parts = [terms[start : start + _TERMS_OF_A_TABLE] for start in range(0, len(terms), _TERMS_OF_A_TABLE)]
    return tuple(
        as_table(
            [
                {"method": row.method, "asked": percent(row.budget) if row.budget else ""}
                | {_told(term): _rounded(row.mean.get(term), row.spread.get(term), term) for term in part}
                for row in rows
            ]
        )
        for part in parts
    )


def _told(term: str) -> str:
    """What a reader calls a term that has no column of its own, with its unit."""
    return _OTHERS.get(term) or term.replace("_ms", ", ms").replace("_", " ")


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a head; columns are all keys in order of appearance, absent values and None are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every term over those that have it."""
    terms = dict.fromkeys(term for one in found for term in one)
    return {term: fmean(one[term] for one in found if term in one) for term in terms}


def _quality(rows: Sequence[Row]) -> tuple[str, str, bool] | None:
    return next((quality for quality in _QUALITIES if any(quality[0] in row.mean for row in rows)), None)


def _frontiers(rows: Sequence[Row], dense: Mapping[str, float] | None) -> list[Chart]:
    """Quality against each cost, one curve a method; bars of quality alone where every method has one budget."""
    quality = _quality(rows)
    if quality is None:
        return []
    term, label, _ = quality
    rows = [row for row in rows if term in row.mean]
    models = {run.model for row in rows for run in row.runs}
    heights = {dense[term]} if dense and term in dense else {run.dense[term] for row in rows for run in row.runs
                                                             if term in run.dense}  # fmt: skip
    levels = {f"dense {next(iter(heights)):.2f}": next(iter(heights))} if len(models) == 1 == len(heights) else {}
    if term == "agreement":
        levels = {"dense": 100.0}
    of = ", ".join(sorted(models))
    methods = list(dict.fromkeys(row.method for row in rows))
    draws = max((row.seeds for row in rows), default=0)
    spread = f", mean ± deviation over {draws} runs" if draws > 1 else ""
    if len(methods) > 1 and len({row.budget for row in rows}) == 1:
        bars = Series(label, tuple(row.mean[term] for row in rows), spread=tuple(row.spread[term] or 0.0 for row in rows))
        asked = f" at {percent(rows[0].budget)}" if rows[0].budget else ""
        title = f"{of}: {label.partition(',')[0]}{asked}{spread}"
        own = [Chart("methods", title, label, "", (bars,), kind="bars", categories=tuple(methods), levels=levels)]
        return own if len(rows) == len(methods) else []
    found = []
    for name, cost, cost_label in _COSTS:
        series = []
        for method in methods:
            mine = [row for row in rows if row.method == method and cost in row.mean]
            if mine:
                series.append(
                    Series(
                        method,
                        y=tuple(row.mean[term] for row in mine),
                        x=tuple(row.mean[cost] for row in mine),
                        spread=tuple(row.spread[term] or 0.0 for row in mine),
                        x_spread=tuple(row.spread[cost] or 0.0 for row in mine),
                    )
                )
        if series:
            title = f"{of}: {label.partition(',')[0]} against {cost_label.partition(' removed')[0].partition(' saved')[0]}"
            found.append(Chart(f"frontier_{name}", title + spread, cost_label, label, tuple(series), levels=levels))
    return found


def _tradeoffs(rows: Sequence[Row]) -> list[Chart]:
    """What can be read inside against what the other classes kept, one curve a method, along the number it is dialled by."""
    words = [row.runs[0].words for row in rows]
    keys = dict.fromkeys(key for own in words for key in own)
    values = {key: {own.get(key) for own in words} for key in keys}
    dials = [key for key, of in values.items() if len(of - {None}) > 1 and all(_numeric(v) for v in of - {None})]
    differing = [key for key, of in values.items() if len(of) > 1 and key not in dials[:1]]
    found = []
    for term, label in _AUDITED.items():
        points: dict[str, list[Mapping[str, float]]] = {}
        for row, own in zip(rows, words, strict=True):
            if {term, "retain_accuracy"} <= row.mean.keys():
                name = ", ".join(f"{key.rpartition('.')[2]} {own.get(key, 'as set')}" for key in differing)
                points.setdefault(name or "edited", []).append(row.mean)
        if not points:
            continue
        series = [
            Series(name, tuple(m[term] for m in own), tuple(m["retain_accuracy"] for m in own))
            for name, own in points.items()
        ]
        levels = {}
        for who, of in (("dense", "dense"), ("head-only control", "control")):
            height = _means([_means([getattr(run, of) for run in row.runs]) for row in rows]).get(term)
            if height is not None:
                levels[f"{who} {height:.1f}"] = height
        dial = f", along {dials[0].rpartition('.')[2]}" if dials else ""
        models = ", ".join(sorted({run.model for row in rows for run in row.runs}))
        title = f"{models}: {label.partition(',')[0]} against retain accuracy{dial}"
        found.append(Chart(f"tradeoff_{term}", title, "retain accuracy, %", label, tuple(series), levels=levels))
    return found


def _numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _rounded(value: float | None, deviation: float | None, term: str) -> str:
    if value is None:
        return ""
    digits = _DIGITS.get(term, 2) if term in _COLUMNS else None
    text = f"{value:.{digits}f}" if digits is not None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    # Widths follow from the budget, so most methods remove the same whatever the seed: no need to say so in every line.
    asked_for = term.startswith("removed_") or term == "calibration_images"
    if deviation is None or (asked_for and round(deviation, digits or 2) == 0):
        return text
    return text + (f" ± {deviation:.{digits}f}" if digits is not None else f" ± {deviation:.2g}")
