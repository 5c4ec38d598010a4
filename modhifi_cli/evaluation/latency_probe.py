"""Measuring a latency table: every kind of layer alone over a grid of widths, then whole narrowed networks together.

A layer's time is no smooth function of its widths (vector units and tiles have their sizes), so the grid is not laid
out in advance: it starts coarse, and the interval over which the network's time jumps most is halved again and again.
All times are medians over rounds that visit everything in turn, so that a busy minute of the machine hits all alike.
"""

import copy
import functools
import hashlib
import itertools
import json
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, is_out_of_memory
from modhifi_cli.evaluation.latency import describe_device
from modhifi_cli.evaluation.latency_table import LatencyTable, LayerTimes
from modhifi_cli.evaluation.runtimes import Runtime, runtime
from modhifi_cli.evaluation.runtimes.clocks import clock_name, milliseconds
from modhifi_cli.graph.components import ComponentGroup, Layout, is_transposed
from modhifi_cli.graph.counting import LayerWidths, output_positions
from modhifi_cli.graph.heads import head_count
from modhifi_cli.graph.parts import is_part, part_of
from modhifi_cli.graph.surgery import slice_module_
from modhifi_cli.records import Progress

Stopwatch = Callable[[nn.Module, Tensor], float]

_LOOKING = 0.35  # share of the time spent on finding out where a finer grid is needed
_LAYERS = 0.65  # share of the time after which the layers are done and whole networks begin
_JUMP = 0.01  # a jump below this share of all layers' time needs no finer grid
_MOST_KNOTS = 14  # widths per axis of one kind
_FEWEST_ROUNDS = 3  # of whole networks, whatever the time
_PROGRAMS = 8  # networks whose programs are kept: dense and narrowed ones of one round
_BLOCKS = ((128, 16), (64, 8), (32, 4))  # widths in between leave a runtime's fast path and would bend the table


def stopwatch(module: nn.Module, images: Tensor) -> float:
    """Milliseconds of one forward pass of `module` on `images`, where they are, by the clock of `clock_name`."""
    return milliseconds(lambda: module(images), images.device, torch.get_num_threads())


def stopwatch_in(serve: str, device: torch.device) -> Stopwatch:
    """A stopwatch that runs modules in a runtime.

    A runtime whose programs take long to make (a compiler) times whole networks; single layers are timed as they are.

    Args:
        serve: Name of the runtime.
        device: Where the modules are.

    Raises:
        ConfigError: If there is no such runtime here.
    """
    if serve == "eager":
        return stopwatch
    return _Served(runtime(serve, device_type=device.type))


class _Served:
    """Programs of the networks that were timed last are kept: rounds visit the same ones again and again."""

    def __init__(self, serving: Runtime) -> None:
        self._serving = serving
        self._programs: OrderedDict[tuple, tuple[nn.Module, Callable[[], object]]] = OrderedDict()

    def __call__(self, module: nn.Module, inputs: Tensor) -> float:
        if not self._serving.QUICK and not list(module.children()):
            return stopwatch(module, inputs)
        key = (id(module), id(inputs))
        if key not in self._programs:
            run = self._serving.program(module, inputs, torch.get_num_threads())
            run()
            self._programs[key] = (module, run)  # the module is held, so that its id stays its own
            while len(self._programs) > _PROGRAMS:
                self._programs.popitem(last=False)
        return milliseconds(self._programs[key][1], inputs.device, torch.get_num_threads())


@dataclass(frozen=True)
class Saved:
    """Share of a dense network's time that a narrower one saves.

    Attributes:
        share: Median over rounds in which both were timed side by side, at most 1.
        low, high: 10th and 90th percentile over the rounds.
        rounds: Their number.
    """

    share: float
    low: float
    high: float
    rounds: int


