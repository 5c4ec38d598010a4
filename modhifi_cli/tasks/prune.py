"""ModHiFi-P: structured pruning, group after group in forward order, each on the network as already edited.

ModHiFi, arXiv:2511.19566; `../shared/method.md` sections 1 and 2 give the formulas (M1)–(M6). For every group: gather
the moments of its consumers' inputs, score the components, select, slice, repair the consumers in closed form, and
re-estimate the BatchNorms behind. Every step leaves an `Edit` that can be replayed without data.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, DataError, NumericsError, UnsupportedModelError
from modhifi_cli.graph.components import ComponentGroup, Layout, Refusal, Slot, has_weight
from modhifi_cli.graph.counting import CostModel, count
from modhifi_cli.graph.dependency import find_groups
from modhifi_cli.graph.law import lawful
from modhifi_cli.graph.segments import Segments
from modhifi_cli.graph.surgery import apply_edit_, slice_module_
from modhifi_cli.numerics.allocation import Uniform
from modhifi_cli.numerics.batchnorm import output_moments
from modhifi_cli.numerics.compensation import Joint, restored_constant
from modhifi_cli.numerics.elimination import elimination
from modhifi_cli.numerics.fidelity import joint_fidelity, layer_fidelity
from modhifi_cli.numerics.moments import reorder
from modhifi_cli.records import Consumer, Edit, ImageSource, ModuleEdit, Progress, Statistics
from modhifi_cli.tasks.activations import Activations, set_statistics_
from modhifi_cli.tasks.classifier import DenseLogits, find_classifier, refit_classifier_
from modhifi_cli.tasks.impact import IMPACT_IMAGES, Impact
from modhifi_cli.tasks.gathering import Gathered, Gathering, LayerMoments

TARGETS = ("params", "flops", "components")
NEAR = 0.01  # a target counts as reached within one percentage point


@dataclass(frozen=True)
class PlannedGroup:
    """What will happen to one group: its size now, what it keeps, and who is in it."""

    name: str
    components: int
    keep: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What the run is about to do, before anything is cut.

    Attributes:
        groups: Every group with its width at the end of the schedule.
        refused: What is left alone, and why.
        predicted: Share that the widths remove: ``{"params": …, "flops": …, "components": …}``, 0 … 1.
        predicted_error: Group → relative error of its consumers, summed over them, that its width costs on the dense
            network with the best subset and joint weights; empty unless error curves were asked for.
    """

    groups: tuple[PlannedGroup, ...]
    refused: tuple[Refusal, ...]
    predicted: Mapping[str, float]
    predicted_error: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What the run achieved.

    Attributes:
        achieved: Share removed, counted on the edited network: params, flops, components, each 0 … 1.
        warnings: Sentences the user must see (a target missed, dead outputs).
    """

    achieved: Mapping[str, float]
    warnings: tuple[str, ...] = ()


@dataclass
class _Run:
    """Everything the steps share; the network in it is edited in place."""

    model: nn.Module
    segments: Segments
    activations: Activations
    layout: Layout
    scoring: Callable
    selection: Callable
    compensation: Callable
    reestimate: bool
    gathering: Gathering
    seed: int
    stale: list[str] = field(default_factory=list)
    refreshed: list[str] = field(default_factory=list)


def discover(
    model: nn.Module, example: Tensor, *, exclude: Sequence[str] = ()
) -> tuple[Segments, tuple[ComponentGroup, ...], tuple[Refusal, ...]]:
    """Groups of a network that obey the slicing law, what was left out and why, and the network's segments.

    Args:
        model: Dense network in evaluation mode; left as found.
        example: Two images or more, ``[batch, channels, height, width]``.
        exclude: Names of modules to leave alone.

    Raises:
        ConfigError: If an excluded module does not exist.
        UnsupportedModelError: If the network cannot be run or traced.
    """
    segments = Segments(model, example)
    groups, refused = find_groups(model, segments.trace, example, exclude=exclude)
    passed, failed = lawful(model, groups, example.cpu())
    for name, verdict in failed.items():
        reason = verdict.failure or f"sliced and zeroed logits differ by {verdict.difference:.1e} of their scale"
        refused = (*refused, Refusal(name, f"it fails the slicing law: {reason}"))
    return segments, passed, refused


def prune_(
    model: nn.Module,
    *,
    calibration: ImageSource,
    sparsity: float,
    target: str,
    scoring: Callable,
    selection: Callable,
    compensation: Callable,
    allocation: Callable,
    schedule: Callable[[float], Sequence[float]],
    batchnorm: str = "reestimate",
    classifier: str = "keep",
    exclude: Sequence[str] = (),
    round_to: int = 1,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    gathering: Gathering | None = None,
    done: Sequence[Edit] = (),
) -> Iterator[Plan | Progress | Edit | Summary]:
    """Prune `model` in place, yielding the plan, progress, one `Edit` per edited group, and a summary.

    Args:
        model: Dense network, evaluation mode. It is moved to `device` and edited as the generator is consumed; an
            edit is complete when it is yielded.
        calibration: Unlabelled images; labels are never read.
        sparsity: Share to be removed, in [0, 1).
        target: What the share counts: ``"params"``, ``"flops"`` or ``"components"``.
        scoring, selection, compensation: The method's steps, from `modhifi_cli.numerics`.
        allocation: Widths of all groups for a wanted share.
        schedule: Wanted share → share after each pass.
        batchnorm: ``"reestimate"`` running statistics on the calibration images, or keep the ``"stored"`` ones
            (shifted by what the repair of the consumers says).
        classifier: ``"keep"`` the last layer as the groups' edits leave it, or ``"refit"`` it in closed form to the dense
            network's logits on the calibration images.
        exclude: Names of modules to leave alone.
        round_to: Widths are multiples of it.
        batch_size: Images a forward.
        device: Where the forwards run.
        seed: For everything that is drawn.
        gathering: How statistics are gathered.
        done: Edits of an interrupted run with the same settings: they are applied, not computed.

    Raises:
        ConfigError: If a setting is out of range or the target cannot be reached.
        DataError: If there are no calibration images, or `done` does not fit.
        NumericsError: If weights or activations are not finite, or a solve is ill-posed.
        UnsupportedModelError: If nothing in the network can be pruned.
    """
    _check_settings(sparsity, target, batchnorm, classifier, round_to, batch_size)
    device = torch.device(device)
    gathering = gathering or Gathering()
    _check_weights(model)
    model.to(device).eval()
    example = _example(calibration, device)
    segments, groups, refused = discover(model, example, exclude=exclude)
    if not groups:
        reasons = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in refused[:3])
        if sparsity > 0 and exclude:
            raise ConfigError(
                f"sparsity={sparsity:g} cannot be reached: every group of channels is excluded or refused ({reasons}); "
                "exclude fewer modules."
            )
        raise UnsupportedModelError(f"the network has no group of channels that can be pruned ({reasons or 'none'}).")
    costs = CostModel(model, example[:1], groups)
    run = _Run(
        model=model,
        segments=segments,
        activations=Activations(
            model,
            segments,
            calibration,
            batch_size=batch_size,
            device=device,
            limit_bytes=_limit_bytes(gathering),
        ),
        layout=Layout(model, groups),
        scoring=scoring,
        selection=selection,
        compensation=compensation,
        reestimate=batchnorm == "reestimate",
        gathering=gathering,
        seed=seed,
    )
    shares = schedule(sparsity)
    sizes = [group.components for group in groups]

    def widths(share: float, present: Sequence[int], curves: list[list[float]]) -> list[int]:
        return allocation(
            sizes,
            present,
            lambda keep: costs.removed_share(keep, target),
            sparsity=share,
            step=round_to,
            curves=curves or None,
        )

    aims: DenseLogits | None = None
    if classifier == "refit":
        aims = DenseLogits(find_classifier(model, example))
        yield from aims.gather(run.activations)
    curves: list[list[float]] = []
    if allocation.needs_curves:
        trial = Uniform()(sizes, sizes, lambda keep: costs.removed_share(keep, target), sparsity=shares[0], step=1)
        yield from _error_curves(run, groups, trial, curves)
    final = widths(shares[-1], sizes, curves)
    yield Plan(
        _planned(groups, final),
        refused,
        {name: costs.removed_share(final, name) for name in TARGETS},
        {g.name: c[g.components - k] for g, c, k in zip(groups, curves, final, strict=True)} if curves else {},
    )

    waiting = list(done)
    edits = 0
    total = len(groups) * len(shares)
    for iteration, share in enumerate(shares):
        run.activations.restart()
        if allocation.needs_curves and iteration:
            curves = []
            now = [run.layout.alive(group).numel() for group in groups]
            trial = Uniform()(sizes, now, lambda keep: costs.removed_share(keep, target), sparsity=share, step=1)
            yield from _error_curves(run, groups, trial, curves)
        keep = widths(share, [run.layout.alive(group).numel() for group in groups], curves)
        for number, group in enumerate(groups):
            yield Progress("groups", group.name, iteration * len(groups) + number, total)
            if keep[number] == run.layout.alive(group).numel():
                continue
            edits += 1
            if waiting:
                _apply_done_(run, group, iteration, keep[number], waiting.pop(0))
                continue
            edit: list[Edit] = []
            yield from _edit_group_(run, groups[number:], iteration, keep[number], edit)
            yield edit[0]
    if run.stale and waiting and waiting[0].name == "batchnorm":
        apply_edit_(model, waiting.pop(0))
    elif run.stale and not waiting:
        yield from run.activations.refresh(list(run.stale), item="batchnorm")
        _forget_refreshed_(run)
        yield Edit("batchnorm", len(shares) - 1, _tensor_edits(run, run.refreshed), torch.arange(0), torch.arange(0))
    if aims is not None and waiting and waiting[0].name == "classifier":
        apply_edit_(model, waiting.pop(0))
    elif aims is not None and not waiting and edits:
        last: list[Edit] = []
        yield from refit_classifier_(model, run.activations, aims, last)
        yield last[0]
    if waiting:
        raise DataError(f"the saved run holds {len(waiting)} edits more than these settings make; it is another run's.")
    yield Progress("groups", "done", total, total)
    yield _summary(model, example, costs, groups, run.layout, sparsity, target, round_to)


def _check_settings(
    sparsity: float, target: str, batchnorm: str, classifier: str, round_to: int, batch_size: int
) -> None:
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity is the share that is removed and must lie in [0, 1), got {sparsity:g}.")
    if target not in TARGETS:
        raise ConfigError(f"target must be one of {', '.join(TARGETS)}, got '{target}'.")
    if batchnorm not in ("reestimate", "stored"):
        raise ConfigError(f"batchnorm must be 'reestimate' or 'stored', got '{batchnorm}'.")
    if classifier not in ("keep", "refit"):
        raise ConfigError(f"classifier must be 'keep' or 'refit', got '{classifier}'.")
    if round_to < 1 or batch_size < 1:
        raise ConfigError(f"round_to and batch_size must be at least 1, got {round_to} and {batch_size}.")


def _check_weights(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"the weights of '{name}' hold NaN or infinite values; use another weights file.")


def _example(calibration: ImageSource, device: torch.device) -> Tensor:
    if len(calibration) == 0:
        raise DataError("the calibration data holds no image; give data.num_samples at least 1.")
    inputs, _ = next(iter(calibration.batches(2)))
    if inputs.shape[0] < 2:
        inputs = torch.cat([inputs, inputs.flip(-1)])
    return inputs[:2].to(device)


def _limit_bytes(gathering: Gathering) -> float:
    if gathering.carry_gigabytes == "auto":
        return free_memory() / 6
    return float(gathering.carry_gigabytes) * 1e9


def free_memory() -> float:
    """Bytes of memory that a process can take now, as the operating system estimates them."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return float(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 8e9  # systems without /proc: a modest laptop


