"""ModHiFi-P: structured pruning, group after group in forward order, each on the network as already edited.

ModHiFi, arXiv:2511.19566. For every group: gather the moments of its consumers' inputs, score the components, select,
slice, repair the consumers in closed form, and re-estimate the BatchNorms behind (`group_edit.py`). Every step leaves
an `Edit` that can be replayed without data.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from modhifi_cli.engine.classifier import DenseLogits, find_classifier, refit_classifier_
from modhifi_cli.engine.curves import error_curves
from modhifi_cli.engine.dense import DenseNetwork, layers_behind, rebuild_
from modhifi_cli.engine.edit import Run, edit_group_, forget_refreshed_, tensor_edits, weighted_consumers
from modhifi_cli.engine.gathering import Gathering
from modhifi_cli.engine.image_walk import Activations
from modhifi_cli.engine.labelling import Labels, image_labels
from modhifi_cli.engine.prices import COUNTED, TARGETS, LatencySettings, Pricing
from modhifi_cli.errors import ConfigError, DataError, NumericsError, UnsupportedModelError
from modhifi_cli.evaluation.latency_table import LatencyTable
from modhifi_cli.graph.attention import find_heads
from modhifi_cli.graph.components import ComponentGroup, Layout, Refusal, shared_tensors
from modhifi_cli.graph.counting import CostModel, count
from modhifi_cli.graph.dependency import excluded_modules, find_groups
from modhifi_cli.graph.law import lawful
from modhifi_cli.graph.segments import Segments
from modhifi_cli.graph.surgery import apply_edit_
from modhifi_cli.records import Edit, ImageSource, Progress

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
        predicted: Share that the widths remove: ``{"params": …, "flops": …, "components": …}``, 0 … 1; with
            ``"latency"``, by the table, where that is the target.
        predicted_error: Group → relative error of its consumers, summed over them, that its width costs on the dense
            network with the best subset and joint weights; empty unless error curves were asked for.
        predicted_impact: Group → squared change of the logits as a share of their variance if it alone is cut so.
        labels: Where the classes of the calibration images come from; empty where no step looks at classes.
        impact_at: Any other share → the sum of the impacts at its widths; None without error curves.
    """

    groups: tuple[PlannedGroup, ...]
    refused: tuple[Refusal, ...]
    predicted: Mapping[str, float]
    predicted_error: Mapping[str, float] = field(default_factory=dict)
    predicted_impact: Mapping[str, float] = field(default_factory=dict)
    labels: str = ""
    impact_at: Callable[[float], float] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Summary:
    """What the run achieved.

    Attributes:
        achieved: Share removed, counted on the edited network: params, flops, components, each 0 … 1.
        warnings: Sentences the user must see (a target missed, dead outputs).
        latency: Share of time that the widths should save, 0 … 1, where time was the target: what the ``"table"`` says
            and what is ``"predicted"`` once narrowed networks were timed. Whether they do is for the clock to say.
        predicted_impact: Squared change of the logits as a share of their variance that the plan's error curves add up
            to; None without them.
    """

    achieved: Mapping[str, float]
    warnings: tuple[str, ...] = ()
    latency: Mapping[str, float] | None = None
    predicted_impact: float | None = None


