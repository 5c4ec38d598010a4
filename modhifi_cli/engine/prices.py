"""What any widths save of what the run shall save: parameters, FLOPs and components counted, or time from a table.

A `Price` says what a share counts; `on` a network it becomes a `Pricing`, which tells the removed share of any widths,
whatever kind of network it is. Time is the only price that has to be measured. The table is measured once, before
anything is cut; then networks of the chosen widths are timed against the dense one, still before the cut, and the share
that is asked of the table is moved until what was asked is what the clock says.
"""

import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, is_number, is_whole, nearest
from modhifi_cli.evaluation.latency import describe_device
from modhifi_cli.evaluation.latency_probe import (
    Saved,
    Stopwatch,
    Timing,
    measure_table,
    narrowed,
    network_identity,
    saved_share,
    stopwatch_in,
    widths_of,
)
from modhifi_cli.evaluation.latency_table import LatencyTable
from modhifi_cli.graph.components import ComponentGroup, output_size
from modhifi_cli.graph.counting import LayerWidths, independent_inputs
from modhifi_cli.numerics.allocation import UnreachableShare
from modhifi_cli.records import Progress

COUNTED = ("params", "flops", "components")  # what the summary of every run tells

_TRIALS = 4  # narrowed networks that are timed before the cut
_NEAR = 0.01  # a share is met within one point


class Costs(Protocol):
    """What can be counted of a network's widths."""

    def removed_share(self, keep: Sequence[int], target: str) -> float:
        """Share removed of ``"params"``, ``"flops"`` or ``"components"``, 0 … 1."""


@dataclass(frozen=True)
class Subject:
    """The network that is priced, of either kind.

    Attributes:
        model: The dense network in evaluation mode, on the device that counts; never changed.
        example: One input: ``[1, channels, height, width]``, or ids ``[1, length]``.
        groups: In the order of all widths.
        costs: Of this network.
        steps: By what each group's width changes.
        narrowed: Widths → a copy with those, for timing; None: groups are cut as those of image networks are.
    """

    model: nn.Module
    example: Tensor
    groups: Sequence[ComponentGroup]
    costs: Costs
    steps: Sequence[int] = ()
    narrowed: Callable[[Sequence[int]], nn.Module] | None = None

    def copy_of(self, keep: Sequence[int]) -> nn.Module:
        """A copy in which group g has ``keep[g]`` components."""
        return narrowed(self.model, self.groups, keep) if self.narrowed is None else self.narrowed(keep)


class Pricing(Protocol):
    """Tells the removed share of one network's widths.

    Attributes:
        stepwise: Whether the price moves in jumps, so that one component less may save nothing.
        table: Times of the network's layers, where time is the price.
    """

    table: LatencyTable | None

    @property
    def stepwise(self) -> bool: ...

    def prepare(self) -> Iterator[Progress | LatencyTable]:
        """Measure what has to be measured; a table is yielded when it has changed."""

    def settle(
        self, share: float, widths: Callable[[float], list[int]], *, name: str
    ) -> Iterator[Progress | LatencyTable]:
        """See that what will be asked by `aim` brings the wanted share; `name` says what decides the widths."""

    def removed_share(self, keep: Sequence[int]) -> float:
        """Share of the dense network that widths save, 0 … 1, when group g keeps ``keep[g]`` components."""

    def removed_share_of(self, network: nn.Module) -> float:
        """The same of a narrower network of the same layers; only of what is measured."""

    def aim(self, share: float) -> float:
        """The share to ask of `removed_share` for a wanted one."""

    def expected_share(self, keep: Sequence[int]) -> float:
        """What widths should save in the end."""


class Price(Protocol):
    """What the share of a run counts. Classes are named in configs/target.

    Attributes:
        name: Short name, as in tables.
        title: What a reader calls it.
        searched: Whether the run finds the share itself.
        timed: Whether times have to be measured.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    searched: ClassVar[bool]

    @property
    def timed(self) -> bool: ...

    def goal(self, share: float | None) -> str:
        """What is asked for, as in "40 % of FLOPs removed"."""

    def on(self, subject: Subject) -> Pricing:
        """The price of one network's widths."""


class _Counted:
    name: ClassVar[str]
    title: ClassVar[str]
    searched: ClassVar[bool] = False
    timed: ClassVar[bool] = False

    def goal(self, share: float | None) -> str:
        return _share_of(share, self.title)

    def on(self, subject: Subject) -> Pricing:
        return _Count(self.name, subject.costs)


@dataclass(frozen=True)
class Params(_Counted):
    """The network's parameters; of a language model those of its decoder layers."""

    name: ClassVar[str] = "params"
    title: ClassVar[str] = "parameters"


@dataclass(frozen=True)
class Flops(_Counted):
    """Multiply-accumulates of one input; of a language model those of its decoder layers for one token."""

    name: ClassVar[str] = "flops"
    title: ClassVar[str] = "FLOPs"


