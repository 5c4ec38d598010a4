"""What stands on the page of a run or of a study, from the files of its folder alone.

Everything here reads plain JSON values, and a part whose numbers a run does not have is left out: pruning, unlearning,
measuring and studies share one page, and runs of later versions with further numbers still make one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from modhifi_cli.pages import audit, terms
from modhifi_cli.pages.figures import draw
from modhifi_cli.pages.page import (
    Bars,
    Block,
    Claim,
    Code,
    Drawing,
    Fact,
    Listing,
    Page,
    Picture,
    Section,
    Table,
    Text,
    sections,
    table,
)
from modhifi_cli.pages.terms import class_name, told
from modhifi_cli.records import Chart, Measurement, Results, Series

_AT_THE_TOP = (
    "top1", "forget_accuracy", "retain_accuracy", "agreement", "token_perplexity", "parameters", "macs", "file_bytes",
    "speedup",
)  # fmt: skip
_QUALITIES = ("top1", "retain_accuracy", "token_perplexity", "agreement")  # the first that was measured is the cost
_STEPS = ("outside", "scoring", "selection", "compensation", "allocation", "schedule", "method", "statistics")
_PLAIN = ("sparsity", "batchnorm", "classifier", "components", "round_to", "exclude", "layers", "seeds", "minutes")
_OF_IMAGES, _OF_TEXT = ("batchnorm", "classifier"), ("components",)  # settings that the others do not look at
_WIDTHS = ("out_channels", "out_features", "num_features")


def figures(material: Mapping[str, Any]) -> dict[str, dict[str, bytes]]:
    """Figures beside the page: file stem → ``{"png": bytes, "svg": bytes}``; `material` as of `page`."""
    results = material["results"]
    charts = list(material.get("charts", ()))
    if (errors := _errors(results)) is not None:
        charts.append(errors)
    return {chart.name: kinds for chart in charts if (kinds := draw(chart))}


def page(material: Mapping[str, Any], drawn: Mapping[str, Mapping[str, bytes]]) -> Page:
    """The page of a run.

    Args:
        material: ``results`` (`Results`) and, where the run has them, ``settings``, ``environment``, ``charts``
            (`Chart` records) and ``sheet`` (PNG of calibration images).
        drawn: As `figures` gives them.
    """
    results, settings = material["results"], material.get("settings") or {}
    environment, sheet = material.get("environment") or {}, material.get("sheet")
    make = _study_page if results.verb == "study" else _run_page
    own, protocol = make(results, settings, drawn, material.get("charts", ()), sheet)
    below = (*_protocol(results, environment, protocol), _again(environment))
    verdict = (results.audit or {}).get("verdict", "")
    return Page(
        title=_title(results, settings),
        lead=_lead(results, settings),
        facts=_facts(results.measurements) if results.verb != "study" else (),
        sections=sections(*own, *below),
        banner=f"{verdict[:1].upper()}{verdict[1:]}." if verdict else "",
        mood=audit.mood(verdict) if verdict else None,
    )


_Parts = tuple[Sequence[Section | None], Sequence[Measurement]]  # sections, and what was measured by which protocol


def _run_page(
    results: Results, settings: Mapping[str, Any], drawn: Mapping[str, Any], charts: Any, sheet: bytes | None
) -> _Parts:
    measured = [dataclasses.replace(m, protocol=_without(m.protocol, "per_class")) for m in results.measurements]
    return [
        _in_short(results),
        _warnings(results),
        _use(results),
        _achieved(results),
        _audit(results),
        _every_class(results),
        _records("Trials", results.trials, ("Each was judged on calibration images alone.",)) if results.trials else None,
        _healing(results),
        *_widths(results),
        _group_errors(results, drawn),
        _fidelity(results),
        _layers_unlearned(results),
        _calibration(results, sheet),
        _exports(results),
        _asked(results, settings),
        _groups(results),
    ], measured


def _study_page(
    results: Results, settings: Mapping[str, Any], drawn: Mapping[str, Any], charts: Any, sheet: bytes | None
) -> _Parts:
    verdicts = {True: "holds here", False: "does not hold here", None: "cannot be said"}
    findings = tuple(
        Claim(found["claim"], verdicts.get(found.get("holds"), ""), found["found"], found.get("holds"))
        for found in results.findings
    )
    shown = tuple(_chart_block(chart, drawn[chart.name]) for chart in charts if chart.name in drawn)
    return [
        _warnings(results),
        Section("The paper's claims, and what was found", findings) if findings else None,
        Section("Figures", shown) if shown else None,
        _records("Numbers", results.summary, results.notes),
        _calibration(results, sheet),
        _asked(results, settings),
    ], ()


def _chart_block(chart: Chart, kinds: Mapping[str, bytes]) -> Block:
    """Curves as a figure; bars as boxes of the page, which fit every window."""
    if chart.kind != "bars":
        return Drawing(chart.title, kinds["svg"].decode(), f"{chart.name}.svg")
    told = tuple(tuple("" if v is None or not isfinite(v) else f"{v:.3g}" for v in s.y) for s in chart.series)
    series = tuple((one.name, one.y) for one in chart.series)
    return Bars(chart.categories, series, told, f"{chart.title}: {chart.x_label}", f"{chart.name}.svg")


def _title(results: Results, settings: Mapping[str, Any]) -> str:
    model, verb = results.model, results.verb
    if verb == "prune" and results.goal and not _of_decoder(results):
        return f"{model}: {results.goal}"
    if verb == "prune" and _number(results.sparsity):
        of = "decoder parameters" if _of_decoder(results) else terms.COUNTED.get(results.target, "parameters")
        return f"{model}: {terms.percent(results.sparsity)} of {of} removed"
    if verb == "unlearn" and results.forget:
        names = ", ".join(class_name(number, results.classes) for number in results.forget)
        return f"{model}: forgetting class{'es' if len(results.forget) > 1 else ''} {names}"
    words = {"evaluate": "measured", "study": f"study of {results.study or 'the network'}", "replay": "replayed"}
    return f"{model}: {words.get(verb, verb)}"


def _of_decoder(results: Results) -> bool:
    return "model_params" in results.achieved and results.target == "params"


def _lead(results: Results, settings: Mapping[str, Any]) -> str:
    parts = [f"Weights {results.weights}" if results.weights else "", _images(results.calibration)]
    method = settings.get("outside") or settings.get("compensation")
    if isinstance(method, Mapping) and settings.get("scoring") and results.verb != "study":
        trained = (results.healing or {}).get("trained")
        plain = "trained towards the dense network's answers, no labels" if trained else "no training, no labels"
        parts.append(plain if not settings.get("outside") else f"outside method {_target(method)}")
    return terms.placeless("; ".join(part for part in parts if part)) + ("." if any(parts) else "")


def _images(protocol: Mapping[str, Any]) -> str:
    if not protocol:
        return ""
    count = protocol.get("num_samples")
    of = f" of {protocol['available']:,}" if isinstance(protocol.get("available"), int) else ""
    return (
        f"{count:,}{of} calibration samples from {protocol.get('path', protocol.get('source', 'an unnamed source'))}"
        if isinstance(count, int)
        else f"calibration: {protocol.get('path', protocol.get('source', ''))}"
    )


def _facts(measurements: Sequence[Measurement]) -> tuple[Fact, ...]:
    rows = {row.name: row for row in terms.table(measurements)}
    chosen = [rows[name] for name in _AT_THE_TOP if name in rows] or list(rows.values())[:6]
    return tuple(Fact(row.label, row.after or row.before, row.change, row.better) for row in chosen[:8])


def _in_short(results: Results) -> Section | None:
    """What was got, what it cost, and whether to trust it: the first thing to read."""
    items = []
    if results.achieved:
        items.append(f"Removed {terms.removed(results.achieved)}{_wanted(results)}.")
    rows = {row.name: row for row in terms.table(results.measurements)}
    forgot = rows.get("forget_accuracy")
    if forgot is not None and forgot.change:
        items.append(
            f"Forget accuracy: {forgot.before} before, {forgot.after} after. That is what the network answers; what it "
            "still holds inside is for the audit to say."
        )
    scattered = spreads(results.measurements)
    quality = next((rows[name] for name in _QUALITIES if name in rows and rows[name].change), None)
    if quality is not None and results.verb in ("prune", "unlearn"):
        spread = f"; standard error {scattered[quality.name]}" if quality.name in scattered else ""
        items.append(f"Cost: {quality.label} {quality.before} before, {quality.after} after, {quality.change}{spread}.")
    if items:
        count = len(results.warnings)
        said = {0: "No warning was raised", 1: "One warning, below"}.get(count, f"{count} warnings, below")
        items.append(f"{said}; modhifi verify run=RUN proves that the saved network answers as it did.")
    return Section("In short", (Listing(tuple(items)),)) if items else None


def _wanted(results: Results) -> str:
    if not _number(results.sparsity):
        return ""
    of = "decoder parameters" if _of_decoder(results) else terms.COUNTED.get(results.target, "parameters")
    return f" (asked: {terms.percent(results.sparsity)} of {of})"


def _use(results: Results) -> Section | None:
    if not (results.achieved or results.layers):
        return None
    code = 'import modhifi_cli\n\nmodel = modhifi_cli.load_model("RUN")  # RUN: the folder of this page'
    return Section("How to use it", (Code(code),))


def _warnings(results: Results) -> Section | None:
    warnings = tuple(terms.placeless(str(text)) for text in results.warnings)
    return Section("Warnings", (Listing(warnings, "warning"),)) if warnings else None


def _asked(results: Results, settings: Mapping[str, Any]) -> Section | None:
    of_text = ".hf." in str((settings.get("model") or {}).get("_target_"))
    plain = [key for key in _PLAIN if key not in (_OF_IMAGES if of_text else _OF_TEXT)]
    rows = [
        (key.replace("_", " "), told(settings[key])) for key in plain if settings.get(key) not in (None, [])
    ]
    if results.forget:
        rows.insert(0, ("forget class", ", ".join(class_name(number, results.classes) for number in results.forget)))
    target = settings.get("target")
    if isinstance(target, Mapping) and results.study in (None, "ablation"):
        rows.append(("target", _target({key: value for key, value in target.items() if value is not None})))
    steps = _STEPS if results.verb != "study" or results.study == "ablation" else ("scoring", "statistics")
    for key in (*steps, *(("decoder",) if of_text else ())):
        node = settings.get(key)
        if isinstance(node, Mapping) and "_target_" in node and not (settings.get("outside") and key != "outside"):
            rows.append((key, _target(node)))
    rows += [(key.replace("_", " "), told(value)) for key, value in results.strength.items()]
    if results.finetuned_epochs is not None:
        epochs = results.finetuned_epochs
        rows.append(("fine-tuning", f"{epochs} epochs on retain samples, with gradients" if epochs else "none"))
    rows += [
        (f"study {key}".replace("_", " "), told(value))
        for key, value in results.settings.items()
    ]
    return Section("What was asked", (Table(("setting", "value"), tuple(rows)),)) if rows else None


def _target(node: Mapping[str, Any]) -> str:
    own = ", ".join(f"{key} {told(value)}" for key, value in node.items() if not key.startswith("_"))
    return str(node.get("_target_", "")).rpartition(".")[2] + (f" ({own})" if own else "")


def _achieved(results: Results) -> Section | None:
    blocks: list[Block] = []
    if results.latency:
        blocks.append(Table(("of the time of a forward pass", "saved"), _time_saved(results.latency)))
    scattered = spreads(results.measurements)
    rows = terms.table(results.measurements)
    if any(row.before for row in rows) and any(row.after for row in rows):
        cells = tuple((row.label, row.before, row.after, row.change, scattered.get(row.name, "")) for row in rows)
        blocks.append(Table(("", "before", "after", "change", "spread"), cells))
    elif rows:
        cells = tuple((row.label, row.before or row.after, scattered.get(row.name, "")) for row in rows)
        blocks.append(Table(("", "measured", "spread"), cells))
    return Section("What was achieved", tuple(blocks)) if blocks else None


def _time_saved(shares: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The share of time by the table, as predicted before the cut, and as measured."""
    rows = []
    for key, label in (
        ("table", "time saved, by the table"),
        ("predicted", "time saved, predicted from networks timed before the cut"),
        ("measured", "time saved, measured"),
    ):
        if not _number(shares.get(key)):
            continue
        told = f"{shares[key]:.1%}"
        if key == "measured" and {"rounds", "p10", "p90"} <= shares.keys():
            told += f", median of {shares['rounds']} rounds, 80 % of them {shares['p10']:.1%} … {shares['p90']:.1%}"
            told += "".join(f"; {shares[name]}" if name == "device" else f"; {name} {shares[name]}"
                            for name in ("batch", "device", "threads", "clock") if name in shares)  # fmt: skip
        rows.append((label, told))
    return tuple(rows)