def _planned(groups: Sequence[ComponentGroup], keep: Sequence[int]) -> tuple[PlannedGroup, ...]:
    return tuple(
        PlannedGroup(
            group.name,
            group.components,
            kept,
            tuple(slot.module for slot in group.producers),
            tuple(slot.module for slot in group.consumers),
        )
        for group, kept in zip(groups, keep, strict=True)
    )


def _carry_to(segments: Segments, groups: Sequence[ComponentGroup]) -> str | None:
    """The last cut in front of everything that the given groups will change."""
    visits = segments.trace.visits
    first = min(visits[name].enter for group in groups for name in group.modules)
    reachable = [cut for cut in segments.trace.cuts if visits[cut].leave < first]
    return next((cut for cut in reversed(reachable) if segments.usable(cut)), None)


def _forget_refreshed_(run: _Run, *, before: float = float("inf")) -> None:
    """Strike BatchNorms that were re-estimated (they run before the given clock) off the stale list."""
    visits = run.segments.trace.visits
    fresh = [name for name in run.stale if visits[name].enter < before]
    run.stale = [name for name in run.stale if name not in fresh]
    run.refreshed.extend(name for name in fresh if name not in run.refreshed)


def _apply_done_(run: _Run, group: ComponentGroup, iteration: int, keep: int, edit: Edit) -> None:
    if (edit.name, edit.iteration, edit.kept.numel()) != (group.name, iteration, keep):
        raise DataError(
            f"the saved run's edit of '{edit.name}' (pass {edit.iteration}, {edit.kept.numel()} kept) does not fit "
            f"these settings, which edit '{group.name}' (pass {iteration}, {keep} kept); it is another run's."
        )
    apply_edit_(run.model, edit)
    run.layout.keep_(group, edit.kept)
    run.stale = list(edit.facts["stale_batchnorms"])


