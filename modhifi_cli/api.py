"""The method from Python: a network and batches go in, a network and a record come out; no files, no printing.

The functions are what the verbs of the command line do with the same settings: presets are the same YAML files, and the
tasks are the same. Networks that are given are left as they were, unless ``in_place=True`` asks for the opposite.
"""

import copy
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.data.tensors import TensorImages, from_batches
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.evaluation import agreement, size, top1
from modhifi_cli.graph.components import ComponentGroup, Refusal, Slot
from modhifi_cli.graph.folded import copied, fold_
from modhifi_cli.graph.inputs import FORWARD_ERRORS, check_images
from modhifi_cli.models.called import INSIDE, Called, Form, labels_of, named_inputs, parted
from modhifi_cli.records import Edit, Progress
from modhifi_cli.settings import config

Batches = Iterable[Any] | Tensor
Listener = Callable[[Progress], None]
Forward = Callable[[nn.Module, Any], Any]
_STEPS = ("scoring", "selection", "compensation", "allocation", "schedule")
_MOST = 2000  # images, as in the paper; a loader of a whole training set must not fill the memory


@dataclass(frozen=True)
class Pruned:
    """What `prune` did.

    Attributes:
        removed: Group → numbers of the dense components that are gone, ``[removed]`` int64 sorted.
        kept: Group → those that are left, ``[kept]`` int64 sorted.
        refused: Coupled channels that were left alone, each with its reason.
        achieved: Share removed of ``"params"``, ``"flops"`` and ``"components"``, 0 … 1.
        before: Parameters and multiply-accumulates of one image, of the network that was given.
        after: The same of the new one.
        edits: Every step, for `modhifi_cli.graph.surgery.apply_edit_` on the dense network.
        warnings: Sentences to read; one says so where the network was trained (``settings=["healing=distill"]``).
    """

    removed: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    refused: tuple[Refusal, ...]
    achieved: Mapping[str, float]
    before: Mapping[str, int]
    after: Mapping[str, int]
    edits: tuple[Edit, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Unlearned:
    """What `unlearn` did.

    Attributes:
        forgotten: Classes, sorted.
        layers: Edited layers in order.
        strength: Name of the method's strength → the value that was given or found.
        trials: What was tried to find it: strength, forget and retain accuracy on calibration images, 0 … 1.
        edits: Every step, for `modhifi_cli.graph.surgery.apply_edit_`.
        warnings: Sentences to read.
    """

    forgotten: tuple[int, ...]
    layers: tuple[str, ...]
    strength: Mapping[str, float]
    trials: tuple[Mapping[str, Any], ...]
    edits: tuple[Edit, ...]
    warnings: tuple[str, ...]


def prune(
    model: nn.Module,
    batches: Batches,
    *,
    sparsity: float = 0.4,
    target: str = "flops",
    preset: str = "best",
    exclude: str | Sequence[str] = (),
    round_to: int | str = "auto",
    settings: Sequence[str] = (),
    batch_size: int = 64,
    device: torch.device | str | None = None,
    seed: int = 0,
    most_images: int | None = _MOST,
    check_data: bool = True,
    in_place: bool = False,
    forward: Forward | None = None,
    inputs: str | int | None = None,
    progress: Listener | None = None,
) -> tuple[nn.Module, Pruned]:
    """Remove the components that carry least of each layer's output, and repair the rest in closed form.

    Args:
        model: A trained network. What it gives beside or instead of logits counts as a whole: maps, several heads, lists,
            dictionaries.
        batches: Unlabelled calibration samples as the network wants them: a tensor ``[samples, …]`` (images, sound,
            volumes, tables) or anything that gives such batches (a ``DataLoader``), each a tensor, a tuple whose first is
            read, or a dictionary; labels and what else stands beside them are not looked at.
        sparsity: Share that is removed, in [0, 1).
        target: Of what: ``"params"``, ``"flops"`` or ``"components"``.
        preset: A recipe of the command line by name: ``"best"``, ``"paper"``, ``"fast"``, ``"magnitude_batchnorm"`` …
        exclude: Modules to leave alone: a name, or several; what lies inside them, too.
        round_to: Widths are multiples of it; ``"auto"``: of what suits each group where it runs.
        settings: Further settings in the command line's words, such as ``["compensation=joint", "selection=top_k"]``.
        batch_size: Images a forward.
        device: Where the forwards run; None: where the network is. The new network is on it.
        seed: For everything that is drawn.
        most_images: Calibration images at most; None takes all that `batches` gives.
        check_data: Look at the images first, and keep the stored BatchNorm statistics where they are too poor.
        in_place: Change `model` itself and return it, instead of a copy.
        forward: Your function of model and batch, ``forward(model, batch)``, where the network does not simply take what
            is read of a batch: several inputs, masks, what of its answer counts. It is handed whole batches.
        inputs: What is read of a batch that is a dictionary (its key) or a tuple (its place); None guesses.
        progress: Called with a `Progress` at every step.

    Returns:
        The new network in evaluation mode, of the same class with smaller layers, and what was done.

    Raises:
        ConfigError: If a setting is unknown or out of range, or the target cannot be reached.
        DataError: If `batches` holds no images that fit.
        NumericsError: If weights or activations are not finite.
        UnsupportedModelError: If the network cannot be traced or holds nothing that can be pruned.
    """
    from modhifi_cli.engine.healing import Healed, about, check_samples, heal_
    from modhifi_cli.engine.image_walk import ImageWalk
    from modhifi_cli.engine.plan import Plan, Summary
    from modhifi_cli.engine.prune import prune_
    from modhifi_cli.engine.walk import Budget, Recipe
    from modhifi_cli.graph.counting import count

    if target not in ("params", "flops", "components"):
        raise ConfigError(f"target must be params, flops or components, got '{target}'; time is for the command line.")
    if not isinstance(preset, str) or preset not in config.groups()["preset"]:
        known = ", ".join(config.groups()["preset"])
        raise ConfigError(f"preset: there is no recipe {preset!r}; known: {known}.")
    chosen = config.steps("prune", [f"preset={preset}", *settings])
    if chosen.get("outside"):
        raise ConfigError(f"preset={preset} is another library's method; compare with it on the command line.")
    ready = _ready(model, batches, device, most=most_images, in_place=in_place, forward=forward, inputs=inputs)
    edited, calibration, place, inside = ready
    example = next(iter(calibration.batches(1)))[0].to(place)
    before = count(edited, example)
    listen = progress or _nobody
    warnings = list(inside.folded)
    dense = None
    if chosen.get("healing"):
        check_samples(len(calibration))
        dense = copy.deepcopy(edited)
    if check_data:
        chosen["batchnorm"] = _batchnorm(edited, calibration, chosen["batchnorm"], batch_size, place, listen, warnings)
    plan, summary, edits = None, None, []
    steps = {key: config.build(chosen[key]) for key in _STEPS}
    walk = ImageWalk(
        edited,
        calibration,
        exclude=inside.inner(_names(exclude) or tuple(chosen["exclude"])),
        batchnorm=chosen["batchnorm"],
        batch_size=batch_size,
        device=place,
        gathering=config.build(chosen["statistics"]),
        seed=seed,
    )
    recipe = Recipe(**steps, classifier=chosen["classifier"], seed=seed)
    for event in prune_(walk, recipe, Budget(sparsity, target, round_to)):
        if isinstance(event, Plan):
            plan = event
        elif isinstance(event, Edit):
            edits.append(event)
        elif isinstance(event, Summary):
            summary = event
        elif isinstance(event, Progress):
            listen(event)
    assert plan is not None and summary is not None, "the task ended without a summary"
    if dense is not None:
        recipe = config.build(chosen["healing"])
        for event in heal_(edited, dense, calibration, recipe=recipe, edits=edits, device=place, seed=seed):
            if isinstance(event, Edit):
                edits.append(event)
            elif isinstance(event, Progress):
                listen(event)
            elif isinstance(event, Healed):
                warnings += [*event.warnings, *((about(event),) if event.trained else ())]
    after = count(edited, example)
    sizes = {group.name: group.components for group in plan.groups}
    kept = {inside.outer(name): numbers for name, numbers in _kept(sizes, edits).items()}
    sizes = {inside.outer(name): size for name, size in sizes.items()}
    edits = [inside.edit(edit) for edit in edits]
    return inside.network(edited), Pruned(
        removed={name: _others(numbers, sizes[name]) for name, numbers in kept.items()},
        kept=kept,
        refused=tuple(inside.refusal(each) for each in plan.refused),
        achieved=dict(summary.achieved),
        before={"parameters": before.parameters, "macs": before.macs},
        after={"parameters": after.parameters, "macs": after.macs},
        edits=tuple(edits),
        warnings=(*warnings, *summary.warnings),
    )


def unlearn(
    model: nn.Module,
    batches: Batches,
    *,
    forget: int | str | Sequence[int | str],
    method: str = "contrast",
    layers: str | Sequence[str] = "auto",
    classes: Sequence[str] | None = None,
    labels: str = "auto",
    forget_target: float = 0.01,
    retain_drop: float = 0.003,
    settings: Sequence[str] = (),
    batch_size: int = 64,
    device: torch.device | str | None = None,
    seed: int = 0,
    in_place: bool = False,
    forward: Forward | None = None,
    inputs: str | int | None = None,
    progress: Listener | None = None,
) -> tuple[nn.Module, Unlearned]:
    """Take classes out of a classifier in closed form. What it answers changes; what it still holds, only an audit says.

    Args:
        model: A trained classifier that ends in a linear layer.
        batches: Images of the classes to forget and of others, with labels (pairs) or without.
        forget: Classes to forget: numbers, or names where `classes` are given.
        method: ``"contrast"``, ``"contrast_deep"``, ``"contrast_few"``, ``"collapse"``, ``"modhifi_u"`` or
            ``"discedit_u"``.
        layers: ``"auto"``, ``"last N"``, or names (or their beginnings).
        classes: Names of the classes in the order of the logits.
        labels: ``"auto"`` takes those of `batches`, else the network's own predictions; ``"given"``; ``"model"``.
        forget_target: Forget accuracy on calibration images that is good enough, 0 … 1.
        retain_drop: Retain accuracy that may be lost (`contrast`), 0 … 1.
        settings: Further settings in the command line's words, such as ``["method.depth=4"]``.
        batch_size: Images a forward.
        device: Where the forwards run; None: where the network is.
        seed: For everything that is drawn.
        in_place: Change `model` itself and return it, instead of a copy.
        forward, inputs: As of `prune`.
        progress: Called with a `Progress` at every step.

    Returns:
        The edited network in evaluation mode, and what was done.

    Raises:
        ConfigError: If a setting is unknown or a class does not exist.
        DataError: If there are too few samples of the classes.
        NumericsError: If values are not finite.
        UnsupportedModelError: If the network is no classifier that can be edited.
    """
    from modhifi_cli.engine.labelling import Labels, image_labels
    from modhifi_cli.unlearning.classes import forget_classes
    from modhifi_cli.unlearning.search import UnlearnSummary, trials_as_rows, unlearn_

    chosen = config.steps("unlearn", ["forget_class=0", f"method={method}", *settings])
    ready = _ready(model, batches, device, in_place=in_place, forward=forward, inputs=inputs)
    edited, calibration, place, inside = ready
    listen = progress or _nobody
    found: Labels | None = None
    for event in image_labels(
        edited, calibration, mode=labels, device=place, batch_size=batch_size, names=None if classes is None else
        tuple(classes), place="batches",
    ):  # fmt: skip
        if isinstance(event, Labels):
            found = event
        else:
            listen(event)
    assert found is not None, "labelling ended without labels"
    asked = list(forget) if isinstance(forget, Sequence) and not isinstance(forget, str) else forget
    wanted = forget_classes(asked, classes, found.classes)
    summary, edits = None, []
    for event in unlearn_(
        edited,
        calibration=calibration,
        labels=found.values,
        forget=wanted,
        method=config.build(chosen["method"]),
        layers=layers,
        forget_target=forget_target,
        retain_drop=retain_drop,
        batch_size=batch_size,
        device=place,
        seed=seed,
        gathering=config.build(chosen["statistics"]),
    ):
        if isinstance(event, Edit):
            edits.append(event)
        elif isinstance(event, UnlearnSummary):
            summary = event
        elif isinstance(event, Progress):
            listen(event)
    assert summary is not None, "the task ended without a summary"
    return inside.network(edited), Unlearned(
        forgotten=wanted,
        layers=tuple(inside.outer(name) for name in summary.layers),
        strength={summary.strength_name: summary.strength},
        trials=tuple(trials_as_rows(summary.trials, summary.strength_name)),
        edits=tuple(inside.edit(edit) for edit in edits),
        warnings=(*inside.folded, *summary.warnings),
    )


def groups(
    model: nn.Module,
    batches: Batches,
    *,
    exclude: str | Sequence[str] = (),
    forward: Forward | None = None,
    inputs: str | int | None = None,
) -> tuple[tuple[ComponentGroup, ...], tuple[Refusal, ...]]:
    """What can be removed of a network: its groups of coupled components, and what is left alone with the reason.

    Args:
        model: A network that takes an image batch; left as it was.
        batches: Images as of `prune`; two are looked at.
        exclude: Modules to leave alone: a name, or several; what lies inside them, too.
        forward, inputs: As of `prune`.

    Raises:
        ConfigError: If an excluded module does not exist.
        DataError: If `batches` holds no images that fit.
        UnsupportedModelError: If the network cannot be traced.
    """
    from modhifi_cli.engine.plan import discover, example_of

    seen, calibration, place, inside = _ready(model, batches, None, most=2, forward=forward, inputs=inputs)
    _, found, refused = discover(seen, example_of(calibration, place), exclude=inside.inner(_names(exclude)))
    return tuple(inside.group(group) for group in found), tuple(inside.refusal(each) for each in refused)


def score(
    model: nn.Module,
    batches: Batches,
    *,
    scoring: str = "singleton",
    exclude: str | Sequence[str] = (),
    settings: Sequence[str] = (),
    batch_size: int = 64,
    device: torch.device | str | None = None,
    seed: int = 0,
    most_images: int | None = _MOST,
    forward: Forward | None = None,
    inputs: str | int | None = None,
    progress: Listener | None = None,
) -> dict[str, Tensor]:
    """How much each component of each group matters, without cutting anything.

    Args:
        model: A trained network that takes an image batch; left as it was.
        batches: Images as of `prune`.
        scoring: ``"singleton"`` (fidelity of a component alone), ``"saliency"``, ``"energy"``, ``"fluctuation"``,
            ``"magnitude_l1"``, ``"magnitude_l2"`` or ``"random"``.
        exclude: Modules to leave alone: a name, or several; what lies inside them, too.
        settings: Further settings in the command line's words.
        batch_size: Images a forward.
        device: Where the forwards run; None: where the network is.
        seed: For scores that draw.
        most_images: Images at most; None takes all.
        forward, inputs: As of `prune`.
        progress: Called with a `Progress` at every step.

    Returns:
        Group → ``[components]`` float64: the mean over all that vote, larger is more worth keeping.

    Raises:
        ConfigError, DataError, NumericsError, UnsupportedModelError: As `prune`.
    """
    from modhifi_cli.engine.scores import component_scores

    chosen = config.steps("prune", [f"scoring={scoring}", *settings])
    seen, calibration, place, inside = _ready(
        model, batches, device, most=most_images, forward=forward, inputs=inputs
    )
    scores: dict[str, Tensor] = {}
    for event in component_scores(
        seen,
        calibration=calibration,
        scoring=config.build(chosen["scoring"]),
        exclude=inside.inner(_names(exclude)),
        batch_size=batch_size,
        device=place,
        seed=seed,
        gathering=config.build(chosen["statistics"]),
    ):
        if isinstance(event, Progress):
            (progress or _nobody)(event)
        else:
            scores = event
    return {inside.outer(name): values for name, values in scores.items()}


def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    dense: nn.Module | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    inputs: str | int | None = None,
    progress: Listener | None = None,
) -> dict[str, float]:
    """Measure a network on images: size, accuracy where there are labels, agreement where there is a dense network.

    Args:
        model: A classifier; left as it was.
        batches: Images, with labels (pairs) or without.
        dense: The network to compare with.
        batch_size: Images a forward.
        device: Where the forwards run; None: where the network is.
        forward, inputs: As of `prune`.
        progress: Called with a `Progress` at every step.

    Returns:
        ``parameters``, ``macs`` (of one image), ``file_bytes``; with labels ``top1`` and ``top5`` (more than five
        classes), %; with `dense` ``agreement``, % of images with its answer, and ``kl``, nats.

    Raises:
        DataError: If `batches` holds no images that fit, or a label is outside of the classes.
        NumericsError: If logits are not finite.
        UnsupportedModelError: If the network gives no logits ``[batch, classes]``.
    """
    model, images, place, inside = _ready(model, batches, device, forward=forward, inputs=inputs)
    dense = None if dense is None else inside.wrap(copied(dense).to(place).eval())
    example, labels = next(iter(images.batches(1)))
    given: dict[str, Any] = {
        "evaluation_data": images, "calibration_data": None, "example": example, "device": place,
        "batch_size": batch_size, "progress": progress or _nobody,
    }  # fmt: skip
    found = [*size.measure(models={"model": model}, **given)]
    if labels is not None:
        found += top1.measure(models={"model": model}, **given)
    if dense is not None:
        found += agreement.measure(models={"dense": dense, "model": model}, **given)
    return {measurement.name: measurement.value for measurement in found if measurement.model == "model"}


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Names as a tuple; a text is one name, not its letters."""
    return (given,) if isinstance(given, str) else tuple(given)


def _nobody(step: Progress) -> None:
    """Listens to nothing."""


def _home(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in _tensors(model)), torch.device("cpu"))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def load_model(
    place: str | os.PathLike[str], *, allow: str | bool = False, unverified: bool = False
) -> nn.Module:
    """The network that a run or `save` wrote, or one on the Hugging Face hub, on the CPU in evaluation mode.

    Args:
        place: A folder, which wins, or ``"USER/NAME"`` on the hub.
        allow: ``"package.module:function"``, the user's own code that makes this network, as the folder names it; True
            for whatever it names. A folder runs no code otherwise.
        unverified: Whether a folder without checksums, as older versions wrote them, may be read.

    Raises:
        DataError: If there is no such folder and no such name on the hub, or what is there is no saved network.
    """
    from modhifi_cli.files import artifacts, hub

    folder = Path(place)
    if not folder.is_dir() and hub.is_name(str(place)):
        folder = hub.fetched(str(place))
    return artifacts.load_model(folder, allow=allow, unverified=unverified)


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    factory: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    tokenizer: Any = None,
    name: str | None = None,
) -> None:
    """Write a network that this package has made narrower, so that `load_model` opens the folder.

    Args:
        model: A decoder of transformers, a network of timm, or any other together with its factory.
        folder: Where to write; made if absent.
        factory: ``"package.module:function"`` that makes the dense network, such as ``"torchvision.models.resnet:resnet18"``;
            not needed for decoders and networks of timm.
        kwargs: The factory's arguments.
        preprocess: ``{"size": …, "mean": […], "std": […]}`` of a network for images; needed for it but of timm.
        classes: Names in the order of the logits.
        tokenizer: Of a decoder.
        name: Short name; None takes the class's.

    Raises:
        ConfigError: If what is needed to build the network again is not said.
        DataError: If the folder cannot be written, or the saved network does not build again with these widths.
    """
    from modhifi_cli.files import artifacts
    from modhifi_cli.models.describe import described

    loaded = described(
        model, factory=factory, kwargs=kwargs, preprocess=preprocess, classes=classes, tokenizer=tokenizer, name=name
    )
    artifacts.save_model(Path(folder), loaded, model)
    artifacts.load_model(folder, allow=factory or False)


@dataclass(frozen=True)
class _Inside:
    """How a network and what is pruned go together: names differ where the network stands in a wrapper."""

    form: Form | None = None
    forward: Forward | None = None
    folded: tuple[str, ...] = ()

    @property
    def wrapped(self) -> bool:
        return self.form is not None

    def wrap(self, network: nn.Module) -> nn.Module:
        return network if self.form is None else Called(network, self.form, self.forward).eval()

    def outer(self, name: str) -> str:
        return name.removeprefix(INSIDE) if self.wrapped else name

    def inner(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{INSIDE}{name}" for name in names) if self.wrapped else tuple(names)

    def network(self, edited: nn.Module) -> nn.Module:
        return (edited.network if self.wrapped else edited).eval()

    def refusal(self, refusal: Refusal) -> Refusal:
        if not self.wrapped:
            return refusal
        return Refusal(self.outer(refusal.name), refusal.reason.replace(INSIDE, ""))

    def group(self, group: ComponentGroup) -> ComponentGroup:
        def slots(found: Sequence[Slot]) -> tuple[Slot, ...]:
            return tuple(Slot(self.outer(slot.module), slot.index) for slot in found)

        ends = (slots(group.producers), slots(group.followers), slots(group.consumers))
        return ComponentGroup(self.outer(group.name), group.components, *ends)

    def edit(self, edit: Edit) -> Edit:
        modules = tuple(replace(module, module=self.outer(module.module)) for module in edit.modules)
        return replace(edit, name=self.outer(edit.name), modules=modules)


def _ready(
    model: nn.Module,
    batches: Batches,
    device: torch.device | str | None,
    *,
    most: int | None = None,
    in_place: bool = False,
    forward: Forward | None = None,
    inputs: str | int | None = None,
) -> tuple[nn.Module, TensorImages, torch.device, _Inside]:
    """The network (a copy, unless in place) on its device in evaluation mode, the samples, the device, and the names.

    A network that takes or gives anything else than one tensor stands in a wrapper (`Called`). One that does not take
    these samples is refused in one sentence, before any work.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected a torch.nn.Module, got a {type(model).__name__}.")
    place = torch.device(device) if device is not None else _home(model)
    ready = (model if in_place else copied(model)).to(place).eval()
    folded = fold_(ready)
    rest = iter([batches] if isinstance(batches, Tensor) else batches)
    first = next(rest, None)
    if first is None:
        raise DataError("batches: expected at least one image, got none.")
    names = () if forward is not None or inputs is not None else named_inputs(ready, first)
    form: Form | None = None
    if forward is not None or names:
        form = Form(first if forward is not None else {name: first[name] for name in names})

    def part(batch: Any) -> tuple[Any, Tensor | None]:
        if form is None:
            return parted(batch, inputs)
        return form.pack({name: batch[name] for name in names} if names else batch), labels_of(batch)

    images = from_batches(itertools.chain([first], rest), most=most, part=part)
    example = next(iter(images.batches(2)))[0].to(place)
    example = example if len(example) > 1 else torch.cat([example, example.flip(-1)])
    if form is None and _gives_logits(ready, example):
        check_images(ready, example)
        return ready, images, place, _Inside(folded=folded)
    inside = _Inside(form or Form(example), forward, folded)
    ready = inside.wrap(ready)
    check_images(ready, example)
    return ready, images, place, inside


