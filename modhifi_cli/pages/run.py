"""What stands on the page of a run or of a study, from the files of its folder alone.

Everything here reads plain JSON values, and a part whose numbers a run does not have is left out: pruning, unlearning,
measuring and studies share one page, and runs of later versions with further numbers still make one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import fmean
from typing import Any

from modhifi_cli.errors import DataError
from modhifi_cli.pages import plots, reports
from modhifi_cli.pages.page import Bars, Block, Claim, Code, Drawing, Fact, Listing, Page, Picture, Section, Table, Text
from modhifi_cli.records import Chart, Measurement, Series

_AT_THE_TOP = (
    "top1", "forget_accuracy", "retain_accuracy", "agreement", "token_perplexity", "parameters", "macs", "file_bytes",
    "speedup",
)  # fmt: skip
_STEPS = ("outside", "scoring", "selection", "compensation", "allocation", "schedule", "method", "statistics")
_PLAIN = ("sparsity", "batchnorm", "classifier", "components", "round_to", "exclude", "layers", "seeds", "minutes")
_OF_IMAGES, _OF_TEXT = ("batchnorm", "classifier"), ("components",)  # settings that the others do not look at
_COUNTED = {"params": "parameters", "flops": "FLOPs", "components": "components", "latency": "time"}
_WIDTHS = ("out_channels", "out_features", "num_features")


def figures(material: Mapping[str, Any]) -> dict[str, dict[str, bytes]]:
    """Figures beside the page: file stem → ``{"png": bytes, "svg": bytes}``."""
    found = {chart.name: plots.draw(chart) for chart in material.get("charts", ())}
    results = material["results"]
    predicted, measured = _errors(results)
    if measured:
        names = [*predicted, *measured]
        title = f"{results.get('model', 'network')}: error of each group"
        found["groups"] = plots.group_errors(names, predicted=predicted, measured=measured, title=title)
    return {stem: kinds for stem, kinds in found.items() if kinds}


def page(material: Mapping[str, Any], drawn: Mapping[str, Mapping[str, bytes]]) -> Page:
    """The page of a run.

    Args:
        material: ``results`` (the content of results.json) and, where the run has them, ``settings``, ``environment``,
            ``charts`` (`Chart` records) and ``sheet`` (PNG of calibration images).
        drawn: As `figures` gives them.

    Raises:
        DataError: If the results say nothing of what was done: another program or version wrote them.
    """
    results = material["results"]
    if not isinstance(results.get("verb"), str):
        raise DataError(
            "results.json does not say what was done (no 'verb'); the folder was written by another version of modhifi "
            "or is damaged, run again."
        )
    return _study_page(material, drawn) if results["verb"] == "study" else _run_page(material, drawn)


def _run_page(material: Mapping[str, Any], drawn: Mapping[str, Mapping[str, bytes]]) -> Page:
    results, settings = material["results"], material.get("settings") or {}
    measurements = _measurements(results)
    told = [dataclasses.replace(m, protocol=_without(m.protocol, "per_class")) for m in measurements]
    sections = [
        _warnings(results),
        _achieved(results, measurements),
        _audit(results),
        _every_class(results, measurements),
        _trials(results),
        _healing(results),
        _widths(results),
        _group_errors(results, drawn),
        _fidelity(results),
        _layers_unlearned(results),
        _calibration(results, material.get("sheet")),
        _exports(results),
        _asked(results, settings),
        _groups(results),
        *_protocol(results, material.get("environment") or {}, told),
        _again(material.get("environment") or {}),
    ]
    return Page(
        title=_title(results, settings),
        lead=_lead(results, settings),
        facts=_facts(measurements),
        sections=tuple(section for section in sections if section is not None),
    )


def _study_page(material: Mapping[str, Any], drawn: Mapping[str, Mapping[str, bytes]]) -> Page:
    results, settings = material["results"], material.get("settings") or {}
    verdicts = {True: "holds here", False: "does not hold here", None: "cannot be said"}
    findings = tuple(
        Claim(found["claim"], verdicts.get(found.get("holds"), ""), found["found"], found.get("holds"))
        for found in results.get("findings") or ()
    )
    shown = tuple(_chart_block(chart, drawn[chart.name]) for chart in material.get("charts", ()) if chart.name in drawn)
    sections = [
        _warnings(results),
        Section("The paper's claims, and what was found", findings) if findings else None,
        Section("Figures", shown) if shown else None,
        _records("Numbers", results.get("summary") or (), results.get("notes") or ()),
        _calibration(results, material.get("sheet")),
        _asked(results, settings),
        *_protocol(results, material.get("environment") or {}, ()),
        _again(material.get("environment") or {}),
    ]
    return Page(
        title=_title(results, settings),
        lead=f"{results.get('weights', '')}; {_images(results.get('calibration') or {})}",
        facts=(),
        sections=tuple(section for section in sections if section is not None),
    )


def _chart_block(chart: Chart, kinds: Mapping[str, bytes]) -> Block:
    """Curves as a figure; bars as boxes of the page, which fit every window."""
    if chart.kind != "bars":
        return Drawing(chart.title, kinds["svg"].decode(), f"{chart.name}.svg")
    told = tuple(tuple("" if v is None or not isfinite(v) else f"{v:.3g}" for v in s.y) for s in chart.series)
    series = tuple((one.name, one.y) for one in chart.series)
    return Bars(chart.categories, series, told, f"{chart.title}: {chart.x_label}", f"{chart.name}.svg")


def _title(results: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    model, verb = results.get("model", "network"), results["verb"]
    if verb == "prune" and results.get("goal"):
        return f"{model}: {results['goal']}"
    if verb == "prune" and _number(results.get("sparsity")):
        return f"{model}: {100 * results['sparsity']:g} % of {_COUNTED.get(results.get('target'), 'parameters')} removed"
    if verb == "unlearn" and results.get("forget"):
        told = ", ".join(_class_name(number, results.get("classes")) for number in results["forget"])
        return f"{model}: forgetting class{'es' if len(results['forget']) > 1 else ''} {told}"
    told = {"evaluate": "measured", "study": f"study of {results.get('study', 'the network')}", "replay": "replayed"}
    return f"{model}: {told.get(verb, verb)}"


def _lead(results: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    parts = [f"Weights {results['weights']}" if results.get("weights") else ""]
    if results.get("calibration"):
        parts.append(_images(results["calibration"]))
    method = settings.get("outside") or settings.get("compensation")
    if isinstance(method, Mapping) and settings.get("scoring"):
        trained = (results.get("healing") or {}).get("trained")
        plain = "trained towards the dense network's answers, no labels" if trained else "no training, no labels"
        parts.append(plain if not settings.get("outside") else f"outside method {_target(method)}")
    return "; ".join(part for part in parts if part) + "." if any(parts) else ""


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


def _measurements(results: Mapping[str, Any]) -> tuple[Measurement, ...]:
    found = []
    for entry in results.get("measurements") or ():
        try:
            found.append(
                Measurement(
                    **{key: entry[key] for key in ("model", "name", "value", "unit")},
                    protocol=entry.get("protocol") or {},
                )
            )
        except (KeyError, TypeError):
            continue  # a measurement that a later version writes in another way
    return tuple(found)


def _facts(measurements: Sequence[Measurement]) -> tuple[Fact, ...]:
    rows = {row.name: row for row in reports.table(measurements)}
    chosen = [rows[name] for name in _AT_THE_TOP if name in rows] or list(rows.values())[:6]
    return tuple(Fact(row.label, row.after or row.before, row.change, row.better) for row in chosen[:8])


def _warnings(results: Mapping[str, Any]) -> Section | None:
    warnings = tuple(str(text) for text in results.get("warnings") or ())
    return Section("Warnings", (Listing(warnings, "warning"),)) if warnings else None


def _asked(results: Mapping[str, Any], settings: Mapping[str, Any]) -> Section | None:
    of_text = ".hf." in str((settings.get("model") or {}).get("_target_"))
    plain = [key for key in _PLAIN if key not in (_OF_IMAGES if of_text else _OF_TEXT)]
    rows = [
        (key.replace("_", " "), reports.told(settings[key])) for key in plain if settings.get(key) not in (None, [])
    ]
    if results.get("forget"):
        told = ", ".join(_class_name(number, results.get("classes")) for number in results["forget"])
        rows.insert(0, ("forget class", told))
    target = settings.get("target")
    if isinstance(target, Mapping) and results.get("study", "ablation") == "ablation":
        rows.append(("target", _target({key: value for key, value in target.items() if value is not None})))
    steps = _STEPS if results["verb"] != "study" or results.get("study") == "ablation" else ("scoring", "statistics")
    for key in (*steps, *(("decoder",) if of_text else ())):
        node = settings.get(key)
        if isinstance(node, Mapping) and "_target_" in node and not (settings.get("outside") and key != "outside"):
            rows.append((key, _target(node)))
    rows += [(key.replace("_", " "), reports.told(value)) for key, value in (results.get("strength") or {}).items()]
    if "finetuned_epochs" in results:
        epochs = results["finetuned_epochs"]
        rows.append(("fine-tuning", f"{epochs} epochs on retain samples, with gradients" if epochs else "none"))
    rows += [
        (f"study {key}".replace("_", " "), reports.told(value))
        for key, value in (results.get("settings") or {}).items()
    ]
    return Section("What was asked", (Table(("setting", "value"), tuple(rows)),)) if rows else None


def _target(node: Mapping[str, Any]) -> str:
    own = ", ".join(f"{key} {reports.told(value)}" for key, value in node.items() if not key.startswith("_"))
    return str(node.get("_target_", "")).rpartition(".")[2] + (f" ({own})" if own else "")


def _achieved(results: Mapping[str, Any], measurements: Sequence[Measurement]) -> Section | None:
    blocks: list[Block] = []
    achieved = results.get("achieved") or {}
    if achieved:
        shares = ", ".join(f"{100 * share:.2f} % of {_COUNTED.get(name, name)}" for name, share in achieved.items())
        asked = results.get("sparsity")
        wanted = (
            ""
            if not _number(asked)
            else f" (asked: {100 * asked:g} % of {_COUNTED.get(results.get('target'), 'parameters')})"
        )
        blocks.append(Text(f"Removed {shares}{wanted}."))
    if isinstance(results.get("latency"), Mapping):
        blocks.append(Table(("of the time of a forward pass", "saved"), _time_saved(results["latency"])))
    spreads = _spreads(measurements)
    rows = []
    for row in reports.table(measurements):
        rows.append((row.label, row.before, row.after, row.change, spreads.get(row.name, "")))
    if rows:
        two = any(row[1] for row in rows) and any(row[2] for row in rows)
        if two:
            blocks.append(Table(("", "before", "after", "change", "spread"), tuple(rows)))
        else:
            blocks.append(Table(("", "measured", "spread"), tuple((r[0], r[1] or r[2], r[4]) for r in rows)))
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


def _trials(results: Mapping[str, Any]) -> Section | None:
    """What was tried on calibration images before the run settled."""
    trials = results.get("trials")
    return _records("Trials", trials, ("Each was judged on calibration images alone.",)) if trials else None


def _healing(results: Mapping[str, Any]) -> Section | None:
    """What training after the cut was tried, and what held-out samples made of every epoch."""
    healed = results.get("healing")
    if not healed:
        return None
    rows = [{"stage": "closed form", "epoch": 0, "kl": healed["before"]}, *healed["history"]]
    rows = [{"stage": row["stage"], "epoch": row["epoch"], "KL on held-out samples, nats": row["kl"]} for row in rows]
    kept = "trained" if healed["trained"] else "as the closed form left it"
    return _records("Healing", rows, (f"The network that is kept is {kept} (KL {healed['after']:.4g}).",))


def _audit(results: Mapping[str, Any]) -> Section | None:
    """The verdict of an unlearning run's audit with its grounds; that there is none is said too."""
    if results.get("verb") != "unlearn":
        return None
    found = results.get("audit")
    if not found:
        return Section("Audit: left out", (Text(reports.NO_AUDIT),))
    rows = found["figures"]
    head = tuple(dict.fromkeys(key for row in rows for key in row))
    blocks = (
        Listing(tuple(found["sentences"])),
        Table(head, tuple(tuple(row.get(key, "") for key in head) for row in rows)),
        Text("audit.md says what every figure means, what the forget images become, and has the plots.", "note"),
    )
    return Section(f"Audit: {found['verdict']}", blocks)