def _edit_group_(
    run: _Run, ahead: Sequence[ComponentGroup], iteration: int, keep: int, result: list[Edit]
) -> Iterator[Progress]:
    """Score, select, cut and repair the first of the groups ahead; its edit is appended to `result` at the end."""
    started = time.perf_counter()
    group = ahead[0]
    alive = run.layout.alive(group)
    weighted = _weighted(run, group)
    gathered: dict[str, Gathered] = {}
    if any(step.needs_statistics for step in (run.scoring, run.selection, run.compensation)):
        yield from _gather(run, ahead, weighted, gathered)
    gathered_at = time.perf_counter()
    consumers = [_consumer(run, slot, alive, gathered) for slot in weighted]
    producers = [_filters(run, slot, alive) for slot in group.producers]
    generator = torch.Generator().manual_seed(run.seed + 1_000_003 * iteration + 7_919 * len(ahead))
    scores = run.scoring(consumers, [filters for filters in producers if filters is not None], generator=generator)
    kept = run.selection(scores, consumers, keep=keep).cpu()
    repairs = [_repair(run, consumer, kept, bool(gathered)) for consumer in consumers]
    orders = [run.layout.input_order(slot, alive) for slot in weighted]

    kept_outputs, kept_inputs = run.layout.keep_(group, kept)
    for name in dict.fromkeys((*kept_outputs, *kept_inputs)):
        slice_module_(
            run.model.get_submodule(name), outputs=kept_outputs.get(name), inputs=kept_inputs.get(name)
        )
    changed: list[str] = []
    for slot, consumer, repair, order in zip(weighted, consumers, repairs, orders, strict=True):
        changed += _apply_repair_(run, slot, consumer, kept, repair, order, alone=len(weighted) == 1)
    _mark_stale_(run, group, changed)
    removed = torch.ones(alive.numel(), dtype=torch.bool)
    removed[kept] = False
    touched = dict.fromkeys((*run.refreshed, *changed))
    modules = {edit.module: edit for edit in _tensor_edits(run, touched)}
    order = dict.fromkeys((*run.refreshed, *group.modules, *changed))
    result.append(
        Edit(
            name=group.name,
            iteration=iteration,
            modules=tuple(
                ModuleEdit(
                    name,
                    kept_outputs.get(name),
                    kept_inputs.get(name),
                    modules[name].tensors if name in modules else {},
                )
                for name in order
            ),
            kept=kept,
            removed=removed.nonzero().flatten(),
            facts=_facts(run, consumers, repairs, scores, alive.numel(), kept.numel(), started, gathered_at),
        )
    )
    run.refreshed = []


