"""The edit of one group: gather, score, select, slice, repair, and put the BatchNorms behind it right.

The network is edited in place, and everything that was done to it comes back as one `Edit`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.engine.class_features import MapSummaries, map_summaries
from modhifi_cli.engine.gathering import Gathered, Gathering, LayerMoments
from modhifi_cli.engine.image_walk import Activations, set_statistics_
from modhifi_cli.engine.labelling import Labels
from modhifi_cli.errors import UnsupportedModelError
from modhifi_cli.graph.components import (
    ComponentGroup,
    Layout,
    Slot,
    has_weight,
    is_upsampling,
    output_size,
    output_weights,
    reading_weight,
    taps_of,
)
from modhifi_cli.graph.parts import part_of
from modhifi_cli.graph.segments import Look, Segments
from modhifi_cli.graph.surgery import slice_module_
from modhifi_cli.numerics.batchnorm import output_moments
from modhifi_cli.numerics.compensation import Joint, restored_constant
from modhifi_cli.numerics.fidelity import joint_fidelity, layer_fidelity
from modhifi_cli.numerics.moments import reorder
from modhifi_cli.numerics.scoring import Place
from modhifi_cli.records import Consumer, Edit, ModuleEdit, Progress, Statistics


@dataclass
class Run:
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
    labels: Labels | None = None
    stale: list[str] = field(default_factory=list)
    refreshed: list[str] = field(default_factory=list)


def edit_group_(
    run: Run, ahead: Sequence[ComponentGroup], iteration: int, keep: int, result: list[Edit]
) -> Iterator[Progress]:
    """Score, select, cut and repair the first of the groups ahead; its edit is appended to `result` at the end."""
    started = time.perf_counter()
    group = ahead[0]
    alive = run.layout.alive(group)
    weighted = weighted_consumers(run, group)
    gathered: dict[str, Gathered] = {}
    wanted = any(step.needs_statistics for step in (run.scoring, run.selection, run.compensation))
    classes = _class_looks(run, group, weighted)
    if wanted or classes:
        yield from _gather(run, ahead, weighted if wanted else (), gathered, classes)
    gathered_at = time.perf_counter()
    consumers = [consumer_of(run, slot, alive, gathered) for slot in weighted]
    producers = [filters_of(run, slot, alive) for slot in group.producers]
    generator = torch.Generator().manual_seed(run.seed + 1_000_003 * iteration + 7_919 * len(ahead))
    filters = [weights for weights in producers if weights is not None]
    scores = run.scoring(consumers, filters, generator=generator, **_places(run, classes))
    kept = run.selection(scores, consumers, keep=keep).cpu()
    repairs = [_repair(run, consumer, kept, bool(gathered)) for consumer in consumers]
    orders = [run.layout.input_order(slot, alive) for slot in weighted]

    kept_outputs, kept_inputs = run.layout.keep_(group, kept)
    # A layer may read and write the same stream: its own outputs go with what it reads.
    repairs = [
        _narrowed(repair, run.model.get_submodule(slot.module), kept_outputs.get(slot.module))
        for slot, repair in zip(weighted, repairs, strict=True)
    ]
    for name in dict.fromkeys((*kept_outputs, *kept_inputs)):
        slice_module_(
            part_of(run.model, name), outputs=kept_outputs.get(name), inputs=kept_inputs.get(name)
        )
    changed: list[str] = []
    for slot, consumer, repair, order in zip(weighted, consumers, repairs, orders, strict=True):
        changed += _apply_repair_(run, slot, consumer, kept, repair, order, alone=len(weighted) == 1)
    mark_stale_(run, [slot.module for slot in group.consumers], changed)
    removed = torch.ones(alive.numel(), dtype=torch.bool)
    removed[kept] = False
    touched = dict.fromkeys((*run.refreshed, *changed))
    modules = {edit.module: edit for edit in tensor_edits(run, touched)}
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
    run: Run,
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
            key: {
                consumer.name: value
                for consumer, repair in zip(consumers, repairs, strict=True)
                if (value := getattr(repair, key)) is not None
            }
            for key in ("fidelity", "subset_fidelity", "ridge")
        },
        "rows": {consumer.name: consumer.statistics.rows for consumer in consumers},
        "seconds": {"gathering": gathered - started, "solving": time.perf_counter() - gathered},
        "stale_batchnorms": list(run.stale),
        **({} if run.labels is None else {"labels": run.labels.account}),
    }


def _class_looks(run: Run, group: ComponentGroup, weighted: Sequence[Slot]) -> dict[str, MapSummaries]:
    """What a score of classes has to look at, by module; nothing for any other score.

    Raises:
        UnsupportedModelError: If a layer that reads the group runs more than once, so that an image has several maps.
    """
    if run.labels is None:
        return {}
    several = next((slot.module for slot in weighted if slot.module in run.segments.trace.calls), None)
    if several is not None:
        raise UnsupportedModelError(
            f"a score of classes looks at one map of each image, and {several} runs more than once in one forward; "
            f"choose another score, or leave its group alone with exclude=[{several}]."
        )
    norm = norm_behind(run, group.producers[0].module) if len(group.producers) == 1 else None
    return map_summaries(run.model, run.layout, group, weighted, norm, run.scoring.summary)


def _places(run: Run, looks: Mapping[str, MapSummaries]) -> dict[str, Any]:
    if run.labels is None:
        return {}
    labels = run.labels
    return {"places": [Place(name, look.result(), labels.values, labels.classes) for name, look in looks.items()]}


def _gather(
    run: Run,
    ahead: Sequence[ComponentGroup],
    slots: Sequence[Slot],
    gathered: dict[str, Gathered],
    classes: Mapping[str, MapSummaries],
) -> Iterator[Progress]:
    visits = run.segments.trace.visits
    start = _carry_to(run.segments, ahead)
    if start is not None:
        yield from run.activations.advance(start, stale=run.stale, item=ahead[0].name)
        forget_refreshed_(run, before=visits[start].leave)
    also = {name: summaries.update for name, summaries in classes.items()}
    yield from look(run, slots, gathered, ahead[0].name, also=also)


def look(
    run: Run,
    slots: Sequence[Slot],
    gathered: dict[str, Gathered],
    item: str,
    *,
    also: Mapping[str, Look] | None = None,
    hold_out: bool | None = None,
) -> Iterator[Progress]:
    """Gather the moments of the given consumers' inputs in one walk from where the activations stand.

    `also` are further looks that ride on the walk: module → function of its first input. `hold_out` says whether every
    fifth image is kept apart, too; None leaves it to the compensation.
    """
    visits = run.segments.trace.visits
    moments = {
        slot.module: LayerMoments(
            slot.module,
            run.model.get_submodule(slot.module),
            positions_per_image=run.gathering.positions_per_image,
            seed=run.seed,
            hold_out=run.compensation.wants_held_out if hold_out is None else hold_out,
        )
        for slot in slots
    }
    looks: dict[str, Look] = {name: accumulator.update for name, accumulator in moments.items()}
    for name, extra in (also or {}).items():
        looks[name] = _both(looks[name], extra) if name in looks else extra
    last = max(visits[name].enter for name in looks)
    yield from run.activations.walk(looks, stale=run.stale, item=item)
    forget_refreshed_(run, before=last)
    gathered.update({name: accumulator.result() for name, accumulator in moments.items()})


def _both(first: Look, second: Look) -> Look:
    def look_twice(inputs: Tensor) -> None:
        first(inputs)
        second(inputs)

    return look_twice


def weighted_consumers(run: Run, group: ComponentGroup) -> tuple[Slot, ...]:
    """The group's consumers that have weights, each once."""
    return tuple(slot for slot in group.consumers if has_weight(run.model.get_submodule(slot.module)))


