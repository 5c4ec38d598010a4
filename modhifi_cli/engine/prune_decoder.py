"""ModHiFi-P on causal decoders: layer after layer, each on the network as already edited.

ModHiFi, arXiv:2511.19566, prunes the hidden neurons of MLPs; heads of attention go the same way here, with a whole head
(or a KV head with all its query heads) as one component of many features. For every part of a layer: gather the moments
of its consumer's input, score, select, slice, repair in closed form; then the tokens go on through the edited layer.
Every step leaves an `Edit` that can be replayed without data.
"""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.engine.decoder_curves import decoder_curves
from modhifi_cli.engine.decoder_widths import Widths
from modhifi_cli.engine.gathering import Gathered
from modhifi_cli.engine.prices import COUNTED
from modhifi_cli.engine.prune import NEAR, Plan, PlannedGroup, Summary
from modhifi_cli.engine.team import Team
from modhifi_cli.engine.token_walk import Flow, TokenMoments, stream_weights
from modhifi_cli.errors import ConfigError, DataError, NumericsError
from modhifi_cli.graph.components import Layout, is_transposed, output_size
from modhifi_cli.graph.decoder import (
    KINDS,
    UNITS,
    Decoder,
    Part,
    find_parts,
    run_layer,
    slice_part_,
)
from modhifi_cli.graph.surgery import apply_edit_
from modhifi_cli.models.hf import accepts_heads
from modhifi_cli.numerics.compensation import Joint, restored_constant
from modhifi_cli.numerics.fidelity import joint_fidelity, layer_fidelity
from modhifi_cli.numerics.linalg import feature_index
from modhifi_cli.numerics.moments import reorder
from modhifi_cli.numerics.regression import Regression, kept_weight, regressions
from modhifi_cli.records import Consumer, Edit, ImageSource, ModuleEdit, Note, Progress, Statistics


@dataclass(frozen=True)
class DecoderOptions:
    """What is special to decoders. Named in configs/decoder.

    Attributes:
        components: Which of ``"mlp"`` (hidden neurons, the paper) and ``"attention"`` (heads) are pruned.
        unit: What goes of attention: ``"kv_group"`` a KV head with its query heads, ``"query_head"`` the same number of
            query heads from every KV head, ``"auto"`` the former from 4 KV heads on.
        reference: What a repaired layer rebuilds: ``"edited"`` its own output before the cut, or ``"dense"`` the
            residual stream of the dense network (method.md, M9), errors of earlier layers included. A compensation
            whose own reference is dense means the same.
        weighting: How much the calibration tokens count: ``"even"`` all the same, or ``"stream"`` by the inverse mean
            square of the residual stream that the layer's output goes into, since the norms behind divide by it.
        add_bias: Give consumers without a bias one that carries the mean of what was removed. It changes the
            architecture, so the folder then needs `modhifi_cli.load_model`.
        native: With even widths, whether head counts are chosen among those that the family's configuration accepts.
        offload: Whether the hidden states of the calibration tokens wait on the CPU.

    Raises:
        ConfigError: If a value is unknown.
    """

    components: Sequence[str] = ("mlp",)
    unit: str = "auto"
    reference: str = "edited"
    weighting: str = "even"
    add_bias: bool = False
    native: bool = True
    offload: bool = False

    def __post_init__(self) -> None:
        if not self.components or not set(self.components) <= set(KINDS):
            raise ConfigError(f"decoder.components must name mlp, attention or both, got {list(self.components)}.")
        known_values = (("unit", UNITS), ("reference", ("edited", "dense")), ("weighting", ("stream", "even")))
        for key, known in known_values:
            if getattr(self, key) not in known:
                raise ConfigError(f"decoder.{key} must be one of {', '.join(known)}, got '{getattr(self, key)}'.")