def _facts(
    run: _Run,
    consumers: Sequence[Consumer],
    repairs: Sequence["_Repair"],
    scores: Any,
    components: int,
    kept: int,
    started: float,
    gathered: float,
) -> dict[str, Any]:
    return {
        "components": components,
        "kept": kept,
        "dead_outputs": int(scores.dead_outputs),
        **{
            key: {c.name: getattr(r, key) for c, r in zip(consumers, repairs, strict=True) if getattr(r, key) is not None}
            for key in ("fidelity", "subset_fidelity", "ridge")
        },
        "rows": {consumer.name: consumer.statistics.rows for consumer in consumers},
        "seconds": {"gathering": gathered - started, "solving": time.perf_counter() - gathered},
        "stale_batchnorms": list(run.stale),
    }


def _gather(
    run: _Run, ahead: Sequence[ComponentGroup], slots: Sequence[Slot], gathered: dict[str, Gathered]
) -> Iterator[Progress]:
    visits = run.segments.trace.visits
    start = _carry_to(run.segments, ahead)
    if start is not None:
        yield from run.activations.advance(start, stale=run.stale, item=ahead[0].name)
        _forget_refreshed_(run, before=visits[start].leave)
    yield from _look(run, slots, gathered, ahead[0].name)


def _look(run: _Run, slots: Sequence[Slot], gathered: dict[str, Gathered], item: str) -> Iterator[Progress]:
    """Gather the moments of the given consumers' inputs in one walk from where the activations stand."""
    visits = run.segments.trace.visits
    moments = {
        slot.module: LayerMoments(
            slot.module,
            run.model.get_submodule(slot.module),
            positions_per_image=run.gathering.positions_per_image,
            seed=run.seed,
            hold_out=run.compensation.wants_held_out,
        )
        for slot in slots
    }
    last = max(visits[slot.module].enter for slot in slots)
    looks = {name: accumulator.update for name, accumulator in moments.items()}
    yield from run.activations.walk(looks, stale=run.stale, item=item)
    _forget_refreshed_(run, before=last)
    gathered.update({name: accumulator.result() for name, accumulator in moments.items()})