@dataclass(frozen=True)
class Components(_Counted):
    """Components of the groups that may be pruned."""

    name: ClassVar[str] = "components"
    title: ClassVar[str] = "components"


@dataclass(frozen=True)
class Latency:
    """Time of a forward pass in the runtime that will serve the network; of a language model the prefill of a batch.

    Attributes:
        batch_size: Inputs a forward pass; None: 64 on a CPU, 640 elsewhere, as the paper times networks, and 1
            sequence of a language model.
        rounds: Timed rounds at most.
        max_seconds: For the table, and as much again for the narrowed networks.
        table: File of a table that was measured before, for who reads files; None measures one.
        serve: Name of the runtime.
        measured: The table itself.
        stopwatch: (module, inputs) → milliseconds; None: by the runtime.
    """

    name: ClassVar[str] = "latency"
    title: ClassVar[str] = "time"
    searched: ClassVar[bool] = False
    timed: ClassVar[bool] = True

    batch_size: int | None = None
    rounds: int = 15
    max_seconds: float = 60.0
    table: str | None = None
    serve: str = "eager"
    measured: LatencyTable | None = None
    stopwatch: Stopwatch | None = None

    def __post_init__(self) -> None:
        _need("target.batch_size", "a whole number from 1, or null", self.batch_size, _count_or_null(self.batch_size, 1))
        _need("target.rounds", "a whole number from 1", self.rounds, is_whole(self.rounds) and self.rounds >= 1)
        above = is_number(self.max_seconds) and self.max_seconds > 0
        _need("target.max_seconds", "a number above 0", self.max_seconds, above)
        named = self.table is None or (isinstance(self.table, str) and self.table != "")
        _need("target.table", "a latency_table.json, or null", self.table, named)

    def goal(self, share: float | None) -> str:
        return _share_of(share, self.title)

    def on(self, subject: Subject) -> Pricing:
        return Timed(self, subject)

    def batch(self, example: Tensor) -> int:
        """Inputs a forward pass."""
        if not example.is_floating_point():
            return self.batch_size or 1
        return self.batch_size or (64 if example.device.type == "cpu" else 640)


@dataclass(frozen=True)
class MaxDrop:
    """The most that can go while the drop in agreement with the dense network keeps a bound.

    Attributes:
        value: Points of agreement that may be lost: of images, or of next tokens.
        of: Name of what is compressed.
        trials: Copies that are pruned at most.
        held_out: Share of the calibration set that judges and is not fitted to.
        batch_size, rounds, max_seconds, table, serve: As in `Latency`, for ``of="latency"``.
    """

    name: ClassVar[str] = "max_drop"
    title: ClassVar[str] = "drop"
    searched: ClassVar[bool] = True

    value: float = 1.0
    of: str = "flops"
    trials: int = 6
    held_out: float = 0.25
    batch_size: int | None = None
    rounds: int = 15
    max_seconds: float = 60.0
    table: str | None = None
    serve: str = "eager"

    def __post_init__(self) -> None:
        inside = is_number(self.value) and 0 < self.value < 100
        _need("target.value", "points of agreement, above 0 and below 100", self.value, inside)
        _need("target.of", "params, flops or latency", self.of, self.of in self._prices())
        _need("target.trials", "a whole number from 2", self.trials, is_whole(self.trials) and self.trials >= 2)
        parted = is_number(self.held_out) and 0 < self.held_out <= 0.5
        _need("target.held_out", "a share with 0 < held_out <= 0.5", self.held_out, parted)

    @property
    def price(self) -> Price:
        """What is compressed, as a price of its own."""
        return self._prices()[self.of]

    @property
    def timed(self) -> bool:
        """Whether time is what is compressed."""
        return self.price.timed

    def goal(self, share: float | None) -> str:
        few = "little" if self.price.timed else "few"
        return f"as {few} {self.price.title} as {self.value:g} points of agreement allow"

    def on(self, subject: Subject) -> Pricing:
        return self.price.on(subject)

    def _prices(self) -> dict[str, Price]:
        time = Latency(self.batch_size, self.rounds, self.max_seconds, self.table, self.serve)
        return {price.name: price for price in (Params(), Flops(), time)}


def as_price(target: "Price | str") -> Price:
    """A price, or the counted one of that name, for callers from Python.

    Raises:
        ConfigError: If nothing counted has that name.
    """
    if not isinstance(target, str):
        return target
    known: dict[str, Price] = {price.name: price for price in (Params(), Flops(), Components())}
    if target not in known:
        raise ConfigError(f"target must be one of {', '.join(known)}, got '{target}'; {nearest(target, known)}")
    return known[target]


