"""Widths of the groups of a network that reads images: an allocation under the price that the budget counts."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from modhifi_cli.engine.plan import Summary
from modhifi_cli.engine.prices import COUNTED, Subject
from modhifi_cli.engine.rounding import channel_steps, refuse_narrow, told
from modhifi_cli.engine.walk import Budget
from modhifi_cli.errors import ConfigError
from modhifi_cli.evaluation.latency_table import LatencyTable
from modhifi_cli.graph.components import ComponentGroup, Layout
from modhifi_cli.graph.counting import CostModel, count
from modhifi_cli.records import Progress
from modhifi_cli.roles import Allocation

NEAR = 0.01  # a target counts as reached within one percentage point


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
        # Whole blocks of the runtime first, and finer steps where those miss what is asked for.
        self._ways = [self._steps]
        if budget.block > 1 and self._price.name in COUNTED:
            self._ways.append(channel_steps(groups, budget.round_to, example.device))
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
        for steps in self._ways:
            last = steps is self._ways[-1]
            try:
                keep = self._allocation(
                    self._sizes,
                    present,
                    self._pricing.removed_share,
                    sparsity=share,
                    steps=steps,
                    curves=curves or None,
                    stepwise=self._pricing.stepwise,
                )
            except ConfigError:
                if last:
                    raise
                continue
            if last or abs(self._pricing.removed_share(keep) - share) <= NEAR:
                self._steps = steps
                return keep
        raise AssertionError("the last way returns or raises")