@dataclass
class DecoderRun:
    """Everything the steps share; the network in it is edited in place."""

    model: nn.Module
    decoder: Decoder
    flow: Flow
    dense: Flow | None
    layout: Layout
    scoring: Callable
    selection: Callable
    compensation: Callable
    options: DecoderOptions
    seed: int

    @property
    def needs_statistics(self) -> bool:
        return any(step.needs_statistics for step in (self.scoring, self.selection, self.compensation))

    @property
    def weighted(self) -> bool:
        """Whether tokens count by the residual stream."""
        return self.options.weighting == "stream"


def prune_decoder_(
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
    options: DecoderOptions | None = None,
    exclude: Sequence[str] = (),
    round_to: int = 1,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    seed: int = 0,
    done: Sequence[Edit] = (),
    team: Team | None = None,
) -> Iterator[Plan | Note | Progress | Edit | Summary]:
    """Prune `model` in place, yielding the plan, progress, one `Edit` per edited part, and a summary.

    Args:
        model: Dense causal decoder, evaluation mode. It stays on the device it is on; layers visit `device` one by one.
        calibration: Token windows.
        sparsity: Share to be removed, in [0, 1).
        target: What the share counts: ``"params"`` of the decoder layers, ``"flops"`` of the decoder layers for one
            token in the middle of a calibration sequence, or ``"components"`` of the parts that may be pruned.
        scoring, selection, compensation: The method's steps, from `modhifi_cli.numerics`.
        allocation: Widths for a wanted share. Without error curves all layers get the same widths.
        schedule: Wanted share → share after each pass.
        options: What is special to decoders.
        exclude: Names of modules to leave alone.
        round_to: MLP widths are multiples of it.
        batch_size: Sequences a forward, at most.
        device: Where layers run.
        seed: For everything that is drawn.
        done: Edits of an interrupted run with the same settings: they are applied, not computed.
        team: Other processes that run the same with their share of the calibration set; None for none.

    Raises:
        ConfigError: If a setting is out of range or the target cannot be reached.
        DataError: If there are no calibration tokens, or `done` does not fit.
        NumericsError: If weights or activations are not finite, or a solve is ill-posed.
        UnsupportedModelError: If nothing in the network can be pruned.
    """
    options = options or DecoderOptions()
    if getattr(compensation, "reference", "current") == "dense":
        options = replace(options, reference="dense")
    device = torch.device(device)
    shares = schedule(sparsity)
    _check_settings(sparsity, target, round_to, batch_size, options, shares, calibration)
    _check_weights(model)
    decoder = find_parts(model, components=options.components, unit=options.unit, exclude=exclude)
    parts = decoder.parts
    flow = Flow(
        model,
        decoder.layers,
        calibration,
        batch_size=batch_size,
        device=device,
        offload=options.offload,
        team=team or Team(),
    )
    run = DecoderRun(
        model=model,
        decoder=decoder,
        flow=flow,
        dense=None,
        layout=Layout(model, [part.group for part in parts]),
        scoring=scoring,
        selection=selection,
        compensation=compensation,
        options=options,
        seed=seed,
    )
    length = calibration.batches(1).__next__()[0].shape[1]
    widths = Widths(model, decoder, length=length, round_to=round_to, allocation=allocation, target=target)
    if options.native and not allocation.needs_curves:
        widths.restrict_heads(lambda heads, kv_heads: accepts_heads(model, heads, kv_heads))
    yield Note(_memory_estimate(run, len(calibration), length))
    curves: list[list[float]] = []
    if allocation.needs_curves:
        yield from decoder_curves(run, curves)
    sizes = [part.components for part in parts]
    final = widths.at(shares[-1], sizes, curves)
    predicted = {part.name: curve[part.components - keep] for part, curve, keep in zip(parts, curves, final)}
    yield Plan(
        tuple(_planned(part, keep) for part, keep in zip(parts, final, strict=True)),
        decoder.refused,
        {name: widths.removed_share(final, name) for name in COUNTED},
        predicted_impact=predicted,
    )
    for warning in widths.warnings:
        yield Note(warning)
    waiting = list(done)
    total = len(decoder.layers) * len(shares)
    for iteration, share in enumerate(shares):
        present = [run.layout.alive(part.group).numel() for part in parts]
        if curves and iteration:
            curves = []
            yield from decoder_curves(run, curves)
        keep = dict(zip((part.name for part in parts), widths.at(share, present, curves), strict=True))
        yield from flow.restart()
        run.dense = flow.copied() if options.reference == "dense" else None
        for number, name in enumerate(decoder.layers):
            yield Progress("layers", name, iteration * len(decoder.layers) + number, total)
            yield from _edit_layer_(run, number, iteration, keep, waiting)
    if waiting:
        raise DataError(f"the saved run holds {len(waiting)} edits more than these settings make; it is another run's.")
    yield Progress("layers", "done", total, total)
    yield Note(_memory_measured(device))
    achieved = {
        name: widths.removed_share([run.layout.alive(part.group).numel() for part in parts], name)
        for name in ("params", "model_params", "flops", "components")
    }
    warnings = ()
    if abs(achieved[target] - sparsity) > NEAR:
        warnings = (
            f"sparsity={sparsity:g} of {target} was asked for and {achieved[target]:.3f} reached: widths come in steps "
            f"of {round_to} neurons or whole heads, the same in every layer.",
        )
    yield Summary(achieved, warnings)


