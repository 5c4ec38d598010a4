"""What a run is about to do and what it achieved: groups that obey the law, the plan, the summary."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, DataError, NumericsError, UnsupportedModelError
from modhifi_cli.graph.attention import find_heads, find_products
from modhifi_cli.graph.components import ComponentGroup, Refusal, shared_tensors
from modhifi_cli.graph.dependency import excluded_modules, find_groups
from modhifi_cli.graph.law import lawful
from modhifi_cli.graph.segments import Segments
from modhifi_cli.records import ImageSource


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
    model: nn.Module,
    example: Tensor,
    *,
    exclude: Sequence[str] = (),
    dtype: torch.dtype = torch.float64,
    products: bool = False,
) -> tuple[Segments, tuple[ComponentGroup, ...], tuple[Refusal, ...]]:
    """Groups of a network that obey the slicing law, what was left out and why, and the network's segments.

    Args:
        model: Dense network in evaluation mode; left as found, but for attention modules whose projections do not run
            as modules: they get a class in which they do (`Segments`).
        example: Two images or more, ``[batch, channels, height, width]``.
        exclude: Names of modules to leave alone.
        dtype: In which the law is checked: float64, or float32 for networks whose copy would not fit.
        products: Whether features of queries and keys are groups, too (`attention.find_products`).

    Raises:
        ConfigError: If an excluded module does not exist.
        UnsupportedModelError: If the network cannot be run or traced.
    """
    excluded = excluded_modules(model, exclude)
    pairs = find_products(model, example, excluded=excluded) if products else ()
    segments = Segments(model, example)
    found = find_heads(model, segments.trace, excluded=excluded)
    claimed = (found.writers, found.readers)
    groups, refused = find_groups(model, segments.trace, example, exclude=exclude, claimed=claimed)
    candidates = [*found.groups, *((group,) for group in (*groups, *pairs))]
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
        found_now, _ = find_groups(model, segments.trace, example, exclude=exclude, claimed=claimed)
        writing = [group for group in found_now if outputs & {slot.module for slot in group.producers}]
        more = [group for group in writing if not any(module in shared for module in group.modules)]
        if more:
            passed, _ = lawful(model, [(group,) for group in (*passed, *more)], example.cpu(), dtype=dtype)
            failed = {name: verdict for name, verdict in failed.items() if not _parted(name, passed)}
    refused = (*refused, *(refusal for refusal in found.refused if not _parted(refusal.name, passed)))
    visits = segments.trace.visits
    passed = tuple(sorted(passed, key=lambda group: min(visits[slot.module].enter for slot in group.readers)))
    for name, verdict in failed.items():
        reason = verdict.failure or f"sliced and zeroed logits differ by {verdict.difference:.1e} of their scale"
        among = ", ".join(modules[name][:4]) + (f" and {len(modules[name]) - 4} more" if len(modules[name]) > 4 else "")
        refused = (*refused, Refusal(name, f"it fails the slicing law: {reason} (modules {among})"))
    cut = {group.name for group in passed}  # a layer may lose features where its only head stays
    return segments, passed, tuple(refusal for refusal in refused if refusal.name not in cut)


_ENDS = ("producers", "consumers")


def _parted(attention: str, groups: Sequence[ComponentGroup]) -> bool:
    """Whether one of the groups lies between two layers of an attention module."""
    inside = f"{attention}."
    return any(
        all(any(slot.module.startswith(inside) for slot in getattr(group, kind)) for kind in _ENDS) for group in groups
    )


def refuse_nothing(
    groups: Sequence[ComponentGroup], refused: Sequence[Refusal], *, sparsity: float, excluding: bool
) -> None:
    """Refuse a network without any group that can be pruned.

    Raises:
        ConfigError: If that is because of what is excluded.
        UnsupportedModelError: If it is not.
    """
    if groups:
        return
    reasons = "; ".join(f"{refusal.name}: {refusal.reason}" for refusal in refused[:3])
    if sparsity > 0 and excluding:
        raise ConfigError(
            f"sparsity={sparsity:g} cannot be reached: every group of channels is excluded or refused ({reasons}); "
            "exclude fewer modules."
        )
    raise UnsupportedModelError(f"the network has no group of channels that can be pruned ({reasons or 'none'}).")


def check_weights(model: nn.Module) -> None:
    """Refuse weights that are not finite.

    Raises:
        NumericsError: Naming the first tensor that holds NaN or infinite values.
    """
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


def at_widths(
    groups: Sequence[ComponentGroup], curves: Sequence[Sequence[float]], keep: Sequence[int]
) -> dict[str, float]:
    """Where each group's curve stands at its width; nothing where there are no curves."""
    if not curves:
        return {}
    return {g.name: curve[g.components - kept] for g, curve, kept in zip(groups, curves, keep, strict=True)}


def planned(groups: Sequence[ComponentGroup], keep: Sequence[int]) -> tuple[PlannedGroup, ...]:
    """The groups with the widths that they will have."""
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