def _healing(results: Results) -> Section | None:
    """What training after the cut was tried, and what held-out samples made of every epoch."""
    healed = results.healing
    if not healed:
        return None
    rows = [{"stage": "closed form", "epoch": 0, "kl": healed["before"]}, *healed["history"]]
    rows = [{"stage": row["stage"], "epoch": row["epoch"], "KL on held-out samples, nats": row["kl"]} for row in rows]
    gone = "" if healed.get("way", 1.0) == 1 else f", {healed['way']:.0%} of the way from the closed form"
    kept = f"trained{gone}" if healed["trained"] else "as the closed form left it"
    return _records("Healing", rows, (f"The network that is kept is {kept} (KL {healed['after']:.4g}).",))


def _audit(results: Results) -> Section | None:
    """The verdict of an unlearning run's audit with its grounds; that there is none is said too."""
    if results.verb != "unlearn":
        return None
    found = results.audit
    if not found:
        return Section("Audit: left out", (Text(audit.NOT_MADE),))
    blocks = (
        Listing(tuple(found["sentences"])),
        table(found["figures"]),
        Text("audit.html says what every figure means, what the forget images become, and has the plots.", "note"),
    )
    return Section(f"Audit: {found['verdict']}", blocks)


def _every_class(results: Results) -> Section | None:
    """Accuracy of every class, where a measurement kept it."""
    columns = {m.model: m.protocol["per_class"] for m in results.measurements if m.protocol.get("per_class")}
    numbers = sorted({int(number) for column in columns.values() for number in column})
    labels = [
        class_name(number, results.classes) + (", forgotten" if number in results.forget else "") for number in numbers
    ]
    by_number = {model: {int(number): value for number, value in of.items()} for model, of in columns.items()}
    series = {model: [of.get(number) for number in numbers] for model, of in by_number.items()}
    return _bars("Accuracy of every class", labels, series, "{:.2f} %", "accuracy, %")


