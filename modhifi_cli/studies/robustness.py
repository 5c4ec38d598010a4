"""Robustness: do the scores depend on how many samples are looked at, on which, and on where they come from?

ModHiFi, arXiv:2511.19566, compares 0.2 %, 0.5 % and 2 % of 100,000 synthetic images. Here every size, seed and source
of data gives scores, which are compared with those of the largest sample of the calibration data.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from modhifi_cli.errors import ConfigError
from modhifi_cli.numerics.ranks import kept_in_common, rank_correlation
from modhifi_cli.records import Chart, Finding, Progress, Series
from modhifi_cli.studies import Cell, Outcome, Row, Subject
from modhifi_cli.studies.settings import deviation, mean, median, need_samples, need_shares
from modhifi_cli.studies.subject import HANDFUL

_FEWEST = 8
_HERE = "calibration data"
_SIZES = (
    "Scores hardly depend on the number of samples (here: a median rank correlation of at least 0.95 from the {} on)."
)
_SEEDS = "Scores hardly depend on which samples are drawn (here: a median rank correlation of at least 0.95)."
_SOURCES = "Scores hardly depend on the quality of the data (here: a median rank correlation of at least 0.95)."


@dataclass(frozen=True)
class Robustness:
    """Settings of the study.

    Attributes:
        sizes: Numbers of samples; None for an eighth, a half and all of the calibration data.
        sources: Further data: files or folders like ``data.path``, for the network's own kind of input.
        keep: Share of a layer's components whose set is compared.
    """

    sizes: Sequence[int] | None = None
    sources: Sequence[str] = ()
    keep: float = 0.6

    def __post_init__(self) -> None:
        need_shares("study.keep", self.keep)
        if self.sizes is not None and not all(isinstance(n, int) and n >= _FEWEST for n in self.sizes):
            raise ConfigError(f"study.sizes must be whole numbers of samples from {_FEWEST}, got {list(self.sizes)}.")

    def cells(self, subject: Subject) -> Sequence[Cell]:
        """One cell for every size and seed, and one for every further source."""
        need_samples("robustness", subject, _FEWEST)
        if subject.reads_text and self.sources:
            raise ConfigError("study.sources are for networks that read images; give another text with data.path.")
        subject.layers(HANDFUL)
        whole = len(subject.calibration)
        sizes = sorted(
            {max(_FEWEST, whole // 8), max(_FEWEST, whole // 2), whole} if self.sizes is None else self.sizes
        )
        layers = {"layers": subject.asked if isinstance(subject.asked, str) else list(subject.asked)}
        cells: list[Cell] = [
            {"source": "", "size": size, "seed": seed, **layers} for size in sizes for seed in subject.seeds
        ]
        for source in self.sources:
            most = len(subject.draw(source, subject.seeds[0]))
            size = min(most, sizes[-1])
            cells.append({"source": source, "size": size, "seed": subject.seeds[0], **layers})
        return cells

    def compute(self, subject: Subject, cell: Cell) -> Generator[Progress, None, list[Row]]:
        """A row for every component of every layer: its score."""
        source = subject.draw(cell["source"], cell["seed"])
        layers = subject.layers(HANDFUL)
        scores = yield from subject.scores_of(layers, source=source, images=cell["size"], item=cell["source"] or _HERE)
        return [
            {
                "source": cell["source"] or _HERE, "size": cell["size"], "seed": cell["seed"], "layer": layer,
                "component": number, "score": score,
            }
            for layer in layers for number, score in enumerate(scores[layer].tolist())
        ]  # fmt: skip

    def conclude(self, rows: Sequence[Row]) -> Outcome:
        """Every sample's scores against those of the largest one of the first seed."""
        samples: dict[tuple[str, int, int], dict[str, list[float]]] = {}
        for row in rows:
            own = samples.setdefault((row["source"], row["size"], row["seed"]), {})
            own.setdefault(row["layer"], []).append(row["score"])
        reference = max((key for key in samples if key[0] == _HERE), key=lambda key: (key[1], -key[2]), default=None)
        if reference is None:
            return Outcome(findings=(), charts=())
        alike = {key: self._compared(samples[reference], own) for key, own in samples.items() if key != reference}
        summary = []
        for source, size in dict.fromkeys(key[:2] for key in alike):
            found = [line for key, lines in alike.items() if key[:2] == (source, size) for line in lines]
            if found:
                rank, common = ([line[place] for line in found] for place in (1, 2))
                summary.append(
                    {
                        "source": source, "size": size, "draws": sum(key[:2] == (source, size) for key in alike),
                        "rank_correlation": median(rank), "lowest_rank_correlation": min(rank, default=None),
                        "kept_in_common": mean(common), "kept_in_common_sd": deviation(common),
                    }
                )  # fmt: skip
        return Outcome(
            findings=tuple(_findings(summary, reference)),
            charts=tuple(self._charts(alike, reference)),
            summary=tuple(summary),
            notes=(
                f"Compared with the scores of {reference[1]} samples of the calibration data, seed {reference[2]}; "
                f"kept in common is the share of the best {100 * self.keep:g} % of a layer's components "
                f"(two unrelated scorings: {100 * self.keep:g} %).",
                "A smaller sample of the reference's own seed is a part of it, so its agreement is flattered; other "
                "seeds draw anew.",
            ),
        )

    def _compared(
        self, reference: dict[str, list[float]], own: dict[str, list[float]]
    ) -> list[tuple[str, float, float]]:
        lines = []
        for layer, scores in own.items():
            one, other = torch.tensor(reference[layer]), torch.tensor(scores)
            keep = max(1, round(self.keep * len(one)))
            lines.append((layer, rank_correlation(one, other), kept_in_common(one, other, keep)))
        return lines

    def _charts(self, alike: dict, reference: tuple[str, int, int]) -> list[Chart]:
        series = []
        for place, panel in ((1, "rank correlation"), (2, "kept in common")):
            for layer in dict.fromkeys(line[0] for lines in alike.values() for line in lines):
                points = []
                for size in sorted({key[1] for key in alike if key[0] == _HERE}):
                    values = [
                        line[place] for key, lines in alike.items() if key[:2] == (_HERE, size)
                        for line in lines if line[0] == layer
                    ]  # fmt: skip
                    points.append((float(size), mean(values), deviation(values)))
                if points:
                    x, y, spread = zip(*points, strict=True)
                    series.append(Series(layer, y, x, spread, panel=panel))
        charts = []
        if series:
            charts.append(
                Chart(
                    name="robustness",
                    title=f"Scores of fewer samples against those of {reference[1]}",
                    x_label="calibration samples",
                    y_label="agreement of the scores, 0 … 1",
                    series=tuple(series),
                    x_log=len({key[1] for key in alike if key[0] == _HERE}) > 1,
                )
            )
        others = list(dict.fromkeys(key[0] for key in alike if key[0] != _HERE))
        if others:
            layers = list(dict.fromkeys(line[0] for lines in alike.values() for line in lines))
            bars = []
            for source in others:
                values = []
                for layer in layers:
                    own = [
                        line[1]
                        for key, lines in alike.items()
                        if key[0] == source
                        for line in lines
                        if line[0] == layer
                    ]
                    values.append(mean(own))
                bars.append(Series(source.rpartition("/")[2], tuple(values)))
            charts.append(
                Chart(
                    name="sources",
                    title="Scores from other data against those from the calibration data",
                    x_label="rank correlation",
                    y_label="",
                    kind="bars",
                    categories=tuple(layers),
                    series=tuple(bars),
                )
            )
        return charts


