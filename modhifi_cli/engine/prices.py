"""What any widths save of what the run shall save: parameters, FLOPs and components counted, or time from a table.

Time is the only price that has to be measured. The table is measured once, before anything is cut; then networks of
the chosen widths are timed against the dense one, still before the cut, and the share that is asked of the table is
moved until what was asked is what the clock says.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError
from modhifi_cli.evaluation.latency import describe_device
from modhifi_cli.evaluation.latency_probe import (
    Saved,
    Stopwatch,
    measure_table,
    narrowed,
    network_identity,
    saved_share,
    stopwatch,
    widths_of,
)
from modhifi_cli.evaluation.latency_table import LatencyTable
from modhifi_cli.graph.components import ComponentGroup, output_size
from modhifi_cli.graph.counting import CostModel, independent_inputs
from modhifi_cli.numerics.allocation import UnreachableShare
from modhifi_cli.records import Progress

COUNTED = ("params", "flops", "components")
LATENCY = "latency"
TARGETS = (*COUNTED, LATENCY)

_TRIALS = 4  # narrowed networks that are timed before the cut
_NEAR = 0.01  # a share is met within one point


@dataclass(frozen=True)
class LatencySettings:
    """How time is measured where it is the target.

    Attributes:
        batch_size: Images a forward pass; None: 64 on a CPU, 640 elsewhere, as the paper times networks.
        rounds: Timed rounds at most.
        max_seconds: For the table, and as much again for the narrowed networks.
        table: A table that was measured before; None measures one.
        stopwatch: (module, images) → milliseconds.
    """

    batch_size: int | None = None
    rounds: int = 15
    max_seconds: float = 60.0
    table: LatencyTable | None = None
    stopwatch: Stopwatch = stopwatch

    def batch(self, device: torch.device) -> int:
        """Images a forward pass on that device."""
        return self.batch_size or (64 if device.type == "cpu" else 640)


def measured_here(table: LatencyTable, device: torch.device) -> bool:
    """Whether a table was measured on this device with as many threads, so that times taken now belong to it."""
    now = {"device": describe_device(device), "threads": torch.get_num_threads()}
    return all(table.protocol.get(key) == value for key, value in now.items())


class Pricing:
    """Tells the removed share of widths, in the run's target.

    Args:
        target: ``"params"``, ``"flops"``, ``"components"`` or ``"latency"``.
        costs: The exact cost model, for what is counted.
        model: The dense network in evaluation mode, on its device; never changed.
        example: One image, ``[1, channels, height, width]``.
        groups: In the order of all widths.
        latency: For ``"latency"``.
    """

    def __init__(
        self,
        target: str,
        costs: CostModel,
        model: nn.Module,
        example: Tensor,
        groups: Sequence[ComponentGroup],
        latency: LatencySettings | None,
    ) -> None:
        self.target = target
        self.table: LatencyTable | None = None
        self._costs, self._model, self._example, self._groups = costs, model, example, tuple(groups)
        self._latency = latency or LatencySettings()
        self._asked, self._aim, self._offset = 1.0, 1.0, 0.0
        self._layer_ms: Callable[[str, int, int], float] | None = None

    @property
    def stepwise(self) -> bool:
        """Whether the price moves in jumps, so that one component less may save nothing."""
        return self.target == LATENCY

    def prepare(self) -> Iterator[Progress | LatencyTable]:
        """Have a table where time is the price: the given one, or one that is measured now and yielded.

        Raises:
            ConfigError: If the given table is another network's, or the batch does not fit into memory.
        """
        if self.target != LATENCY:
            return
        table = self._latency.table
        if table is None:
            for event in measure_table(
                self._model,
                self._example,
                self._groups,
                batch=self._latency.batch(self._example.device),
                rounds=self._latency.rounds,
                max_seconds=self._latency.max_seconds,
                stopwatch=self._latency.stopwatch,
            ):
                yield event
                table = event if isinstance(event, LatencyTable) else table
        assert table is not None
        if table.network != network_identity(self._model, self._example, self._groups):
            raise ConfigError(
                "target.table: the table was measured for other layers, groups or image sizes than this network has; "
                "leave target.table out to measure one."
            )
        self._take(table)

    def removed_share(self, keep: Sequence[int]) -> float:
        """Share of the dense network that widths save, 0 … 1, when group g keeps ``keep[g]`` components."""
        if self.table is None:
            return self._costs.removed_share(keep, self.target)
        return self._saved(widths_of(self._costs.widths, keep))

    def removed_share_of(self, network: nn.Module) -> float:
        """Share of the dense network's time that a narrower network of the same layers saves, by the table."""
        assert self.table is not None
        widths = {}
        for name, (inputs, _) in self.table.dense_widths.items():
            layer = network.get_submodule(name)
            # The dense layer says whether inputs count: a grouped convolution of one last group no longer looks like one.
            widths[name] = (1 if inputs == 1 else independent_inputs(layer), output_size(layer))
        return self._saved(widths)

    def aim(self, share: float) -> float:
        """The share to ask of `removed_share` for a wanted share: not the same once `settle` has used the clock."""
        return share if self.table is None else min(share * self._aim / self._asked, 0.999)

    def expected_share(self, keep: Sequence[int]) -> float:
        """Share of time that widths should save: the table's, set right by what was timed before the cut."""
        return self.removed_share(keep) + self._offset

    def settle(
        self, share: float, widths: Callable[[float], list[int]], *, name: str
    ) -> Iterator[Progress | LatencyTable]:
        """Time networks of the chosen widths against the dense one, and move the aim until the clock agrees.

        What was found is kept in the table, which is yielded again: whoever reads the table later asks the same of it.

        Args:
            share: Wanted share.
            widths: Share → widths of all groups.
            name: Of what decides the widths, for the table.

        Raises:
            ConfigError: If the share cannot be reached.
        """
        if self.table is None or share <= 0:
            return
        self._asked = share
        key = f"{share:.6g} {name}"
        if key in self.table.aims:
            self._aim, self._offset = self.table.aims[key]
            return
        self._aim = share
        if not measured_here(self.table, self._example.device):
            return
        best: tuple[float, float, float] | None = None  # miss, aim, offset
        aim, lowest, highest = share, 0.0, 1.0
        tried: set[tuple[int, ...]] = set()
        for trial in range(_TRIALS):
            yield Progress("latency trials", f"{aim:.3f} of the table", trial, _TRIALS)
            try:
                keep = widths(aim)
            except UnreachableShare as error:
                if trial == 0:
                    raise self._unreachable(share, error.reachable) from error
                break
            if tuple(keep) in tried:
                break
            tried.add(tuple(keep))
            measured = share
            for event in saved_share(
                self._model,
                narrowed(self._model, self._groups, keep),
                self._example,
                batch=int(self.table.protocol["batch"]),
                rounds=self._latency.rounds,
                max_seconds=self._latency.max_seconds / _TRIALS,
                stopwatch=self._latency.stopwatch,
            ):
                if isinstance(event, Saved):
                    measured = event.share
                else:
                    yield event
            if best is None or abs(measured - share) < best[0]:
                best = (abs(measured - share), aim, measured - self.removed_share(keep))
            if abs(measured - share) <= _NEAR / 2:
                break
            if measured < share:
                lowest = max(lowest, aim)
            else:
                highest = min(highest, aim)
            aim += share - measured
            if not lowest < aim < highest:
                aim = (lowest + highest) / 2
        yield Progress("latency trials", "done", _TRIALS, _TRIALS)
        assert best is not None
        _, self._aim, self._offset = best
        self._take(replace(self.table, aims={**self.table.aims, key: (self._aim, self._offset)}))
        yield self.table

    def _take(self, table: LatencyTable) -> None:
        self.table = table
        self._layer_ms = functools.cache(lambda kind, inputs, outputs: table.kinds[kind].at(inputs, outputs))

    def _saved(self, widths: Mapping[str, tuple[int, int]]) -> float:
        """As `LatencyTable.removed_share`, remembering every layer's time: an allocation asks thousands of times."""
        table, layer_ms = self.table, self._layer_ms
        assert table is not None and layer_ms is not None
        alone = sum(layer_ms(kind, *widths[name]) for name, kind in table.layers.items())
        spent = table.fixed_ms + table.scale * alone + table.per_element_ms * table.elements(widths)
        return 1.0 - spent / table.dense_ms

    def _unreachable(self, share: float, reachable: float) -> UnreachableShare:
        assert self.table is not None
        smallest = dict.fromkeys(self.table.layers, (1, 1))
        fixed = 1 - self.table.removed_share(smallest)
        return UnreachableShare(
            f"sparsity={share:g} of latency cannot be reached: the largest share possible is {reachable:.3f}, since "
            f"{fixed:.0%} of the {self.table.dense_ms:.3g} ms of a forward pass does not depend on the widths and the "
            "rest is bounded by round_to and allocation.floor; lower sparsity, or exclude fewer modules.",
            reachable,
        )