def _bars(
    title: str, labels: Sequence[str], series: Mapping[str, Sequence[float | None]], text: str, unit: str, file: str = ""
) -> Section | None:
    """A section of bars, every value told as `text` says; None where there is no label."""
    if not labels:
        return None
    told = tuple(tuple("" if v is None else text.format(v) for v in values) for values in series.values())
    own = tuple((name, tuple(values)) for name, values in series.items())
    return Section(title, (Bars(tuple(labels), own, told, unit, file),))


def _without(plain: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in plain.items() if name != key}


def spreads(measurements: Sequence[Measurement]) -> dict[str, str]:
    """How far the measurements of each term scatter, in words.

    Args:
        measurements: As a run keeps them; those whose protocol tells no spread are left out.

    Returns:
        Term → deciles of repetitions, the number of paired rounds, or a standard error, of every network.
    """
    told: dict[str, list[str]] = {}
    for measured in measurements:
        protocol = measured.protocol
        if "p10_ms" in protocol and "p90_ms" in protocol:
            text = f"{measured.model} {protocol['p10_ms']:.3g} … {protocol['p90_ms']:.3g} ms in 80 % of runs"
        elif "told" in protocol and "clock" not in protocol:
            continue  # a rank, or a count of images too few for a share
        elif "told" in protocol:
            text = f"median of {protocol.get('iterations')} paired rounds, {protocol.get('clock')} clock"
        elif "p10" in protocol and "p90" in protocol:
            text = f"{protocol['p10']:.3g} … {protocol['p90']:.3g} × in 80 % of pairs"
        elif "standard_error" in protocol:
            text = f"{measured.model} ± {protocol['standard_error']:.2f}"
        else:
            continue
        told.setdefault(measured.name, []).append(text)
    return {name: "; ".join(texts) for name, texts in told.items()}