def _every_class(results: Mapping[str, Any], measurements: Sequence[Measurement]) -> Section | None:
    """Accuracy of every class, where a measurement kept it."""
    columns = {m.model: m.protocol["per_class"] for m in measurements if m.protocol.get("per_class")}
    if not columns:
        return None
    numbers = sorted({int(number) for column in columns.values() for number in column})
    labels = tuple(
        _class_name(number, results.get("classes")) + (", forgotten" if number in (results.get("forget") or ()) else "")
        for number in numbers
    )
    series = []
    for model, column in columns.items():
        by_number = {int(number): value for number, value in column.items()}
        series.append((model, tuple(by_number.get(number) for number in numbers)))
    told = tuple(tuple("" if value is None else f"{value:.2f} %" for value in values) for _, values in series)
    return Section("Accuracy of every class", (Bars(labels, tuple(series), told, "accuracy, %"),))


def _class_name(number: int, classes: Sequence[str] | None) -> str:
    """``3 (cat)``, or the number alone where nobody knows names."""
    return str(number) if not classes or classes[number] == str(number) else f"{number} ({classes[number]})"


def _without(plain: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in plain.items() if name != key}


def _spreads(measurements: Sequence[Measurement]) -> dict[str, str]:
    """How far each term's measurements scatter, in words: deciles of repetitions, or a standard error."""
    told: dict[str, list[str]] = {}
    for measured in measurements:
        protocol = measured.protocol
        if "p10_ms" in protocol and "p90_ms" in protocol:
            text = f"{measured.model} {protocol['p10_ms']:.3g} … {protocol['p90_ms']:.3g} ms in 80 % of runs"
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


