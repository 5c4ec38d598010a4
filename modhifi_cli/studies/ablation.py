"""Ablation: what do the repair of the kept weights and the re-estimated BatchNorm statistics bring, alone and together?

ModHiFi, arXiv:2511.19566. The network is pruned to several shares with each of the two switched on or off, all else the
same; then the answers are compared at equal sparsity, and the sparsity at equal answers.
"""

import copy
import functools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from torch import nn

from modhifi_cli.engine.image_walk import ImageWalk
from modhifi_cli.engine.plan import Summary
from modhifi_cli.engine.prune import prune_
from modhifi_cli.engine.walk import Budget, Recipe
from modhifi_cli.errors import ConfigError
from modhifi_cli.numerics.compensation import NoCompensation
from modhifi_cli.numerics.schedule import geometric
from modhifi_cli.records import Chart, Finding, Progress, Series
from modhifi_cli.studies import Cell, Outcome, Row, Subject
from modhifi_cli.studies.settings import deviation, mean, need_samples, need_shares
from modhifi_cli.studies.subject import not_for

_FEWEST = 32
_ARMS = {
    "both": (True, True), "repair alone": (True, False), "BatchNorm alone": (False, True), "neither": (False, False),
}  # fmt: skip
_CLAIM = (
    "Each brings something and both together most: at about equal accuracy 1.61× fewer FLOPs with neither, 2.21× with "
    "repair, 2.53× with BatchNorm, 3.22× with both (ResNet-50, CIFAR-10)."
)
_OTHERS = ("existence", "counterfactual", "noise", "robustness", "lipschitz")