def _widths(results: Results) -> list[Section | None]:
    """Outputs of every layer that lost some, dense against kept; the others by name, folded."""
    counts = {
        name: of[key] for name, of in results.widths.items()
        if (key := next((key for key in _WIDTHS if key in of), "num_features")) != "num_features"
    }  # fmt: skip
    changed = {name: (float(dense), float(kept)) for name, (dense, kept) in counts.items() if dense != kept}
    if not changed:
        return []
    told = (
        tuple(f"{dense:.0f}" for dense, _ in changed.values()),
        tuple(f"{kept:.0f} ({100 * kept / dense:.0f} %)" for dense, kept in changed.values()),
    )
    series = tuple((name, tuple(of[side] for of in changed.values())) for side, name in enumerate(("dense", "kept")))
    bars = Bars(tuple(changed), series, told, "output channels or features")
    found: list[Section | None] = [Section("Widths of the layers", (bars,))]
    same = [f"{name}: {dense:.0f}" for name, (dense, kept) in counts.items() if dense == kept]
    if same:
        found.append(Section(f"{len(same)} layers kept all their outputs", (Listing(tuple(same)),), folded=True))
    return found


def _errors(results: Results) -> Chart | None:
    """Predicted and measured relative error by group (of its last pass), summed over its consumers like M10's."""
    measured = {}
    for group in results.groups:
        fidelity = group.get("fidelity")
        if group.get("removed") and isinstance(fidelity, Mapping) and fidelity:
            measured[group["group"]] = 100 * sum(1 - value for value in fidelity.values() if value is not None)
    if not measured:
        return None
    predicted = {name: 100 * value for name, value in results.predicted_error.items() if name in measured and value is not None}
    series = [Series("measured after the cut", tuple(measured.values()))]
    if predicted:
        series.insert(0, Series("predicted before it", tuple(predicted.get(name) for name in measured)))
    return Chart(
        "groups", f"{results.model}: error of each group",
        "relative error of what reads the group, summed over its readers, % of their output energy",
        "", tuple(series), kind="bars", categories=tuple(measured),
    )  # fmt: skip


