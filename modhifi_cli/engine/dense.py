"""Repair towards the dense network (M9): after all cuts, every layer behind one is solved again in forward order.

The two networks run side by side on the same images. A layer's target is what it gives in the dense network; where its
output closes a residual block, what the edited stream lacks there is added to the target, so that errors of earlier
layers are repaired instead of inherited. Each solve is a least-squares problem on moments: no labels, no gradients.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi_cli.engine.edit import (
    Run,
    forget_refreshed_,
    mark_stale_,
    norm_behind,
    tensor_edits,
)
from modhifi_cli.engine.gathering import DepthwiseMoments, LayerMoments, TargetMoments
from modhifi_cli.engine.image_walk import Activations, set_statistics_
from modhifi_cli.errors import DataError
from modhifi_cli.graph.surgery import apply_edit_
from modhifi_cli.numerics.batchnorm import ChannelMoments, input_scale, output_moments
from modhifi_cli.numerics.compensation import Joint
from modhifi_cli.numerics.cross import dense_regression, squared_error
from modhifi_cli.numerics.depthwise import fitted_filters
from modhifi_cli.records import Edit, Progress

STEP = "dense_reference"  # how such edits are told from those of groups

_LEAST_RIDGE = 1e-6  # of a depthwise filter, where no ridge is asked for: a channel may always be 0


@dataclass(frozen=True)
class DenseNetwork:
    """The network before any edit, and its own carried activations.

    Attributes:
        model: A copy that nobody edits.
        activations: Its calibration activations.
    """

    model: nn.Module
    activations: Activations


def layers_behind(run: Run, edited: Sequence[str], *, leave: Sequence[str] = ()) -> list[str]:
    """Convolutions (depthwise ones, too) and linear layers whose input an edit has changed, in forward order.

    Args:
        run: The network and its trace.
        edited: Consumers of the groups that were cut.
        leave: Layers to leave out.
    """
    trace = run.segments.trace
    found = []
    for name in trace.visits:
        module = run.model.get_submodule(name)
        plain = type(module) in (nn.Conv2d, nn.Linear) and (getattr(module, "groups", 1) == 1 or _is_depthwise(module))
        known = plain and getattr(module, "padding_mode", "zeros") == "zeros"
        behind = name in edited or any(trace.depends(name, source) for source in edited)
        if known and behind and name not in leave:
            found.append(name)
    return found


def rebuild_(
    run: Run, dense: DenseNetwork, layers: Sequence[str], iteration: int, waiting: list[Edit]
) -> Iterator[Progress | Edit]:
    """Solve the given layers again towards the dense network, in place, yielding an edit for each.

    Args:
        run: The edited network; its compensation is `Joint` and says how the ridge is chosen.
        dense: The network before any edit.
        layers: Names from `layers_behind`, in forward order.
        iteration: Pass that the edits belong to.
        waiting: Edits of an interrupted run: those of these layers are taken off its front and applied.

    Raises:
        DataError: If a waiting edit is not the next layer's.
        NumericsError: If activations are not finite.
    """
    run.activations.restart()
    dense.activations.restart()
    for number, name in enumerate(layers):
        yield Progress("towards the dense network", name, number, len(layers))
        if waiting:
            _apply_done_(run, name, waiting.pop(0))
            continue
        edit: list[Edit] = []
        yield from _rebuild_layer_(run, dense, name, iteration, edit)
        yield edit[0]


def _apply_done_(run: Run, name: str, edit: Edit) -> None:
    if edit.facts.get("step") != STEP or edit.name != name:
        raise DataError(
            f"the saved run's edit of '{edit.name}' does not fit these settings, which solve '{name}' again towards "
            "the dense network; it is another run's."
        )
    apply_edit_(run.model, edit)
    run.stale = list(edit.facts["stale_batchnorms"])


def _rebuild_layer_(
    run: Run, dense: DenseNetwork, name: str, iteration: int, result: list[Edit]
) -> Iterator[Progress]:
    yield from _stand_before(run, dense, name)
    module = run.model.get_submodule(name)
    norm = norm_behind(run, name)
    joined = run.segments.trace.joins.get(norm or name)
    depthwise = _is_depthwise(module)
    moments = (
        DepthwiseMoments(name, module)
        if depthwise
        else LayerMoments(name, module, positions_per_image=None, seed=run.seed, hold_out=True)
    )
    aims = TargetMoments(name, module)
    alive = run.layout.alive_outputs(name)
    streams = () if joined is None else (joined,)
    scale = _stream_scale(dense, norm, alive)
    pairs = zip(
        run.activations.seen(inputs=(name,), outputs=streams),
        dense.activations.seen(outputs=(name, *streams)),
        strict=True,
    )
    axis = -1 if isinstance(module, nn.Linear) else 1
    for (read, ours, done, total), (_, theirs, _, _) in pairs:
        target = _channels(theirs[name], alive, axis)
        if joined is not None and theirs[joined].shape == theirs[name].shape:
            lacking = _channels(theirs[joined], alive, axis) - ours[joined]
            if scale is not None:
                lacking = lacking * (scale if axis == -1 else scale[:, None, None])
            target = target + lacking
        if isinstance(moments, DepthwiseMoments):
            moments.update(read[name], target)
        else:
            moments.update(read[name])
            aims.update(read[name], target)
        yield Progress("images", name, done, total)
    if isinstance(moments, DepthwiseMoments):
        facts = _solve_depthwise_(run, dense, module, norm, alive, moments)
    else:
        facts = _solve_(run, dense, module, norm, alive, moments, aims)
    changed = [name] if norm is None else [name, norm]
    touched = list(dict.fromkeys((*run.refreshed, *changed)))
    mark_stale_(run, [name], changed)
    run.refreshed = []
    facts |= {"step": STEP, "residual": joined, "stale_batchnorms": list(run.stale)}
    nothing = torch.arange(0)
    result.append(Edit(name, iteration, tensor_edits(run, touched), nothing, nothing, facts))


def _channels(maps: Tensor, alive: Tensor | None, axis: int) -> Tensor:
    return maps if alive is None else maps.index_select(axis, alive.to(maps.device))


def _stand_before(run: Run, dense: DenseNetwork, name: str) -> Iterator[Progress]:
    """Carry both networks to the last cut in front of a layer and put the BatchNorms between them right."""
    visits = run.segments.trace.visits
    reachable = [cut for cut in run.segments.trace.cuts if visits[cut].leave < visits[name].enter]
    both = (run.segments, dense.activations.segments)
    cut = next((cut for cut in reversed(reachable) if all(one.usable(cut) for one in both)), None)
    if cut is not None:
        yield from run.activations.advance(cut, stale=run.stale, item=name)
        forget_refreshed_(run, before=visits[cut].leave)
        yield from dense.activations.advance(cut, item=name)
    between = [stale for stale in run.stale if visits[stale].enter < visits[name].enter]
    yield from run.activations.refresh(between, item=name)
    forget_refreshed_(run, before=visits[name].enter)


def _stream_scale(dense: DenseNetwork, norm: str | None, alive: Tensor | None) -> Tensor | None:
    """What one unit of the residual stream is worth in the layer's output units: σ_c / γ_c, or None without BatchNorm.

    Outputs whose γ is next to nothing leave the residual part out of their target.
    """
    if norm is None:
        return None
    behind = dense.model.get_submodule(norm)
    scale, _ = input_scale(behind.running_var, behind.eps, None if behind.weight is None else behind.weight.detach())
    return scale if alive is None else scale[alive.to(scale.device)]


def _is_depthwise(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and 1 < module.groups == module.in_channels == module.out_channels


@torch.no_grad()
def _solve_depthwise_(
    run: Run,
    dense: DenseNetwork,
    module: nn.Module,
    norm: str | None,
    alive: Tensor | None,
    moments: DepthwiseMoments,
) -> dict[str, object]:
    every, held_out, fit = moments.result()
    before = module.weight.detach().flatten(1).double()
    centred = norm is not None or module.bias is not None
    joint: Joint = run.compensation
    grid = joint.grid if joint.ridge == "auto" else (float(joint.ridge) or _LEAST_RIDGE,)
    weight, ridge = fitted_filters(every, held_out, fit, before, grid, centred=centred)
    module.weight.copy_(weight.view_as(module.weight))
    bias = None if module.bias is None else module.bias.detach().double()
    behind = None if norm is None else run.model.get_submodule(norm)
    outputs = (weight * every.inputs).sum(1)  # mean, with the bias left out
    if behind is None and bias is not None:
        module.bias.copy_(every.targets - outputs)
    elif behind is not None and run.reestimate:
        variance = torch.einsum("ct,cts,cs->c", weight, every.gram, weight) - outputs.square()
        mean = outputs if bias is None else outputs + bias
        set_statistics_(behind, ChannelMoments(every.rows, mean, variance.clamp(min=0)))
    elif behind is not None:
        was = dense.model.get_submodule(norm).running_mean
        was = was if alive is None else was[alive.to(was.device)]
        lacking = every.targets - outputs
        behind.running_mean.copy_(was - (lacking if bias is None else lacking - bias))
    seen = every.about(every.inputs, every.targets) if centred else every
    spread = float(seen.energy.sum().clamp(min=1e-300))
    return {
        "ridge": ridge,
        "error_before": float(seen.errors(before).sum()) / spread,
        "error_after": float(seen.errors(weight).sum()) / spread,
    }


@torch.no_grad()
def _solve_(
    run: Run,
    dense: DenseNetwork,
    module: nn.Module,
    norm: str | None,
    alive: Tensor | None,
    moments: LayerMoments,
    aims: TargetMoments,
) -> dict[str, object]:
    gathered = moments.result()
    aim, held_aim = aims.result()
    before = module.weight.detach().flatten(1).double()
    every = dense_regression(gathered.statistics, aim, before)
    held_out = None if held_aim is None else dense_regression(gathered.held_out, held_aim, before)
    centred = norm is not None or module.bias is not None
    joint: Joint = run.compensation
    change, ridge, gained = joint.fit(every, held_out, centred=centred)
    if gained is not None and gained >= 0:  # nothing does better on images it has not seen
        change, ridge = torch.zeros_like(change), None
    weight = before + change
    module.weight.copy_(weight.view_as(module.weight))
    bias = None if module.bias is None else module.bias.detach().double()
    behind = None if norm is None else run.model.get_submodule(norm)
    lacking = aim.mean - weight @ gathered.statistics.mean  # of the mean, with the bias left out
    if behind is None and bias is not None:
        module.bias.copy_(lacking)
    elif behind is not None and run.reestimate:
        set_statistics_(behind, output_moments(gathered.statistics, weight, bias))
    elif behind is not None:
        was = dense.model.get_submodule(norm).running_mean
        was = was if alive is None else was[alive.to(was.device)]
        behind.running_mean.copy_(was - (lacking if bias is None else lacking - bias))
    spread = (aim.energy - aim.mean.square()).sum().clamp(min=1e-300) if centred else aim.energy.sum()
    return {
        "ridge": ridge,
        "error_before": float(squared_error(gathered.statistics, aim, before, centred=centred) / spread),
        "error_after": float(squared_error(gathered.statistics, aim, weight, centred=centred) / spread),
    }
