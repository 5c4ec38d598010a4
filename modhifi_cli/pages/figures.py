"""Figures as bytes: charts (which also go to JSON and back), and the figure of an audit.

Plain numbers in, PNG and SVG out. Nothing is shown and nothing is written here; matplotlib is imported when a figure is
drawn, without a display. Colours are those of Okabe and Ito, which colour-blind readers tell apart; markers and names
at the curves say the same again.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from modhifi_cli.errors import DataError
from modhifi_cli.records import Chart, Series

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", ":")
_GREY = "#555555"
_AUDITED = {  # colour and marker of the networks of an audit
    "dense": ("#000000", "o"),
    "edited": ("#D55E00", "s"),
    "head_only": ("#56B4E9", "^"),
    "reference": ("#009E73", "D"),
}
_MOST_CLASSES = 12  # of one panel of an audit
_MOST_BARS = 120  # groups of one figure: more cannot be read, the table has them all


def draw(chart: Chart) -> dict[str, bytes]:
    """Any chart.

    Returns:
        ``{"png": bytes, "svg": bytes}``; empty where there is no point to draw.
    """
    if not any(_finite(value) for series in chart.series for value in series.y):
        return {}
    return _draw_bars(chart) if chart.kind == "bars" else _draw_lines(chart)


def chart_to_json(chart: Chart) -> dict[str, Any]:
    """A chart as a JSON object; numbers that are not finite become null."""
    plain = dataclasses.asdict(chart)
    for series in plain["series"]:
        for axis in ("x", "y", "spread", "x_spread"):
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


def audit(report: Mapping[str, Any], *, title: str) -> dict[str, bytes]:
    """One page of an audit: what can be read inside, relearning, what the forget images become, every class.

    Args:
        report: `modhifi_cli.auditing.audit.AuditReport` as plain mappings and lists.
        title: Headline.

    Returns:
        ``{"png": bytes, "svg": bytes}``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 8.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{report['verdict']['level']}", x=0.01, ha="left", fontsize=11)
    inside, relearn, becomes, classes = figure.subplots(2, 2).flatten()
    _draw_readouts(inside, report)
    _draw_relearning(relearn, report)
    where = "evaluation" if "evaluation" in report["accuracy"]["dense"] else "calibration"
    _draw_becomes(becomes, report, where)
    _draw_classes(classes, report, where)
    for axes in (inside, relearn, becomes, classes):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.set_axisbelow(True)
    return _rendered(figure)


def _draw_readouts(axes: Any, report: Mapping[str, Any]) -> None:
    """Recall of the forgotten classes by depth: solid the linear probe, dotted the class mean."""
    # The control has the dense network's features, so one line stands for both.
    names = {"dense": "dense = head-only", "edited": "edited", "reference": "reference"}
    places = list(dict.fromkeys(one["depth"] for one in report["readouts"]))
    for model, label in names.items():
        own = {one["depth"]: one for one in report["readouts"] if one["model"] == model}
        known = [number for number, place in enumerate(places) if place in own]
        if not known:
            continue
        colour, marker = _AUDITED[model]
        for key, line in (("probe", "-"), ("class_mean", ":")):
            values = [own[places[number]][key] for number in known]
            size = 2.0 if model == "dense" else 1.0  # it may lie exactly under the edited network's
            axes.plot(known, values, line, color=colour, marker=marker, markersize=5 * size, linewidth=1.4 * size,
                      label=label if line == "-" else None)  # fmt: skip
    chance = report["protocol"]["chance of a probe, %"]
    axes.axhline(chance, color=_GREY, linewidth=1.0, linestyle=(0, (6, 3)), zorder=0)
    axes.set_xticks(range(len(places)), places, fontsize=8)
    axes.set_ylim(0, 103)
    axes.set_ylabel("recall of the forgotten classes, %")
    axes.set_title("readable inside: linear probe solid, class mean dotted, chance dashed", loc="left", fontsize=9)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)