def _group_errors(results: Results, drawn: Mapping[str, Mapping[str, bytes]]) -> Section | None:
    chart = _errors(results)
    if chart is None:
        return None
    unit = "Relative error of what reads the group, summed over its readers, as a share of their output energy."
    file = f"{chart.name}.svg" if chart.name in drawn else ""
    series = {one.name: one.y for one in chart.series}
    return _bars("Error of each group", chart.categories, series, "{:.2f} %", unit, file)


def _fidelity(results: Results) -> Section | None:
    """Fidelity of every repaired layer, of its last edit, beside the best that its kept components allow."""
    found: dict[str, dict[str, float]] = {"fidelity": {}, "subset_fidelity": {}}
    for group in results.groups:
        for key, into in found.items():
            if isinstance(group.get(key), Mapping):
                into.update({name: value for name, value in group[key].items() if value is not None})
    names, best = list(found["fidelity"]), found["subset_fidelity"]
    series: dict[str, Sequence[float | None]] = {"of the repaired weights": list(found["fidelity"].values())}
    if any(name in best for name in names):
        series["best with these components"] = [best.get(name) for name in names]
    unit = "Share of the layer's output energy that is left on the calibration samples (1 is everything)."
    return _bars("Fidelity of each layer", names, series, "{:.4f}", unit)


def _layers_unlearned(results: Results) -> Section | None:
    layers = [{k: v for k, v in layer.items() if not isinstance(v, Mapping)} for layer in results.layers]
    return _records("Layers that were edited", layers, ()) if layers else None