def _carry_to(segments: Segments, groups: Sequence[ComponentGroup]) -> str | None:
    """The last cut in front of everything that the given groups will change."""
    visits = segments.trace.visits
    first = min(visits[name].enter for group in groups for name in group.modules if name in visits)
    reachable = [cut for cut in segments.trace.cuts if visits[cut].leave < first]
    return next((cut for cut in reversed(reachable) if segments.usable(cut)), None)


def forget_refreshed_(run: Run, *, before: float = float("inf")) -> None:
    """Strike BatchNorms that were re-estimated (they run before the given clock) off the stale list."""
    visits = run.segments.trace.visits
    fresh = [name for name in run.stale if visits[name].enter < before]
    run.stale = [name for name in run.stale if name not in fresh]
    run.refreshed.extend(name for name in fresh if name not in run.refreshed)


def features_of(channels: Tensor, taps: int) -> Tensor:
    """Feature numbers of channels, tap after tap: ``[channels × taps]``."""
    return (channels[:, None] * taps + torch.arange(taps)).flatten()


def consumer_of(run: Run, slot: Slot, alive: Tensor, gathered: Mapping[str, Gathered]) -> Consumer:
    """One consumer as the numerics see it, the group's living components first."""
    module = run.model.get_submodule(slot.module)
    features = features_of(run.layout.input_order(slot, alive), taps_of(module))
    weight = reading_weight(module).to(torch.float64)
    mine = gathered.get(slot.module)
    nothing = Statistics(0, torch.zeros(features.numel(), dtype=torch.float64))
    return Consumer(
        name=slot.module,
        weight=weight[:, features.to(weight.device)],
        statistics=nothing if mine is None else reorder(mine.statistics, features),
        components=features.numel() // (taps_of(module) * slot.entries),
        in_group=alive.numel(),
        # Where patches overlap, a constant of each of their pixels is none of the outputs'.
        centred=not is_upsampling(module) and (norm_behind(run, slot.module) is not None or module.bias is not None),
        held_out=None if mine is None or mine.held_out is None else reorder(mine.held_out, features),
    )


