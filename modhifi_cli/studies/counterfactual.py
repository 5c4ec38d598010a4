"""Counterfactual: what does removing the components with the highest, the lowest or any scores do to the answers?

ModHiFi, arXiv:2511.19566. The same share of every layer's components is removed at once, nothing is repaired and no
statistics are re-estimated, so that the answers say what the components were worth and not what a repair makes up for.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from modhifi_cli.records import Chart, Finding, Progress, Series
from modhifi_cli.studies import Cell, Outcome, Row, Subject
from modhifi_cli.studies.settings import deviation, mean, need_samples, need_shares
from modhifi_cli.studies.subject import weights_kept, zero_components_

_CHOICES = {"top": "highest scores", "random": "random", "bottom": "lowest scores"}
_FEWEST = 8
_CLAIM = (
    "Removing 22 % of the components costs 70 points of accuracy where they have the highest scores, 32 where they are "
    "random and 1 where they have the lowest (ResNet-50, CIFAR-10)."
)
_PAPER = 0.22


@dataclass(frozen=True)
class Counterfactual:
    """Settings of the study.

    Attributes:
        shares: Shares of every layer's components that are removed.
    """

    shares: Sequence[float] = (0.05, 0.1, 0.22, 0.4)

    def __post_init__(self) -> None:
        need_shares("study.shares", self.shares)

    def cells(self, subject: Subject) -> Sequence[Cell]:
        """The network as it is, and one cell for every share and choice (and seed, where it is random)."""
        need_samples("counterfactual", subject, _FEWEST)
        subject.layers(None)
        layers = {"layers": subject.asked if isinstance(subject.asked, str) else list(subject.asked)}
        found: list[Cell] = [{"removed": "nothing", "share": 0.0, "seed": 0, **layers}]
        for share in self.shares:
            for choice in _CHOICES:
                for seed in subject.seeds if choice == "random" else subject.seeds[:1]:
                    found.append({"removed": choice, "share": share, "seed": seed, **layers})
        return found

    def compute(self, subject: Subject, cell: Cell) -> Generator[Progress, None, list[Row]]:
        """One row: how well the network answers."""
        layers, removed = subject.layers(None), 0
        scores = yield from subject.scores_of(layers, item="scores")
        generator = torch.Generator().manual_seed(cell["seed"])
        with weights_kept(subject.model):
            for layer in layers:
                components = len(scores[layer])
                count = round(cell["share"] * components)
                order = scores[layer].argsort(descending=cell["removed"] == "top", stable=True)
                if cell["removed"] == "random":
                    order = torch.randperm(components, generator=generator)
                zero_components_(subject.model.get_submodule(layer), order[:count])
                removed += count
            quality = yield from subject.quality(subject.model, item=cell["removed"])
        return [
            {
                "removed": cell["removed"], "share": cell["share"], "seed": cell["seed"], "layers": len(layers),
                "components_removed": removed, "quality": quality, "unit": subject.quality_label,
            }
        ]  # fmt: skip

    def conclude(self, rows: Sequence[Row]) -> Outcome:
        """Loss of accuracy for every share and choice."""
        dense = next((row["quality"] for row in rows if row["removed"] == "nothing"), None)
        label = rows[0]["unit"]
        summary, series = [], []
        for choice, name in _CHOICES.items():
            points = []
            for share in dict.fromkeys(row["share"] for row in rows if row["removed"] == choice):
                found = [row["quality"] for row in rows if (row["removed"], row["share"]) == (choice, share)]
                points.append((100 * share, mean(found), deviation(found)))
                summary.append(
                    {
                        "removed": name, "share": share, "draws": len(found), "quality": points[-1][1],
                        "lost_points": None if dense is None else dense - points[-1][1],
                    }
                )  # fmt: skip
            if points:
                start = [] if dense is None else [(0.0, dense, 0.0)]
                x, y, spread = zip(*start, *points, strict=True)
                series.append(Series(name, y, x, spread))
        chart = Chart(
            name="counterfactual",
            title="What the removed components were worth",
            x_label="components removed from every layer, %",
            y_label=label,
            series=tuple(series),
            levels={} if dense is None else {f"dense {dense:.1f}": dense},
        )
        return Outcome(
            findings=tuple(_findings(summary)),
            charts=(chart,),
            summary=tuple(summary),
            notes=(
                f"Removed from {rows[0]['layers']} layers at once, without repair and without new statistics; scores "
                "are those of the intact network, summed over a layer's outputs.",
            ),
        )


def _findings(summary: Sequence[Row]) -> list[Finding]:
    known = [row for row in summary if row["lost_points"] is not None]
    if not known:
        return []
    shares = sorted({row["share"] for row in known})
    lost = {(row["share"], row["removed"]): row["lost_points"] for row in known}
    whole = [share for share in shares if all((share, name) in lost for name in _CHOICES.values())]
    if not whole:
        return []
    told = "; ".join(
        f"{100 * share:g} %: {' / '.join(f'{lost[share, name]:.1f}' for name in _CHOICES.values())}" for share in whole
    )
    top, random, bottom = (lost[min(whole, key=lambda share: abs(share - _PAPER)), name] for name in _CHOICES.values())
    found = f"Points lost with the highest / random / lowest scores removed, by share of the components: {told}."
    return [Finding(_CLAIM, found, top > random > bottom and bottom < 0.25 * random)]