def _records(title: str, records: Sequence[Any], notes: Sequence[str]) -> Section | None:
    """JSON objects with the same keys as a table."""
    records = [record for record in records if isinstance(record, Mapping)]
    blocks: list[Block] = []
    if records:
        blocks.append(table([{key.replace("_", " "): told(value) for key, value in one.items()} for one in records]))
    blocks += [Text(str(note), "note") for note in notes]
    return Section(title, tuple(blocks)) if blocks else None


def _groups(results: Results) -> Section | None:
    lines = []
    for group in results.groups:
        line = {key: value for key, value in group.items() if not isinstance(value, Mapping)}
        fidelity = [value for value in (group.get("fidelity") or {}).values() if value is not None]
        lines.append(line | ({"lowest fidelity": min(fidelity)} if fidelity else {}))
    section = _records("Groups", lines, ())
    return None if section is None else Section("Groups", section.blocks, folded=True)


def _calibration(results: Results, sheet: bytes | None) -> Section | None:
    blocks: list[Block] = []
    if sheet:
        blocks.append(Picture("the first calibration images, as the network sees them", sheet, "calibration.png"))
    quality = tuple((key.replace("_", " "), told(value)) for key, value in results.calibration_quality.items())
    if quality:
        blocks.append(Table(("quality of the sample", ""), quality))
    if results.calibration_samples:
        blocks.append(Listing(tuple(str(text)[:400] for text in results.calibration_samples[:5])))
    return Section("Calibration sample", tuple(blocks)) if blocks else None


def _exports(results: Results) -> Section | None:
    rows = [
        {
            "format": str(export.get("format", "")),
            "file": str(export.get("path", "")),
            "size": terms.quantity(export["bytes"], "bytes") if "bytes" in export else "",
            "largest difference": f"{export['max_difference']:.2g}" if "max_difference" in export else "",
            "checked with": str(export.get("runtime", "")),
        }
        for export in results.exports
    ]
    return Section("Exports", (table(rows),)) if rows else None


def _protocol(
    results: Results, environment: Mapping[str, Any], measurements: Sequence[Measurement]
) -> list[Section | None]:
    blocks: list[Block] = []
    data = {key: value for key in ("calibration", "evaluation") if (value := getattr(results, key))}
    for measured in measurements:
        if isinstance(measured.protocol.get("data"), Mapping) and measured.protocol["data"] not in data.values():
            data[f"data of {measured.name}"] = measured.protocol["data"]
    blocks += [Text(f"{name[0].upper()}{name[1:]}: {told(found)}.") for name, found in data.items()]
    lines = terms.protocol_lines([dataclasses.replace(m, protocol=_without(m.protocol, "data")) for m in measurements])
    if lines:
        blocks.append(Listing(tuple(lines)))
    facts = [
        (key, told(environment[key]))
        for key in ("device", "precision", "processor", "processors", "threads", "system", "python", "started")
        if environment.get(key) is not None
    ]
    packages = environment.get("packages") or {}
    facts += (
        [("versions", ", ".join(f"{name} {number}" for name, number in packages.items() if number))] if packages else []
    )
    seconds = {key: value for key, value in results.seconds.items() if _number(value)}
    if seconds and results.verb == "study":
        facts.append(("seconds of computing", f"{sum(seconds.values()):.1f} in {len(seconds)} cells"))
    elif seconds:
        facts.append(("seconds", ", ".join(f"{key} {value:.1f}" for key, value in seconds.items())))
    memory = results.memory
    if memory.get("card"):
        share = f"{memory['card'] / 1e9:.2f} of {memory['card_total'] / 1e9:.2f} GB at most"
        facts.append(("memory of the card", share))
    if memory.get("process"):
        facts.append(("memory of the process", f"{memory['process'] / 1e9:.2f} GB at most, libraries included"))
    if facts:
        blocks.append(Table(("", ""), tuple(facts)))
    return [Section("How it was measured", tuple(blocks), folded=True)] if blocks else []


def _again(environment: Mapping[str, Any]) -> Section | None:
    """The command that makes the run again from nothing: a finished run cannot be resumed."""
    command = environment.get("command")
    if not command:
        return None
    words = [word for word in str(command).split(" ") if not word.startswith("resume=")]
    return Section("Again", (Code(" ".join(words)),))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and isfinite(value)