def _widths(results: Mapping[str, Any]) -> Section | None:
    """Outputs of every layer, dense against kept, where the run changed any."""
    names, dense, kept = [], [], []
    for name, counts in (results.get("widths") or {}).items():
        attribute = next((key for key in _WIDTHS if key in counts), None)
        if attribute is None or attribute == "num_features":
            continue
        names.append(name)
        dense.append(float(counts[attribute][0]))
        kept.append(float(counts[attribute][1]))
    if dense == kept:
        return None
    told = (
        tuple(f"{value:.0f}" for value in dense),
        tuple(f"{k:.0f} ({100 * k / d:.0f} %)" for k, d in zip(kept, dense, strict=True)),
    )
    bars = Bars(tuple(names), (("dense", tuple(dense)), ("kept", tuple(kept))), told, "output channels or features")
    return Section("Widths of the layers", (bars,))


def _errors(results: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Predicted and measured relative error by group (of its last pass), summed over its consumers like M10's."""
    measured = {}
    for group in results.get("groups") or ():
        fidelity = group.get("fidelity")
        if group.get("removed") and isinstance(fidelity, Mapping) and fidelity:
            measured[group["group"]] = sum(1 - value for value in fidelity.values() if value is not None)
    predicted = {name: value for name, value in (results.get("predicted_error") or {}).items() if name in measured}
    return predicted, measured


def _group_errors(results: Mapping[str, Any], drawn: Mapping[str, Mapping[str, bytes]]) -> Section | None:
    predicted, measured = _errors(results)
    if not measured:
        return None
    names = tuple(measured)
    series = [("measured after the cut", tuple(measured[name] for name in names))]
    if predicted:
        series.insert(0, ("predicted before it", tuple(predicted.get(name) for name in names)))
    told = tuple(tuple("" if v is None else f"{100 * v:.2f} %" for v in values) for _, values in series)
    bars = Bars(
        names, tuple(series), told,
        "Relative error of what reads the group, summed over its readers, as a share of their output energy.",
        file="groups.svg" if "groups" in drawn else "",
    )  # fmt: skip
    return Section("Error of each group", (bars,))


def _fidelity(results: Mapping[str, Any]) -> Section | None:
    """Fidelity of every repaired layer, of its last edit, beside the best that its kept components allow."""
    reached: dict[str, float] = {}
    best: dict[str, float] = {}
    for group in results.get("groups") or ():
        for key, into in (("fidelity", reached), ("subset_fidelity", best)):
            if isinstance(group.get(key), Mapping):
                into.update({name: value for name, value in group[key].items() if value is not None})
    if not reached:
        return None
    names = tuple(reached)
    series = [("of the repaired weights", tuple(reached[name] for name in names))]
    if any(name in best for name in names):
        series.append(("best with these components", tuple(best.get(name) for name in names)))
    told = tuple(tuple("" if v is None else f"{v:.4f}" for v in values) for _, values in series)
    unit = "Share of the layer's output energy that is left on the calibration samples (1 is everything)."
    return Section("Fidelity of each layer", (Bars(names, tuple(series), told, unit),))


def _layers_unlearned(results: Mapping[str, Any]) -> Section | None:
    layers = results.get("layers")
    if isinstance(layers, Sequence):
        layers = [{k: v for k, v in layer.items() if not isinstance(v, Mapping)} for layer in layers]
    return _records("Layers that were edited", layers, ()) if isinstance(layers, Sequence) and layers else None


def _records(title: str, records: Sequence[Any], notes: Sequence[str]) -> Section | None:
    """JSON objects with the same keys as a table."""
    records = [record for record in records if isinstance(record, Mapping)]
    blocks: list[Block] = []
    if records:
        columns = tuple(dict.fromkeys(key for record in records for key in record))
        rows = tuple(tuple(reports.told(record.get(key, "")) for key in columns) for record in records)
        blocks.append(Table(tuple(column.replace("_", " ") for column in columns), rows))
    blocks += [Text(str(note), "note") for note in notes]
    return Section(title, tuple(blocks)) if blocks else None


def _groups(results: Mapping[str, Any]) -> Section | None:
    lines = []
    for group in results.get("groups") or ():
        line = {key: value for key, value in group.items() if not isinstance(value, Mapping)}
        fidelity = [value for value in (group.get("fidelity") or {}).values() if value is not None]
        lines.append(line | ({"lowest fidelity": min(fidelity)} if fidelity else {}))
    section = _records("Groups", lines, ())
    return None if section is None else Section("Groups", section.blocks, folded=True)


def _calibration(results: Mapping[str, Any], sheet: bytes | None) -> Section | None:
    blocks: list[Block] = []
    if sheet:
        blocks.append(Picture("the first calibration images, as the network sees them", sheet, "calibration.png"))
    quality = results.get("calibration_quality") or {}
    if quality:
        blocks.append(
            Table(
                ("quality of the sample", ""),
                tuple((key.replace("_", " "), reports.told(value)) for key, value in quality.items()),
            )
        )
    texts = results.get("calibration_samples")
    if isinstance(texts, Sequence) and not isinstance(texts, str):
        blocks.append(Listing(tuple(str(text)[:400] for text in texts[:5])))
    return Section("Calibration sample", tuple(blocks)) if blocks else None


def _exports(results: Mapping[str, Any]) -> Section | None:
    rows = []
    for export in results.get("exports") or ():
        size = reports.quantity(export["bytes"], "bytes") if "bytes" in export else ""
        difference = f"{export['max_difference']:.2g}" if "max_difference" in export else ""
        rows.append(
            (
                str(export.get("format", "")),
                str(export.get("path", "")),
                size,
                difference,
                str(export.get("runtime", "")),
            )
        )
    head = ("format", "file", "size", "largest difference", "checked with")
    return Section("Exports", (Table(head, tuple(rows)),)) if rows else None


def _protocol(
    results: Mapping[str, Any], environment: Mapping[str, Any], measurements: Sequence[Measurement]
) -> list[Section | None]:
    blocks: list[Block] = []
    data = {key: results[key] for key in ("calibration", "evaluation") if results.get(key)}
    for measured in measurements:
        if isinstance(measured.protocol.get("data"), Mapping) and measured.protocol["data"] not in data.values():
            data[f"data of {measured.name}"] = measured.protocol["data"]
    blocks += [Text(f"{name[0].upper()}{name[1:]}: {reports.told(found)}.") for name, found in data.items()]
    measurements = [
        dataclasses.replace(m, protocol={key: value for key, value in m.protocol.items() if key != "data"})
        for m in measurements
    ]
    lines = reports.protocol_lines(measurements)
    if lines:
        blocks.append(Listing(tuple(lines)))
    facts = [
        (key, reports.told(environment[key]))
        for key in ("device", "precision", "processor", "processors", "threads", "system", "python", "started")
        if environment.get(key) is not None
    ]
    packages = environment.get("packages") or {}
    facts += (
        [("versions", ", ".join(f"{name} {number}" for name, number in packages.items() if number))] if packages else []
    )
    seconds = {key: value for key, value in (results.get("seconds") or {}).items() if _number(value)}
    if seconds and results.get("verb") == "study":
        facts.append(("seconds of computing", f"{sum(seconds.values()):.1f} in {len(seconds)} cells"))
    elif seconds:
        facts.append(("seconds", ", ".join(f"{key} {value:.1f}" for key, value in seconds.items())))
    memory = results.get("memory") or {}
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


# ------------------------------------------------------------------------------------------------------- several runs


_NOT_A_METHOD = (
    "sparsity", "data.seed", "runtime.seed", "seed", "console", "output_dir", "resume", "measure_dense", "forget_class",
)  # fmt: skip
_QUALITIES = (
    ("top1", "top-1 accuracy, %"),
    ("agreement", "agreement with the dense network, % of images"),
    ("token_perplexity", "perplexity per token"),
)
_COSTS = (
    ("removed_flops", "FLOPs (MACs) removed, % of dense"),
    ("removed_params", "parameters removed, % of dense"),
    ("time_saved", "time of a forward pass saved, % of dense"),
)
# What an unlearning run's audit found in the edited network that a comparison shows.
_AUDITED = {
    "audit_probe_penultimate": "linear probe, recall of the forgotten, %",
    "audit_class_mean_penultimate": "nearest class mean, recall of the forgotten, %",
    "audit_relearn_steps": "steps until relearned",
    "audit_MIA": "membership attack, %",
}
_MEASURED_BY_THE_AUDIT = {"audit_FA": "forget_accuracy", "audit_TA": "retain_accuracy"}  # of the head-only control


def compared(results: Mapping[str, Any], words: Sequence[str], folder: str) -> dict[str, Any]:
    """One run as a comparison needs it: its own words, its shares and numbers, those of the dense network.

    Args:
        results: Content of results.json.
        words: Overrides of the command that made it.
        folder: Where it lies.
    """
    values = {f"removed_{name}": 100 * share for name, share in (results.get("achieved") or {}).items()}
    dense: dict[str, float] = {}
    control: dict[str, float] = {}
    taken = {"dense": dense, "head_only": control}
    for measured in _measurements(results):
        taken.get(measured.model, values)[measured.name] = measured.value
    for measured in (results.get("audit") or {}).get("measurements", ()):
        if measured["name"] in _AUDITED:
            taken.get(measured["model"], values)[measured["name"]] = measured["value"]
        elif measured["model"] == "head_only" and measured["name"] in _MEASURED_BY_THE_AUDIT:
            control[_MEASURED_BY_THE_AUDIT[measured["name"]]] = measured["value"]
    if values.get("speedup"):
        values["time_saved"] = 100 * (1 - 1 / values["speedup"])
    given = dict(word.partition("=")[::2] for word in words)
    return {
        "folder": folder,
        "model": str(results.get("model", "network")),
        "budget": float(results.get("sparsity") or 0.0),
        "seed": " ".join([given.get("data.seed", "0"), *map(str, results.get("forget") or ())]),
        "words": {key: value for key, value in given.items() if key not in _NOT_A_METHOD},
        "values": values,
        "dense": dense,
        "control": control,
    }


def grouped(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs that differ in the draw of images or in the forgotten class alone, as one row: mean, standard deviation.

    Returns:
        One row a (method, budget): ``method`` (what its command says that others do not), ``budget``, ``seeds``,
        ``folders``, ``measured`` (mean of every term, its deviation as ``TERM_sd``), ``dense`` and ``control`` (the
        head-only control; both means), ``model``, ``words`` (what its command says).
    """
    keys = list(dict.fromkeys(key for run in runs for key in run["words"]))
    differing = [key for key in keys if len({run["words"].get(key) for run in runs}) > 1 or len(runs) == 1]
    models = {run["model"] for run in runs}
    cells = []
    for run in runs:
        own = [
            f"{key.rpartition('.')[2]} {run['words'][key]}" if key != "preset" else run["words"][key]
            for key in differing
            if key in run["words"] and key != "model" and "/" not in run["words"][key]
        ]
        name = ", ".join(([run["model"]] if len(models) > 1 else []) + own) or "default"
        cells.append(
            {
                "method": name,
                "budget": run["budget"],
                "seed": run["seed"],
                "status": "finished",
                "message": "",
                "folder": run["folder"],
                **run["values"],
            }
        )
    rows = []
    for row in reports.comparison_rows(cells):
        mine = [
            run
            for run, cell in zip(runs, cells, strict=True)
            if (cell["method"], cell["budget"]) == (row["method"], row["budget"])
        ]
        measured = {key: value for key, value in row.items() if key not in ("method", "budget", "seeds", "failed")}
        rows.append(
            {
                "method": row["method"],
                "budget": row["budget"],
                "seeds": row["seeds"],
                "measured": measured,
                "folders": [run["folder"] for run in mine],
                "dense": _means([run["dense"] for run in mine]),
                "control": _means([run["control"] for run in mine]),
                "model": mine[0]["model"],
                "words": mine[0]["words"],
            }
        )
    return rows


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every term over those that have it."""
    terms = dict.fromkeys(term for one in found for term in one)
    return {term: fmean(one[term] for one in found if term in one) for term in terms}


def tradeoffs(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """What can be read inside against what the other classes kept, one curve a method, along the number it is dialled by."""
    keys = dict.fromkeys(key for row in rows for key in row["words"])
    told = {key: {row["words"].get(key) for row in rows} for key in keys}
    dials = [key for key, values in told.items() if len(values - {None}) > 1 and all(_numeric(v) for v in values - {None})]
    differing = [key for key, values in told.items() if len(values) > 1 and key not in dials[:1]]
    found = []
    for term, label in _AUDITED.items():
        points: dict[str, list[Mapping[str, float]]] = {}
        for row in rows:
            if {term, "retain_accuracy"} <= row["measured"].keys():
                name = ", ".join(f"{key.rpartition('.')[2]} {row['words'].get(key, 'as set')}" for key in differing)
                points.setdefault(name or "edited", []).append(row["measured"])
        if not points:
            continue
        series = [
            Series(name, tuple(m[term] for m in own), tuple(m["retain_accuracy"] for m in own))
            for name, own in points.items()
        ]
        levels = {}
        for who, key in (("dense", "dense"), ("head-only control", "control")):
            height = _means([row[key] for row in rows]).get(term)
            if height is not None:
                levels[f"{who} {height:.1f}"] = height
        dial = f", along {dials[0].rpartition('.')[2]}" if dials else ""
        models = ", ".join(sorted({row["model"] for row in rows}))
        title = f"{models}: {label.partition(',')[0]} against retain accuracy{dial}"
        found.append(Chart(f"tradeoff_{term}", title, "retain accuracy, %", label, tuple(series), levels=levels))
    return found


def _numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def frontiers(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Quality against each cost that there are numbers for, one curve a method."""
    quality = next((pair for pair in _QUALITIES if any(pair[0] in row["measured"] for row in rows)), None)
    if quality is None:
        return []
    key, label = quality
    models = {row["model"] for row in rows}
    heights = {row["dense"][key] for row in rows if key in row["dense"]}
    levels = {f"dense {next(iter(heights)):.2f}": next(iter(heights))} if len(models) == 1 == len(heights) else {}
    found = []
    for cost, cost_label in _COSTS:
        series = []
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row["measured"] for row in rows if row["method"] == method]
            own = [measured for measured in own if cost in measured and key in measured]
            if own:
                series.append(
                    Series(
                        method,
                        tuple(m[key] for m in own),
                        tuple(m[cost] for m in own),
                        tuple(m.get(f"{key}_sd") or 0.0 for m in own),
                    )
                )
        if series:
            title = f"{', '.join(sorted(models))}: {label.partition(',')[0]} against {cost_label.partition(',')[0]}"
            found.append(Chart(f"frontier_{cost}", title, cost_label, label, tuple(series), levels=levels))
    return found


def comparison(
    rows: Sequence[Mapping[str, Any]],
    charts: Sequence[Chart],
    drawn: Mapping[str, Mapping[str, bytes]],
    command: str,
) -> Page:
    """The page of several runs: a table, the frontiers, where each run lies."""
    terms = list(dict.fromkeys(key for row in rows for key in row["measured"] if not key.endswith("_sd")))
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        dense = next((row["dense"] for row in rows if row["model"] == model and row["dense"]), {})
        if dense:
            lines.append((f"{model}, dense", "", "", *(_rounded(dense.get(term)) for term in terms)))
        control = next((row["control"] for row in rows if row["model"] == model and row["control"]), {})
        if control:
            lines.append(("head-only control", "", "", *(_rounded(control.get(term)) for term in terms)))
    for row in rows:
        measured = row["measured"]
        told = (_rounded(measured.get(term), measured.get(f"{term}_sd")) for term in terms)
        lines.append((row["method"], f"{100 * row['budget']:g} %" if row["budget"] else "", str(row["seeds"]), *told))
    head = ("method", "asked", "draws", *(term.replace("_", " ") for term in terms))
    places = tuple((row["method"], f"{100 * row['budget']:g} %", ", ".join(row["folders"])) for row in rows)
    shown = tuple(
        Drawing(chart.title, drawn[chart.name]["svg"].decode(), f"{chart.name}.svg")
        for chart in charts if drawn.get(chart.name)
    )  # fmt: skip
    over = "Mean ± standard deviation over draws and, where a run forgets, over forgotten classes."
    sections = [
        Section("Numbers", (Table(head, tuple(lines)), Text(over, "note"))),
        Section("Frontiers", shown) if shown else None,
        Section("Runs", (Table(("method", "asked", "folder"), places),), folded=True),
        Section("Again", (Code(command),)),
    ]
    count = sum(len(row["folders"]) for row in rows)
    models = ", ".join(dict.fromkeys(row["model"] for row in rows))
    budgets = {row["budget"] for row in rows}
    return Page(
        title=f"{models}: {count} runs compared",
        lead=f"{len({row['method'] for row in rows})} methods" + (f", {len(budgets)} budgets." if any(budgets) else "."),
        facts=(),
        sections=tuple(section for section in sections if section is not None),
    )


def _rounded(value: float | None, deviation: float | None = None) -> str:
    if value is None:
        return ""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    spread = f"{deviation:,.0f}" if deviation and deviation >= 100 else f"{deviation or 0:.2g}"
    return text + (f" ± {spread}" if deviation else "")
