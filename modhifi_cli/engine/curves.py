"""Error curves for an uneven allocation: a group's own shape, on a scale that the logits give."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from modhifi_cli.engine.edit import (
    Run,
    consumer_of,
    features_of,
    look,
    norm_behind,
    weighted_consumers,
    with_others,
    write_weight_,
)
from modhifi_cli.engine.gathering import Gathered
from modhifi_cli.engine.impact import TRIAL_DEPTHS, Impact, images_for, scaled_curve
from modhifi_cli.graph.components import ComponentGroup, Slot, has_weight
from modhifi_cli.numerics.compensation import Joint, restored_constant
from modhifi_cli.numerics.elimination import elimination
from modhifi_cli.records import Consumer, Progress

_FEWEST_HELD_OUT = 8  # images; fewer say less than images that were fitted to


def error_curves(
    run: Run, groups: Sequence[ComponentGroup], curves: list[list[float]], shapes: list[list[float]]
) -> Iterator[Progress]:
    """What it costs every group to lose 0, 1, 2, … components, from one walk over the network as it stands.

    The shape of a curve is the group's own relative error under elimination (M10). Its scale is measured at a few
    depths: the group alone is cut there with joint weights, and the change of the logits on some calibration images is
    set against the group's error. Errors of different groups then add up to one quantity, the relative error of the
    logits. Both are appended, for each group: to `curves` on the logits' scale, to `shapes` as they are.

    The trial weights are fitted without the held-out images and tried on these alone, where there are enough: a layer
    with fewer rows than features (a classifier behind global pooling has one row for an image) is rebuilt without any
    error by as many components as there are images, on those images.
    """
    gathered: dict[str, Gathered] = {}
    slots = {slot.module: slot for group in groups for slot in weighted_consumers(run, group)}
    yield from look(run, tuple(slots.values()), gathered, "error curves", hold_out=True)
    count = images_for(run.activations.samples)
    images = run.activations.held_out_images(count)
    if all(one.fitted is not None for one in gathered.values()) and len(images) >= _FEWEST_HELD_OUT:
        gathered = {name: replace(one, statistics=one.fitted) for name, one in gathered.items()}
    else:
        images = run.activations.first_images(count)
    impact = Impact(run.segments, images, limit_bytes=run.activations.limit_bytes)
    for number, group in enumerate(groups):
        yield Progress("error curves", group.name, number, len(groups))
        alive = run.layout.alive(group)
        weighted = weighted_consumers(run, group)
        consumers = [consumer_of(run, slot, alive, gathered) for slot in weighted]
        path = elimination(consumers, keep=1)
        depths = sorted({min(max(round(alive.numel() * share), 1), alive.numel() - 1) for share in TRIAL_DEPTHS})
        moved = {}
        impact.stand_before(slot.module for slot in group.consumers)
        for depth in depths if alive.numel() > 1 else ():
            with impact.edited():
                _hollow_(run, group, weighted, consumers, alive, path.kept(alive.numel() - depth).cpu())
                moved[depth] = impact.measure()
        shapes.append(path.errors.tolist())
        curves.append(scaled_curve(shapes[-1], moved))
    yield Progress("error curves", "done", len(groups), len(groups))


def _hollow_(
    run: Run,
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
        all_kept = with_others(consumer, kept)
        solved = joint(consumer, all_kept)
        width = consumer.weight.shape[1] // consumer.components
        wide = torch.zeros_like(consumer.weight)
        wide[:, features_of(all_kept, width).to(wide.device)] = solved
        write_weight_(module, wide, run.layout.input_order(slot, alive))
        if consumer.centred:
            constant = restored_constant(consumer, all_kept, solved)
            norm = norm_behind(run, slot.module)
            behind = module.bias.data if norm is None else run.model.get_submodule(norm).running_mean
            behind.add_(constant.to(behind), alpha=1 if norm is None else -1)
    for slot in group.consumers:
        module = run.model.get_submodule(slot.module)
        if not has_weight(module):
            gone = run.layout.inputs(slot, alive[removed]).flatten().to(module.source.device)
            module.source[torch.isin(module.source, gone)] = -1
