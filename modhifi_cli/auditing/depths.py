"""Where a network is read, and the walk that reads it: logits, and features of several depths, over images.

Depths are found, not declared: of the cuts in the network's data flow the last one at every resolution is taken, and
always what the classifier sees, the *penultimate* features. Feature maps are averaged over a grid as coarse as keeps
them below a limit, token sequences over their tokens.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi_cli.engine.classifier import find_classifier
from modhifi_cli.evaluation.forward import RememberedLogits, logits_of_batches, ready_to_measure
from modhifi_cli.graph.trace import trace
from modhifi_cli.records import ImageSource, Progress

PENULTIMATE = "penultimate"
_FINEST = 4  # cells along a side of the averaging grid


@dataclass(frozen=True)
class Depth:
    """One place where features are read.

    Attributes:
        name: What it is called: the module's name, or ``penultimate``.
        module: The module whose output is read, or for the penultimate features the classifier, whose input is.
        grid: Cells along a side of the averaging grid of a feature map.
    """

    name: str
    module: str
    grid: int = 1


@dataclass(frozen=True)
class Reading:
    """What one network said over one set of images, in their order.

    Attributes:
        logits: ``[images, classes]`` float64.
        features: Depth name → ``[chosen images, features]`` float32.
    """

    logits: Tensor
    features: Mapping[str, Tensor]


def classifier_of(model: nn.Module, example: Tensor) -> str:
    """Name of the linear layer whose output is the network's output; `find_classifier` in an audit's words."""
    return find_classifier(
        model, example, wanted="audit", advice="audit a network that ends in one, whose rows the control can remove"
    )


def find_depths(model: nn.Module, example: Tensor, *, depths: int = 4, features: int = 256) -> tuple[Depth, ...]:
    """Where to read, in execution order, the penultimate features last.

    Args:
        model: Network in evaluation mode with a linear classifier.
        example: A batch it takes, at least two images.
        depths: How many places at most.
        features: Largest number of features of a feature map after averaging, unless it has more channels.

    Raises:
        UnsupportedModelError: As `classifier_of` and `modhifi_cli.graph.trace.trace`.
    """
    classifier = classifier_of(model, example)
    seen: dict[str, Tensor] = {}
    found = trace(model, example)
    cuts = [cut for cut in found.cuts if not (classifier == cut or classifier.startswith(cut + "."))]
    penultimate = Depth(PENULTIMATE, classifier)
    places = [*(Depth(cut, cut) for cut in cuts), penultimate]
    with torch.no_grad(), _read(model, places, lambda place, output: seen.update({place.name: output})):
        model(example)
    held: dict[tuple[int, ...], list[str]] = {}
    for cut in cuts:
        output = seen.get(cut)
        if output is not None and output.dim() > 2 and not _same(output, seen[PENULTIMATE]):
            held.setdefault(_resolution(output), []).append(cut)
    chosen = [same[-1] for same in held.values()][-(depths - 1) :] if depths > 1 else []
    if chosen and seen[chosen[-1]].dim() == 3:
        # A transformer keeps one resolution throughout: it is read at even distances instead.
        same = held[_resolution(seen[chosen[-1]])]
        count = min(depths - 1, len(same))
        chosen = [same[round((number + 1) * len(same) / count) - 1] for number in range(count)]
    return (*(Depth(cut, cut, _grid(seen[cut], features)) for cut in chosen), penultimate)


def depths_of_all(
    models: Mapping[str, nn.Module], example: Tensor, *, depths: int, features: int
) -> dict[str, tuple[Depth, ...]]:
    """The dense network's depths; in the others those that they have too, and their own penultimate features.

    Args:
        models: Networks by name, ``dense`` among them.
        example: As for `find_depths`; likewise `depths` and `features`.
    """
    found = find_depths(models["dense"], example, depths=depths, features=features)
    every = {"dense": found}
    for name, model in models.items():
        if name != "dense":
            known = dict(model.named_modules())
            places = [at for at in found if at.module in known and at.name != PENULTIMATE]
            every[name] = (*places, Depth(PENULTIMATE, classifier_of(model, example)))
    return every


def read(
    models: Mapping[str, nn.Module],
    depths: Mapping[str, Sequence[Depth]],
    source: ImageSource,
    chosen: Callable[[Tensor | None, int], Tensor],
    *,
    place: str,
    device: torch.device,
    batch_size: int,
    answers: Mapping[str, RememberedLogits] | None = None,
) -> Generator[Progress, None, tuple[dict[str, Reading], Tensor | None]]:
    """Walk the images once through all networks; logits of all images, features of those that are chosen.

    Args:
        models: Networks by name.
        depths: Where each of them is read.
        source: The images.
        chosen: Called with a batch's labels (or None) and its first image's number: which of the batch's images have
            their features kept, ``[kept]`` int64.
        place: What the settings call the source.
        device: Where to run.
        batch_size: Images a forward.
        answers: Memories that shall learn what the networks of the same names say.

    Returns:
        The reading of every network, and the images' labels ``[images]`` int64, None where there are none.

    Raises:
        DataError, NumericsError, UnsupportedModelError: As `modhifi_cli.evaluation.forward.logits_of_batches`.
    """
    caught: dict[tuple[str, str], Tensor] = {}
    features: dict[tuple[str, str], list[Tensor]] = {}
    logits: dict[str, list[Tensor]] = {name: [] for name in models}
    labels: list[Tensor] = []

    def keep(model: str) -> Callable[[Depth, Tensor], None]:
        def kept(at: Depth, output: Tensor) -> None:
            caught[model, at.name] = summarise(output, at.grid).detach().to("cpu", torch.float32)

        return kept

    done = 0
    with ready_to_measure(models, device), ExitStack() as hooks:
        for name, model in models.items():
            hooks.enter_context(_read(model, depths[name], keep(name)))
        batches = logits_of_batches(
            models, source, place=place, stage="audit", device=device, batch_size=batch_size, progress=lambda _: None,
            answers=answers,
        )  # fmt: skip
        for scores, of_batch in batches:
            count = len(next(iter(scores.values())))
            rows = chosen(of_batch, done)
            for key, output in caught.items():
                features.setdefault(key, []).append(output[rows])
            for name, values in scores.items():
                logits[name].append(values)
            if of_batch is not None:
                labels.append(of_batch.cpu())
            done += count
            yield Progress("audit", place, done, len(source))
    result = {}
    for name in models:
        own = {at: torch.cat(parts) for (model, at), parts in features.items() if model == name}
        result[name] = Reading(torch.cat(logits[name]), own)
    return result, torch.cat(labels) if labels else None


def summarise(output: Tensor, grid: int = 1) -> Tensor:
    """A module's output as one vector an image: maps averaged over a grid, sequences over their tokens.

    Args:
        output: ``[batch, features]``, ``[batch, tokens, features]``, ``[batch, channels, height, width]`` or
            ``[batch, height, width, channels]`` (told by height = width).
        grid: Cells along a side.

    Returns:
        ``[batch, features]``.
    """
    if output.dim() == 3:
        return output.mean(1)
    if output.dim() == 4:
        if output.shape[1] == output.shape[2] != output.shape[3]:
            output = output.permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(output, grid).flatten(1)
    return output.flatten(1)


@contextmanager
def _read(model: nn.Module, depths: Sequence[Depth], look: Callable[[Depth, Tensor], None]) -> Iterator[None]:
    """Show `look` every depth's tensor at each forward; the hooks are gone afterwards."""
    handles = []

    def output_of(at: Depth) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor):
                look(at, output)

        return hook

    def input_of(at: Depth) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            look(at, inputs[0])

        return hook

    try:
        for at in depths:
            module = model.get_submodule(at.module)
            if at.name == PENULTIMATE:
                handles.append(module.register_forward_pre_hook(input_of(at)))
            else:
                handles.append(module.register_forward_hook(output_of(at)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _resolution(output: Tensor) -> tuple[int, ...]:
    if output.dim() == 4:
        last = output.shape[1] == output.shape[2] != output.shape[3]
        return tuple(output.shape[1:3] if last else output.shape[2:])
    return (output.shape[1],)


def _grid(output: Tensor, features: int) -> int:
    if output.dim() != 4:
        return 1
    last = output.shape[1] == output.shape[2] != output.shape[3]
    channels, side = (output.shape[3], output.shape[1]) if last else (output.shape[1], min(output.shape[2:]))
    fitting = int((features / channels) ** 0.5)
    return max(1, min(_FINEST, side, fitting))


def _same(output: Tensor, penultimate: Tensor) -> bool:
    """Whether a cut holds nothing but the penultimate features in another shape (a pooled map before its flatten)."""
    return output[0].numel() == penultimate[0].numel() and torch.equal(output.flatten(1), penultimate.flatten(1))