@dataclass(frozen=True)
class Ablation:
    """Settings of the study.

    Attributes:
        shares: Shares that are removed, of what `target` counts.
        drop: Points below the dense network at which sparsities are compared.
    """

    shares: Sequence[float] = (0.1, 0.2, 0.4, 0.6)
    drop: float = 10.0

    def __post_init__(self) -> None:
        need_shares("study.shares", self.shares)
        if not isinstance(self.drop, (int, float)) or not 0 < self.drop < 100:
            raise ConfigError(f"study.drop must be a number of points above 0 and below 100, got {self.drop!r}.")

    def cells(self, subject: Subject) -> Sequence[Cell]:
        """The network as it is, and a cell for every arm, share and seed."""
        if subject.reads_text:
            raise not_for("ablation", "a language model has no BatchNorm statistics to re-estimate", _OTHERS)
        if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in subject.model.modules()):
            raise not_for("ablation", "the network has no BatchNorm, so there is nothing to switch off", _OTHERS)
        if subject.steps.get("target") not in ("params", "flops", "components"):
            raise ConfigError(
                f"ablation: target must be params, flops or components, got {subject.steps.get('target')}."
            )
        if subject.asked != "auto":
            raise ConfigError("ablation prunes the whole network; leave out layers=.")
        need_samples("ablation", subject, _FEWEST)
        found: list[Cell] = [{"arm": "dense", "share": 0.0, "seed": 0}]
        for share in self.shares:
            found += [{"arm": arm, "share": share, "seed": seed} for seed in subject.seeds for arm in _ARMS]
        return found

    def compute(self, subject: Subject, cell: Cell) -> Generator[Progress, None, list[Row]]:
        """One row: what was removed, and how well the pruned copy answers."""
        row: Row = {**cell, "target": subject.steps.get("target"), "unit": subject.quality_label}
        if cell["arm"] == "dense":
            return [row | {"quality": (yield from subject.quality(subject.model, item="dense")), "achieved": 0.0}]
        repair, reestimate = _ARMS[cell["arm"]]
        model, summary = copy.deepcopy(subject.model), None
        walk = ImageWalk(
            model,
            subject.draw("", cell["seed"]),
            batchnorm="reestimate" if reestimate else "stored",
            batch_size=subject.batch_size,
            device=subject.device,
            gathering=subject.steps["statistics"],
            seed=cell["seed"],
        )
        recipe = Recipe(
            scoring=subject.steps["scoring"],
            selection=subject.steps["selection"],
            compensation=subject.steps["compensation"] if repair else NoCompensation(),
            allocation=subject.steps["allocation"],
            schedule=functools.partial(geometric, iterations=1),
            seed=cell["seed"],
        )
        budget = Budget(cell["share"], *(subject.steps[key] for key in ("target", "round_to", "block")))
        for event in prune_(walk, recipe, budget):
            if isinstance(event, Progress):
                yield event
            elif isinstance(event, Summary):
                summary = event
        assert summary is not None, "the task ended without a summary"
        quality = yield from subject.quality(model, item=cell["arm"])
        achieved = {f"removed_{name}": share for name, share in summary.achieved.items()}
        return [row | {"quality": quality, "achieved": summary.achieved[subject.steps["target"]], **achieved}]

    def conclude(self, rows: Sequence[Row]) -> Outcome:
        """Answers at equal sparsity, sparsity at equal answers."""
        dense = next((row["quality"] for row in rows if row["arm"] == "dense"), None)
        target = {"params": "parameters", "flops": "FLOPs"}.get(rows[0]["target"], rows[0]["target"])
        summary, series, reached = [], [], {}
        for arm in _ARMS:
            points = []
            for share in sorted({row["share"] for row in rows if row["arm"] == arm}):
                found = [row for row in rows if (row["arm"], row["share"]) == (arm, share)]
                values = [row["quality"] for row in found]
                points.append((100 * mean(row["achieved"] for row in found), mean(values), deviation(values)))
                summary.append(
                    {
                        "arm": arm, "asked": share, f"removed {target}, %": points[-1][0], "draws": len(found),
                        "quality": points[-1][1], "sd": points[-1][2],
                    }
                )  # fmt: skip
            if points:
                points = ([] if dense is None else [(0.0, dense, 0.0)]) + points
                x, y, spread = zip(*points, strict=True)
                series.append(Series(arm, y, x, spread))
                if dense is not None:
                    reached[arm] = _crossing(points, dense - self.drop)
        chart = Chart(
            name="ablation",
            title="Repair and BatchNorm re-estimation, on and off",
            x_label=f"removed {target}, %",
            y_label=rows[0]["unit"],
            series=tuple(series),
            levels={} if dense is None else {f"dense {dense:.1f}": dense},
        )
        return Outcome(
            findings=tuple(self._findings(summary, reached, target)),
            charts=(chart,),
            summary=tuple(summary),
            notes=("One shot, no fine-tuning; every arm sees the same images and the same draw.",),
        )

    def _findings(self, summary: Sequence[Row], reached: dict[str, float], target: str) -> list[Finding]:
        if set(reached) != set(_ARMS):
            return []
        told = "; ".join(f"{arm} {_factor(share)}" for arm, share in reached.items())
        deepest = max(line["asked"] for line in summary)
        last = {line["arm"]: line["quality"] for line in summary if line["asked"] == deepest}
        values = "; ".join(f"{arm} {value:.1f}" for arm, value in last.items())
        both = reached["both"]
        singles = (reached["repair alone"], reached["BatchNorm alone"])
        holds = both >= max(singles) and min(singles) >= reached["neither"]
        found = f"{self.drop:g} points below dense, removed {target}: {told}. At {deepest:.0%}: {values}."
        return [Finding(_CLAIM, found, holds)]


def _crossing(points: Sequence[tuple[float, float, float]], level: float) -> float:
    """Where the line through the points first falls below a level, in their unit; the last point if nowhere."""
    for (x0, y0, _), (x1, y1, _) in zip(points, points[1:], strict=False):
        if y1 < level <= y0:
            return x0 + (x1 - x0) * (y0 - level) / (y0 - y1)
    return points[-1][0] if points[-1][1] >= level else math.nan


def _factor(percent: float) -> str:
    return f"{percent:.1f} % ({1 / (1 - percent / 100):.2f}×)" if math.isfinite(percent) else "unknown"