def with_others(consumer: Consumer, kept: Tensor) -> Tensor:
    """Kept components of the consumer's whole input: those of the group, then all that are not the group's."""
    return torch.cat([kept, torch.arange(consumer.in_group, consumer.components)])


def write_weight_(module: nn.Module, weight: Tensor, channels: Tensor) -> None:
    """Give a conv or linear layer a weight whose features are ordered by component, in place.

    Args:
        module: The layer, already of the right width.
        weight: ``[outputs, features]`` float64, the features of ``channels[0]`` first.
        channels: A number for each input channel in that order, ``[channels]``; their ranks are the positions.
    """
    natural = features_of(torch.argsort(channels), taps_of(module))
    with torch.no_grad():
        written = weight[:, natural.to(weight.device)]
        module.weight.copy_((written.T if is_upsampling(module) else written).reshape(module.weight.shape))


def filters_of(run: Run, slot: Slot, alive: Tensor) -> Tensor | None:
    """A producer's weights by living component, ``[components, weights]`` float64; None where it has none."""
    weight = output_weights(run.model.get_submodule(slot.module))
    if weight is None:
        return None
    outputs = run.layout.outputs(slot, alive)
    weight = weight.to(torch.float64)
    return weight[outputs.flatten().to(weight.device)].view(alive.numel(), -1)


def norm_behind(run: Run, name: str) -> str | None:
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


def _narrowed(repair: _Repair, module: nn.Module, outputs: Tensor | None) -> _Repair:
    """The same for the outputs that a layer, not yet cut, will still have: ``[kept]``, or None for all."""
    if outputs is None:
        return repair
    outputs = outputs.to(repair.weight.device)
    weight = repair.weight.unflatten(0, (output_size(module), -1))[outputs].flatten(0, 1)
    constant = None if repair.constant is None else repair.constant[outputs.to(repair.constant.device)]
    return replace(repair, weight=weight, constant=constant)


def _repair(run: Run, consumer: Consumer, kept: Tensor, measured: bool) -> _Repair:
    all_kept = with_others(consumer, kept)
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
    run: Run, slot: Slot, consumer: Consumer, kept: Tensor, repair: _Repair, order: Tensor, *, alone: bool
) -> list[str]:
    """Write the repaired weights of one consumer, put its constant right, and say which modules have new tensors."""
    module = run.model.get_submodule(slot.module)
    entries = slot.entries
    mine = order[: consumer.in_group * entries].view(-1, entries)[kept]
    positions = torch.cat([mine.flatten(), order[consumer.in_group * entries :]])
    write_weight_(module, repair.weight, positions)
    changed = [slot.module]
    norm = norm_behind(run, slot.module)
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
    known = alone and repair.fidelity is not None and not is_upsampling(module)
    if known and run.gathering.positions_per_image is None:
        # The consumer's input is what was gathered, so its output's moments follow without another forward.
        width = consumer.weight.shape[1] // consumer.components
        inputs = reorder(consumer.statistics, features_of(with_others(consumer, kept), width))
        bias = None if module.bias is None else module.bias.detach().to(repair.weight)
        set_statistics_(behind, output_moments(inputs, repair.weight, bias))
        return [*changed, norm]
    return changed


def mark_stale_(run: Run, sources: Sequence[str], changed: Sequence[str]) -> None:
    """Every BatchNorm behind one of the changed layers is stale now, unless it is among those that were just set."""
    if not run.reestimate:
        return
    trace = run.segments.trace
    run.stale = [name for name in run.stale if name not in changed]
    for name in trace.visits:
        module = run.model.get_submodule(name)
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
            continue
        behind = any(trace.depends(name, source) for source in sources)
        if behind and name not in changed and name not in run.stale:
            run.stale.append(name)
    run.stale.sort(key=lambda name: trace.visits[name].enter)


def tensor_edits(run: Run, names: Sequence[str]) -> tuple[ModuleEdit, ...]:
    """Present parameters and running statistics of the named modules, as replacements."""
    edits = []
    for name in names:
        module = run.model.get_submodule(name)
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        kept = ("running_mean", "running_var") if norm else ("weight", "bias")
        tensors = {key: getattr(module, key) for key in kept if getattr(module, key, None) is not None}
        edits.append(ModuleEdit(name, tensors={key: value.detach().cpu().clone() for key, value in tensors.items()}))
    return tuple(edits)