def _draw_relearning(axes: Any, report: Mapping[str, Any]) -> None:
    """The fastest attack on every network."""
    for model, label in (("head_only", "head-only"), ("edited", "edited"), ("reference", "reference")):
        curves = report["relearn"].get(model, {}).get("curves", [])
        if curves:
            best = min(curves, key=lambda curve: (curve["reached"] is None, curve["reached"] or 0))
            colour, marker = _AUDITED[model]
            # The control is drawn broad and underneath: an edit of the classifier alone lies exactly on it.
            size = 2.5 if model == "head_only" else 1.0
            axes.plot(
                best["steps"],
                best["forget"],
                color=colour,
                marker=marker,
                markersize=4 * size,
                linewidth=1.4 * size,
                label=f"{label}, fresh row" if best["row"] == "fresh" else label,
            )
    back = report["protocol"]["relearn"]["back at forget, retain accuracy, %"][0]
    axes.axhline(back, color=_GREY, linewidth=1.0, linestyle=(0, (6, 3)), zorder=0)
    axes.set_ylim(0, 103)
    axes.set_xlim(-0.5, report["protocol"]["relearn"]["most steps"] + 0.5)
    axes.set_xlabel("relearn steps")
    axes.set_ylabel("forget accuracy, %")
    axes.set_title("relearning from a few images (dashed: counts as back)", loc="left", fontsize=9)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)


def _draw_becomes(axes: Any, report: Mapping[str, Any], where: str) -> None:
    models = [model for model in ("dense", "edited", "head_only", "reference") if model in report["becomes"]]
    shares = {}
    for model in models:
        counts = report["becomes"][model][where]
        shares[model] = [100 * count / max(1, sum(counts)) for count in counts]
    order = sorted(range(len(shares["edited"])), key=lambda cls: -max(shares[model][cls] for model in models))
    shown = sorted(order[:_MOST_CLASSES])
    _bars(axes, report, models, [[shares[model][cls] for cls in shown] for model in models], shown)
    axes.set_ylabel("share of the forget images, %")
    axes.set_title(f"what the forget images become ({where} images)", loc="left", fontsize=9)


def _draw_classes(axes: Any, report: Mapping[str, Any], where: str) -> None:
    models = [model for model in ("dense", "edited", "reference") if model in report["per_class"]]
    of = {model: report["per_class"][model][where] for model in models}
    known = [cls for cls, value in enumerate(of["dense"]) if value is not None]
    order = sorted(known, key=lambda cls: (cls not in report["forget"], -abs(of["edited"][cls] - of["dense"][cls])))
    shown = sorted(order[:_MOST_CLASSES])
    _bars(axes, report, models, [[of[model][cls] for cls in shown] for model in models], shown)
    axes.set_ylabel("accuracy, %")
    more = "" if len(shown) == len(known) else f", the {len(shown)} that changed most"
    axes.set_title(f"every class ({where} images{more})", loc="left", fontsize=9)


def _bars(
    axes: Any,
    report: Mapping[str, Any],
    models: Sequence[str],
    heights: Sequence[Sequence[float]],
    shown: Sequence[int],
) -> None:
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        places = [at + (number - (len(models) - 1) / 2) * width for at in range(len(shown))]
        label = model.replace("_", "-")
        axes.bar(places, heights[number], width, label=label, color=_AUDITED[model][0])
    classes = report["classes"]
    labels = [str(cls) if classes is None else classes[cls] for cls in shown]
    axes.set_xticks(range(len(shown)), labels, fontsize=8, rotation=35 if max(map(len, labels)) > 3 else 0, ha="right")
    for at, cls in zip(axes.get_xticklabels(), shown, strict=True):
        at.set_fontweight("bold" if cls in report["forget"] else "normal")
    axes.set_ylim(0, 118)  # room for the legend above full bars
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, ncols=len(models), loc="upper right")


