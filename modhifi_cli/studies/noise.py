"""Noise: does noise in the components with high scores hurt more than in those with low ones, and do scores bear it?

ModHiFi, arXiv:2511.19566. Gaussian noise is added to what a layer makes of some of its components (their weights), the
same share of every layer at once; and, apart from that, to a whole layer's weights, whose scores are then computed anew
from the same second moment.
"""

import dataclasses
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from modhifi_cli.numerics.ranks import kept_in_common, rank_correlation
from modhifi_cli.records import Chart, Finding, Progress, Series
from modhifi_cli.studies import Cell, Outcome, Row, Subject
from modhifi_cli.studies.settings import deviation, mean, median, need_levels, need_samples, need_shares
from modhifi_cli.studies.subject import weights_kept

_PARTS = {"high": "noise in high-scored components", "low": "noise in low-scored components"}
_FEWEST = 8
_CLAIM = "Noise N(0, 0.01 … 0.05) in components of high fidelity hurts much more than in the others."
_SCORES = "Scores change little under such noise (here: a median rank correlation of at least 0.9 at every level)."


@dataclass(frozen=True)
class Noise:
    """Settings of the study.

    Attributes:
        levels: Standard deviations of the noise, in units of the weights.
        share: Share of every layer's components with the highest (lowest) scores that get the noise.
    """

    levels: Sequence[float] = (0.01, 0.02, 0.03, 0.04, 0.05)
    share: float = 0.2

    def __post_init__(self) -> None:
        need_levels("study.levels", self.levels)
        need_shares("study.share", self.share)

    def cells(self, subject: Subject) -> Sequence[Cell]:
        """The network as it is, a cell for every part, level and seed, and one for the scores under every seed."""
        need_samples("noise", subject, _FEWEST)
        subject.layers(None)
        layers = {"layers": subject.asked if isinstance(subject.asked, str) else list(subject.asked)}
        found: list[Cell] = [{"part": "none", "level": 0.0, "seed": 0, **layers}]
        for seed in subject.seeds:
            found += [
                {"part": part, "level": level, "seed": seed, **layers} for level in self.levels for part in _PARTS
            ]
        return [*found, *({"part": "scores", "seed": seed, **layers} for seed in subject.seeds)]

    def compute(self, subject: Subject, cell: Cell) -> Generator[Progress, None, list[Row]]:
        """How well the noisy network answers; or, for the scores, a row for every layer and level."""
        layers = subject.layers(None)
        if cell["part"] == "scores":
            return (yield from self._scores(subject, layers, cell["seed"]))
        scores = yield from subject.scores_of(layers, item="scores")
        with weights_kept(subject.model), torch.no_grad():
            for layer in layers if cell["part"] != "none" else ():
                count = max(1, round(self.share * len(scores[layer])))
                chosen = scores[layer].argsort(descending=cell["part"] == "high", stable=True)[:count]
                weight = subject.model.get_submodule(layer).weight
                drawn = _drawn(weight[:, chosen].shape, cell["level"], f"{cell['seed']} {layer}")
                weight[:, chosen] += drawn.to(weight)
            quality = yield from subject.quality(subject.model, item=cell["part"])
        return [
            {
                "part": cell["part"], "level": cell["level"], "seed": cell["seed"], "quality": quality,
                "unit": subject.quality_label,
            }
        ]  # fmt: skip

    def _scores(self, subject: Subject, layers: Sequence[str], seed: int) -> Generator[Progress, None, list[Row]]:
        consumers = yield from subject.consumers(layers, item="scores")
        rows = []
        for number, (layer, consumer) in enumerate(consumers.items()):
            before = subject.scores(consumer)
            keep = max(1, round((1 - self.share) * len(before)))
            for level in self.levels:
                drawn = _drawn(consumer.weight.shape, level, f"{seed} {layer} scores").to(consumer.weight)
                after = subject.scores(dataclasses.replace(consumer, weight=consumer.weight + drawn))
                rows.append(
                    {
                        "part": "scores", "level": level, "seed": seed, "layer": layer,
                        "rank_correlation": rank_correlation(before, after),
                        "kept_in_common": kept_in_common(before, after, keep),
                        "relative_level": level / float(consumer.weight.std()),
                    }
                )  # fmt: skip
            yield Progress("scores", layer, number + 1, len(consumers))
        return rows

    def conclude(self, rows: Sequence[Row]) -> Outcome:
        """Answers against the level for either part, and how far scores keep their order."""
        answers = [row for row in rows if "quality" in row]
        scores = [row for row in rows if row["part"] == "scores"]
        dense = next((row["quality"] for row in answers if row["part"] == "none"), None)
        summary = [_line(level, answers, scores) for level in self.levels]
        charts = []
        if any(row["part"] in _PARTS for row in answers):
            series = []
            for part, name in _PARTS.items():
                start = [] if dense is None else [(0.0, dense, 0.0)]
                points = [
                    (line["level"], line[part], line[f"{part}_sd"]) for line in summary if line[part] == line[part]
                ]
                if points:
                    x, y, spread = zip(*start, *points, strict=True)
                    series.append(Series(name, y, x, spread))
            charts.append(
                Chart(
                    name="noise",
                    title=f"Noise in {100 * self.share:g} % of every layer's components",
                    x_label="standard deviation of the noise, in units of the weights",
                    y_label=answers[0]["unit"],
                    series=tuple(series),
                    levels={} if dense is None else {f"dense {dense:.1f}": dense},
                )
            )
        if scores:
            x = tuple(line["level"] for line in summary)
            charts.append(
                Chart(
                    name="scores_under_noise",
                    title="Scores under noise in all weights of a layer (median over layers)",
                    x_label="standard deviation of the noise, in units of the weights",
                    y_label="agreement with the scores without noise, 0 … 1",
                    series=(
                        Series("rank correlation", tuple(line["rank_correlation"] for line in summary), x),
                        Series("kept in common", tuple(line["kept_in_common"] for line in summary), x),
                    ),
                )
            )
        return Outcome(
            findings=tuple(_findings(summary, dense, bool(scores))),
            charts=tuple(charts),
            summary=tuple(summary),
            notes=(
                "The noise is Gaussian with the given standard deviation on every weight that reads the chosen "
                "components. Scores under noise keep "
                f"{100 - 100 * self.share:g} % of a layer's components; two unrelated scorings would have that share "
                "in common.",
            ),
        )


