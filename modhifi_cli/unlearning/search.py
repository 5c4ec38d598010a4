"""Unlearning: late layers are edited one after the other so that a class is forgotten, without gradients.

Every later layer sees the network as already edited. The strength of the edit is fixed, or tried on calibration images:
on those alone, and for `contrast` on ones that its weights were not computed from. Test data are never looked at here.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.engine.activations import Activations
from modhifi_cli.engine.classifier import find_classifier
from modhifi_cli.engine.gathering import Gathering
from modhifi_cli.engine.memory import limit_bytes
from modhifi_cli.engine.plan import example_of
from modhifi_cli.errors import ConfigError, DataError, NumericsError, UnsupportedModelError
from modhifi_cli.graph.segments import Segments
from modhifi_cli.graph.surgery import apply_edit_
from modhifi_cli.records import Edit, ImageSource, Progress
from modhifi_cli.unlearning.classes import check_every_class, count_samples, samples_of
from modhifi_cli.unlearning.closings import class_means
from modhifi_cli.unlearning.finetune import Finetune, finetune_
from modhifi_cli.unlearning.layers import choose_layers
from modhifi_cli.unlearning.method import Fit, Layer, Method, Samples, Site


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
class Order:
    """What is to be forgotten, how, and when a strength is good enough.

    Attributes:
        forget: Classes to forget, sorted, as `forget_classes` gives them.
        method: How one layer forgets.
        layers: ``"auto"`` (the method's own choice), ``"last N"``, or names (or their beginnings, such as a stage's).
        forget_target: A strength is enough where forget accuracy is below this, 0 … 1.
        retain_drop: With a method that searches downwards (`contrast`): loss of retain accuracy that is allowed, 0 … 1.
        finetune: Training after the edit; off by default.
        seed: For everything that is drawn.

    Raises:
        ConfigError: If a share is none.
    """

    forget: Sequence[int]
    method: Method
    layers: str | Sequence[str] = "auto"
    forget_target: float = 0.01
    retain_drop: float = 0.003
    finetune: Finetune = Finetune()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("forget_target", "retain_drop"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} must be a share from 0 to 1; got {value!r}.")

    def rank(self, trial: Trial, dense: Trial, *, downwards: bool) -> tuple[bool, bool, bool, float]:
        """Good enough, forgets, keeps, and what is gained: the larger, the better."""
        forgets = trial.forget <= self.forget_target
        keeps = trial.retain is not None and trial.retain >= dense.retain - self.retain_drop
        gained = -1.0 if trial.retain is None else trial.retain - trial.forget
        return forgets and (keeps or not downwards), forgets, keeps, gained


def unlearn_(
    model: nn.Module,
    order: Order,
    *,
    calibration: ImageSource,
    labels: Tensor,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    gathering: Gathering | None = None,
    done: Sequence[Edit] = (),
) -> Iterator[UnlearnPlan | Progress | Trial | Edit | UnlearnSummary]:
    """Make `model` forget classes, in place, yielding plan, progress, trials, one `Edit` per layer, and a summary.

    Args:
        model: Dense classifier, evaluation mode. It is moved to `device`.
        order: What is to be forgotten, and how.
        calibration: Images of the forget classes and of others.
        labels: Class of every image, ``[images]`` int64.
        batch_size: Images a forward.
        device: Where the forwards run.
        gathering: How statistics are gathered.
        done: Edits of an interrupted run with the same settings: they are applied, not computed.

    Raises:
        ConfigError: If a setting is out of range or names no layer.
        DataError: If there are too few forget or retain samples, or `done` does not fit.
        NumericsError: If values are not finite.
        UnsupportedModelError: If the network is no classifier with a linear layer at its end.
    """
    method, device = order.method, torch.device(device)
    gathering = gathering or Gathering()
    if len(labels) != len(calibration):
        raise DataError(f"there are {len(calibration)} calibration images but {len(labels)} labels; give one for each.")
    model.to(device).eval()
    _check_weights(model)
    counts = count_samples(labels, order.forget)
    example = example_of(calibration, device)
    classifier = find_classifier(model, example, wanted="unlearn", advice="use a classifier that ends in one")
    segments = Segments(model, example)
    chosen = choose_layers(model, segments, example, classifier, order.layers, method)
    names = [layer.name for layer in chosen]
    yield UnlearnPlan(tuple(names), *counts)

    if done:
        _check_done(done, names)
    if done and len(done) == done[0].facts.get("edits"):
        for edit in done:
            apply_edit_(model, edit)
        yield _known(done).summary(names, method)
        return
    activations = Activations(
        model, segments, calibration, batch_size=batch_size, device=device, limit_bytes=limit_bytes(gathering, device)
    )
    yield from activations.advance(_in_front(segments, names[0]), item="calibration images")
    logits = yield from _outputs(activations, classifier, "dense logits")
    samples = samples_of(logits, labels, order.forget, hold_out=method.edits_classifier and method.given is None)
    run = _Run(model, activations, samples, chosen, order, classifier, batch_size, gathering)
    if method.closings:
        check_every_class(samples)
        run.means = yield from class_means(
            activations,
            {layer.name: layer.closing for layer in chosen if layer.closing is not None},
            samples.labels,
            samples.fitted & ~samples.forget,
            samples.classes,
        )
    if done:
        # The strength is known; what the interruption left unsaved is computed again, to the same numbers.
        found = _known(done)
        edits = yield from _edit_layers(run, found.strength)
    elif method.given is None:
        found, edits = yield from _search(run, _judge(logits, samples, 0.0))
    else:
        found = _Found(method.given)
        edits = yield from _edit_layers(run, found.strength)
    if order.finetune.epochs:
        found = replace(found, finetuned=order.finetune.epochs)
        edits.append((yield from finetune_(model, calibration, samples, order.finetune, batch_size, device, order.seed)))
    yield from found.told(edits)[len(done) :]
    yield found.summary(names, method)


# ------------------------------------------------------------------------------------------------------------ the search


@dataclass(frozen=True)
class _Found:
    """What a search came to, or what was given."""

    strength: float
    trials: tuple[Trial, ...] = ()
    warnings: tuple[str, ...] = ()
    finetuned: int = 0

    def facts(self) -> dict[str, Any]:
        """JSON-able, for the first edit."""
        trials = [vars(trial) for trial in self.trials]
        return {"trials": trials, "warnings": list(self.warnings), "finetuned": self.finetuned}

    def told(self, edits: Sequence[Edit]) -> list[Edit]:
        """The edits with the strength and their number among their facts, so that an interrupted saving can go on."""
        common = {"strength": self.strength, "edits": len(edits)}
        return [
            replace(edit, facts={**edit.facts, **common, **(self.facts() if number == 0 else {})})
            for number, edit in enumerate(edits)
        ]

    def summary(self, names: Sequence[str], method: Method) -> UnlearnSummary:
        return UnlearnSummary(
            tuple(names), method.strength, self.strength, self.trials, self.finetuned, self.warnings
        )


def _known(done: Sequence[Edit]) -> _Found:
    """What the edits of an interrupted run tell."""
    about = done[0].facts
    trials = tuple(Trial(**trial) for trial in about["trials"])
    return _Found(float(about["strength"]), trials, tuple(about["warnings"]), int(about["finetuned"]))


@dataclass
class _Run:
    """What the steps of one run share; the activations stand in front of the first layer."""

    model: nn.Module
    activations: Activations
    samples: Samples
    layers: tuple[Layer, ...]
    order: Order
    classifier: str
    batch_size: int
    gathering: Gathering
    # The first layer's inputs do not depend on the strength, so its fit serves every trial.
    first: Fit | None = None
    means: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.method = self.order.method
        self.home = self.activations.position()
        # The forget samples alone, for a method that asks for no others: `looked` is where its walks go.
        self.looked, self.numbers = self.activations, torch.arange(len(self.samples.labels))
        if self.method.forget_only:
            self.numbers = self.samples.forget.nonzero().flatten()
            self.looked = self.activations.only(self.numbers)
        self.looked_home = self.looked.position()
        self.dense: dict[str, dict[str, Tensor]] = {}
        for layer in self.layers:
            for name in filter(None, (layer.name, layer.norm)):
                state = self.model.get_submodule(name).state_dict()
                self.dense[name] = {key: value.detach().clone() for key, value in state.items()}

    def restore_(self, edits: Sequence[Edit] = ()) -> None:
        """Put the dense weights back, stand in front of the first layer, and apply some edits."""
        for name, state in self.dense.items():
            self.model.get_submodule(name).load_state_dict(state)
        self.activations.return_to(self.home)
        self.looked.return_to(self.looked_home)
        for edit in edits:
            apply_edit_(self.model, edit)


def _search(run: _Run, dense: Trial) -> Generator[Progress | Trial, None, tuple[_Found, list[Edit]]]:
    """Try strengths in the method's order; leaves the network at the chosen one, and returns its edits.

    Upwards (shares): the first that forgets. Downwards (β): the largest that keeps retain accuracy, and forgets.
    """
    method, order, downwards = run.method, run.order, run.method.edits_classifier
    yield dense
    tried: list[tuple[Trial, list[Edit]]] = []
    for strength in method.strengths:
        run.restore_()
        edits = yield from _edit_layers(run, strength)
        trial = yield from _try(run, strength)
        tried.append((trial, edits))
        yield trial
        if order.rank(trial, dense, downwards=downwards)[0]:
            break
    else:
        # None is good enough: the best of them is told by both accuracies.
        for number, (trial, edits) in enumerate(tried):
            if trial.retain is None:
                run.restore_(edits)
                retain = yield from _retain_accuracy(run)
                tried[number] = replace(trial, retain=retain, images=len(run.samples.labels)), edits
    best, edits = max(tried, key=lambda one: order.rank(one[0], dense, downwards=downwards))
    warnings = []
    if not order.rank(best, dense, downwards=downwards)[0]:
        warnings.append(
            f"no {method.strength} of {', '.join(f'{s:g}' for s in method.strengths)} brought forget accuracy on "
            f"the calibration images to {order.forget_target:.1%} or less"
            + (f" within {100 * order.retain_drop:g} points of retain accuracy" if downwards else "")
            + f"; {best.strength:g} came nearest, with forget {best.forget:.1%} and retain {best.retain:.1%}."
        )
    run.restore_(edits)
    return _Found(best.strength, (dense, *(trial for trial, _ in tried)), tuple(warnings)), edits


def _try(run: _Run, strength: float) -> Generator[Progress, None, Trial]:
    """Judge the network as edited. Of forget samples alone where those decide, until a strength forgets."""
    given = yield from _outputs(run.looked, run.classifier, f"{run.method.strength} {strength:g}")
    if not run.method.forget_only:
        return _judge(given, run.samples, strength)
    forget = float((given.argmax(1) == run.samples.labels[run.numbers]).double().mean())
    if forget > run.order.forget_target:
        return Trial(strength, forget, None, len(run.numbers))
    retain = yield from _retain_accuracy(run)
    return Trial(strength, forget, retain, len(run.samples.labels))


def _retain_accuracy(run: _Run) -> Generator[Progress, None, float]:
    """Accuracy of the network as edited on all retain samples, for a method that looks at the others alone."""
    numbers = (~run.samples.forget).nonzero().flatten()
    run.activations.return_to(run.home)
    logits = yield from _outputs(run.activations.only(numbers), run.classifier, "retain samples")
    return float((logits.argmax(1) == run.samples.labels[numbers]).double().mean())


def _outputs(activations: Activations, module: str, item: str) -> Generator[Progress, None, Tensor]:
    """What a module gives over all images, on the CPU."""
    found: list[Tensor] = []
    yield from activations.outputs(module, found.append, item=item)
    return torch.cat(found).cpu()


def _edit_layers(run: _Run, strength: float) -> Generator[Progress, None, list[Edit]]:
    """Edit every layer in order at one strength; the network is left edited."""
    empty = torch.arange(0)
    edits = []
    for number, layer in enumerate(run.layers):
        yield Progress("layers", layer.name, number, len(run.layers))
        fit = run.first if number == 0 else None
        if fit is None:
            if number:
                yield from run.looked.advance(_in_front(run.looked.segments, layer.name), item=layer.name)
            fit = yield from _fit(run, layer)
            if number == 0:
                run.first = fit
        found = fit.solve(strength)
        edits.append(Edit(layer.name, 0, found.modules, empty, empty, dict(found.facts)))
        apply_edit_(run.model, edits[-1])
    yield Progress("layers", "done", len(run.layers), len(run.layers))
    return edits


def _fit(run: _Run, layer: Layer) -> Generator[Progress, None, Fit]:
    """Show one layer's fit all samples, in one walk."""
    fit = run.method.fit(
        Site(layer, run.samples, run.model, run.gathering, run.order.seed, run.means.get(layer.name))
    )
    if layer.closing is None:
        look = _numbered(layer, fit.update, run.batch_size, run.numbers)
        yield from run.looked.walk({layer.name: look}, item=layer.name)
        return fit
    start = 0
    for read, given, done, total in run.looked.seen((layer.name,), layer.closing.reads):
        inputs = read[layer.name]
        fit.update(inputs, run.numbers[start : start + len(inputs)], given)
        start += len(inputs)
        yield Progress("images", layer.name, done, total)
    return fit


def _numbered(
    layer: Layer, update: Callable[[Tensor, Tensor, Mapping[str, Tensor]], None], batch_size: int, numbers: Tensor
) -> Callable[[Tensor], None]:
    """A look that tells the fit which images it sees; walks show them in their order."""
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


def _check_done(done: Sequence[Edit], names: Sequence[str]) -> None:
    expected = [*names, "finetune"][: len(done)]
    if [edit.name for edit in done] != expected:
        raise DataError(
            f"the saved run edits {', '.join(edit.name for edit in done)}, these settings {', '.join(names)}; it is "
            "another run's."
        )


def _check_weights(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"the weights of '{name}' hold NaN or infinite values; use another weights file.")


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


def _in_front(segments: Segments, name: str) -> str | None:
    """The last cut in front of a module that can be resumed from."""
    return segments.last_before(segments.trace.visits[name].enter)