def _weighted(run: _Run, group: ComponentGroup) -> tuple[Slot, ...]:
    """The group's consumers that have weights, each once."""
    return tuple(slot for slot in group.consumers if has_weight(run.model.get_submodule(slot.module)))


def _error_curves(
    run: _Run, groups: Sequence[ComponentGroup], trial: Sequence[int], curves: list[list[float]]
) -> Iterator[Progress]:
    """What it costs every group to lose 0, 1, 2, … components, from one walk over the network as it stands.

    The shape of a curve is the group's own relative error under elimination (M10). Its scale is measured: the group
    alone is cut to its trial width with joint weights, and the change of the logits on some calibration images is
    set against that error. Errors of different depths then add up to one quantity, the relative error of the logits.
    """
    gathered: dict[str, Gathered] = {}
    slots = {slot.module: slot for group in groups for slot in _weighted(run, group)}
    yield from _look(run, tuple(slots.values()), gathered, "error curves")
    impact = Impact(run.model, run.activations.first_images(IMPACT_IMAGES))
    for number, (group, width) in enumerate(zip(groups, trial, strict=True)):
        yield Progress("error curves", group.name, number, len(groups))
        alive = run.layout.alive(group)
        weighted = _weighted(run, group)
        consumers = [_consumer(run, slot, alive, gathered) for slot in weighted]
        path = elimination(consumers, keep=1)
        width = min(max(width, 1), alive.numel() - 1) if alive.numel() > 1 else 1
        kept = path.kept(width).cpu()
        with impact.edited():
            _hollow_(run, group, weighted, consumers, alive, kept)
            moved = impact.measure()
        local = float(path.errors[alive.numel() - width])
        scale = moved / local if local > 0 else 1.0
        curves.append([scale * error for error in path.errors.tolist()])
    yield Progress("error curves", "done", len(groups), len(groups))


