"""The edit of one part: gather, score, select, cut, repair, and put right what follows.

The network is edited in place, and everything that was done to it comes back as one `Edit`.
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.engine.gathering import Gathered
from modhifi_cli.engine.site import (
    consumers_of,
    kept_positions,
    own_units,
    producers_of,
    with_others,
    write_weight_,
)
from modhifi_cli.engine.walk import Recipe, Repair, Walk, drawn
from modhifi_cli.graph.components import ComponentGroup, complement, output_size
from modhifi_cli.numerics.compensation import NoCompensation, restored_constant
from modhifi_cli.numerics.fidelity import joint_fidelity, layer_fidelity
from modhifi_cli.records import Consumer, Edit, ModuleEdit, Progress
from modhifi_cli.roles import Scores, Selection


def edit_part_(
    walk: Walk, recipe: Recipe, part: ComponentGroup, iteration: int, keep: int
) -> Generator[Progress, None, Edit]:
    """Score, select, cut and repair one part.

    Args:
        walk: Standing at the part's stop; its network is edited in place.
        recipe: The steps.
        part: What is cut.
        iteration: Pass of the schedule.
        keep: Components that stay, fewer than live.
    """
    started = time.perf_counter()
    alive, slots = walk.layout.alive(part), walk.consumers(part)
    gathered: dict[str, Gathered] = {}
    looks = walk.class_looks(part, recipe.scoring)
    if recipe.needs_statistics or looks:
        hold_out = recipe.compensation.wants_held_out
        wanted = slots if recipe.needs_statistics else ()
        gathered = yield from walk.gather(part, wanted, hold_out=hold_out, also=looks)
    gathered_at = time.perf_counter()
    consumers = consumers_of(walk, part, gathered)
    places = {"places": walk.places(looks)} if recipe.scoring.needs_labels else {}
    generator = drawn(recipe, walk, part, iteration)
    scores = recipe.scoring(consumers, producers_of(walk, part, consumers), generator=generator, **places)
    kept = selected(part, recipe.selection, scores, consumers, alive, keep).cpu()
    if not walk.repairs(part):
        recipe = replace(recipe, compensation=NoCompensation())
    repairs = [repaired(walk, recipe, consumer, kept, measured=bool(gathered)) for consumer in consumers]

    orders = [walk.layout.input_order(slot, alive) for slot in slots]
    sizes = [output_size(walk.model.get_submodule(slot.module)) for slot in slots]
    cut = walk.cut_(part, kept)
    changed: list[str] = []
    for slot, consumer, whole, order, size in zip(slots, consumers, repairs, orders, sizes, strict=True):
        repair = _narrowed(whole, size, cut.outputs.get(slot.module))
        positions = kept_positions(slot, consumer, kept, order)
        write_weight_(walk.model.get_submodule(slot.module), repair.weight, positions)
        changed += [slot.module, *walk.settle_(slot, consumer, kept, repair, alone=len(slots) == 1)]
    walk.edited_([slot.module for slot in part.consumers], changed)
    refreshed = walk.take_refreshed_()
    modules = {edit.module: edit for edit in tensor_edits(walk.model, list(dict.fromkeys((*refreshed, *changed))))}
    facts = _facts(consumers, repairs, scores, alive.numel(), kept.numel(), started, gathered_at)
    return Edit(
        name=part.name,
        iteration=iteration,
        modules=tuple(
            ModuleEdit(
                name,
                cut.outputs.get(name),
                cut.inputs.get(name),
                modules[name].tensors if name in modules else {},
                cut.attributes.get(name, {}),
            )
            for name in dict.fromkeys((*refreshed, *part.modules, *changed, *cut.attributes))
        ),
        kept=kept,
        removed=complement(kept, alive.numel()),
        facts={**facts, **walk.facts(part)},
        state=walk.state,
    )


def selected(
    part: ComponentGroup,
    selection: Selection,
    scores: Scores,
    consumers: Sequence[Consumer],
    alive: Tensor,
    keep: int,
) -> Tensor:
    """Kept components; where a part asks for it, the same number from each of its runs (query heads of a KV head).

    Args:
        part: What is selected from.
        selection: The rule.
        scores: Votes on the living components.
        consumers: Of the part, living components only.
        alive: Dense numbers of the living components.
        keep: How many to keep, a multiple of ``part.balanced``.

    Returns:
        Positions among the living components, ``[keep]`` int64 sorted.
    """
    if part.balanced == 1:
        return selection(scores, consumers, keep=keep)
    run_of = (alive // (part.components // part.balanced)).tolist()
    room = dict.fromkeys(run_of, keep // part.balanced)
    kept = []
    for component in selection.ranked(scores, consumers):
        if room[run_of[component]] > 0:
            room[run_of[component]] -= 1
            kept.append(component)
    return torch.tensor(sorted(kept))


def repaired(walk: Walk, recipe: Recipe, consumer: Consumer, kept: Tensor, *, measured: bool) -> Repair:
    """The new weight of a consumer that keeps some of a part's components, and what that costs.

    Args:
        walk: The network.
        recipe: The steps.
        consumer: The consumer before the cut.
        kept: Kept components of the part, ``[kept]`` int64.
        measured: Whether the consumer's statistics were gathered.
    """
    all_kept = with_others(consumer, kept)
    solution = recipe.compensation.solve(consumer, all_kept)
    weight = own_units(walk, consumer.name, solution.weight)
    if not measured:
        return Repair(weight)
    # Plain slicing restores nothing.
    restores = consumer.centred and (recipe.compensation.needs_statistics or walk.restores_always)
    constant = restored_constant(consumer, all_kept, solution.weight) if restores else None
    return Repair(
        weight,
        None if constant is None else own_units(walk, consumer.name, constant),
        layer_fidelity(consumer, all_kept, solution.weight),
        joint_fidelity(consumer, all_kept),
        solution.ridge,
    )


def _narrowed(repair: Repair, size: int, outputs: Tensor | None) -> Repair:
    """The same for the kept ones of a layer's outputs: a layer may read and write the same stream."""
    if outputs is None:
        return repair
    outputs = outputs.to(repair.weight.device)
    weight = repair.weight.unflatten(0, (size, -1))[outputs].flatten(0, 1)
    constant = None if repair.constant is None else repair.constant[outputs.to(repair.constant.device)]
    return replace(repair, weight=weight, constant=constant)


def _facts(
    consumers: Sequence[Consumer],
    repairs: Sequence[Repair],
    scores: Scores,
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
    }


def tensor_edits(model: nn.Module, names: Sequence[str]) -> tuple[ModuleEdit, ...]:
    """Present parameters and running statistics of the named modules, as replacements."""
    edits = []
    for name in names:
        module = model.get_submodule(name)
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        kept = ("running_mean", "running_var") if norm else ("weight", "bias")
        tensors = {key: getattr(module, key) for key in kept if getattr(module, key, None) is not None}
        edits.append(ModuleEdit(name, tensors={key: value.detach().cpu().clone() for key, value in tensors.items()}))
    return tuple(edits)