def discover(
    model: nn.Module, example: Tensor, *, exclude: Sequence[str] = (), dtype: torch.dtype = torch.float64
) -> tuple[Segments, tuple[ComponentGroup, ...], tuple[Refusal, ...]]:
    """Groups of a network that obey the slicing law, what was left out and why, and the network's segments.

    Args:
        model: Dense network in evaluation mode; left as found, but for attention modules whose projections do not run
            as modules: they get a class in which they do (`Segments`).
        example: Two images or more, ``[batch, channels, height, width]``.
        exclude: Names of modules to leave alone.
        dtype: In which the law is checked: float64, or float32 for networks whose copy would not fit.

    Raises:
        ConfigError: If an excluded module does not exist.
        UnsupportedModelError: If the network cannot be run or traced.
    """
    segments = Segments(model, example)
    found = find_heads(model, segments.trace, excluded=excluded_modules(model, exclude))
    claimed = (found.writers, found.readers)
    groups, refused = find_groups(model, segments.trace, example, exclude=exclude, claimed=claimed)
    candidates = [*found.groups, *((group,) for group in groups)]
    shared = shared_tensors(model)
    modules = {group.name: group.modules for group, *_ in candidates}
    tied = {name: next((module for module in modules[name] if module in shared), None) for name in modules}
    for name, module in tied.items():
        if module is not None:
            refused = (*refused, Refusal(name, f"{module} and {shared[module]} share a tensor, so neither can be cut"))
    untied = [ways for ways in candidates if tied[ways[0].name] is None]
    passed, failed = lawful(model, untied, example.cpu(), dtype=dtype)
    lost = [ways[0] for ways in found.groups if ways[0].name in failed]
    if lost:  # heads that do not lie as the roles of the modules say: what does the forward say?
        outputs, inputs = ({slot.module for group in lost for slot in getattr(group, kind)} for kind in _ENDS)
        claimed = (found.writers - outputs, found.readers - inputs)
        more, _ = find_groups(model, segments.trace, example, exclude=exclude, claimed=claimed)
        more = [group for group in more if outputs & {slot.module for slot in group.producers}]
        more = [group for group in more if not any(module in shared for module in group.modules)]
        if more:
            passed, _ = lawful(model, [(group,) for group in (*passed, *more)], example.cpu(), dtype=dtype)
            failed = {name: verdict for name, verdict in failed.items() if not _parted(name, passed)}
    refused = (*refused, *(refusal for refusal in found.refused if not _parted(refusal.name, passed)))
    visits = segments.trace.visits
    passed = tuple(sorted(passed, key=lambda group: min(visits[slot.module].enter for slot in group.consumers)))
    for name, verdict in failed.items():
        reason = verdict.failure or f"sliced and zeroed logits differ by {verdict.difference:.1e} of their scale"
        among = ", ".join(modules[name][:4]) + (f" and {len(modules[name]) - 4} more" if len(modules[name]) > 4 else "")
        refused = (*refused, Refusal(name, f"it fails the slicing law: {reason} (modules {among})"))
    return segments, passed, refused


_ENDS = ("producers", "consumers")