def _edit_layer_(
    run: DecoderRun, number: int, iteration: int, keep: dict[str, int], waiting: list[Edit]
) -> Iterator[Progress | Edit]:
    """Edit what is to be edited of one layer, and let the tokens go on behind it."""
    parts = [part for part in run.decoder.parts if part.layer == number]
    name = run.decoder.layers[number]
    with run.flow.at_work(number) as layer:
        reference = _Reference(run, number, layer) if run.dense is not None else None
        for part in parts:
            if keep[part.name] == run.layout.alive(part.group).numel():
                continue
            if waiting:
                _apply_done_(run, part, iteration, keep[part.name], waiting.pop(0))
                layer.to(run.flow.device)
                continue
            edit: list[Edit] = []
            yield from _edit_part_(run, part, layer, iteration, keep[part.name], reference, edit)
            yield edit[0]
        if number + 1 < len(run.decoder.layers):
            yield from run.flow.advance(layer, number, name)
            if reference is not None:
                yield from run.dense.advance(reference.layer, number, name)


def _edit_part_(
    run: DecoderRun,
    part: Part,
    layer: nn.Module,
    iteration: int,
    keep: int,
    reference: "_Reference | None",
    result: list[Edit],
) -> Iterator[Progress]:
    """Score, select, cut and repair one part; its edit is appended to `result` at the end."""
    started = time.perf_counter()
    alive = run.layout.alive(part.group)
    reader = run.model.get_submodule(part.consumer.module)
    gathered: Gathered | None = None
    missing: Missing | None = None
    if run.needs_statistics:
        moments = TokenMoments(part.name, features_of_reader(reader), run.compensation.wants_held_out)
        if reference is None:
            looks = {reader: (part.kind, moments.update)}
            yield from run.flow.look(layer, part.layer, looks, part.name, weighted=run.weighted)
        else:
            yield from reference.look(part, moments)
            missing = reference.missing
        gathered = moments.result(run.flow.team, run.flow.device)
    gathered_at = time.perf_counter()
    order = run.layout.input_order(part.consumer, alive)
    consumer = consumer_of(run, part, reader, alive, order, gathered)
    producers = [_filters(run, part, slot, alive) for slot in part.group.producers]
    generator = torch.Generator().manual_seed(run.seed + 1_000_003 * iteration + 7_919 * part.layer)
    scores = run.scoring([consumer], producers, generator=generator)
    kept = select_balanced(part, run.selection, scores, consumer, alive, keep).cpu()
    weight, constant, facts = _repaired(run, part, consumer, kept, order, missing, gathered is not None)
    before = alive.numel()
    outputs, inputs, attributes = slice_part_(run.model, run.layout, part, kept)
    positions = order.view(before, -1)[kept].flatten()
    tensors = {"weight": _write_weight_(reader, weight, positions)}
    if constant is not None:
        tensors["bias"] = _write_bias_(reader, constant)
    removed = torch.ones(before, dtype=torch.bool)
    removed[kept] = False
    names = dict.fromkeys((*outputs, *inputs, *((part.parent,) if attributes else ())))
    result.append(
        Edit(
            name=part.name,
            iteration=iteration,
            modules=tuple(
                ModuleEdit(
                    name,
                    outputs.get(name),
                    inputs.get(name),
                    tensors if name == part.consumer.module else {},
                    attributes if name == part.parent else {},
                )
                for name in names
            ),
            kept=kept,
            removed=removed.nonzero().flatten(),
            facts={
                "components": before,
                "kept": kept.numel(),
                "kind": part.kind,
                "unit": part.unit,
                "dead_outputs": int(scores.dead_outputs),
                **facts,
                "rows": {part.name: consumer.statistics.rows},
                "seconds": {"gathering": gathered_at - started, "solving": time.perf_counter() - gathered_at},
            },
        )
    )