def _hollow_(
    run: _Run,
    group: ComponentGroup,
    weighted: Sequence[Slot],
    consumers: Sequence[Consumer],
    alive: Tensor,
    kept: Tensor,
) -> None:
    """Make the network behave as if a group were cut and repaired, without changing a shape (for a trial)."""
    removed = torch.ones(alive.numel(), dtype=torch.bool)
    removed[kept] = False
    joint = Joint(ridge=1e-3)
    for slot, consumer in zip(weighted, consumers, strict=True):
        module = run.model.get_submodule(slot.module)
        all_kept = torch.cat([kept, torch.arange(consumer.in_group, consumer.components)])
        solved = joint(consumer, all_kept)
        width = consumer.weight.shape[1] // consumer.components
        wide = torch.zeros_like(consumer.weight)
        wide[:, _features(all_kept, width).to(wide.device)] = solved
        order = _features(torch.argsort(run.layout.input_order(slot, alive)), _taps(module))
        with torch.no_grad():
            module.weight.copy_(wide[:, order.to(wide.device)].view_as(module.weight))
        if consumer.centred:
            constant = restored_constant(consumer, all_kept, solved)
            norm = _norm_behind(run, slot.module)
            behind = module.bias.data if norm is None else run.model.get_submodule(norm).running_mean
            behind.add_(constant.to(behind), alpha=1 if norm is None else -1)
    for slot in group.consumers:
        module = run.model.get_submodule(slot.module)
        if not has_weight(module):
            gone = run.layout.inputs(slot, alive[removed]).flatten().to(module.source.device)
            module.source[torch.isin(module.source, gone)] = -1


def _taps(module: nn.Module) -> int:
    return module.weight[0, 0].numel()


def _features(channels: Tensor, taps: int) -> Tensor:
    """Feature numbers of channels, tap after tap: ``[channels × taps]``."""
    return (channels[:, None] * taps + torch.arange(taps)).flatten()


def _consumer(run: _Run, slot: Slot, alive: Tensor, gathered: Mapping[str, Gathered]) -> Consumer:
    module = run.model.get_submodule(slot.module)
    features = _features(run.layout.input_order(slot, alive), _taps(module))
    weight = module.weight.detach().flatten(1).to(torch.float64)
    mine = gathered.get(slot.module)
    nothing = Statistics(0, torch.zeros(features.numel(), dtype=torch.float64))
    return Consumer(
        name=slot.module,
        weight=weight[:, features.to(weight.device)],
        statistics=nothing if mine is None else reorder(mine.statistics, features),
        components=features.numel() // (_taps(module) * slot.entries),
        in_group=alive.numel(),
        centred=_norm_behind(run, slot.module) is not None or module.bias is not None,
        held_out=None if mine is None or mine.held_out is None else reorder(mine.held_out, features),
    )


def _filters(run: _Run, slot: Slot, alive: Tensor) -> Tensor | None:
    """A producer's weights by component, ``[components, weights]`` float64; None where it has none."""
    module = run.model.get_submodule(slot.module)
    if not has_weight(module):
        return None
    outputs = run.layout.outputs(slot, alive)
    weight = module.weight.detach().flatten(1).to(torch.float64)
    return weight[outputs.flatten().to(weight.device)].view(alive.numel(), -1)


def _norm_behind(run: _Run, name: str) -> str | None:
    """The BatchNorm with running statistics that reads exactly this layer's output."""
    norm = run.segments.trace.norm_of.get(name)
    if norm is None or run.model.get_submodule(norm).running_mean is None:
        return None
    return norm


@dataclass(frozen=True)
class _Repair:
    weight: Tensor  # [outputs, kept features], component-major
    constant: Tensor | None  # [outputs] what the repaired layer lacks of the dense output's mean; None: leave it
    fidelity: float | None  # of this weight; None: nothing was measured
    subset_fidelity: float | None  # of the best weight on the same components
    ridge: float | None  # of a joint solve


def _repair(run: _Run, consumer: Consumer, kept: Tensor, measured: bool) -> _Repair:
    all_kept = torch.cat([kept, torch.arange(consumer.in_group, consumer.components)])
    ridge = None
    if isinstance(run.compensation, Joint):
        solution = run.compensation.solve(consumer, all_kept)
        weight, ridge = solution.weight, solution.ridge
    else:
        weight = run.compensation(consumer, all_kept)
    if not measured:
        return _Repair(weight, None, None, None, None)
    restores = run.compensation.needs_statistics and consumer.centred  # plain slicing restores nothing
    constant = restored_constant(consumer, all_kept, weight) if restores else None
    best = joint_fidelity(consumer, all_kept)
    return _Repair(weight, constant, layer_fidelity(consumer, all_kept, weight), best, ridge)