def _parted(attention: str, groups: Sequence[ComponentGroup]) -> bool:
    """Whether one of the groups lies between two layers of an attention module."""
    inside = f"{attention}."
    return any(
        all(any(slot.module.startswith(inside) for slot in getattr(group, kind)) for kind in _ENDS) for group in groups
    )


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
    latency: LatencySettings | None = None,
) -> Iterator[Plan | Progress | Edit | LatencyTable | Summary]:
    """Prune `model` in place, yielding the plan, progress, one `Edit` per edited group, and a summary.

    With ``target="latency"`` the table is yielded whenever it has changed; a continued run must be given the last one.

    Args:
        model: Dense network, evaluation mode. It is moved to `device` and edited as the generator is consumed; an
            edit is complete when it is yielded.
        calibration: Images; labels are taken from it, or predicted, only for a scoring that `needs_labels`.
        sparsity: Share to be removed, in [0, 1).
        target: What the share counts: ``"params"``, ``"flops"``, ``"components"`` or ``"latency"``.
        scoring, selection, compensation: The method's steps, from `modhifi_cli.numerics`.
        allocation: Widths of all groups for a wanted share.
        schedule: Wanted share → share after each pass.
        batchnorm: ``"reestimate"`` running statistics on the calibration images, or keep the ``"stored"`` ones
            (shifted by what the repair of the consumers says).
        classifier: ``"keep"`` the last layer as the groups' edits leave it, or ``"refit"`` it in closed form to the
            dense network's logits on the calibration images; ``"auto"`` refits where the logits come out of a linear
            layer, and lists the classifier among what was left alone where they do not.
        exclude: Names of modules to leave alone.
        round_to: Widths are multiples of it.
        batch_size: Images a forward.
        device: Where the forwards run.
        seed: For everything that is drawn.
        gathering: How statistics are gathered.
        done: Edits of an interrupted run with the same settings: they are applied, not computed.
        latency: How time is measured, for ``target="latency"``.

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
    example = example_of(calibration, device)
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
    pricing = Pricing(target, costs, model, example[:1], groups, latency)
    yield from pricing.prepare()
    two = getattr(compensation, "reference", "current") == "dense"

    def activations(of: nn.Module, cuts: Segments) -> Activations:
        limit = limit_bytes(gathering) / (2 if two else 1)
        return Activations(of, cuts, calibration, batch_size=batch_size, device=device, limit_bytes=limit)

    dense: DenseNetwork | None = None
    if two:
        untouched = copy.deepcopy(model)
        dense = DenseNetwork(untouched, activations(untouched, Segments(untouched, example)))
    labels: Labels | None = None
    if getattr(scoring, "needs_labels", False):
        for event in image_labels(model, calibration, device=device, batch_size=batch_size):
            if isinstance(event, Labels):
                labels = event
            else:
                yield event
    run = Run(
        model=model,
        segments=segments,
        activations=activations(model, segments),
        layout=Layout(model, groups),
        scoring=scoring,
        selection=selection,
        compensation=compensation,
        reestimate=batchnorm == "reestimate",
        gathering=gathering,
        seed=seed,
        labels=labels,
    )
    shares = schedule(sparsity)
    sizes = [group.components for group in groups]

    def widths(share: float, present: Sequence[int], curves: list[list[float]]) -> list[int]:
        return allocation(
            sizes,
            present,
            pricing.removed_share,
            sparsity=share,
            step=round_to,
            curves=curves or None,
            stepwise=pricing.stepwise,
        )

    aims: DenseLogits | None = None
    if classifier != "keep":
        try:
            aims = DenseLogits(find_classifier(model, example))
        except UnsupportedModelError as error:
            if classifier == "refit":
                raise
            why = str(error).partition(": ")[2].partition(";")[0]
            refused = (*refused, Refusal("classifier", f"kept as it is: {why}"))
        else:
            yield from aims.gather(run.activations)
    curves: list[list[float]] = []
    shapes: list[list[float]] = []
    if allocation.needs_curves:
        yield from error_curves(run, groups, curves, shapes)
    yield from pricing.settle(
        sparsity, lambda share: widths(share, sizes, curves), name=f"{allocation!r} round_to={round_to}"
    )
    final = widths(pricing.aim(shares[-1]), sizes, curves)
    on_dense = curves

    def impact_at(share: float) -> float:
        return sum(_at_widths(groups, on_dense, widths(pricing.aim(share), sizes, on_dense)).values())

    yield Plan(
        _planned(groups, final),
        refused,
        {name: costs.removed_share(final, name) for name in COUNTED} | {target: pricing.removed_share(final)},
        _at_widths(groups, shapes, final),
        _at_widths(groups, curves, final),
        labels.account if labels is not None else "",
        impact_at if curves else None,
    )
    impact = impact_at(shares[-1]) if curves else None

    waiting = list(done)
    edits = 0
    total = len(groups) * len(shares)
    for iteration, share in enumerate(shares):
        run.activations.restart()
        if allocation.needs_curves and iteration:
            curves = []
            yield from error_curves(run, groups, curves, [])
        keep = widths(pricing.aim(share), [run.layout.alive(group).numel() for group in groups], curves)
        for number, group in enumerate(groups):
            yield Progress("groups", group.name, iteration * len(groups) + number, total)
            if keep[number] == run.layout.alive(group).numel():
                continue
            edits += 1
            if waiting:
                _apply_done_(run, group, iteration, keep[number], waiting.pop(0))
                continue
            edit: list[Edit] = []
            yield from edit_group_(run, groups[number:], iteration, keep[number], edit)
            yield edit[0]
        if dense is not None and edits:
            cut = [group for group in groups if run.layout.alive(group).numel() < group.components]
            layers = layers_behind(
                run,
                [slot.module for group in cut for slot in weighted_consumers(run, group)],
                leave=() if aims is None else (aims.layer,),
            )
            yield from rebuild_(run, dense, layers, iteration, waiting)
    if run.stale and waiting and waiting[0].name == "batchnorm":
        apply_edit_(model, waiting.pop(0))
    elif run.stale and not waiting:
        yield from run.activations.refresh(list(run.stale), item="batchnorm")
        forget_refreshed_(run)
        yield Edit("batchnorm", len(shares) - 1, tensor_edits(run, run.refreshed), torch.arange(0), torch.arange(0))
    if aims is not None and waiting and waiting[0].name == "classifier":
        apply_edit_(model, waiting.pop(0))
    elif aims is not None and not waiting and edits:
        last: list[Edit] = []
        yield from refit_classifier_(model, run.activations, aims, last)
        yield last[0]
    if waiting:
        raise DataError(f"the saved run holds {len(waiting)} edits more than these settings make; it is another run's.")
    yield Progress("groups", "done", total, total)
    yield replace(
        _summary(model, example, costs, groups, run.layout, sparsity, pricing, round_to), predicted_impact=impact
    )


def _check_settings(
    sparsity: float, target: str, batchnorm: str, classifier: str, round_to: int, batch_size: int
) -> None:
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity is the share that is removed and must lie in [0, 1), got {sparsity:g}.")
    if target not in TARGETS:
        raise ConfigError(f"target must be one of {', '.join(TARGETS)}, got '{target}'.")
    if batchnorm not in ("reestimate", "stored"):
        raise ConfigError(f"batchnorm must be 'reestimate' or 'stored', got '{batchnorm}'.")
    if classifier not in ("keep", "refit", "auto"):
        raise ConfigError(f"classifier must be 'keep', 'refit' or 'auto', got '{classifier}'.")
    if round_to < 1 or batch_size < 1:
        raise ConfigError(f"round_to and batch_size must be at least 1, got {round_to} and {batch_size}.")


def _check_weights(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"the weights of '{name}' hold NaN or infinite values; use another weights file.")


def example_of(calibration: ImageSource, device: torch.device) -> Tensor:
    """Two calibration images for tracing; a single one is mirrored. Raises DataError if there is none."""
    if len(calibration) == 0:
        raise DataError("the calibration data holds no image; give data.num_samples at least 1.")
    inputs, _ = next(iter(calibration.batches(2)))
    if inputs.shape[0] < 2:
        inputs = torch.cat([inputs, inputs.flip(-1)])
    return inputs[:2].to(device)


def limit_bytes(gathering: Gathering) -> float:
    """Largest activation over all images that one network may keep, bytes."""
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


def _at_widths(
    groups: Sequence[ComponentGroup], curves: Sequence[Sequence[float]], keep: Sequence[int]
) -> dict[str, float]:
    """Where each group's curve stands at its width; nothing where there are no curves."""
    if not curves:
        return {}
    return {g.name: curve[g.components - kept] for g, curve, kept in zip(groups, curves, keep, strict=True)}


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


