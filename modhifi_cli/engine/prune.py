"""ModHiFi-P: structured pruning, part after part in forward order, each on the network as already edited.

ModHiFi, arXiv:2511.19566. For every part: gather the moments of its consumers' inputs, score the components, select, cut,
repair the consumers in closed form, and put right what follows (`edit.py`). The loop is the same whatever the network
reads (`walk.py`). Every step leaves an `Edit` that can be replayed without data.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import torch

from modhifi_cli.engine.classifier import Aims, aims_of, refit_classifier_
from modhifi_cli.engine.curves import Curves, Orders, error_curves
from modhifi_cli.engine.dense import rebuild_
from modhifi_cli.engine.edit import edit_part_, tensor_edits
from modhifi_cli.engine.plan import Plan, Summary, at_widths, planned
from modhifi_cli.engine.query_key import edit_product_
from modhifi_cli.engine.rounding import check_rounding
from modhifi_cli.engine.walk import Budget, Recipe, Stop, Walk
from modhifi_cli.errors import ConfigError, DataError, IllPosedError
from modhifi_cli.evaluation.latency_table import LatencyTable
from modhifi_cli.graph.components import ComponentGroup
from modhifi_cli.graph.surgery import apply_edit_
from modhifi_cli.numerics.elimination import Elimination
from modhifi_cli.records import Edit, EditState, Note, Progress

_TOO_FEW = (
    "there are too few calibration samples to say which layers can lose more than others (8 must be held out, one in "
    "five), so the cut is spread evenly; raise data.num_samples"
)
Event = Plan | Note | Progress | Edit | LatencyTable | Summary


def prune_(walk: Walk, recipe: Recipe, budget: Budget, *, done: Sequence[Edit] = ()) -> Iterator[Event]:
    """Prune a walk's network in place, yielding the plan, progress, one `Edit` per edited part, and a summary.

    Where time is the target its table is yielded whenever it has changed; a continued run must be given the last one.

    Args:
        walk: The network on its calibration data. It is edited as the generator is consumed; an edit is complete when
            it is yielded.
        recipe: The steps of the method.
        budget: What is asked for.
        done: Edits of an interrupted run with the same settings: they are applied, not computed.

    Raises:
        ConfigError: If a setting is out of range or the target cannot be reached.
        DataError: If there are no calibration samples, or `done` does not fit.
        NumericsError: If weights or activations are not finite, or a solve is ill-posed.
        UnsupportedModelError: If nothing in the network can be pruned.
    """
    _check(recipe, budget)
    shares = recipe.schedule(budget.sparsity)
    widths = walk.prices(recipe, budget)
    yield from widths.prepare()
    yield from walk.prepare(recipe, len(shares))
    aims, refused = yield from aims_of(walk, recipe.classifier)
    curves, shapes, orders = yield from _curves(walk, recipe)
    yield from widths.settle(curves)
    sizes = [part.components for part in walk.parts]
    final = widths.at(shares[-1], sizes, curves)

    def impact_at(share: float) -> float:
        return sum(at_widths(walk.parts, curves, widths.at(share, sizes, curves)).values())

    plan = Plan(
        planned(walk.parts, final),
        (*walk.refused, *refused),
        widths.shares(final),
        at_widths(walk.parts, shapes, final),
        at_widths(walk.parts, curves, final),
        str(next((walk.facts(part).get("labels", "") for part in walk.parts), "")),
        impact_at if curves else None,
    )
    yield plan
    for warning in widths.warnings:
        yield Note(warning)
    waiting, present = list(done), curves
    lost = [edit.facts["left_alone"].rstrip(".") for edit in done if "left_alone" in edit.facts]
    for iteration, share in enumerate(shares):
        if iteration and curves:
            yield from walk.begin()
            present, _, orders = yield from _curves(walk, recipe)
        alive = [walk.layout.alive(part).numel() for part in walk.parts]
        now = widths.at(share, alive, present) if iteration or len(shares) > 1 else final
        keep = dict(zip((part.name for part in walk.parts), now, strict=True))
        for event in _pass_(walk, recipe, (iteration, len(shares)), keep, orders, waiting, aims):
            if isinstance(event, Edit) and "left_alone" in event.facts:
                lost.append(event.facts["left_alone"].rstrip("."))
            yield event
    if lost and not _cut_parts(walk):
        raise IllPosedError(lost[0] + ".")
    yield from _finish_(walk, len(shares) - 1, waiting, aims, any_edit=_cut_parts(walk) != [])
    if waiting:
        raise DataError(f"the saved run holds {len(waiting)} edits more than these settings make; it is another run's.")
    total = len(walk.stops) * len(shares)
    yield Progress(walk.what, "done", total, total)
    yield from walk.notes()
    summary = widths.summary(walk.layout)
    if lost:
        summary = replace(summary, warnings=(*summary.warnings, f"left alone after all: {'; '.join(lost)}"))
    if recipe.allocation.needs_curves and not curves:
        summary = replace(summary, warnings=(*summary.warnings, _TOO_FEW))
    yield replace(summary, predicted_impact=sum(plan.predicted_impact.values()) if curves else None)


def _curves(walk: Walk, recipe: Recipe) -> Generator[Progress, None, tuple[Curves, Curves, Orders]]:
    """Error curves, shapes and orders of all parts where the allocation looks at them; else nothing of any."""
    if not recipe.allocation.needs_curves:
        return [], [], {}
    return (yield from error_curves(walk, recipe))


def _pass_(
    walk: Walk,
    recipe: Recipe,
    place: tuple[int, int],
    keep: dict[str, int],
    orders: Orders,
    waiting: list[Edit],
    aims: Aims | None,
) -> Iterator[Progress | Edit]:
    """Go over the network once, editing what is to be narrower; `place` is the pass and how many there are."""
    iteration, passes = place
    yield from walk.begin()
    for number, stop in enumerate(walk.stops):
        yield Progress(walk.what, stop.name, iteration * len(walk.stops) + number, passes * len(walk.stops))
        with walk.at(stop):
            for part in stop.parts:
                if keep[part.name] == walk.layout.alive(part).numel():
                    continue
                if waiting:
                    _apply_done_(walk, stop, part, iteration, keep[part.name], waiting.pop(0))
                    continue
                try:
                    if part.product:
                        edit = yield from edit_product_(walk, part, iteration, keep[part.name])
                    else:
                        own = _along(recipe, orders.get(part.name))
                        edit = yield from edit_part_(walk, own, part, iteration, keep[part.name])
                except IllPosedError as error:  # nothing is cut yet; other parts may be fine
                    edit = _left_alone(walk, part, iteration, str(error))
                yield edit
            layers = [name for name in walk.solvable(stop, _cut_parts(walk)) if aims is None or name != aims.layer]
            yield from rebuild_(walk, recipe, layers, iteration, waiting)
            yield from walk.leave(stop)


def _along(recipe: Recipe, order: Elimination | None) -> Recipe:
    """The recipe for a part whose order of removal is known from its curve, where the selection asks for such an order."""
    along = getattr(recipe.selection, "along", None)
    return recipe if order is None or along is None else replace(recipe, selection=along(order))


def _finish_(
    walk: Walk, iteration: int, waiting: list[Edit], aims: Aims | None, *, any_edit: bool
) -> Iterator[Progress | Edit]:
    """The edits behind all cuts: statistics that still are stale, and the last layer."""
    nothing = torch.arange(0)
    if walk.state.stale and waiting and waiting[0].state.step == "batchnorm":
        apply_edit_(walk.model, waiting.pop(0))
    elif walk.state.stale and not waiting:
        names = yield from walk.finish_()
        edits = tensor_edits(walk.model, names)
        yield Edit("batchnorm", iteration, edits, nothing, nothing, state=EditState("batchnorm"))
    if aims is not None and waiting and waiting[0].state.step == "classifier":
        apply_edit_(walk.model, waiting.pop(0))
    elif aims is not None and not waiting and any_edit:
        yield (yield from refit_classifier_(aims))


def _cut_parts(walk: Walk) -> list[ComponentGroup]:
    return [part for part in walk.parts if walk.layout.alive(part).numel() < part.components]


def _left_alone(walk: Walk, part: ComponentGroup, iteration: int, reason: str) -> Edit:
    """The edit of a part of which the calibration data say nothing: none, but a run that goes on must know.

    The look at the part may have brought statistics in front of it up to date; these belong to it.
    """
    alive = torch.arange(walk.layout.alive(part).numel())
    refreshed = tensor_edits(walk.model, list(dict.fromkeys(walk.take_refreshed_())))
    return Edit(part.name, iteration, refreshed, alive, alive[:0], facts={"left_alone": reason}, state=walk.state)


def _apply_done_(walk: Walk, stop: Stop, part: ComponentGroup, iteration: int, keep: int, edit: Edit) -> None:
    alive = walk.layout.alive(part).numel()
    if (edit.name, edit.iteration) != (part.name, iteration) or edit.kept.numel() not in (keep, alive):
        raise DataError(
            f"the saved run's edit of '{edit.name}' (pass {edit.iteration}, {edit.kept.numel()} kept) does not fit "
            f"these settings, which edit '{part.name}' (pass {iteration}, {keep} kept); it is another run's."
        )
    apply_edit_(walk.model, edit)
    walk.layout.keep_(part, edit.kept)
    for module in edit.modules:
        if module.turn is not None:
            walk.turned_(part, module.turn)
    walk.resume_(edit.state)


def _check(recipe: Recipe, budget: Budget) -> None:
    """Refuse settings out of range.

    Raises:
        ConfigError: Naming the setting.
    """
    if not 0 <= budget.sparsity < 1:
        raise ConfigError(f"sparsity is the share that is removed and must lie in [0, 1), got {budget.sparsity:g}.")
    if recipe.classifier not in ("keep", "refit", "auto"):
        raise ConfigError(f"classifier must be 'keep', 'refit' or 'auto', got '{recipe.classifier}'.")
    check_rounding(budget.round_to)
