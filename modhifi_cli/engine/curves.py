"""Error curves for an uneven allocation: a part's own shape, on a scale that the answers give.

The shape of a curve is the part's own relative error under elimination (M10). Its scale is measured at a few depths: the
part alone is cut there with joint weights, and the change of the answers on some samples is set against the part's
error. Errors of different parts then add up to one quantity. The trial weights are fitted without the samples on which
they are tried, where there are enough: what a layer remembers of samples that it was fitted to looks free and is not.
"""

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from modhifi_cli.engine.impact import TRIAL_DEPTHS, scaled_curve
from modhifi_cli.engine.query_key import product_of
from modhifi_cli.engine.site import consumers_of, features_kept, own_units, with_others, write_weight_
from modhifi_cli.engine.walk import Recipe, Surveyed, Walk
from modhifi_cli.errors import IllPosedError
from modhifi_cli.graph.components import ComponentGroup, bias_of, complement
from modhifi_cli.graph.modules import ChannelPadShortcut
from modhifi_cli.numerics.compensation import Joint, restored_constant
from modhifi_cli.numerics.elimination import DEFAULT_RIDGE, Elimination, elimination
from modhifi_cli.records import Consumer, Progress

Curves = list[list[float]]
Orders = dict[str, Elimination]  # part → in which order its components go, where its cut need not ask again
_ANYTHING = 1e9  # of the answers: more than any part costs


def error_curves(walk: Walk, recipe: Recipe) -> Generator[Progress, None, tuple[Curves, Curves, Orders]]:
    """What it costs every part to lose 0, 1, 2, … components, from one walk over the network as it stands.

    Returns:
        For each part its curve on the scale of the answers, and its own shape, both from 0; nothing where the walk has too
        few samples to say anything of unseen ones. And the orders of removal that lie under them, of parts that are cut
        from the same look.
    """
    curves: Curves = []
    shapes: Curves = []
    orders: Orders = {}
    for event in walk.survey():
        if not isinstance(event, Surveyed):
            yield event
            continue
        yield Progress("error curves", event.part.name, len(curves), len(walk.parts))
        try:
            moved, errors, order = _tried(walk, event, getattr(recipe.selection, "ridge", DEFAULT_RIDGE))
            if order is not None and event.lasting:
                orders[event.part.name] = order
        except IllPosedError:  # the data say nothing of it: whatever is removed may cost anything
            moved, errors = {}, [0.0] + [_ANYTHING] * (walk.layout.alive(event.part).numel() - 1)
        shapes.append(errors)
        curves.append(scaled_curve(errors, moved))
    yield Progress("error curves", "done", len(walk.parts), len(walk.parts))
    return curves, shapes, orders


def _tried(walk: Walk, found: Surveyed, ridge: float) -> tuple[dict[int, float], list[float], Elimination | None]:
    """How far cuts of one part move the answers, by components removed, the part's own errors, and the order of removal."""
    part = found.part
    alive = walk.layout.alive(part).numel()
    if part.product:
        product = product_of(walk, part, found.gathered)
        return _moved(walk, found, product.hollow_), product.errors(), None
    consumers = consumers_of(walk, part, found.gathered)
    path = elimination(consumers, keep=1, ridge=ridge)

    def hollow_(depth: int) -> None:
        _hollow_(walk, part, consumers, path.kept(alive - depth).cpu())

    return _moved(walk, found, hollow_), path.errors.tolist(), path


def _moved(walk: Walk, found: Surveyed, hollow_: Callable[[int], None]) -> dict[int, float]:
    """How far a part's trial cuts move the answers, by components removed."""
    part, trial = found.part, found.trial
    moved: dict[int, float] = {}
    trial.stand_before(part)
    for depth in trial_depths(walk.layout.alive(part).numel(), part.balanced):
        with trial.edited([walk.model.get_submodule(name) for name in _written(walk, part)]):
            hollow_(depth)
            moved[depth] = trial.measure()
    return moved


def trial_depths(alive: int, step: int) -> list[int]:
    """Components that trials remove: multiples of what must stay even, leaving at least one of each run."""
    if alive <= step:
        return []
    return sorted({min(max(round(alive * share / step) * step, step), alive - step) for share in TRIAL_DEPTHS})


def _written(walk: Walk, part: ComponentGroup) -> list[str]:
    norms = (walk.norm_behind(slot.module) for slot in walk.consumers(part))
    return [*(slot.module for slot in part.readers), *(norm for norm in norms if norm is not None)]


def _hollow_(walk: Walk, part: ComponentGroup, consumers: Sequence[Consumer], kept: Tensor) -> None:
    """Make the network behave as if a part were cut and repaired, without changing a shape (for a trial)."""
    alive = walk.layout.alive(part)
    removed = complement(kept, alive.numel())
    joint = Joint(ridge=walk.trial_ridge)
    for slot, consumer in zip(walk.consumers(part), consumers, strict=True):
        module = walk.model.get_submodule(slot.module)
        all_kept = with_others(consumer, kept)
        solved = joint(consumer, all_kept)
        wide = torch.zeros_like(consumer.weight)
        wide[:, features_kept(consumer, kept).to(wide.device)] = own_units(walk, slot.module, solved)
        write_weight_(module, wide, walk.layout.input_order(slot, alive))
        norm, bias = walk.norm_behind(slot.module), bias_of(module)
        mean = None if norm is None else walk.model.get_submodule(norm).get_buffer("running_mean")
        behind = mean if mean is not None or bias is None else bias.data
        if consumer.centred and behind is not None:
            constant = own_units(walk, slot.module, restored_constant(consumer, all_kept, solved))
            behind.add_(constant.to(behind), alpha=1 if norm is None else -1)
    for slot in part.consumers:
        module = walk.model.get_submodule(slot.module)
        if isinstance(module, ChannelPadShortcut):
            gone = walk.layout.inputs(slot, alive[removed]).flatten().to(module.source.device)
            module.source[torch.isin(module.source, gone)] = -1