def _apply_done_(run: Run, group: ComponentGroup, iteration: int, keep: int, edit: Edit) -> None:
    if (edit.name, edit.iteration, edit.kept.numel()) != (group.name, iteration, keep):
        raise DataError(
            f"the saved run's edit of '{edit.name}' (pass {edit.iteration}, {edit.kept.numel()} kept) does not fit "
            f"these settings, which edit '{group.name}' (pass {iteration}, {keep} kept); it is another run's."
        )
    apply_edit_(run.model, edit)
    run.layout.keep_(group, edit.kept)
    run.stale = list(edit.facts["stale_batchnorms"])


def _summary(
    model: nn.Module,
    example: Tensor,
    costs: CostModel,
    groups: Sequence[ComponentGroup],
    layout: Layout,
    sparsity: float,
    pricing: Pricing,
    round_to: int,
) -> Summary:
    counts = count(model, example[:1])
    alive = [layout.alive(group).numel() for group in groups]
    kept = sum(alive)
    achieved = {
        "params": 1 - counts.parameters / costs.dense.parameters,
        "flops": 1 - counts.macs / costs.dense.macs,
        "components": 1 - kept / sum(group.components for group in groups),
    }
    warnings = ()
    if pricing.table is not None:
        shares = {"table": pricing.removed_share(alive), "predicted": pricing.expected_share(alive)}
        return Summary(achieved, latency=shares)
    target = pricing.target
    if abs(achieved[target] - sparsity) > NEAR:
        warnings = (
            f"sparsity={sparsity:g} of {target} was asked for and {achieved[target]:.3f} reached: widths come in steps "
            f"of {round_to} and groups have as few as {min(group.components for group in groups)} components.",
        )
    return Summary(achieved, warnings)