def _apply_repair_(
    run: _Run, slot: Slot, consumer: Consumer, kept: Tensor, repair: _Repair, order: Tensor, *, alone: bool
) -> list[str]:
    """Write the repaired weights of one consumer, put its constant right, and say which modules have new tensors."""
    module = run.model.get_submodule(slot.module)
    entries = slot.entries
    taps = _taps(module)
    mine = order[: consumer.in_group * entries].view(-1, entries)[kept]
    positions = torch.cat([mine.flatten(), order[consumer.in_group * entries :]])
    natural = _features(torch.argsort(positions), taps)
    weight = repair.weight[:, natural.to(repair.weight.device)]
    with torch.no_grad():
        module.weight.copy_(weight.view_as(module.weight))
    changed = [slot.module]
    norm = _norm_behind(run, slot.module)
    if norm is None:
        if repair.constant is not None:
            with torch.no_grad():
                module.bias.add_(repair.constant.to(module.bias.device))
        return changed
    behind = run.model.get_submodule(norm)
    if not run.reestimate:
        if repair.constant is None:
            return changed
        behind.running_mean.sub_(repair.constant.to(behind.running_mean.device))
        return [*changed, norm]
    if alone and repair.fidelity is not None and run.gathering.positions_per_image is None:
        # The consumer's input is what was gathered, so its output's moments follow without another forward.
        features = torch.cat([kept, torch.arange(consumer.in_group, consumer.components)])
        width = consumer.weight.shape[1] // consumer.components
        inputs = reorder(consumer.statistics, _features(features, width))
        bias = None if module.bias is None else module.bias.detach().to(repair.weight)
        set_statistics_(behind, output_moments(inputs, repair.weight, bias))
        return [*changed, norm]
    return changed


def _mark_stale_(run: _Run, group: ComponentGroup, changed: Sequence[str]) -> None:
    """Every BatchNorm behind a consumer whose input statistics the edit has changed, unless just set exactly."""
    if not run.reestimate:
        return
    trace = run.segments.trace
    run.stale = [name for name in run.stale if name not in changed]
    sources = [slot.module for slot in group.consumers]
    for name in trace.visits:
        module = run.model.get_submodule(name)
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
            continue
        behind = any(trace.depends(name, source) for source in sources)
        if behind and name not in changed and name not in run.stale:
            run.stale.append(name)
    run.stale.sort(key=lambda name: trace.visits[name].enter)


def _tensor_edits(run: _Run, names: Sequence[str]) -> tuple[ModuleEdit, ...]:
    """Present parameters and running statistics of the named modules, as replacements."""
    edits = []
    for name in names:
        module = run.model.get_submodule(name)
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        kept = ("running_mean", "running_var") if norm else ("weight", "bias")
        tensors = {key: getattr(module, key) for key in kept if getattr(module, key, None) is not None}
        edits.append(ModuleEdit(name, tensors={key: value.detach().cpu().clone() for key, value in tensors.items()}))
    return tuple(edits)


def _summary(
    model: nn.Module,
    example: Tensor,
    costs: CostModel,
    groups: Sequence[ComponentGroup],
    layout: Layout,
    sparsity: float,
    target: str,
    round_to: int,
) -> Summary:
    counts = count(model, example[:1])
    kept = sum(layout.alive(group).numel() for group in groups)
    achieved = {
        "params": 1 - counts.parameters / costs.dense.parameters,
        "flops": 1 - counts.macs / costs.dense.macs,
        "components": 1 - kept / sum(group.components for group in groups),
    }
    warnings = ()
    if abs(achieved[target] - sparsity) > NEAR:
        warnings = (
            f"sparsity={sparsity:g} of {target} was asked for and {achieved[target]:.3f} reached: widths come in steps "
            f"of {round_to} and groups have as few as {min(group.components for group in groups)} components.",
        )
    return Summary(achieved, warnings)
