"""Pruners of other projects, run to the same budget so that they can be compared with ours on equal terms.

The other library chooses what goes, on a copy of the network; its choice is written down as our `Edit` records and cut
by our own surgery. That the two networks are then equal, tensor by tensor, is checked in every run, so a saved outside
run replays like any other, and a network that the library cuts in another way is refused instead of misreported.
"""

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.engine.activations import Activations
from modhifi_cli.engine.gathering import Gathering
from modhifi_cli.engine.memory import limit_bytes
from modhifi_cli.engine.plan import Plan, PlannedGroup, Summary, discover, example_of
from modhifi_cli.engine.prices import COUNTED, Price, Pricing, Subject, as_price
from modhifi_cli.engine.rounding import AUTO
from modhifi_cli.engine.widths import NEAR
from modhifi_cli.errors import ConfigError, DataError, NumericsError, UnsupportedModelError, nearest, package_missing
from modhifi_cli.evaluation.latency_table import LatencyTable
from modhifi_cli.graph.components import complement
from modhifi_cli.graph.counting import CostModel, count
from modhifi_cli.graph.modules import ChannelPadShortcut
from modhifi_cli.graph.segments import Segments
from modhifi_cli.graph.surgery import apply_edit_
from modhifi_cli.records import Edit, ImageSource, ModuleEdit, Progress

try:
    import torch_pruning
except ImportError as missing:
    raise package_missing("outside=torch_pruning_… (presets of that name, too)", "torch_pruning") from missing

IMPORTANCES = ("magnitude", "bn_scale")
_TRIALS = 16  # of the bisection: 2^-16 of the pruning ratio is less than one channel of any network here
_CLOSE = 0.001  # share of the budget at which the bisection stops early