@torch.inference_mode()
def saved_share(
    dense: nn.Module,
    narrow: nn.Module,
    example: Tensor,
    *,
    batch: int,
    rounds: int,
    max_seconds: float,
    stopwatch: Stopwatch = stopwatch,
    now: Callable[[], float] = time.perf_counter,
) -> Iterator[Progress | Saved]:
    """Time two networks side by side, round after round, and yield what the second saves last.

    Args:
        dense: The reference, in evaluation mode.
        narrow: The other.
        example: One image, ``[1, channels, height, width]``, on their device.
        batch: Images a forward pass.
        rounds: Rounds at most.
        max_seconds: No new round begins after that, once there are three.
        stopwatch: (module, images) → milliseconds.
        now: Seconds.
    """
    images = _random_images(example, batch)
    started = now()
    networks = [dense, narrow]
    for network in networks:
        stopwatch(network, images)
    saved: list[float] = []
    while len(saved) < _FEWEST_ROUNDS or (len(saved) < rounds and now() - started < max_seconds):
        yield Progress("latency", f"batch of {batch}", len(saved), max(rounds, _FEWEST_ROUNDS))
        before, after = timed_round(networks, images, len(saved), stopwatch)
        saved.append(1 - after / before)
    yield Progress("latency", "done", len(saved), len(saved))
    low, middle, high = np.quantile(saved, [0.1, 0.5, 0.9]).tolist()
    yield Saved(middle, low, high, len(saved))


def _random_images(example: Tensor, batch: int) -> Tensor:
    """Inputs like the example: noise, or ids of tokens that it holds."""
    if not example.is_floating_point():
        return example[:1].expand(batch, *example.shape[1:]).contiguous()
    images = torch.randn((batch, *example.shape[1:]), generator=torch.Generator().manual_seed(0))
    return images.to(example)


def layer_names(model: nn.Module, groups: Sequence[ComponentGroup]) -> list[str]:
    """The layers that a table has entries for: all that a group may narrow.

    Attention modules are none of them: they hold the layers that project, and what they spend between those goes with
    the layers' outputs, so that it is in what is fitted to whole networks.
    """
    parts = {name: part_of(model, name) for name in LayerWidths(model, groups).modules}
    return [name for name, part in parts.items() if not is_part(part) and head_count(part) is None]