def _findings(summary: Sequence[Row], reference: tuple[str, int, int]) -> list[Finding]:
    found = []
    here = [line for line in summary if line["source"] == _HERE]
    fewer = [line for line in here if line["size"] < reference[1]]
    if fewer:
        told = "; ".join(
            f"{line['size']} samples: {line['rank_correlation']:.3f} (lowest of all layers "
            f"{line['lowest_rank_correlation']:.3f}), {line['kept_in_common']:.0%} kept in common" for line in fewer
        )  # fmt: skip
        found.append(
            Finding(
                _SIZES.format("smallest size"),
                f"Median rank correlation with {reference[1]} samples: {told}.",
                fewer[0]["rank_correlation"] >= 0.95,
            )
        )
    same = [line for line in here if line["size"] == reference[1]]
    for line in same:
        told = f"{line['draws']} other draws of {line['size']}: {line['rank_correlation']:.3f}, lowest of all layers "
        told += f"{line['lowest_rank_correlation']:.3f}; {line['kept_in_common']:.0%} kept in common."
        found.append(Finding(_SEEDS, told, line["rank_correlation"] >= 0.95))
    others = [line for line in summary if line["source"] != _HERE]
    if others:
        told = "; ".join(
            f"{line['size']} samples of {line['source'].rpartition('/')[2]}: {line['rank_correlation']:.3f} (lowest "
            f"{line['lowest_rank_correlation']:.3f}), {line['kept_in_common']:.0%} kept in common" for line in others
        )  # fmt: skip
        holds = min(line["rank_correlation"] for line in others) >= 0.95
        found.append(Finding(_SOURCES, f"Median rank correlation: {told}.", holds))
    return found