class _ShortcutPruner(torch_pruning.BasePruningFunc):
    """Lets Torch-Pruning cut the option-A shortcut map, whose two sides belong to different streams."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        layer.slice_(outputs=complement(idxs, layer.out_channels).to(layer.source.device))
        return layer

    def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        layer.slice_(inputs=complement(idxs, layer.in_channels).to(layer.source.device))
        return layer

    def get_out_channels(self, layer: nn.Module) -> int:
        return layer.out_channels

    def get_in_channels(self, layer: nn.Module) -> int:
        return layer.in_channels


@dataclass(frozen=True)
class _Cut:
    """What Torch-Pruning did at one pruning ratio."""

    model: nn.Module
    edits: tuple[Edit, ...]
    groups: tuple[PlannedGroup, ...]
    removed: dict[str, float]


def torch_pruning_(
    model: nn.Module,
    *,
    calibration: ImageSource,
    sparsity: float,
    target: Price | str,
    importance: str,
    whole_network: bool = False,
    batchnorm: str = "reestimate",
    exclude: Sequence[str] = (),
    round_to: int | str = 1,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    done: Sequence[Edit] = (),
) -> Iterator[Plan | Progress | Edit | LatencyTable | Summary]:
    """Prune `model` in place with Torch-Pruning's high-level pruner, its ratio bisected until the budget is met.

    Fang et al., "DepGraph: Towards Any Structural Pruning" (arXiv:2301.12900). Layers that write the network's output
    are left alone. Nothing is fine-tuned. One parameter for each key of the YAML, and for what every run gives.

    Args:
        model: Dense network in evaluation mode; moved to `device` and edited as the generator is consumed.
        calibration: Unlabelled images for BatchNorm; Torch-Pruning itself sees one input only, for tracing.
        sparsity: Share to be removed, in [0, 1).
        target: What the share counts, from `modhifi_cli.engine.prices`, or the name of what is counted. Time is that of
            our table; no narrowed network is timed before the cut.
        importance: ``"magnitude"`` (group L2 norm) or ``"bn_scale"`` (absolute BatchNorm weights, Network Slimming).
        whole_network: Whether channels are ranked across layers; otherwise each layer loses the same share, some of
            them one step more where the budget lies between two steps.
        batchnorm: ``"reestimate"`` running statistics on the calibration images, or keep the ``"stored"`` ones.
        exclude: Names of modules to leave alone.
        round_to: Widths are multiples of it. ``"auto"`` is 1: one number for all layers is no rule for each group.
        batch_size: Images a forward.
        device: Where the forwards run.
        done: Edits of an interrupted run with the same settings: they are applied again.

    Yields:
        The plan, progress, the latency table, one `Edit` per group that loses channels, one named ``batchnorm``, and a summary.

    Raises:
        ConfigError: If a setting is out of range or names a module that does not exist.
        DataError: If there are no calibration images, or `done` does not fit.
        NumericsError: If activations are not finite.
        UnsupportedModelError: If Torch-Pruning cannot trace the network or does not cut it as our surgery does.
    """
    price = as_price(target)
    target = price.name
    _check(sparsity, importance)
    device = torch.device(device)
    example = example_of(calibration, device)
    model.to(device).eval()
    asked = _Asked(importance, whole_network, _excluded(model, exclude), 1 if round_to == AUTO else int(round_to))
    segments = Segments(model, example)
    pricing: Pricing | None = None
    if price.timed:
        _, groups, _ = discover(model, example, exclude=exclude)
        steps = [1] * len(groups)
        pricing = price.on(Subject(model, example[:1], groups, CostModel(model, example[:1], groups), steps))
        yield from pricing.prepare()

    def cut(ratio: float, raised: Mapping[str, float]) -> _Cut:
        found = _cut(model, example, ratio, raised, asked)
        if pricing is not None:
            found.removed[target] = pricing.removed_share_of(found.model)
        return found

    search = _Search(sparsity, target, cut)
    if sparsity > 0:
        yield from search.bisect_ratio()
        if not whole_network:
            yield from search.raise_layers()
    yield Progress("torch-pruning", "done", 1, 1)
    best = search.best
    if best is None:
        nothing = {"table": 0.0, "predicted": 0.0} if pricing is not None else None
        yield Plan((), (), dict.fromkeys(COUNTED, 0.0))
        yield Summary(dict.fromkeys(COUNTED, 0.0), latency=nothing)
        return
    yield Plan(best.groups, (), best.removed)
    waiting = list(done)
    yield from _edits_(model, best, waiting)
    _same_network(model, best.model)
    if waiting:
        apply_edit_(model, waiting.pop(0))
    elif batchnorm == "reestimate":
        yield from _refresh(model, segments, calibration, batch_size, device)
    yield _summary(best, target, sparsity)


def _edits_(model: nn.Module, best: _Cut, waiting: list[Edit]) -> Iterator[Edit]:
    """Apply the edits; those that are `waiting` from an interrupted run are taken off its front and not told again."""
    for edit in best.edits:
        before = waiting.pop(0) if waiting else None
        if before is not None and (before.name, before.kept.tolist()) != (edit.name, edit.kept.tolist()):
            raise DataError(
                f"the saved run's edit of '{before.name}' does not fit these settings; it is another run's."
            )
        apply_edit_(model, edit)
        if before is None:
            yield edit


def _summary(best: _Cut, target: str, sparsity: float) -> Summary:
    missed = abs(best.removed[target] - sparsity) > NEAR
    warning = (
        f"sparsity={sparsity:g} of {target} was asked for and {best.removed[target]:.3f} reached: no pruning ratio of "
        "Torch-Pruning came closer."
    )
    saved = best.removed.get("latency")
    return Summary(
        {name: best.removed[name] for name in COUNTED},
        (warning,) if missed else (),
        None if saved is None else {"table": saved, "predicted": saved},
    )


class _Search:
    """Looks for the settings of Torch-Pruning's pruner that meet a budget.

    With the same ratio for every layer the widths of many layers change at the same ratio, so the budget often lies
    between two of its steps. Then some layers get the ratio behind the step and the others the one in front of it, by
    the pruner's own `pruning_ratio_dict`.

    Args:
        sparsity: The budget.
        target: What it counts.
        cut: (ratio, layers' own ratios) → what Torch-Pruning makes of it.
    """

    def __init__(self, sparsity: float, target: str, cut: Callable[[float, Mapping[str, float]], _Cut]) -> None:
        self._sparsity, self._target, self._cut = sparsity, target, cut
        self._low, self._high = 0.0, 1.0
        self.best: _Cut | None = None

    def bisect_ratio(self) -> Iterator[Progress]:
        for trial in range(_TRIALS):
            if self._met():
                return
            ratio = (self._low + self._high) / 2
            yield Progress("torch-pruning", f"pruning ratio {ratio:.4f}", trial, _TRIALS)
            if self._removed(ratio, {}) < self._sparsity:
                self._low = ratio
            else:
                self._high = ratio

    def raise_layers(self) -> Iterator[Progress]:
        if self.best is None or self._met():
            return
        names = [group.name for group in self.best.groups]
        # Neighbours in this order lie far apart in the network, so no part of it is favoured.
        names = [name for _, name in sorted((number * 0.618034 % 1, name) for number, name in enumerate(names))]
        few, many = 0, len(names)
        while many - few > 1:
            yield Progress("torch-pruning", f"{(few + many) // 2} layers one step narrower", few, len(names))
            middle = (few + many) // 2
            if self._removed(self._low, dict.fromkeys(names[:middle], self._high)) < self._sparsity:
                few = middle
            else:
                many = middle
        raised = names[:few]
        for number, name in enumerate(names[few + 1 : few + 1 + _TRIALS]):
            if self._met():
                return
            yield Progress("torch-pruning", f"{name} one step narrower", number, _TRIALS)
            if self._removed(self._low, dict.fromkeys([*raised, name], self._high)) < self._sparsity:
                raised.append(name)

    def _removed(self, ratio: float, raised: Mapping[str, float]) -> float:
        cut = self._cut(ratio, raised)
        if self.best is None or self._distance(cut) < self._distance(self.best):
            self.best = cut
        return cut.removed[self._target]

    def _distance(self, cut: _Cut) -> float:
        return abs(cut.removed[self._target] - self._sparsity)

    def _met(self) -> bool:
        return self.best is not None and self._distance(self.best) <= _CLOSE


def _check(sparsity: float, importance: str) -> None:
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity is the share that is removed and must lie in [0, 1), got {sparsity:g}.")
    if importance not in IMPORTANCES:
        raise ConfigError(f"outside.importance: there is no '{importance}'; {nearest(importance, IMPORTANCES)}")


def _excluded(model: nn.Module, exclude: Sequence[str]) -> frozenset[str]:
    known = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for name in exclude:
        inside = [module for module in known if module == name or module.startswith(name + ".")]
        if not inside:
            raise ConfigError(f"exclude: the network has no module '{name}'; {nearest(name, known)}")
        found.update(inside)
    return frozenset(found)


@dataclass(frozen=True)
class _Asked:
    """What Torch-Pruning is asked for, whatever the ratio.

    Attributes:
        importance: ``"magnitude"`` or ``"bn_scale"``.
        whole_network: Whether channels are ranked across layers.
        excluded: Modules to leave alone.
        round_to: Widths are multiples of it.
    """

    importance: str
    whole_network: bool
    excluded: frozenset[str]
    round_to: int


def _cut(model: nn.Module, example: Tensor, ratio: float, raised: Mapping[str, float], asked: _Asked) -> _Cut:
    """Let Torch-Pruning cut a copy of the network, and write down what it does group by group."""
    ours = copy.deepcopy(model)
    for parameter in ours.parameters():
        parameter.requires_grad_(True)
    names = {module: name for name, module in ours.named_modules() if name}
    edits: list[Edit] = []
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
            warnings.simplefilter("ignore")
            pruner = _pruner(ours, example, names, ratio, raised, asked)
            sizes: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {}
            for group in pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers):
                name, touched = _touched(pruner.DG, group, names)
                producers = tuple(module for module, dim in touched if dim == "out" and _writes(ours, module))
                consumers = tuple(module for module, dim in touched if dim == "in")
                sizes[name] = (len(group[0].idxs), producers, consumers)
            for group in pruner.step(interactive=True):
                edits.append(_as_edit(pruner.DG, group, names))
                group.prune()
            before, after = count(model, example[:1]), count(ours.eval(), example[:1])
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError) as error:
        told = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"Torch-Pruning cannot prune {type(model).__name__} ({type(error).__name__}: {told}); "
            "leave this method out, or exclude the modules it fails on."
        ) from error
    for parameter, own in zip(ours.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(own.requires_grad)
    gone = {edit.name: 0 for edit in edits}
    for edit in edits:
        gone[edit.name] += edit.removed.numel()
    groups = tuple(
        PlannedGroup(name, size, size - gone.get(name, 0), producers, consumers)
        for name, (size, producers, consumers) in sizes.items()
    )
    total = sum(group.components for group in groups)
    removed = {
        "params": 1 - after.parameters / before.parameters,
        "flops": 1 - after.macs / before.macs,
        "components": 1 - sum(group.keep for group in groups) / max(total, 1),
    }
    return _Cut(ours, tuple(edits), groups, removed)


def _pruner(
    ours: nn.Module,
    example: Tensor,
    names: dict[nn.Module, str],
    ratio: float,
    raised: Mapping[str, float],
    asked: _Asked,
) -> Any:
    """Torch-Pruning's own pruner of a network."""
    kind, score = {
        "magnitude": (torch_pruning.pruner.MagnitudePruner, torch_pruning.importance.GroupMagnitudeImportance(p=2)),
        "bn_scale": (torch_pruning.pruner.BNScalePruner, torch_pruning.importance.BNScaleImportance()),
    }[asked.importance]
    customized = {ChannelPadShortcut: _ShortcutPruner()}
    graph = torch_pruning.DependencyGraph().build_dependency(
        ours, example, customized_pruners=customized, verbose=False
    )
    left_alone = [module for module, name in names.items() if name in asked.excluded]
    left_alone += _output_layers(graph, names)
    return kind(
        ours,
        example,
        importance=score,
        global_pruning=asked.whole_network,
        pruning_ratio=ratio,
        pruning_ratio_dict={ours.get_submodule(name): own for name, own in raised.items()},
        ignored_layers=left_alone,
        round_to=asked.round_to if asked.round_to > 1 else None,
        customized_pruners=customized,
        in_channel_groups={},  # its defaults are dictionaries that all pruners of a process share
        out_channel_groups={},
        num_heads={},
    )


def _output_layers(graph: Any, names: dict[nn.Module, str]) -> list[nn.Module]:
    """Layers whose output channels no other layer reads: they write the network's output."""
    found = []
    for module in names:
        if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear) or module not in graph.module2node:
            continue
        pruner = graph.get_pruner_of_module(module)
        group = graph.get_pruning_group(module, pruner.prune_out_channels, [0])
        _, touched = _touched(graph, group, names)
        if not any(dim == "in" for _, dim in touched):
            found.append(module)
    return found


