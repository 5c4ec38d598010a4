"""The page of an audit: its verdict on top, every figure under its name, and how it was measured."""

import re
from collections.abc import Mapping
from typing import Any

from modhifi_cli.pages.page import Block, Code, Drawing, Fact, Listing, Page, Section, Table, Text, sections
from modhifi_cli.pages.terms import class_name, signed, told

_NETWORKS = {"dense": "dense", "edited": "edited", "head_only": "head-only", "reference": "reference"}
_NAMES = {
    "FA": "forget accuracy (FA)", "UA": "unlearning accuracy (UA)", "RA": "remaining accuracy (RA)",
    "TA": "test accuracy (TA)", "MIA": "membership attack (MIA)", "MIA check": "check of that attack (MIA check)",
    "loss forget": "membership by loss, forget", "loss retain": "membership by loss, retain",
    "neighbour": "told from the nearest class (neighbour)",
}  # fmt: skip
_AT_THE_TOP = ("FA", "TA", "RA", "probe, penultimate", "class mean, penultimate", "relearn steps", "MIA")
_MOST_CLASSES = 30  # rows of a table of classes; the JSON file has them all
NOT_MADE = (
    "The audit was left out (audit=none): low forget accuracy says what the outputs do, not what the features still "
    "hold. modhifi audit run=DIR makes it up."
)


def page(*, title: str, report: Mapping[str, Any], svg: str | None = None, repeat: str = "") -> Page:
    """The page of an audit: the verdict with its grounds, every figure beside what it means, and how it was measured.

    Args:
        title: Headline.
        report: `modhifi_cli.auditing.audit.AuditReport` as plain mappings and lists.
        svg: The audit's figure, which lies as audit.svg beside the page.
        repeat: The command that does it again.
    """
    verdict, found = report["verdict"], report["figures"]
    drawing = None
    if svg is not None:
        caption = "What is readable inside, relearning, what the images become, every class"
        drawing = Section("At a glance", (Drawing(caption, svg, "audit.svg"),))
    protocol = [(name, told(value)) for name, value in report["protocol"].items()]
    protocol.append(("seconds", told(report["seconds"])))
    return Page(
        title=title,
        lead="Head-only is the control: the dense network with the forgotten classes' rows removed, nothing else.",
        facts=tuple(_fact(name, found) for name in _AT_THE_TOP if found["edited"].get(name) is not None),
        sections=sections(
            Section("Why", (Listing(tuple(verdict["sentences"])),)),
            drawing,
            Section("Figures", _figures(report)),
            Section("What can be read inside", _readouts(report)),
            _becomes(report),
            _per_class(report),
            Section("Membership", _membership(report)),
            _further(report["further"]) if report.get("further") else None,
            Section("Distances between networks", _distances(report)),
            Section("How it was measured", (Table(("", ""), tuple(protocol)),), folded=True),
            Section("Again", (Code(repeat),)) if repeat else None,
        ),
        banner=f"{verdict['level'][:1].upper()}{verdict['level'][1:]}.",
        mood=mood(verdict["level"]),
    )


def mood(level: str) -> bool | None:
    """Whether a verdict is good news: inside as well as outside yes, at the output only or not at all no."""
    if "cannot tell" in level:
        return None
    return "inside" in level


def rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures of an audit that fit a terminal, one row a figure: of the places only the last one."""
    found = report["figures"]
    models = _models(report)
    return [
        {"figure": _name(name)} | {_NETWORKS[model]: _text(name, found[model].get(name)) for model in models}
        for name in dict.fromkeys(name for model in models for name in found[model])
        if "," not in name or name.endswith(", penultimate")
    ]


def _models(report: Mapping[str, Any]) -> list[str]:
    return [name for name in _NETWORKS if name in report["figures"]]


def _heads(report: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_NETWORKS[name] for name in _models(report))


def _name(figure: str) -> str:
    unit = "" if figure.startswith("TV") or figure == "relearn steps" else ", %"
    return _called(figure) + unit


def _called(figure: str) -> str:
    """What a reader calls a figure; those with rounded weights are as many as the settings have bits."""
    rounded = re.fullmatch(r"int(\d+) FA", figure)
    return f"forget accuracy, weights in {rounded[1]} bits ({figure})" if rounded else _NAMES.get(figure, figure)


def _fact(name: str, found: Mapping[str, Mapping[str, float | None]]) -> Fact:
    before = found["dense"].get(name)
    shown = _text(name, found["edited"][name]) + (" steps" if name == "relearn steps" else " %")
    return Fact(_called(name), shown, "" if before is None else f"dense {_text(name, before)}")


def _text(name: str, value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return "–"
    digits = 2 if name.startswith("TV") else 1
    return signed(value, digits) if sign else f"{value:.{digits}f}"


def _figures(report: Mapping[str, Any]) -> tuple[Block, ...]:
    found, models, gaps = report["figures"], _models(report), report["gaps"].get("edited", {})
    lines = []
    for name in dict.fromkeys(name for model in models for name in found[model]):
        gap = (_text(name, gaps.get(name), sign=True),) if gaps else ()
        lines.append((_name(name), *(_text(name, found[model].get(name)) for model in models), *gap))
    return (
        Table(("figure", *_heads(report), *(("edited − reference",) if gaps else ())), tuple(lines)),
        Text(
            "Shares in %, relearn steps in steps (– where the attack did not succeed, or was not made), TV in 0 … 1. "
            "Names behind a comma are places in the network, in execution order."
        ),
        Listing(tuple(f"{_called(name)}: {meaning}." for name, meaning in report["definitions"].items())),
    )


def _readouts(report: Mapping[str, Any]) -> tuple[Block, ...]:
    models = _models(report)
    lines = tuple(
        (
            one["depth"], _NETWORKS[one["model"]], str(one["features"]), f"{one['probe']:.1f}",
            f"{one['probe_balanced']:.1f}", f"{one['class_mean']:.1f}", f"{one['class_mean_balanced']:.1f}",
            f"{one['tv']:.2f}",
        )
        for one in sorted(report["readouts"], key=lambda one: models.index(one["model"]))
    )  # fmt: skip
    head = ("place", "network", "features", "probe, forget", "all", "class mean, forget", "all", "TV")
    chance = report["protocol"]["chance of a probe, %"]
    meaning = f"Recall in %: of the forgotten classes, and the mean over all classes of the probe; chance is {chance:.1f} %."
    return Table(head, lines), Text(meaning)


def _judged(report: Mapping[str, Any]) -> str:
    return "evaluation" if "evaluation" in report["accuracy"]["dense"] else "calibration"


def _becomes(report: Mapping[str, Any]) -> Section:
    where, models = _judged(report), _models(report)
    counts = {model: report["becomes"][model][where] for model in models}
    total = sum(counts["dense"])
    order = sorted(range(len(counts["dense"])), key=lambda cls: (-counts["edited"][cls], -counts["dense"][cls], cls))
    shown = [cls for cls in order if any(counts[model][cls] for model in models)][:_MOST_CLASSES]
    lines = tuple(
        (class_name(cls, report["classes"]), *(str(counts[model][cls]) for model in models)) for cls in shown
    )
    below = f"Of {total} {where} images of the forgotten classes; classes that no network gives are left out."
    return Section("What the forget images become", (Table(("given class", *_heads(report)), lines), Text(below)))


def _per_class(report: Mapping[str, Any]) -> Section:
    where, models = _judged(report), _models(report)
    of = {model: report["per_class"][model][where] for model in models}
    known = [cls for cls in range(len(of["dense"])) if of["dense"][cls] is not None]
    shown, left = known, ""
    if len(known) > _MOST_CLASSES:
        change = {cls: abs(of["edited"][cls] - of["dense"][cls]) for cls in known}
        shown = sorted(sorted(known, key=lambda cls: -change[cls])[:_MOST_CLASSES])
        left = f" The {_MOST_CLASSES} that changed most; audit.json has all {len(known)}."
    lines = tuple(
        (
            class_name(cls, report["classes"]) + (", forgotten" if cls in report["forget"] else ""),
            *(f"{of[model][cls]:.1f}" for model in models),
        )
        for cls in shown
    )
    blocks = (Table(("class", *_heads(report)), lines), Text(f"Accuracy on {where} images, %.{left}"))
    return Section("Every class", blocks)


def _membership(report: Mapping[str, Any]) -> tuple[Block, ...]:
    why = Text(f"{report['protocol']['membership']}.")
    if not report["membership"]:
        return (why,)
    lines = tuple(
        (
            _NETWORKS[name], f"{one['confidence_accuracy']:.1f} ± {one['confidence_accuracy_error']:.1f}",
            f"{one['forget_as_non_members']:.1f}", f"{one['forget_evaluation_as_non_members']:.1f}",
            f"{one['loss_forget']:.1f} ± {one['loss_forget_error']:.1f}",
            f"{one['loss_retain']:.1f} ± {one['loss_retain_error']:.1f}",
        )
        for name, one in report["membership"].items()
    )  # fmt: skip
    head = ("network", "MIA check", "MIA", "MIA of evaluation images", "loss forget", "loss retain")
    return Table(head, lines), Text("In %, ± one standard error."), why


def _further(found: Mapping[str, Any]) -> Section:
    """Intervals of the attacks that draw, and what rounding does to the accuracies."""
    lines = []
    for figure, by_network in {"neighbour": found["neighbour"], **found["intervals"]}.items():
        for name, one in by_network.items():
            if one.get("mean") is None:
                continue
            ends = "–" if one["low"] is None else f"{one['low']:.1f} … {one['high']:.1f}"
            lines.append((_called(figure), _NETWORKS[name], f"{one['mean']:.1f}", ends, str(one["draws"])))
    blocks: list[Block] = [Table(("figure", "network", "mean", "95 % interval of the mean", "draws"), tuple(lines))]
    rounded = tuple(
        (_NETWORKS[name], bits, f"{one['forget']:.1f}", f"{one['retain']:.1f}")
        for name, each in found["rounding"].items()
        for bits, one in each.items()
    )
    if rounded:
        blocks.append(Table(("network", "weights", "forget, %", "retain, %"), rounded))
    return Section("Several draws, and rounded weights", tuple(blocks))


def _distances(report: Mapping[str, Any]) -> tuple[Block, ...]:
    output, features = report["distances"]["output"], report["distances"]["features"]
    lines = [(f"softmax: {pair}", f"{of['forget']:.3f}", f"{of['retain']:.3f}") for pair, of in output.items()]
    lines += [(f"features, {depth}: dense, edited", f"{bound:.3f}", "") for depth, bound in features.items()]
    meaning = (
        "Softmax: mean total variation between the answers to one image. Features: lower bound on the total variation "
        "between the two networks' features of the forget images."
    )
    return Table(("between", "forget images", "retain images"), tuple(lines)), Text(meaning)