@dataclass(frozen=True)
class Missing:
    """What a layer's target has beyond the layer's own output, m: for the dense target (M9), what only dense has.

    Attributes:
        cross: E[m xᵀ] over the consumer's rows, ``[outputs, features]`` float64.
        mean: E[m], ``[outputs]`` float64.
        held_out: The same over the held-out rows, or None.
    """

    cross: Tensor
    mean: Tensor
    held_out: "Missing | None" = None

    def ordered(self, features: Tensor) -> "Missing":
        """The same with the features in another order."""
        held_out = None if self.held_out is None else self.held_out.ordered(features)
        return Missing(self.cross[:, features.to(self.cross.device)], self.mean, held_out)

    def added(self, regression: Regression, features: Tensor) -> Regression:
        """A regression of an edit that keeps the given features, with m added to its target."""
        cross = self.cross[:, features.to(self.cross.device)]
        cross = cross if regression.basis is None else cross @ regression.basis
        return replace(regression, cross=regression.cross + cross, targets=regression.targets + self.mean)


class _Reference:
    """The dense network beside the edited one, at one layer: what the residual stream should be behind its consumers.

    A consumer adds y to the residual stream. With out the stream behind the layer, x the consumer's input and y its
    output in the edited network before this cut, the repair should aim at y + (out_dense − out_edited) for an MLP that
    closes the layer, and at y_dense + (in_dense − in_edited) for attention (method.md, M9: the residual part belongs to
    the target). What the target has beyond y is gathered as E[missing · xᵀ].
    """

    def __init__(self, run: DecoderRun, number: int, layer: nn.Module) -> None:
        import copy

        self._run, self._number = run, number
        self._edited = layer
        self.layer = copy.deepcopy(layer)
        self.missing: Missing | None = None
        self._checked: set[str] = set()

    def look(self, part: Part, moments: TokenMoments) -> Iterator[Progress]:
        """Gather the consumer's moments and E[missing · xᵀ], over all sequences and over the held-out ones."""
        from modhifi_cli.engine.gathering import held_out_images

        run = self._run
        local = part.consumer.module.removeprefix(run.decoder.layers[self._number]).removeprefix(".")
        reader, dense_reader = self._edited.get_submodule(local), self.layer.get_submodule(local)
        sums: list[Tensor | None] = [None, None]
        means: list[Tensor | None] = [None, None]
        counts = [0, 0]
        dense_batches = run.dense.batches(self._number)
        for (start, hidden, call, done), (_, dense_hidden, _, _) in zip(
            run.flow.batches(self._number), dense_batches, strict=True
        ):
            with torch.no_grad():
                inputs, output, behind = _watched(self._edited, reader, hidden, call)
                _, dense_output, dense_behind = _watched(self.layer, dense_reader, dense_hidden, call)
                if part.name not in self._checked:
                    self._check(part, reader, hidden, call, output)
                if part.kind == "attention":
                    missing = dense_output - output + dense_hidden - hidden
                else:
                    missing = dense_behind - behind
                weights = stream_weights(part.kind, hidden, behind) if run.weighted else None
                moments.update(start, inputs, weights)
                held = held_out_images(torch.arange(start, start + len(hidden), device=hidden.device))
                for which, rows in ((0, slice(None)), (1, held)):
                    chosen, x = missing[rows].flatten(0, 1).float(), inputs[rows].flatten(0, 1).float()
                    if weights is not None:
                        chosen = chosen * weights[rows].flatten()[:, None]
                    product = (chosen.T @ x).double()
                    sums[which] = product if sums[which] is None else sums[which].add_(product)
                    mean = chosen.sum(0).double()
                    means[which] = mean if means[which] is None else means[which].add_(mean)
                    counts[which] += len(x)
            yield Progress("tokens", part.name, done, done)
        if run.flow.team.size > 1:
            shape = (output_size(reader), features_of_reader(reader))
            for which in (0, 1):
                for kept, size in ((sums, shape), (means, shape[:1])):
                    if kept[which] is None:
                        kept[which] = torch.zeros(size, dtype=torch.float64, device=run.flow.device)
                    run.flow.team.add_up_(kept[which])
                count = torch.tensor([counts[which]], dtype=torch.float64, device=run.flow.device)
                run.flow.team.add_up_(count)
                counts[which] = int(count)
        crosses = [None if total is None or not n else total / n for total, n in zip(sums, counts, strict=True)]
        averages = [None if total is None or not n else total / n for total, n in zip(means, counts, strict=True)]
        held_out = Missing(crosses[1], averages[1]) if moments.hold_out and counts[1] else None
        self.missing = Missing(crosses[0], averages[0], held_out)

    def _check(self, part: Part, reader: nn.Module, hidden: Tensor, call: Any, output: Tensor) -> None:
        """The consumer's output must be added to the residual stream as it is."""
        others = [
            self._run.model.get_submodule(other.consumer.module)
            for other in self._run.decoder.parts
            if other.layer == part.layer and other.kind == "mlp" and part.kind == "attention"
        ]
        whole = _silenced(self._edited, others, hidden, call)
        without = _silenced(self._edited, [*others, reader], hidden, call)
        # Streams hundreds of times as large as an output round it away in half precision: that much is no norm's doing.
        rounding = 2 * torch.finfo(whole.dtype).eps * whole.abs().double()
        error = ((whole.double() - without.double() - output.double()).abs() - rounding).max()
        if error > 1e-2 * output.abs().max():
            raise ConfigError(
                f"decoder.reference=dense needs layers that add their output to the residual stream as it is, and "
                f"{part.name} does not (a normalisation follows it); set decoder.reference=edited."
            )
        self._checked.add(part.name)


