"""Unlearning: late layers are edited one after the other so that a class is forgotten, without gradients.

Every later layer sees the network as already edited. The strength of the edit is fixed, or tried on calibration images:
on those alone, and for `contrast` on ones that its weights were not computed from. Test data are never looked at here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.engine.classifier import find_classifier
from modhifi_cli.engine.gathering import Gathering, held_out_images
from modhifi_cli.engine.image_walk import Activations
from modhifi_cli.errors import (
    ConfigError,
    DataError,
    NumericsError,
    UnsupportedModelError,
    is_number,
    is_whole,
    nearest,
)
from modhifi_cli.graph.segments import Segments
from modhifi_cli.graph.surgery import apply_edit_
from modhifi_cli.records import Edit, ImageSource, Progress
from modhifi_cli.unlearning.closings import class_means, find_closings, read_positions
from modhifi_cli.unlearning.forgetting import Accumulator, Layer, Method, Samples

LEAST_SAMPLES = 5  # of the forget classes, and of the others: with fewer nothing can be fitted and judged apart


@dataclass(frozen=True)
class UnlearnPlan:
    """What is about to be edited.

    Attributes:
        layers: Names in the order in which they are edited.
        forget_samples: Calibration images of the forget classes.
        retain_samples: The others.
        warnings: Sentences the user must see.
    """

    layers: tuple[str, ...]
    forget_samples: int
    retain_samples: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """One strength, tried on calibration images.

    Attributes:
        strength: The share of pairs or filters, or β; 0 for the dense network.
        forget: Accuracy on the forget classes, 0 … 1.
        retain: Accuracy on the other classes, 0 … 1; None where nobody needed to know: a share that does not forget,
            tried by a method that looks at forget samples alone.
        images: How many images judged.
    """

    strength: float
    forget: float
    retain: float | None
    images: int


@dataclass(frozen=True)
class UnlearnSummary:
    """What the run did.

    Attributes:
        layers: Edited layers in order.
        strength_name: ``"fraction"`` or ``"beta"``.
        strength: Its value.
        trials: What was tried to find it, the dense network first; empty where it was given.
        finetuned: Epochs of fine-tuning, 0 for none.
        warnings: Sentences the user must see.
    """

    layers: tuple[str, ...]
    strength_name: str
    strength: float
    trials: tuple[Trial, ...] = ()
    finetuned: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finetune:
    """Training on retain samples after the edit: off unless asked for, since it needs gradients and labels.

    Attributes:
        epochs: Walks over the retain samples; 0 is off.
        lr: Learning rate of SGD with momentum 0.9.
    """

    epochs: int = 0
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if not is_whole(self.epochs) or self.epochs < 0:
            raise ConfigError(f"finetune.epochs must be a whole number from 0 (off); got {self.epochs!r}.")
        if not is_number(self.lr) or not 0 < self.lr < float("inf"):
            raise ConfigError(f"finetune.lr must be a number above 0; got {self.lr!r}.")


def forget_classes(asked: Any, classes: Sequence[str] | None, logits: int) -> tuple[int, ...]:
    """The classes to forget, sorted, from numbers or names, one or several.

    Args:
        asked: A number, a name, or a list of them.
        classes: Names in the order of the logits, or None.
        logits: Number of logits.

    Raises:
        ConfigError: If a class does not exist, none is named, or none would be left.
    """
    wanted = list(asked) if isinstance(asked, list | tuple) else [asked]
    if not wanted:
        raise ConfigError("forget_class: name at least one class, by number or name, such as forget_class=3.")
    known = f"0 to {logits - 1}" + (f" ({_named(classes)})" if classes else "")
    found = set()
    for one in wanted:
        number = _class_number(one, classes)
        if number is None or not 0 <= number < logits:
            hint = nearest(one, classes) if isinstance(one, str) and classes else ""
            raise ConfigError(f"forget_class: there is no class {one!r}; the classes are {known}. {hint}".strip())
        found.add(number)
    if len(found) == logits:
        raise ConfigError(
            f"forget_class: {len(found)} of {logits} classes shall be forgotten, so none is left to keep; name fewer, "
            "or use a network with more classes."
        )
    return tuple(sorted(found))


def unlearn_(
    model: nn.Module,
    *,
    calibration: ImageSource,
    labels: Tensor,
    forget: Sequence[int],
    method: Method,
    layers: str | Sequence[str] = "auto",
    forget_target: float = 0.01,
    retain_drop: float = 0.003,
    finetune: Finetune = Finetune(),
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    gathering: Gathering | None = None,
    done: Sequence[Edit] = (),
) -> Iterator[UnlearnPlan | Progress | Trial | Edit | UnlearnSummary]:
    """Make `model` forget classes, in place, yielding plan, progress, trials, one `Edit` per layer, and a summary.

    Args:
        model: Dense classifier, evaluation mode. It is moved to `device`.
        calibration: Images of the forget classes and of others.
        labels: Class of every image, ``[images]`` int64.
        forget: Classes to forget, sorted, as `forget_classes` gives them.
        method: How one layer forgets.
        layers: ``"auto"`` (the method's own choice), ``"last N"``, or names (or their beginnings, such as a stage's).
        forget_target: A strength is enough where forget accuracy is below this, 0 … 1.
        retain_drop: With a method that searches downwards (`contrast`): loss of retain accuracy that is allowed.
        finetune: Training after the edit; off by default.
        batch_size: Images a forward.
        device: Where the forwards run.
        seed: For everything that is drawn.
        gathering: How statistics are gathered.
        done: Edits of an interrupted run with the same settings: they are applied, not computed.

    Raises:
        ConfigError: If a setting is out of range or names no layer.
        DataError: If there are too few forget or retain samples, or `done` does not fit.
        NumericsError: If values are not finite.
        UnsupportedModelError: If the network is no classifier with a linear layer at its end.
    """
    for name, value in (("forget_target", forget_target), ("retain_drop", retain_drop)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} must be a share from 0 to 1; got {value!r}.")
    device = torch.device(device)
    gathering = gathering or Gathering()
    if len(labels) != len(calibration):
        raise DataError(f"there are {len(calibration)} calibration images but {len(labels)} labels; give one for each.")
    model.to(device).eval()
    _check_weights(model)
    example = next(iter(calibration.batches(2)))[0].to(device) if len(calibration) else torch.empty(0)
    counts = _check_samples(labels, forget)
    if len(example) < 2:
        example = torch.cat([example, example.flip(-1)])
    classifier = find_classifier(model, example, wanted="unlearn", advice="use a classifier that ends in one")
    segments = Segments(model, example)
    activations = Activations(
        model, segments, calibration, batch_size=batch_size, device=device, limit_bytes=_limit(gathering)
    )
    chosen = choose_layers(model, segments, example, classifier, layers, method)
    yield UnlearnPlan(tuple(layer.name for layer in chosen), *counts)

    if done and len(done) == done[0].facts.get("edits"):
        yield _finish_(model, done, chosen, method)
        return
    logits: list[Tensor] = []
    first = _cut_before(segments, chosen[0].name)
    yield from activations.advance(first, item="calibration images")
    home = activations.position()
    yield from activations.outputs(classifier, logits.append, item="dense logits")
    samples = _samples(
        torch.cat(logits).cpu(), labels, forget, hold_out=method.edits_classifier and method.given is None
    )
    dense = _judge(torch.cat(logits).cpu(), samples, 0.0)
    looked, numbers = activations, torch.arange(len(labels))
    if method.forget_only:
        numbers = samples.forget.nonzero().flatten()
        looked = activations.only(numbers)
    run = _Run(
        model, activations, samples, chosen, method, classifier, home, batch_size, gathering, seed, looked, numbers
    )
    closings = {layer.name: layer.closing for layer in chosen if layer.closing is not None}
    if method.closings:
        wanted = samples.fitted & ~samples.forget
        for event in class_means(activations, closings, samples.labels, wanted, samples.classes):
            if isinstance(event, dict):
                run.means = event
            else:
                yield event
    edits: list[Edit] = []
    trials: list[Trial] = []
    warnings: list[str] = []
    if done:
        _check_done(done, [layer.name for layer in chosen])
        # The strength is known; what the interruption left unsaved is computed again, to the same numbers.
        about = done[0].facts
        strength, warnings = float(about["strength"]), list(about["warnings"])
        trials = [Trial(**trial) for trial in about["trials"]]
        yield from _edit_layers(run, strength, edits)
    elif method.given is None:
        yield dense
        trials.append(dense)
        yield from _search(run, dense, forget_target, retain_drop, edits, trials, warnings)
        strength = float(edits[0].facts["strength"])
    else:
        strength = method.given
        yield from _edit_layers(run, strength, edits)
    if finetune.epochs:
        yield from finetune_(model, calibration, samples, finetune, edits, batch_size, device, seed)
    # The facts of every edit name the strength and the number of edits, so that an interrupted saving can go on.
    trial_facts = [vars(trial) for trial in trials]
    for number, edit in enumerate(edits):
        facts = {**edit.facts, "strength": strength, "edits": len(edits)}
        if number == 0:
            facts |= {"trials": trial_facts, "warnings": list(warnings), "finetuned": finetune.epochs}
        if number >= len(done):
            yield replace(edit, facts=facts)
    yield UnlearnSummary(
        tuple(layer.name for layer in chosen),
        method.strength,
        strength,
        tuple(trials),
        finetune.epochs,
        tuple(warnings),
    )


def choose_layers(
    model: nn.Module,
    segments: Segments,
    example: Tensor,
    classifier: str,
    layers: str | Sequence[str],
    method: Method,
) -> tuple[Layer, ...]:
    """The layers that are edited, in execution order.

    ``"auto"`` takes the method's `depth` late layers, or where it has none the last stage: every layer whose output
    has as few positions as the last one's, or the last third of the layers where that is more than half of them all
    (plain transformers). ``"last N"`` takes the N last ones in front of the classifier.

    Raises:
        ConfigError: If a name matches nothing, or ``last N`` asks for more layers than there are.
        UnsupportedModelError: If there is no layer to edit.
    """
    known = _editable(model, segments, example, classifier)
    body = [layer for layer in known if not layer.classifier]
    if method.closings:
        found = find_closings(model, segments, example, {layer.name: layer.norm for layer in body}, classifier)
        visits = segments.trace.visits
        ended = max((visits[closing.place].leave for closing in found.values()), default=0)
        open_ended = any(visits[layer.name].enter > ended for layer in body)
        body = [replace(layer, closing=found[layer.name]) for layer in body if layer.name in found]
        known = [*body, *(layer for layer in known if layer.classifier)]
        if open_ended or not body:
            raise UnsupportedModelError(
                "the network's last block does not end in one layer's output plus a stream, which method=collapse solves; "
                "use method=contrast."
            )
    ends = [layer for layer in known if layer.classifier] if method.edits_classifier else []
    if layers == "auto":
        if method.depth is not None:
            return (*body[len(body) - min(method.depth, len(body)) :], *ends)
        chosen = _last_stage(model, body, example)
    elif isinstance(layers, str) and layers.split()[:1] == ["last"]:
        number = layers.removeprefix("last").strip()
        if not number.isdigit() or not 1 <= int(number) <= len(body):
            raise ConfigError(
                f"layers='{layers}' must be 'last N' with N from 1 to {len(body)}, the layers in front of the classifier."
            )
        chosen = body[-int(number) :]
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
        matched = {name: [layer for layer in known if _is_under(layer.name, name)] for name in names}
        for name, found in matched.items():
            if not found:
                raise ConfigError(
                    f"layers: the network has no layer '{name}' that can be edited; "
                    f"{nearest(name, {part for layer in known for part in _beginnings(layer.name)})}"
                )
        wanted = {layer.name for found in matched.values() for layer in found}
        return tuple(layer for layer in known if layer.name in wanted or layer in ends)
    if not chosen and not ends:
        raise UnsupportedModelError(
            "the network has no convolution or linear layer in front of its classifier to edit."
        )
    return (*chosen, *ends)


# ------------------------------------------------------------------------------------------------------------ the search


@dataclass
class _Run:
    """What the steps of one run share."""

    model: nn.Module
    activations: Activations
    samples: Samples
    layers: tuple[Layer, ...]
    method: Method
    classifier: str
    home: Any
    batch_size: int
    gathering: Gathering
    seed: int
    # The forget samples alone, for a method that asks for no others: `looked` is where its walks go.
    looked: Activations
    numbers: Tensor
    # The first layer's inputs do not depend on the strength, so its accumulator serves every trial.
    first: Accumulator | None = None
    dense: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.looked_home = self.looked.position()
        for layer in self.layers:
            for name in filter(None, (layer.name, layer.norm)):
                state = self.model.get_submodule(name).state_dict()
                self.dense[name] = {key: value.detach().clone() for key, value in state.items()}

    def restore_(self) -> None:
        """Put the dense weights back and stand in front of the first layer."""
        for name, state in self.dense.items():
            self.model.get_submodule(name).load_state_dict(state)
        self.activations.return_to(self.home)
        self.looked.return_to(self.looked_home)


def _search(
    run: _Run,
    dense: Trial,
    forget_target: float,
    retain_drop: float,
    edits: list[Edit],
    trials: list[Trial],
    warnings: list[str],
) -> Iterator[Progress | Trial]:
    """Try strengths in the method's order; leaves the network at the chosen one and its edits in `edits`.

    Upwards (shares): the first that forgets. Downwards (β): the largest that keeps retain accuracy, and forgets.
    """
    downwards = run.method.edits_classifier
    tried: list[tuple[Trial, list[Edit]]] = []
    for strength in run.method.strengths:
        run.restore_()
        edits_of_it: list[Edit] = []
        yield from _edit_layers(run, strength, edits_of_it)
        result: list[Trial] = []
        yield from _try(run, strength, forget_target, result)
        tried.append((result[0], edits_of_it))
        yield result[0]
        if _is_good(result[0], dense, forget_target, retain_drop, downwards):
            break
    else:
        # None is good enough: the best of them is told by both accuracies.
        for number, (trial, edits_of_it) in enumerate(tried):
            if trial.retain is None:
                run.restore_()
                for edit in edits_of_it:
                    apply_edit_(run.model, edit)
                retain: list[float] = []
                yield from _retain_accuracy(run, retain)
                tried[number] = replace(trial, retain=retain[0], images=len(run.samples.labels)), edits_of_it
    best: tuple[Any, list[Edit], Trial] | None = None
    for trial, edits_of_it in tried:
        trials.append(trial)
        forgets = trial.forget <= forget_target
        keeps = trial.retain is not None and trial.retain >= dense.retain - retain_drop
        gained = -1.0 if trial.retain is None else trial.retain - trial.forget
        rank = (_is_good(trial, dense, forget_target, retain_drop, downwards), forgets, keeps, gained)
        if best is None or rank > best[0]:
            best = (rank, edits_of_it, trial)
    assert best is not None
    rank, chosen, trial = best
    if not rank[0]:
        warnings.append(
            f"no {run.method.strength} of {', '.join(f'{s:g}' for s in run.method.strengths)} brought forget accuracy on "
            f"the calibration images to {forget_target:.1%} or less"
            + (f" within {100 * retain_drop:g} points of retain accuracy" if downwards else "")
            + f"; {trial.strength:g} came nearest, with forget {trial.forget:.1%} and retain {trial.retain:.1%}."
        )
    run.restore_()
    for edit in chosen:
        apply_edit_(run.model, edit)
    edits += [replace(edit, facts={**edit.facts, "strength": trial.strength}) for edit in chosen]


def _is_good(trial: Trial, dense: Trial, forget_target: float, retain_drop: float, downwards: bool) -> bool:
    return trial.forget <= forget_target and (not downwards or trial.retain >= dense.retain - retain_drop)


def _try(run: _Run, strength: float, forget_target: float, result: list[Trial]) -> Iterator[Progress]:
    """Judge the network as edited. Of forget samples alone where those decide, until a strength forgets."""
    logits: list[Tensor] = []
    item = f"{run.method.strength} {strength:g}"
    yield from run.looked.outputs(run.classifier, logits.append, item=item)
    given = torch.cat(logits).cpu()
    if not run.method.forget_only:
        result.append(_judge(given, run.samples, strength))
        return
    forget = float((given.argmax(1) == run.samples.labels[run.numbers]).double().mean())
    retain: list[float] = []
    if forget <= forget_target:
        yield from _retain_accuracy(run, retain)
    images = len(run.samples.labels) if retain else len(run.numbers)
    result.append(Trial(strength, forget, retain[0] if retain else None, images))


def _retain_accuracy(run: _Run, result: list[float]) -> Iterator[Progress]:
    """Accuracy of the network as edited on all retain samples, for a method that looks at the others alone."""
    logits: list[Tensor] = []
    numbers = (~run.samples.forget).nonzero().flatten()
    run.activations.return_to(run.home)
    yield from run.activations.only(numbers).outputs(run.classifier, logits.append, item="retain samples")
    result.append(float((torch.cat(logits).cpu().argmax(1) == run.samples.labels[numbers]).double().mean()))


def _edit_layers(run: _Run, strength: float, edits: list[Edit]) -> Iterator[Progress]:
    """Edit every layer in order at one strength; the network is left edited."""
    empty = torch.arange(0)
    for number, layer in enumerate(run.layers):
        yield Progress("layers", layer.name, number, len(run.layers))
        accumulator = run.first if number == 0 else None
        if accumulator is None:
            if number:
                yield from run.looked.advance(_cut_before(run.looked.segments, layer.name), item=layer.name)
            accumulator = run.method.accumulator(
                layer, run.samples, run.model, run.gathering, run.seed, run.means.get(layer.name)
            )
            if layer.closing is not None:
                start = 0
                for read, given, done, total in run.looked.seen((layer.name,), layer.closing.reads):
                    inputs = read[layer.name]
                    accumulator.update(inputs, run.numbers[start : start + len(inputs)], given)
                    start += len(inputs)
                    yield Progress("images", layer.name, done, total)
            else:
                look = _numbered(layer, accumulator.update, run.batch_size, run.numbers)
                yield from run.looked.walk({layer.name: look}, item=layer.name)
            if number == 0:
                run.first = accumulator
        found = accumulator.solve(strength)
        edit = Edit(layer.name, 0, found.modules, empty, empty, dict(found.facts))
        apply_edit_(run.model, edit)
        edits.append(edit)
    yield Progress("layers", "done", len(run.layers), len(run.layers))


def _numbered(
    layer: Layer, update: Callable[[Tensor, Tensor, Mapping[str, Tensor]], None], batch_size: int, numbers: Tensor
) -> Callable[[Tensor], None]:
    """A look that tells the accumulator which images it sees; walks show them in their order."""
    seen = 0

    def look(inputs: Tensor) -> None:
        nonlocal seen
        batch = min(batch_size, len(numbers) - seen)
        if len(inputs) != batch:
            # Windows or positions folded into the batch, image by image.
            if len(inputs) % batch or not isinstance(layer.module, nn.Linear):
                raise UnsupportedModelError(
                    f"{layer.name}: expected inputs of {batch} images, got {len(inputs)}; leave the layer out with "
                    "layers=[…]."
                )
            inputs = inputs.reshape(batch, -1, inputs.shape[-1])
        update(inputs, numbers[seen : seen + batch], {})
        seen += batch

    return look


def _judge(logits: Tensor, samples: Samples, strength: float) -> Trial:
    """Accuracy on the images that judge: those that were not fitted, or all where all were."""
    use = ~samples.fitted if not bool(samples.fitted.all()) else samples.fitted
    right = logits.argmax(1) == samples.labels
    forget, retain = use & samples.forget, use & ~samples.forget
    return Trial(strength, float(right[forget].double().mean()), float(right[retain].double().mean()), int(use.sum()))


def _finish_(model: nn.Module, done: Sequence[Edit], chosen: Sequence[Layer], method: Method) -> UnlearnSummary:
    """Apply all the edits of an interrupted run; nothing is computed again."""
    about, names = done[0].facts, [layer.name for layer in chosen]
    _check_done(done, names)
    for edit in done:
        apply_edit_(model, edit)
    return UnlearnSummary(
        tuple(names),
        method.strength,
        float(about["strength"]),
        tuple(Trial(**trial) for trial in about["trials"]),
        int(about["finetuned"]),
        tuple(about["warnings"]),
    )


def _check_done(done: Sequence[Edit], names: Sequence[str]) -> None:
    expected = [*names, "finetune"][: len(done)]
    if [edit.name for edit in done] != expected:
        raise DataError(
            f"the saved run edits {', '.join(edit.name for edit in done)}, these settings {', '.join(names)}; it is "
            "another run's."
        )


# ------------------------------------------------------------------------------------------------------------ fine-tuning


def finetune_(
    model: nn.Module,
    calibration: ImageSource,
    samples: Samples,
    finetune: Finetune,
    edits: list[Edit],
    batch_size: int,
    device: torch.device,
    seed: int,
) -> Iterator[Progress]:
    """Train all weights on the retain samples; BatchNorm statistics stay. The edit is appended to `edits`.

    Args:
        model: The edited network, in place.
        calibration: The images; forget samples are left out.
        samples: What is known of them.
        finetune: How.
        edits: Where the edit goes.
        batch_size: Images a step.
        device: Where it runs.
        seed: Of the order of the images.
    """
    retain = (~samples.forget).nonzero().flatten()
    images = torch.cat([inputs for inputs, _ in calibration.batches(batch_size)])[retain]
    labels = samples.labels[retain]
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=finetune.lr, momentum=0.9)
    steps = -(-len(images) // batch_size)
    with torch.enable_grad():
        for epoch in range(finetune.epochs):
            for step, part in enumerate(torch.randperm(len(images), generator=generator).split(batch_size)):
                logits = model(images[part].to(device))
                loss = torch.nn.functional.cross_entropy(logits, labels[part].to(device))
                if not bool(torch.isfinite(loss)):
                    raise NumericsError(f"finetune: the loss is {float(loss.detach())}; lower finetune.lr ({finetune.lr:g}).")
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                yield Progress("finetune", f"epoch {epoch + 1}", epoch * steps + step + 1, finetune.epochs * steps)
    optimiser.zero_grad(set_to_none=True)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        module, _, own = name.rpartition(".")
        modules.setdefault(module, {})[own] = parameter.detach().cpu().clone()
    from modhifi_cli.records import ModuleEdit

    empty = torch.arange(0)
    parts = tuple(ModuleEdit(module, tensors=tensors) for module, tensors in modules.items())
    edits.append(Edit("finetune", 0, parts, empty, empty, {"epochs": finetune.epochs, "lr": finetune.lr}))


# ----------------------------------------------------------------------------------------------------------------- pieces


def _samples(logits: Tensor, labels: Tensor, forget: Sequence[int], *, hold_out: bool) -> Samples:
    labels = labels.cpu()
    chosen = torch.tensor(list(forget))
    is_forget = torch.isin(labels, chosen)
    others = logits.clone()
    others[:, chosen] = -torch.inf
    resembles = torch.where(is_forget, others.argmax(1), labels)
    fitted = torch.ones(len(labels), dtype=torch.bool)
    if hold_out:
        # Every fifth image of either kind judges, so that a rare forget class is judged too.
        for kind in (is_forget, ~is_forget):
            numbers = kind.nonzero().flatten()
            fitted[numbers[held_out_images(torch.arange(len(numbers)))]] = False
    return Samples(labels, is_forget, fitted, resembles, tuple(forget), logits.shape[1], logits.float())


def _check_samples(labels: Tensor, forget: Sequence[int]) -> tuple[int, int]:
    is_forget = torch.isin(labels.cpu(), torch.tensor(list(forget)))
    counts = int(is_forget.sum()), int((~is_forget).sum())
    for kind, count in zip(("forget", "retain"), counts, strict=True):
        if count < LEAST_SAMPLES:
            raise DataError(
                f"data: unlearning needs at least {LEAST_SAMPLES} {kind} samples, got {count} among {len(labels)} "
                f"images (forget_class={list(forget)}); give more images, or raise data.num_samples."
            )
    return counts


def _check_weights(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"the weights of '{name}' hold NaN or infinite values; use another weights file.")


def _limit(gathering: Gathering) -> float:
    from modhifi_cli.engine.prune import free_memory

    if gathering.carry_gigabytes == "auto":
        return free_memory() / 6
    return float(gathering.carry_gigabytes) * 1e9


def _editable(model: nn.Module, segments: Segments, example: Tensor, classifier: str) -> list[Layer]:
    """Convolutions without groups and linear layers that run once, in execution order, up to the classifier."""
    trace = segments.trace
    modules = dict(model.named_modules())
    found = []
    once = [name for name in trace.visits if name not in trace.calls]
    linear = [name for name in once if isinstance(modules[name], nn.Linear)]
    read = read_positions(model, example, linear) if linear else {}
    for name in once:
        module = modules[name]
        plain = isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
        if plain or isinstance(module, nn.Linear):
            norm = trace.norm_of.get(name)
            if norm is not None and modules[norm].running_mean is None:
                norm = None
            found.append(Layer(name, module, norm, name == classifier, read.get(name)))
    return found


def _last_stage(model: nn.Module, body: Sequence[Layer], example: Tensor) -> list[Layer]:
    positions: dict[str, int] = {}

    def remember(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            per_output = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1]
            positions[name] = output[0].numel() // per_output

        return hook

    handles = [layer.module.register_forward_hook(remember(layer.name)) for layer in body]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    stage = [layer for layer in body if positions[layer.name] == positions[body[-1].name]] if body else []
    if 2 * len(stage) > len(body):
        return list(body[-max(1, len(body) // 3) :])
    return stage


def _cut_before(segments: Segments, name: str) -> str | None:
    """The last cut in front of a module that can be resumed from."""
    visits = segments.trace.visits
    in_front = [cut for cut in segments.trace.cuts if visits[cut].leave < visits[name].enter]
    return next((cut for cut in reversed(in_front) if segments.usable(cut)), None)


def _is_under(name: str, beginning: str) -> bool:
    return name == beginning or name.startswith(beginning + ".")


def _beginnings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _named(classes: Sequence[str], most: int = 30) -> str:
    shown = ", ".join(f"{number} {name}" for number, name in enumerate(classes[:most]))
    return shown + (", …" if len(classes) > most else "")


def _class_number(one: Any, classes: Sequence[str] | None) -> int | None:
    if isinstance(one, bool):
        return None
    if isinstance(one, int):
        return one
    if isinstance(one, str) and classes and one in classes:
        return classes.index(one) if isinstance(classes, tuple | list) else list(classes).index(one)
    if isinstance(one, str) and one.isdigit():
        return int(one)
    return None


def trials_as_rows(trials: Sequence[Trial], strength: str) -> list[Mapping[str, Any]]:
    """Trials for a table: strength, forget and retain accuracy in percent."""
    return [
        {
            strength: trial.strength,
            "forget, %": 100 * trial.forget,
            "retain, %": None if trial.retain is None else 100 * trial.retain,
            "images": trial.images,
        }
        for trial in trials
    ]
