"""Repair towards the dense network (M9): layers behind a cut are solved again in forward order.

The two networks run side by side on the same samples. A layer's target is what it gives in the dense network; where its
output goes into a residual stream, what the edited stream lacks there is added to the target, so that errors of earlier
layers are repaired instead of inherited. Each solve is a least-squares problem on moments: no labels, no gradients. A
layer whose new weights do no better on the held-out samples keeps those it has.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from modhifi_cli.engine.edit import tensor_edits
from modhifi_cli.engine.gathering import DepthwiseMoments, LayerMoments, TargetMoments
from modhifi_cli.engine.site import own_units
from modhifi_cli.engine.walk import Pair, Recipe, Walk
from modhifi_cli.errors import DataError
from modhifi_cli.graph.components import bias_of, reading_weight, write_reading_weight_
from modhifi_cli.graph.surgery import apply_edit_
from modhifi_cli.numerics.batchnorm import ChannelMoments, output_moments
from modhifi_cli.numerics.cross import dense_regression, squared_error
from modhifi_cli.numerics.depthwise import fitted_filters
from modhifi_cli.records import Edit, EditState, Progress
from modhifi_cli.roles import DenseCompensation, solves_towards_dense

STEP = "dense"  # how such edits are told from those of groups

_LEAST_RIDGE = 1e-6  # of a depthwise filter, where no ridge is asked for: a channel may always be 0


def rebuild_(
    walk: Walk, recipe: Recipe, layers: Sequence[str], iteration: int, waiting: list[Edit]
) -> Iterator[Progress | Edit]:
    """Solve the given layers again towards the dense network, in place, yielding an edit for each.

    Args:
        walk: The edited network beside the dense one.
        recipe: Its compensation says how the ridge is chosen.
        layers: Names in forward order.
        iteration: Pass that the edits belong to.
        waiting: Edits of an interrupted run: those of these layers are taken off its front and applied.

    Raises:
        DataError: If a waiting edit is not the next layer's.
        NumericsError: If activations are not finite.
    """
    joint = recipe.compensation
    if not solves_towards_dense(joint):
        return  # there is no dense network beside the walk, so it has found no layers either
    for number, name in enumerate(layers):
        if len(layers) > 2:  # a decoder's layers come a few at a time and are counted by the walk
            yield Progress("towards the dense network", name, number, len(layers))
        if waiting:
            _apply_done_(walk, name, waiting.pop(0))
        else:
            yield (yield from _rebuild_layer_(walk, joint, name, iteration))


def _apply_done_(walk: Walk, name: str, edit: Edit) -> None:
    if edit.state.step != STEP or edit.name != name:
        raise DataError(
            f"the saved run's edit of '{edit.name}' does not fit these settings, which solve '{name}' again towards "
            "the dense network; it is another run's."
        )
    apply_edit_(walk.model, edit)
    walk.resume_(edit.state)


def _rebuild_layer_(
    walk: Walk, joint: DenseCompensation, name: str, iteration: int
) -> Generator[Progress, None, Edit]:
    aims = walk.aims(name)
    moments = None if isinstance(aims, DepthwiseMoments) else walk.sums(name, exact=True)
    for event in walk.pairs(name):
        if not isinstance(event, Pair):
            yield event
            continue
        if moments is not None:
            moments.update(event.inputs)
        aims.update(event.inputs, event.targets)
        yield Progress("tokens" if walk.what == "layers" else "images", name, event.done, event.total)
    if isinstance(aims, DepthwiseMoments):
        changed, facts = _solve_depthwise_(walk, joint, name, aims)
    else:
        assert moments is not None, "only filters are solved from one accumulator"
        changed, facts = _solve_(walk, joint, name, moments, aims)
    walk.edited_([name], changed)
    touched = dict.fromkeys((*walk.take_refreshed_(), *changed))
    nothing = torch.arange(0)
    state = EditState(STEP, walk.state.stale)
    facts |= {"residual": walk.residual(name)}
    return Edit(name, iteration, tensor_edits(walk.model, list(touched)), nothing, nothing, facts, state)


@torch.no_grad()
def _solve_depthwise_(
    walk: Walk, joint: DenseCompensation, name: str, moments: DepthwiseMoments
) -> tuple[list[str], dict[str, Any]]:
    every, held_out, fit = moments.result()
    module = moments.module
    before = module.weight.detach().flatten(1).double()
    centred = walk.centred(name)
    grid = joint.grid if isinstance(joint.ridge, str) else (float(joint.ridge) or _LEAST_RIDGE,)
    weight, ridge = fitted_filters(every, held_out, fit, before, grid, centred=centred)
    module.weight.copy_(weight.view_as(module.weight))
    outputs = (weight * every.inputs).sum(1)  # mean, with the bias left out

    def moved() -> ChannelMoments:
        variance = torch.einsum("ct,cts,cs->c", weight, every.gram, weight) - outputs.square()
        mean = outputs if module.bias is None else outputs + module.bias.detach().double()
        return ChannelMoments(every.rows, mean, variance.clamp(min=0))

    changed = [name, *walk.settle_dense_(name, lambda: every.targets - outputs, moved)]
    seen = every.about(every.inputs, every.targets) if centred else every
    spread = float(seen.energy.sum().clamp(min=1e-300))
    before_after = {"error_before": before, "error_after": weight}
    return changed, {"ridge": ridge, **{key: float(seen.errors(w).sum()) / spread for key, w in before_after.items()}}


@torch.no_grad()
def _solve_(
    walk: Walk, joint: DenseCompensation, name: str, moments: LayerMoments, aims: TargetMoments
) -> tuple[list[str], dict[str, Any]]:
    gathered, module = moments.result(), walk.model.get_submodule(name)
    aim, held_aim = aims.result()
    before = reading_weight(module).double().to(gathered.statistics.mean.device)
    every = dense_regression(gathered.statistics, aim, before)
    apart = gathered.held_out
    held_out = None if held_aim is None or apart is None else dense_regression(apart, held_aim, before)
    centred = walk.centred(name)
    worth = walk.worth(name)
    if worth is None:
        change, ridge, gained = joint.fit(every, held_out, centred=centred)
    else:
        worth = worth.to(before)
        parts = (None if one is None else one.weighted(worth) for one in (every, held_out))
        change, ridge, gained = joint.fit(*parts, centred=centred)
        change = own_units(walk, name, change)
    better = gained is None or gained < 0
    if not better:  # nothing does better on samples it has not seen
        change = torch.zeros_like(change)
    weight = before + change
    write_reading_weight_(module, weight)

    def lacking() -> Tensor:  # of the mean, with the bias left out
        return aim.mean - weight @ gathered.statistics.mean

    def moved() -> ChannelMoments:
        bias = bias_of(module)
        return output_moments(gathered.statistics, weight, None if bias is None else bias.detach().to(weight))

    changed = [name, *walk.settle_dense_(name, lacking, moved)]
    spread = (aim.energy - aim.mean.square()).sum().clamp(min=1e-300) if centred else aim.energy.sum()
    errors = {
        key: float(squared_error(gathered.statistics, aim, one, centred=centred) / spread)
        for key, one in (("error_before", before), ("error_after", weight))
    }
    return changed, {"ridge": ridge if better else None, **errors}