def _drawn(shape: torch.Size, level: float, name: str) -> torch.Tensor:
    """Noise that depends on its name alone, so that parts and orders of layers do not matter; levels share the draw."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return level * torch.randn(shape, generator=generator, dtype=torch.float64)


def _line(level: float, answers: Sequence[Row], scores: Sequence[Row]) -> Row:
    line: Row = {"level": level}
    for part in _PARTS:
        found = [row["quality"] for row in answers if (row["part"], row["level"]) == (part, level)]
        line |= {part: mean(found), f"{part}_sd": deviation(found)}
    for key in ("rank_correlation", "kept_in_common"):
        line[key] = median(row[key] for row in scores if row["level"] == level)
    return line


def _findings(summary: Sequence[Row], dense: float | None, scored: bool) -> list[Finding]:
    found = []
    last = next(
        (line for line in reversed(summary) if line["high"] == line["high"] and line["low"] == line["low"]), None
    )
    if dense is not None and last is not None:
        high, low = dense - last["high"], dense - last["low"]
        told = (
            f"At {last['level']:g}: {high:.1f} points lost with noise in the high-scored, {low:.1f} in the low-scored."
        )
        found.append(Finding(_CLAIM, told, high > 2 * low and high > 1))
    if scored:
        told = "; ".join(f"{line['level']:g}: {line['rank_correlation']:.3f}" for line in summary)
        worst = min(line["rank_correlation"] for line in summary)
        found.append(Finding(_SCORES, f"Median rank correlation by level: {told}.", worst >= 0.9))
    return found
