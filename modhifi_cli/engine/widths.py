"""Widths of the groups of a network that reads images: an allocation under the price that the budget counts."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from modhifi_cli.engine.plan import Summary
from modhifi_cli.engine.prices import COUNTED, Subject
from modhifi_cli.engine.rounding import channel_steps, refuse_narrow, told
from modhifi_cli.engine.walk import Budget
from modhifi_cli.evaluation.latency_table import LatencyTable
from modhifi_cli.graph.components import ComponentGroup, Layout
from modhifi_cli.graph.counting import CostModel, count
from modhifi_cli.numerics.allocation import UnreachableShare
from modhifi_cli.records import Progress
from modhifi_cli.roles import Allocation

NEAR = 0.01  # a target counts as reached within one percentage point
COST_OF_BLOCKS = 0.003  # summed relative error of all groups that whole blocks of channels may add to that of finer steps


class GroupWidths:
    """Chooses widths for coupled groups, whose costs are products.

    Args:
        model: The dense network in evaluation mode, on its device.
        example: One image, ``[1, channels, height, width]``.
        groups: In the order of all widths.
        allocation: From `modhifi_cli.numerics.allocation`.
        budget: What is asked for.

    Raises:
        ConfigError: If the target is unknown, or no group is as wide as the multiple that widths are rounded to.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        groups: Sequence[ComponentGroup],
        allocation: Allocation,
        budget: Budget,
    ) -> None:
        self._price = budget.price
        self._model, self._example, self._groups = model, example, groups
        self._allocation, self._budget = allocation, budget
        self._costs = CostModel(model, example, groups)
        self._sizes = [group.components for group in groups]
        self._steps = channel_steps(groups, budget.round_to, example.device, budget.block)
        # Whole blocks of the runtime, and finer steps where those miss what is asked for or cost too much.
        self._blocks = self._finest = self._steps
        if budget.block > 1 and self._price.name in COUNTED:
            self._finest = channel_steps(groups, budget.round_to, example.device)
        names = [group.name for group in groups]
        self.warnings = refuse_narrow(self._sizes, names, budget.round_to) if budget.sparsity > 0 else ()
        self._pricing = self._price.on(Subject(model, example, groups, self._costs, self._steps))

    def prepare(self) -> Iterator[Progress | LatencyTable]:
        """Measure what has to be measured before anything is cut."""
        yield from self._pricing.prepare()

    def settle(self, curves: Sequence[Sequence[float]]) -> Iterator[Progress | LatencyTable]:
        """Time networks of the chosen widths, where time is the price, and move the aim until the clock agrees."""
        name = f"{self._allocation!r} round_to={self._budget.round_to}"
        yield from self._pricing.settle(
            self._budget.sparsity, lambda share: self._allocated(share, self._sizes, curves), name=name
        )

    def at(self, share: float, present: Sequence[int], curves: Sequence[Sequence[float]]) -> list[int]:
        """Components that each group keeps.

        Args:
            share: Share of the target to be removed, in [0, 1).
            present: Components of each group now.
            curves: For each group its error after the removal of 0, 1, 2, … components; empty for an even share.

        Raises:
            ConfigError: If the share cannot be reached.
        """
        return self._allocated(self._pricing.aim(share), present, curves)

    def shares(self, keep: Sequence[int]) -> dict[str, float]:
        """Shares that widths remove, of everything that is counted and of the target."""
        counted = {name: self._costs.removed_share(keep, name) for name in COUNTED}
        return counted | {self._price.name: self._pricing.removed_share(keep)}

    def summary(self, layout: Layout) -> Summary:
        """What the run achieved, counted on the edited network."""
        counts = count(self._model, self._example)
        alive = [layout.alive(group).numel() for group in self._groups]
        achieved = {
            "params": 1 - counts.parameters / self._costs.dense.parameters,
            "flops": 1 - counts.macs / self._costs.dense.macs,
            "components": 1 - sum(alive) / sum(self._sizes),
        }
        if self._pricing.table is not None:
            saved, expected = self._pricing.removed_share(alive), self._pricing.expected_share(alive)
            return Summary(achieved, self.warnings, latency={"table": saved, "predicted": expected})
        asked, name, warnings = self._budget.sparsity, self._price.name, self.warnings
        if abs(achieved[name] - asked) > NEAR:
            warnings = (
                *warnings,
                f"sparsity={asked:g} of {name} was asked for and {achieved[name]:.3f} reached: widths come in steps of "
                f"{told(self._steps)} and groups have as few as {min(self._sizes)}.",
            )
        return Summary(achieved, warnings)

    def _allocated(self, share: float, present: Sequence[int], curves: Sequence[Sequence[float]]) -> list[int]:
        """Widths in whole blocks of the runtime, and in finer steps of those groups where blocks would cost too much.

        Blocks come first to groups that lose least by them, and to as many (found by bisection) as leave the summed error
        that of finer steps everywhere but for `COST_OF_BLOCKS`, and meet what is asked for. Without curves: to all or none.
        """
        finest = self._widths(share, present, curves, self._finest)
        groups = [group for group, step in enumerate(self._blocks) if step != self._finest[group]]
        if curves:
            groups.sort(key=lambda group: _snapped(curves[group], present[group], finest[group], self._blocks[group]))
        found, self._steps = finest, self._finest
        least, most, number = 0, len(groups), len(groups)
        while least < most:
            steps = list(self._finest)
            for group in groups[:number]:
                steps[group] = self._blocks[group]
            keep = self._in_blocks(share, present, curves, steps, finest)
            if keep is None:
                most = number - 1 if curves else 0
            else:
                found, self._steps, least = keep, steps, number
            number = (least + most + 1) // 2
        return found

    def _in_blocks(
        self,
        share: float,
        present: Sequence[int],
        curves: Sequence[Sequence[float]],
        steps: Sequence[int],
        finest: Sequence[int],
    ) -> list[int] | None:
        """Widths in these steps, or None where they miss what is asked for or lose more than `finest` and a little."""
        try:
            keep = self._widths(share, present, curves, steps)
        except UnreachableShare:
            return None
        risen = sum(
            float(curve[now - ours]) - float(curve[now - theirs])
            for curve, now, ours, theirs in zip(curves, present, keep, finest, strict=bool(curves))
        )
        met = abs(self._pricing.removed_share(keep) - share) <= NEAR
        return keep if met and risen <= COST_OF_BLOCKS else None

    def _widths(
        self, share: float, present: Sequence[int], curves: Sequence[Sequence[float]], steps: Sequence[int]
    ) -> list[int]:
        return self._allocation(
            self._sizes, present, self._pricing.removed_share, sparsity=share, steps=steps, curves=curves or None,
            stepwise=self._pricing.stepwise,
        )  # fmt: skip


def _snapped(curve: Sequence[float], present: int, width: int, block: int) -> float:
    """What a group's error would change by with the nearest width that is whole blocks."""
    near = min(max(round(width / block), 1) * block, present)
    return abs(float(curve[present - near]) - float(curve[present - width]))