def _watched(layer: nn.Module, reader: nn.Module, hidden: Tensor, call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Input and output of one module, and what is behind the layer."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen.extend(tensor.reshape(*hidden.shape[:2], -1) for tensor in (inputs[0], output))

    handle = reader.register_forward_hook(hook)
    try:
        behind = run_layer(layer, hidden, call)
    finally:
        handle.remove()
    return seen[0], seen[1], behind


def _silenced(layer: nn.Module, modules: Sequence[nn.Module], hidden: Tensor, call: Any) -> Tensor:
    """What is behind the layer when some modules answer zero."""
    handles = [module.register_forward_hook(lambda *args: torch.zeros_like(args[2])) for module in modules]
    try:
        return run_layer(layer, hidden, call)
    finally:
        for handle in handles:
            handle.remove()


def select_balanced(
    part: Part, selection: Callable, scores: Any, consumer: Consumer, alive: Tensor, keep: int
) -> Tensor:
    """Kept components; where a part asks for it, the same number from each of its runs (query heads of a KV head).

    Args:
        part: What is selected from.
        selection: The rule.
        scores: Votes on the living components.
        consumer: The consumer, living components only.
        alive: Dense numbers of the living components.
        keep: How many to keep, a multiple of ``part.balanced``.

    Returns:
        Positions among the living components, ``[keep]`` int64 sorted.
    """
    if part.balanced == 1:
        return selection(scores, [consumer], keep=keep)
    size = alive.numel()
    if hasattr(selection, "eliminate"):
        order = selection.eliminate([consumer], keep=1).order.tolist()
        left = [head for head in range(size) if head not in order]
        ranked = left + order[::-1]
    else:  # a component's rank is the smallest width at which the rule keeps it
        first: dict[int, int] = {}
        for width in range(1, size + 1):
            for head in selection(scores, [consumer], keep=width).tolist():
                first.setdefault(head, width)
        ranked = sorted(range(size), key=lambda head: (first[head], head))
    run_of = (alive // (part.components // part.balanced)).tolist()
    room = dict.fromkeys(run_of, keep // part.balanced)
    kept = []
    for head in ranked:
        if room[run_of[head]] > 0:
            room[run_of[head]] -= 1
            kept.append(head)
    return torch.tensor(sorted(kept))


def _repaired(
    run: DecoderRun,
    part: Part,
    consumer: Consumer,
    kept: Tensor,
    order: Tensor,
    missing: Missing | None,
    measured: bool,
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Repaired weight ``[outputs, kept features]``, what to add to the bias or None, and facts for the report."""
    ridge = None
    if isinstance(run.compensation, Joint):
        present = kept_weight(consumer, kept)
        held_out = consumer.held_out if run.compensation.wants_held_out else None
        every, *parts = regressions(consumer, kept, *(() if held_out is None else (held_out,)))
        if missing is not None:
            missing = missing.ordered(order)
            features = feature_index(kept, order.numel() // consumer.components)
            every = missing.added(every, features)
            parts = [missing.held_out.added(held, features) for held in parts]
        change, ridge, _ = run.compensation.fit(every, *parts, centred=consumer.centred, weight=present)
        weight = run.compensation.rebuilt(present, every, change)
    else:
        weight = run.compensation(consumer, kept)
    if not measured:
        return weight, None, {}
    restores = run.compensation.needs_statistics or run.options.add_bias
    constant = restored_constant(consumer, kept, weight) if consumer.centred and restores else None
    if constant is not None and missing is not None:
        constant = constant + missing.mean
    facts = {
        "fidelity": {part.name: layer_fidelity(consumer, kept, weight)},
        "subset_fidelity": {part.name: joint_fidelity(consumer, kept)},
    }
    if ridge is not None:
        facts["ridge"] = {part.name: ridge}
    return weight, constant, facts


def consumer_of(
    run: DecoderRun, part: Part, reader: nn.Module, alive: Tensor, order: Tensor, gathered: Gathered | None
) -> Consumer:
    """A part's consumer as the numerics see it, living components in order; statistics where there are any."""
    weight = reader.weight.detach()
    weight = (weight.T if is_transposed(reader) else weight).to(torch.float64)
    nothing = Statistics(0, torch.zeros(order.numel(), dtype=torch.float64))
    held = None if gathered is None else gathered.held_out
    return Consumer(
        name=part.name,
        weight=weight[:, order.to(weight.device)],
        statistics=nothing if gathered is None else reorder(gathered.statistics, order),
        components=alive.numel(),
        in_group=alive.numel(),
        centred=reader.bias is not None or run.options.add_bias,
        held_out=None if held is None else reorder(held, order),
    )


def features_of_reader(reader: nn.Module) -> int:
    """Features that a linear layer of either orientation reads."""
    return reader.weight.shape[0] if is_transposed(reader) else reader.in_features


def _filters(run: DecoderRun, part: Part, slot: Any, alive: Tensor) -> Tensor:
    """A producer's weights by component, ``[components, weights]`` float64."""
    module = run.model.get_submodule(slot.module)
    weight = module.weight.detach()
    weight = (weight.T if is_transposed(module) else weight).to(torch.float64)
    rows = run.layout.outputs(slot, alive).flatten().to(weight.device)
    return weight[rows].view(alive.numel(), -1)


def _write_weight_(reader: nn.Module, weight: Tensor, positions: Tensor) -> Tensor:
    """Give the cut consumer a weight whose features are component-major; the new parameter, for the edit."""
    written = weight[:, torch.argsort(positions).to(weight.device)]
    with torch.no_grad():
        reader.weight.copy_(written.T if is_transposed(reader) else written)
    return reader.weight.detach().cpu().clone()


def _write_bias_(reader: nn.Module, constant: Tensor) -> Tensor:
    with torch.no_grad():
        if reader.bias is None:
            reader.bias = nn.Parameter(constant.to(reader.weight), requires_grad=False)
        else:
            reader.bias.add_(constant.to(reader.bias))
    return reader.bias.detach().cpu().clone()


def _apply_done_(run: DecoderRun, part: Part, iteration: int, keep: int, edit: Edit) -> None:
    if (edit.name, edit.iteration, edit.kept.numel()) != (part.name, iteration, keep):
        raise DataError(
            f"the saved run's edit of '{edit.name}' (pass {edit.iteration}, {edit.kept.numel()} kept) does not fit "
            f"these settings, which edit '{part.name}' (pass {iteration}, {keep} kept); it is another run's."
        )
    apply_edit_(run.model, edit)
    run.layout.keep_(part.group, edit.kept)


def _planned(part: Part, keep: int) -> PlannedGroup:
    return PlannedGroup(
        part.name,
        part.components,
        keep,
        tuple(slot.module for slot in part.group.producers),
        (part.consumer.module,),
    )


def _check_settings(
    sparsity: float,
    target: str,
    round_to: int,
    batch_size: int,
    options: DecoderOptions,
    shares: Sequence[float],
    calibration: ImageSource,
) -> None:
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity is the share that is removed and must lie in [0, 1), got {sparsity:g}.")
    if target not in COUNTED:
        raise ConfigError(f"target must be one of {', '.join(COUNTED)}, got '{target}'.")
    if round_to < 1 or batch_size < 1:
        raise ConfigError(f"round_to and batch_size must be at least 1, got {round_to} and {batch_size}.")
    if options.reference == "dense" and len(shares) > 1:
        raise ConfigError("decoder.reference=dense knows one pass over the layers; set schedule=one_shot.")
    if len(calibration) == 0:
        raise DataError("the calibration data holds no tokens; give data.sequences at least 1.")


def _check_weights(model: nn.Module) -> None:
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"the weights of '{name}' hold NaN or infinite values; use another checkpoint.")


def _memory_estimate(run: DecoderRun, sequences: int, length: int) -> str:
    """What the run will need where the layers run: one layer, the tokens that wait, and the widest statistics."""
    layer = run.model.get_submodule(run.decoder.layers[0])
    layer_bytes = sum(tensor.numel() * tensor.element_size() for tensor in layer.parameters())
    size = next(run.model.parameters()).element_size()
    part = run.decoder.parts[0]
    width = output_size(run.model.get_submodule(part.consumer.module))
    waiting = sequences * length * width * size * (2 if run.options.reference == "dense" else 1)
    features = max(part.consumer.index.numel() for part in run.decoder.parts)
    # Moments of all, fitted and held-out tokens, and as much again for one solve.
    statistics = 6 * 8 * features**2
    batch = 8192 * (features * 3 + width * 4) * size
    total = layer_bytes + waiting * (not run.options.offload) + statistics + batch
    whole = sum(tensor.numel() * tensor.element_size() for tensor in run.model.parameters())
    return (
        f"memory where the layers run, estimated: {total / 1e9:.2f} GB (one layer {layer_bytes / 1e9:.2f}, waiting "
        f"tokens {waiting / 1e9:.2f}{' offloaded' if run.options.offload else ''}, statistics {statistics / 1e9:.2f}, "
        f"one batch {batch / 1e9:.2f}); the whole network has {whole / 1e9:.2f} GB"
    )


def _memory_measured(device: torch.device) -> str:
    if device.type == "cuda":
        return f"memory on the card, measured: {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB at most"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"memory of the process, measured: {peak / 1e9:.2f} GB at most, network and libraries included"