def _gives_logits(model: nn.Module, example: Tensor) -> bool:
    """Whether the network answers with one tensor ``[samples, numbers]``; one that fails is told of later."""
    try:
        with torch.inference_mode():
            answer = model(example)
    except FORWARD_ERRORS:
        return True
    return isinstance(answer, Tensor) and answer.dim() == 2 and len(answer) == len(example)


def _batchnorm(
    model: nn.Module,
    images: TensorImages,
    asked: str,
    batch_size: int,
    device: torch.device,
    progress: Listener,
    warnings: list[str],
) -> str:
    """What is done with BatchNorm after a look at the images, as the command line decides it; `warnings` grows."""
    from modhifi_cli.engine.quality import Quality, assess

    found: Quality | None = None
    for event in assess(model, images, batch_size=batch_size, device=device):
        if isinstance(event, Progress):
            progress(event)
        else:
            found = event
    assert found is not None, "the assessment ended without a result"
    warnings += found.warnings
    return "stored" if asked == "reestimate" and not found.may_reestimate else asked


def _kept(sizes: Mapping[str, int], edits: Sequence[Edit]) -> dict[str, Tensor]:
    """Dense numbers of what every group keeps after all passes."""
    kept = {name: torch.arange(count) for name, count in sizes.items()}
    for edit in edits:
        if edit.name in kept and edit.removed.numel():
            kept[edit.name] = kept[edit.name][edit.kept]
    return kept


def _others(kept: Tensor, count: int) -> Tensor:
    gone = torch.ones(count, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero().flatten()