def _touched(graph: Any, group: Any, names: dict[nn.Module, str]) -> tuple[str, dict[tuple[str, str], set[int]]]:
    """Name of a group's root, and the positions that it touches: (module, ``"out"`` or ``"in"``) → positions."""
    touched: dict[tuple[str, str], set[int]] = {}
    for item in group.items:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            raise ValueError(f"{item.dep.target.name} is a bare parameter across pruned channels")
        if module not in names:
            continue  # sums, activations, concatenations: nothing to cut
        if not list(module.parameters(recurse=False)) and not list(module.buffers(recurse=False)):
            continue
        single = isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "groups", 1) > 1
        out = single or graph.is_out_channel_pruning_fn(item.dep.handler)
        positions = touched.setdefault((names[module], "out" if out else "in"), set())
        positions.update(int(position) for position in item.idxs)
    return names[group[0].dep.target.module], touched


def _writes(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.modules.conv._ConvNd | nn.Linear | ChannelPadShortcut)


def _as_edit(graph: Any, group: Any, names: dict[nn.Module, str]) -> Edit:
    """One group that Torch-Pruning is about to cut, in the network's present coordinates."""
    root, touched = _touched(graph, group, names)
    modules = {name: module for module, name in names.items()}
    kept: dict[str, dict[str, Tensor]] = {}
    for (name, dim), positions in touched.items():
        size = graph.get_out_channels(modules[name]) if dim == "out" else graph.get_in_channels(modules[name])
        kept.setdefault(name, {})[dim] = complement(positions, size)
    removed = torch.tensor(sorted(int(position) for position in group[0].idxs))
    size = graph.get_out_channels(modules[root])
    return Edit(
        name=root,
        iteration=0,
        modules=tuple(ModuleEdit(name, dims.get("out"), dims.get("in")) for name, dims in kept.items()),
        kept=complement(removed, size),
        removed=removed,
        facts={"components": size, "kept": size - removed.numel()},
    )