def network_identity(model: nn.Module, example: Tensor, groups: Sequence[ComponentGroup]) -> str:
    """SHA-256 of what a table depends on besides the machine: the layers' sizes, the image's, the groups."""
    described = {
        "input": list(example.shape[1:]),
        "layers": {name: repr(model.get_submodule(name)) for name in layer_names(model, groups)},
        "groups": [[group.name, group.components] for group in groups],
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def widths_of(widths: LayerWidths, keep: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Layer name → (inputs, outputs) when group g keeps ``keep[g]`` components, as `LatencyTable` wants it."""
    outputs, inputs = widths.at(keep)
    return {name: (int(i), int(o)) for name, i, o in zip(widths.modules, inputs, outputs, strict=True)}


def narrowed(model: nn.Module, groups: Sequence[ComponentGroup], keep: Sequence[int]) -> nn.Module:
    """A copy of the network in which every group has lost its last components: for timing, not for answers."""
    model = copy.deepcopy(model)
    layout = Layout(model, groups)
    for group, kept in zip(groups, keep, strict=True):
        outputs, inputs = layout.keep_(group, torch.arange(kept))
        for name in dict.fromkeys((*outputs, *inputs)):
            slice_module_(part_of(model, name), outputs=outputs.get(name), inputs=inputs.get(name))
    return model


@dataclass(frozen=True)
class Timing:
    """How a table is timed.

    Attributes:
        batch: Images a forward pass, ≥ 1.
        rounds: Timed rounds at most, ≥ 1.
        max_seconds: No new round begins after that many seconds; the coarse grid and three rounds of whole networks
            are measured whatever it takes.
        stopwatch: (module, images) → milliseconds.
        serve: Name of the runtime that the stopwatch uses, for the protocol.
        now: Seconds.
    """

    batch: int
    rounds: int
    max_seconds: float
    stopwatch: Stopwatch = stopwatch
    serve: str = "eager"
    now: Callable[[], float] = time.perf_counter


@torch.inference_mode()
def measure_table(
    model: nn.Module,
    example: Tensor,
    groups: Sequence[ComponentGroup],
    timing: Timing,
    *,
    steps: Sequence[int] = (),
    copy_of: Callable[[Sequence[int]], nn.Module] | None = None,
) -> Iterator[Progress | LatencyTable]:
    """Measure the network's layers and the network itself, and yield the table last.

    Args:
        model: Dense network in evaluation mode, on the device that counts; left as found.
        example: One image, ``[1, channels, height, width]``, or ids ``[1, length]``, on the same device.
        groups: What may be narrowed.
        timing: How it is timed.
        steps: By what each group's width changes: whole networks are timed at such widths.
        copy_of: Widths → a narrowed copy; None: as groups of image networks are cut.

    Yields:
        Progress, and the `LatencyTable`.

    Raises:
        ConfigError: If the batch does not fit into memory.
    """
    images = _random_images(example, timing.batch)
    started, stopwatch = timing.now(), timing.stopwatch
    copy_of = copy_of or functools.partial(narrowed, model, groups)

    def spent() -> float:
        return (timing.now() - started) / timing.max_seconds

    try:
        yield Progress("latency table", "shapes", 0, 3)
        kinds, of_layer = _kinds(model, images, groups, in_blocks=any(step > 1 for step in steps))
        positions = output_positions(model, images, list(of_layer))
        yield from _find_knots(kinds, stopwatch, spent)
        taken = 1
        while taken < timing.rounds and spent() < _LAYERS:
            for number, kind in enumerate(kinds.values()):
                yield Progress("latency table", f"layers, round {taken + 1}", number, len(kinds))
                kind.measure(stopwatch)
            taken += 1
        table = _table(model, example, groups, kinds, of_layer, positions, timing.batch)
        widths = LayerWidths(model, groups)
        keeps = _trial_widths(widths.sizes, steps or [1] * len(groups))
        networks = [model, *(copy_of(keep) for keep in keeps)]
        table = replace(table, protocol={"runtime": timing.serve, "layer_rounds": taken})
        yield from _fit_to_networks(table, widths, keeps, networks, images, timing, spent)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise ConfigError(
                f"target=latency: a forward pass of {timing.batch} images does not fit into the memory of "
                f"{images.device}; set target.batch_size to fewer than {timing.batch}."
            ) from error
        raise


@dataclass
class _Kind:
    """Layers of the same sizes: one of them, what it reads, and the widths at which it was timed."""

    layer: nn.Module
    shape: tuple[int, ...]  # of its dense input, with the batch
    axis: int  # of the channels in it
    images: Tensor  # only its device matters
    inputs: list[int]
    outputs: list[int]
    paired: bool  # whether inputs go with outputs
    step: int  # output widths are multiples of it (a grouped convolution loses whole groups)
    in_blocks: bool = False  # whether widths between whole blocks are of no interest
    count: int = 0  # layers of this kind
    times: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def input_step(self, widest: int) -> int:
        """By what input widths change."""
        return _block(widest) if self.in_blocks else 1

    @property
    def dtype(self) -> torch.dtype:
        """Of what the layer reads."""
        return next((tensor.dtype for tensor in self.layer.parameters()), torch.float32)

    def measure(self, stopwatch: Stopwatch, only: Sequence[tuple[int, int]] | None = None) -> None:
        for inputs, outputs in itertools.product(self.inputs, self.outputs) if only is None else only:
            self.times.setdefault((inputs, outputs), []).append(self._time(inputs, outputs, stopwatch))

    def missing(self) -> list[tuple[int, int]]:
        return [point for point in itertools.product(self.inputs, self.outputs) if point not in self.times]

    def matrix(self) -> np.ndarray:
        return np.array([[statistics.median(self.times[i, o]) for o in self.outputs] for i in self.inputs])

    def largest_jump(self) -> tuple[float, str, int]:
        """The interval over which the time rises most: milliseconds over all layers of the kind, axis, its middle."""
        found = (0.0, "", 0)
        times = self.matrix()
        for axis, knots, step in ((0, self.inputs, self.input_step(self.inputs[-1])), (1, self.outputs, self.step)):
            if len(knots) >= _MOST_KNOTS:
                continue
            rises = np.abs(np.diff(times, axis=axis)).max(axis=1 - axis) if len(knots) > 1 else ()
            for (low, high), rise in zip(itertools.pairwise(knots), rises, strict=False):
                middle = (low + high) // 2 // step * step
                if low < middle < high and rise * self.count > found[0]:
                    found = (float(rise) * self.count, ("inputs", "outputs")[axis], middle)
        return found

    def add_knot(self, axis: str, knot: int) -> None:
        knots = getattr(self, axis)
        knots.append(knot)
        knots.sort()

    def _time(self, inputs: int, outputs: int, stopwatch: Stopwatch) -> float:
        layer = copy.deepcopy(self.layer)
        slice_module_(layer, outputs=torch.arange(outputs), inputs=None if self.paired else torch.arange(inputs))
        shape = list(self.shape)
        width = outputs * shape[self.axis] // self.outputs[-1] if self.paired else inputs
        shape[self.axis] = width
        images = torch.randn(shape).to(self.images.device, self.dtype)
        stopwatch(layer, images)  # the first run of a new shape chooses and prepares its kernel
        return min(stopwatch(layer, images), stopwatch(layer, images))


def _kinds(
    model: nn.Module, images: Tensor, groups: Sequence[ComponentGroup], *, in_blocks: bool
) -> tuple[dict[str, _Kind], dict[str, str]]:
    """The kinds of layers that groups touch, with a coarse grid each, and every layer's kind."""
    widths = LayerWidths(model, groups)
    names = layer_names(model, groups)
    shapes = _input_shapes(model, images, names)
    widest = widths_of(widths, widths.sizes)
    narrowest = widths_of(widths, np.ones_like(widths.sizes))
    kinds: dict[str, _Kind] = {}
    of_layer: dict[str, str] = {}
    for name in names:
        layer = model.get_submodule(name)
        key = f"{layer!r} on {list(shapes[name][1:])}"
        of_layer[name] = key
        grouped = getattr(layer, "groups", 1) > 1
        step = layer.out_channels // layer.groups if grouped else 1
        low = [max(1, narrowest[name][0]), max(step, narrowest[name][1])]
        if key not in kinds:
            axis = len(shapes[name]) - 1 if isinstance(layer, nn.Linear) or is_transposed(layer) else 1
            if in_blocks and not grouped:
                step = _block(widest[name][1])
            paired = grouped or isinstance(layer, nn.modules.batchnorm._BatchNorm)
            kinds[key] = _Kind(layer, shapes[name], axis, images, [], [], paired, step, in_blocks)
        kind = kinds[key]
        kind.count += 1
        kind.inputs = _coarse(min([low[0], *kind.inputs]), widest[name][0], kind.input_step(widest[name][0]))
        kind.outputs = _coarse(min([low[1], *kind.outputs]), widest[name][1], kind.step)
    return kinds, of_layer


def _block(width: int) -> int:
    return next((block for least, block in _BLOCKS if width >= least), 1)


def _coarse(low: int, high: int, step: int) -> list[int]:
    quarters = [max(low, high * part // 4 // step * step) for part in (1, 2)]
    return sorted({low, *quarters, high})


def _input_shapes(model: nn.Module, images: Tensor, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple], None]:
        def seen(module: nn.Module, inputs: tuple) -> None:
            shapes[name] = tuple(inputs[0].shape)

        return seen

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _find_knots(kinds: Mapping[str, _Kind], stopwatch: Stopwatch, spent: Callable[[], float]) -> Iterator[Progress]:
    for number, kind in enumerate(kinds.values()):
        yield Progress("latency table", "coarse grid", number, len(kinds))
        kind.measure(stopwatch)
    total = sum(kind.count * kind.matrix()[-1, -1] for kind in kinds.values())
    jumps = {key: kind.largest_jump() for key, kind in kinds.items()}
    while jumps and spent() < _LOOKING:
        key = max(jumps, key=lambda key: jumps[key][0])
        jump, axis, knot = jumps[key]
        if jump < _JUMP * total:
            break
        yield Progress("latency table", f"finer grid, {key.partition('(')[0]}", min(99, int(100 * spent())), 100)
        kinds[key].add_knot(axis, knot)
        kinds[key].measure(stopwatch, kinds[key].missing())
        jumps[key] = kinds[key].largest_jump()


def _table(
    model: nn.Module,
    example: Tensor,
    groups: Sequence[ComponentGroup],
    kinds: Mapping[str, _Kind],
    of_layer: Mapping[str, str],
    positions: Mapping[str, int],
    batch: int,
) -> LatencyTable:
    """The layers' times, not yet fitted to the network's."""
    widths = LayerWidths(model, groups)
    return LatencyTable(
        network=network_identity(model, example, groups),
        layers=dict(of_layer),
        kinds={
            key: LayerTimes.smoothed(tuple(kind.inputs), tuple(kind.outputs), kind.matrix())
            for key, kind in kinds.items()
        },
        dense_widths={name: pair for name, pair in widths_of(widths, widths.sizes).items() if name in of_layer},
        positions={name: float(positions[name] * batch) for name in of_layer},
        fixed_ms=0.0,
        scale=1.0,
        per_element_ms=0.0,
        dense_ms=1.0,
    )


def _fit_to_networks(
    table: LatencyTable,
    widths: LayerWidths,
    keeps: Sequence[Sequence[int]],
    networks: Sequence[nn.Module],
    images: Tensor,
    timing: Timing,
    spent: Callable[[], float],
) -> Iterator[Progress | LatencyTable]:
    """The table with how its layers add up: `networks` are the dense one and those of widths `keeps`, all timed in turn."""
    times: list[list[float]] = []
    for network in networks:
        timing.stopwatch(network, images)
    most = max(timing.rounds, _FEWEST_ROUNDS)
    while len(times) < _FEWEST_ROUNDS or (len(times) < most and spent() < 1):
        yield Progress("latency table", "whole networks", len(times), most)
        times.append(timed_round(networks, images, len(times), timing.stopwatch))
    medians = np.median(np.array(times), axis=0)
    dense_ms = float(medians[0])
    layers = np.array([table.layers_ms(widths_of(widths, keep)) for keep in (widths.sizes, *keeps)])
    elements = np.array([table.elements(widths_of(widths, keep)) for keep in (widths.sizes, *keeps)])
    scale, per_element, fixed = fit(layers, elements, medians)
    predicted = fixed + scale * layers + per_element * elements
    low, high = np.quantile(np.array(times)[:, 0], [0.1, 0.9])
    protocol = {
        **table.protocol,
        "batch": len(images),
        "input": list(images.shape[1:]),
        "device": describe_device(images.device),
        "device_type": images.device.type,
        "dtype": str(next(networks[0].parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "clock": clock_name(images.device, torch.get_num_threads()),
        "torch": torch.__version__,
        "network_rounds": len(times),
        "dense_p10_ms": float(low),
        "dense_p90_ms": float(high),
        "trials": [
            {"kept": int(sum(keep)), "measured_ms": float(m), "fitted_ms": float(p)}
            for keep, m, p in zip((widths.sizes, *keeps), medians, predicted, strict=True)
        ],
        "largest_misfit": float(np.abs(predicted - medians).max() / dense_ms),
    }
    yield Progress("latency table", "done", most, most)
    yield replace(
        table, fixed_ms=fixed, scale=scale, per_element_ms=per_element, dense_ms=dense_ms, protocol=protocol
    )


def timed_round(networks: Sequence[nn.Module], images: Tensor, number: int, stopwatch: Stopwatch) -> list[float]:
    """One round over the networks, begun at another one each time; milliseconds in the networks' order."""
    turn = number % len(networks)
    order = [*range(turn, len(networks)), *range(turn)]
    times = {index: stopwatch(networks[index], images) for index in order}
    return [times[index] for index in range(len(networks))]


def _trial_widths(sizes: np.ndarray, steps: Sequence[int]) -> list[list[int]]:
    """Three networks narrowed evenly and two in which every other group is whole."""
    step = np.minimum(np.array(steps, dtype=np.int64), sizes)

    def share(part: float) -> np.ndarray:
        return np.minimum(np.maximum(step, np.round(sizes * part / step).astype(np.int64) * step), sizes)

    even = [share(part).tolist() for part in (0.8, 0.6, 0.35)]
    first = np.arange(len(sizes)) % 2 == 0
    uneven = [np.where(first, share(0.45), sizes).tolist(), np.where(first, sizes, share(0.45)).tolist()]
    return [*even, *(keep for keep in uneven if keep != sizes.tolist())]


def fit(layers: np.ndarray, elements: np.ndarray, times: np.ndarray) -> tuple[float, float, float]:
    """How layers' own times and output elements add up to a network's time: least squares through the dense network.

    Args:
        layers: Summed layer times of the dense network and of narrowed ones, ``[networks]``, ms.
        elements: Their output elements, ``[networks]``.
        times: Their measured times, ``[networks]``, ms; the first is met exactly.

    Returns:
        Scale of the layers' times, milliseconds per element, fixed milliseconds; none is negative.
    """
    saved = np.stack([layers[0] - layers[1:], elements[0] - elements[1:]], axis=1)
    aim = times[0] - times[1:]
    best = (np.inf, np.zeros(2))
    for used in ([0, 1], [0], [1]):  # least squares without negative numbers: of two unknowns all cases can be tried
        solution = np.zeros(2)
        solution[used] = np.linalg.lstsq(saved[:, used], aim, rcond=None)[0]
        miss = float(((saved @ solution - aim) ** 2).sum())
        if (solution >= 0).all() and miss < best[0]:
            best = (miss, solution)
    scale, per_element = best[1]
    moving = scale * layers[0] + per_element * elements[0]
    if moving > times[0]:  # nothing can be fixed by less than nothing
        scale, per_element, moving = scale * times[0] / moving, per_element * times[0] / moving, times[0]
    return float(scale), float(per_element), float(times[0] - moving)