def measured_here(table: LatencyTable, device: torch.device) -> bool:
    """Whether a table was measured on this device with as many threads, so that times taken now belong to it."""
    now = {"device": describe_device(device), "threads": torch.get_num_threads()}
    return all(table.protocol.get(key) == value for key, value in now.items())


class _Count:
    """A price that is counted exactly."""

    stepwise = False
    table: LatencyTable | None = None

    def __init__(self, name: str, costs: Costs) -> None:
        self._name, self._costs = name, costs

    def prepare(self) -> Iterator[Progress | LatencyTable]:
        return iter(())

    def settle(
        self, share: float, widths: Callable[[float], list[int]], *, name: str
    ) -> Iterator[Progress | LatencyTable]:
        return iter(())

    def removed_share(self, keep: Sequence[int]) -> float:
        return self._costs.removed_share(keep, self._name)

    def removed_share_of(self, network: nn.Module) -> float:
        raise NotImplementedError("what is counted is counted on the network itself.")

    def aim(self, share: float) -> float:
        return share

    def expected_share(self, keep: Sequence[int]) -> float:
        return self.removed_share(keep)


@dataclass
class Timed:
    """A price by a table of times, set right by networks that were timed before the cut.

    Attributes:
        price: How time is measured.
        subject: What is timed.
    """

    price: Latency
    subject: Subject
    stepwise: ClassVar[bool] = True
    table: LatencyTable | None = None
    _asked: float = 1.0
    _aim: float = 1.0
    _offset: float = 0.0
    _widths: LayerWidths = field(init=False)
    _stopwatch: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        self._widths = LayerWidths(self.subject.model, self.subject.groups)
        self._stopwatch = self.price.stopwatch or stopwatch_in(self.price.serve, self.subject.example.device)

    def prepare(self) -> Iterator[Progress | LatencyTable]:
        """Have a table: the given one, or one that is measured now and yielded.

        Raises:
            ConfigError: If the given table is another network's or runtime's, or the batch does not fit into memory.
        """
        subject, table = self.subject, self.price.measured
        if table is None:
            for event in measure_table(
                subject.model,
                subject.example,
                subject.groups,
                Timing(
                    self.price.batch(subject.example),
                    self.price.rounds,
                    self.price.max_seconds,
                    self._stopwatch,
                    self.price.serve,
                ),
                steps=subject.steps,
                copy_of=subject.copy_of,
            ):
                yield event
                table = event if isinstance(event, LatencyTable) else table
        assert table is not None
        if table.network != network_identity(subject.model, subject.example, subject.groups):
            raise ConfigError(
                "target.table: the table was measured for other layers, groups or image sizes than this network has; "
                "leave target.table out to measure one."
            )
        where = table.protocol.get("runtime", "eager")
        if where != self.price.serve:
            raise ConfigError(
                f"target.table: the table was measured in {where}, and runtime.serve={self.price.serve}; leave "
                "target.table out to measure one, or set runtime.serve."
            )
        self._take(table)

    def removed_share(self, keep: Sequence[int]) -> float:
        """Share of the dense network's time that widths save, by the table."""
        return self._saved(widths_of(self._widths, keep))

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
        """The share to ask of the table: not the wanted one once `settle` has used the clock."""
        return min(share * self._aim / self._asked, 0.999)

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
        if not measured_here(self.table, self.subject.example.device):
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
            measured = yield from self._clocked(keep)
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

    def _clocked(self, keep: Sequence[int]) -> Generator[Progress, None, float]:
        """The share of time that a network of these widths saves."""
        assert self.table is not None
        saved = 0.0
        for event in saved_share(
            self.subject.model,
            self.subject.copy_of(keep),
            self.subject.example,
            batch=int(self.table.protocol["batch"]),
            rounds=self.price.rounds,
            max_seconds=self.price.max_seconds / _TRIALS,
            stopwatch=self._stopwatch,
        ):
            if isinstance(event, Saved):
                saved = event.share
            else:
                yield event
        return saved

    def _take(self, table: LatencyTable) -> None:
        self.table = table
        self._layer_ms = functools.cache(lambda kind, inputs, outputs: table.kinds[kind].at(inputs, outputs))

    def _saved(self, widths: Mapping[str, tuple[int, int]]) -> float:
        """As `LatencyTable.removed_share`, remembering every layer's time: an allocation asks thousands of times."""
        table = self.table
        assert table is not None
        alone = sum(self._layer_ms(kind, *widths[name]) for name, kind in table.layers.items())
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


def _share_of(share: float | None, title: str) -> str:
    return f"{title} removed" if share is None else f"{100 * share:g} % of {title} removed"


def _count_or_null(value: object, least: int) -> bool:
    return value is None or (is_whole(value) and value >= least)


def _need(key: str, expected: str, value: object, fits: bool) -> None:
    if not fits:
        raise ConfigError(f"{key} must be {expected}; got {value!r}.")