def _same_network(ours: nn.Module, theirs: nn.Module) -> None:
    """Refuse a network that Torch-Pruning cut in another way than our surgery did with the same indices."""
    mine, other = ours.state_dict(), theirs.state_dict()
    for name, tensor in mine.items():
        if tensor.shape != other[name].shape or not torch.equal(tensor, other[name]):
            raise UnsupportedModelError(
                f"Torch-Pruning cuts {name} to {tuple(other[name].shape)} in another way than its own groups say "
                f"({tuple(tensor.shape)}), so its network is not reported; leave this method out for this network."
            )


def _refresh(
    model: nn.Module, segments: Segments, calibration: ImageSource, batch_size: int, device: torch.device
) -> Iterator[Progress | Edit]:
    """Re-estimate every BatchNorm that runs, in execution order, and say so in one edit."""
    stale = [
        name
        for name in segments.trace.visits
        if isinstance(model.get_submodule(name), nn.modules.batchnorm._BatchNorm)
        and model.get_submodule(name).running_mean is not None
    ]
    if not stale:
        return
    activations = Activations(
        model, segments, calibration, batch_size=batch_size, device=device, limit_bytes=limit_bytes(Gathering(), device)
    )
    yield from activations.refresh(stale, item="batchnorm")
    edits = []
    for name in stale:
        norm = model.get_submodule(name)
        tensors = {key: getattr(norm, key).detach().cpu().clone() for key in ("running_mean", "running_var")}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise NumericsError(f"{name}: its re-estimated statistics are not finite; check weights and preprocessing.")
        edits.append(ModuleEdit(name, tensors=tensors))
    yield Edit("batchnorm", 0, tuple(edits), torch.arange(0), torch.arange(0), {"stale_batchnorms": []})