def _draw_lines(chart: Chart) -> dict[str, bytes]:
    """Curves named at their end; small multiples share both axes and list the curves beside the first row."""
    panels = list(dict.fromkeys(series.panel for series in chart.series))
    styles = {name: number for number, name in enumerate(dict.fromkeys(series.name for series in chart.series))}
    columns = 1 if len(panels) == 1 else 2 if len(panels) <= 4 else 3
    rows = -(-len(panels) // columns)
    size = (6.4, 4.2) if len(panels) == 1 else (2.6 * columns, 2.1 * rows + 0.5)
    figure, grid = _figure(*size, rows=rows, columns=columns)
    for place, axes in enumerate(grid):
        axes.set_visible(place < len(panels))
    for place, panel in enumerate(panels):
        axes = grid[place]
        ends = []
        for series in chart.series:
            if series.panel == panel:
                ends += _draw_curve(axes, series, styles[series.name], markers=len(panels) == 1)
        _scale(axes, chart)
        for name, level in chart.levels.items():
            axes.axhline(level, color=_GREY, linewidth=0.8, linestyle=(0, (6, 3)), zorder=0)
            if place == 0 and len(panels) > 1:
                axes.annotate(
                    name, (0.02, level), xycoords=("axes fraction", "data"), fontsize=7, color=_GREY, va="bottom"
                )
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        if len(panels) > 1:
            axes.set_title(panel, loc="left", fontsize=9)
            axes.tick_params(labelsize=8)
        if place == min(columns, len(panels)) - 1:
            figure.canvas.draw()
            if len(panels) == 1:
                _name_curves(axes, ends, chart.levels)
            else:
                _list_curves(axes, chart, styles)
    if len(panels) == 1:
        grid[0].set_title(chart.title, loc="left", fontsize=11)
        grid[0].set_xlabel(chart.x_label)
        grid[0].set_ylabel(chart.y_label)
    else:
        figure.suptitle(chart.title, x=0.01, ha="left", fontsize=11)
        figure.supxlabel(chart.x_label, fontsize=9)
        figure.supylabel(chart.y_label, fontsize=9, x=-0.01)
        figure.tight_layout(pad=0.6)
    return _rendered(figure)


def _list_curves(axes: Any, chart: Chart, styles: Mapping[str, int]) -> None:
    """The curves of small multiples by name beside the last panel of the first row: their ends may lie together."""
    from matplotlib.lines import Line2D

    dashed = {series.name for series in chart.series if series.baseline}
    handles = [
        Line2D([], [], color=_GREY if name in dashed else _COLOURS[number % len(_COLOURS)], linewidth=1.6,
               linestyle=(0, (3, 2)) if name in dashed else _LINES[number // len(_COLOURS) % len(_LINES)])
        for name, number in styles.items()
    ]  # fmt: skip
    axes.legend(
        handles, list(styles), frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.02),
        labelcolor="linecolor", handlelength=1.6,
    )  # fmt: skip


def _draw_curve(axes: Any, series: Series, number: int, *, markers: bool) -> list[tuple[float, str, str]]:
    """One curve; the height of its end, its name and its colour, or nothing where it has no point."""
    nothing = (0.0,) * len(series.y)
    columns = (series.x, series.y, series.x_spread or nothing, series.spread or nothing)
    points = sorted(point for point in zip(*columns, strict=True) if _finite(point[0]) and _finite(point[1]))
    if not points:
        return []
    x, y, wide, high = zip(*points, strict=True)
    colour = _GREY if series.baseline else _COLOURS[number % len(_COLOURS)]
    axes.errorbar(
        x,
        y,
        xerr=wide if any(wide) else None,
        yerr=high if any(high) else None,
        color=colour,
        marker=_MARKERS[number % len(_MARKERS)] if markers and len(points) <= 24 else None,
        linestyle=(0, (3, 2)) if series.baseline else _LINES[number // len(_COLOURS) % len(_LINES)],
        markersize=5,
        linewidth=1.4,
        elinewidth=1.0,
        capsize=2.5,
    )
    return [(y[-1], series.name, colour)]


def _draw_bars(chart: Chart) -> dict[str, bytes]:
    """Lying bars, one bundle a category, with the value at each bar's end; the first 120 of them."""
    places = list(range(len(chart.categories)))[:_MOST_BARS]
    count = len(chart.series)
    figure, (axes,) = _figure(6.4, 1.2 + len(places) * max(0.28, 0.17 * count))
    height = 0.84 / count
    for number, series in enumerate(chart.series):
        values = [series.y[place] if _finite(series.y[place]) else 0.0 for place in places]
        bars = axes.barh(
            [place + (number - (count - 1) / 2) * height for place in places],
            values,
            height,
            xerr=[series.spread[place] for place in places] if series.spread else None,
            error_kw={"elinewidth": 0.8},
            label=series.name,
            color=_COLOURS[number % len(_COLOURS)],
        )
        told = [f"{series.y[place]:.3g}" if _finite(series.y[place]) else "" for place in places]
        axes.bar_label(bars, told, fontsize=6 if count > 2 else 7, padding=2, color=_GREY)
    for name, level in chart.levels.items():
        axes.axvline(level, color=_GREY, linewidth=0.8, linestyle=(0, (6, 3)), zorder=0)
        place = {"xytext": (0, 1), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(name, (level, 1.0), xycoords=("data", "axes fraction"), fontsize=7, color=_GREY, **place)
    axes.set_yticks(places, [chart.categories[place] for place in places], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    _scale(axes, chart)
    axes.set_xlabel(chart.x_label)
    axes.set_title(
        chart.title,
        loc="left",
        fontsize=11,
        pad=8 + 14 * (-(-count // 3) if count > 1 else 0) + 10 * bool(chart.levels),
    )
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    if count > 1:
        axes.legend(
            frameon=False,
            fontsize=8,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            borderaxespad=1.3 if chart.levels else 0.2,
            ncols=min(count, 3),
        )
    return _rendered(figure)


def _scale(axes: Any, chart: Chart) -> None:
    """Logarithmic axes where the chart asks for them, with 0.2 and 60 instead of powers of ten on short ones."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    places = sorted({value for series in chart.series for value in series.x})
    if places and all(value == int(value) for value in places) and not chart.x_log:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for wanted, name in ((chart.x_log, "x"), (chart.y_log, "y")):
        if not wanted:
            continue
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        low, high = getattr(axes, f"get_{name}lim")()
        if high / low < 1e4:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        if name == "x" and len(places) <= 6:
            axis.set_major_locator(FixedLocator(places))
            axis.set_minor_locator(NullLocator())


def _finite(value: float | None) -> bool:
    return value is not None and isfinite(value)


def _figure(width: float, height: float, *, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure of its own with its axes, outside of pyplot: no display, no state that other figures share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in grid:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, grid


def _name_curves(axes: Any, ends: Sequence[tuple[float, str, str]], levels: Mapping[str, float]) -> None:
    """Write each curve's name right of the axes at the height of its end, pushed apart where names would touch."""
    line = 11.0 * axes.figure.dpi / 72  # pixels of one line of text
    to_pixels, to_data = axes.transData, axes.transData.inverted()
    low = axes.get_xlim()[0]  # a logarithmic axis knows no 0
    left = float(to_pixels.transform((low, axes.get_ylim()[0]))[0])
    ends = [*ends, *((level, name, _GREY) for name, level in levels.items())]
    labels = [(float(to_pixels.transform((low, height))[1]), name, colour) for height, name, colour in ends]
    labels.sort()
    heights = [height for height, _, _ in labels]
    # A few sweeps of pushing neighbours apart by half of what they lack settle a dozen names.
    for _ in range(200):
        for below in range(len(heights) - 1):
            lacking = line - (heights[below + 1] - heights[below])
            if lacking > 0.01:
                heights[below] -= lacking / 2
                heights[below + 1] += lacking / 2
    for (anchor, name, colour), height in zip(labels, heights, strict=True):
        axes.annotate(
            name,
            xy=(1.0, float(to_data.transform((left, anchor))[1])),
            xycoords=("axes fraction", "data"),
            xytext=(1.03, float(to_data.transform((left, height))[1])),
            textcoords=("axes fraction", "data"),
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)},
        )  # fmt: skip


def _rendered(figure: Any) -> dict[str, bytes]:
    import matplotlib

    found = {}
    # Neither the time nor random identifiers: the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "modhifi", "svg.fonttype": "none"}):
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, bbox_inches="tight", metadata=metadata)
            found[kind] = buffer.getvalue()
    return found
