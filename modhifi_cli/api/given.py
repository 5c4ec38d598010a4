"""What a call from Python is given: a network and batches, made into what the rooms above work on.

Images, sound, tables and whatever else is floating become one source of samples; of a language model ids of tokens or
texts become windows. Names inside a wrapper are told as the caller knows them.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.data.sources import PAPER_SAMPLES
from modhifi_cli.data.tensors import TensorImages, from_batches
from modhifi_cli.data.text import LENGTH, SEQUENCES, TokenWindows, of_tokens, windows_of
from modhifi_cli.engine.plan import example_of
from modhifi_cli.errors import ConfigError, DataError, is_whole
from modhifi_cli.graph.components import ComponentGroup, Refusal, Slot
from modhifi_cli.graph.folded import copied, fold_
from modhifi_cli.graph.inputs import FORWARD_ERRORS, check_images, refuse_finished
from modhifi_cli.models.called import INSIDE, Called, Form, labels_of, named_inputs, parted, read_of
from modhifi_cli.records import Edit

Batches = Iterable[Any] | Tensor
Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Inside:
    """How a network and what is pruned go together: names differ where the network stands in a wrapper."""

    form: Form | None = None
    forward: Forward | None = None
    folded: tuple[str, ...] = ()

    @property
    def wrapped(self) -> bool:
        """Whether there is a wrapper."""
        return self.form is not None

    def wrap(self, network: nn.Module) -> nn.Module:
        """A network like the given one, as it is walked."""
        return network if self.form is None else Called(network, self.form, self.forward).eval()

    def outer(self, name: str) -> str:
        """A module's name for the caller."""
        return name.removeprefix(INSIDE) if self.wrapped else name

    def inner(self, names: Sequence[str]) -> tuple[str, ...]:
        """The caller's names inside the wrapper."""
        return tuple(f"{INSIDE}{name}" for name in names) if self.wrapped else tuple(names)

    def network(self, edited: nn.Module) -> nn.Module:
        """The caller's network out of the wrapper."""
        return (edited.network if self.wrapped else edited).eval()

    def refusal(self, refusal: Refusal) -> Refusal:
        """A refusal by the caller's names."""
        if not self.wrapped:
            return refusal
        return Refusal(self.outer(refusal.name), refusal.reason.replace(INSIDE, ""))

    def group(self, group: ComponentGroup) -> ComponentGroup:
        """A group by the caller's names."""

        def slots(found: Sequence[Slot]) -> tuple[Slot, ...]:
            return tuple(Slot(self.outer(slot.module), slot.index) for slot in found)

        return replace(
            group,
            name=self.outer(group.name),
            producers=slots(group.producers),
            followers=slots(group.followers),
            consumers=slots(group.consumers),
        )

    def edit(self, edit: Edit) -> Edit:
        """An edit by the caller's names."""
        modules = tuple(replace(module, module=self.outer(module.module)) for module in edit.modules)
        return replace(edit, name=self.outer(edit.name), modules=modules)


@dataclass(frozen=True)
class Given:
    """A network that is ready to be walked, and its samples.

    Attributes:
        network: A copy, unless in place, in evaluation mode on its device; a language model that is only measured is the
            caller's own, as it is.
        samples: Images or windows of tokens.
        device: Where forwards run.
        inside: How names go together.
        part: Takes a batch apart into what the network reads, as one tensor, and labels; None of a language model.
    """

    network: nn.Module
    samples: TensorImages | TokenWindows
    device: torch.device
    inside: Inside
    part: Callable[[Any], tuple[Any, Tensor | None]] | None = None

    @property
    def reads_text(self) -> bool:
        """Whether it is a language model."""
        return self.part is None

    def of(self, network: nn.Module) -> nn.Module:
        """Another network of the same inputs, as the first is walked; a language model is the caller's own, as it is."""
        return network if self.reads_text else self.inside.wrap(copied(network).to(self.device).eval())

    def more(self, batches: Batches) -> TensorImages:
        """Further images, read as the first were.

        Raises:
            DataError: If they are none, or of another form than the first.
        """
        assert self.part is not None, "texts are cut into windows with the network at hand"
        return from_batches(batches, part=self.part)

    @property
    def example(self) -> Tensor:
        """One sample, ``[1, …]``, on the device."""
        return next(iter(self.samples.batches(1)))[0].to(self.device)


def names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Names as a tuple; a text is one name, not its letters."""
    return (given,) if isinstance(given, str) else tuple(given)


def is_decoder(model: nn.Module) -> bool:
    """Whether a network is a causal language model of transformers; one that reads with an encoder is none."""
    known = getattr(model, "config", None)
    return known is not None and hasattr(model, "generate") and not getattr(known, "is_encoder_decoder", False)


def ready(
    model: nn.Module,
    batches: Batches,
    device: torch.device | str | None,
    *,
    most: int | str | None = None,
    in_place: bool = False,
    forward: Forward | None = None,
    inputs: str | int | None = None,
    tokenizer: Any = None,
    length: int | None = None,
    scored: bool = False,
    seed: int = 0,
) -> Given:
    """The network and its samples, looked at before any work.

    One parameter for each of the command line's settings that applies here, by its word.

    Args:
        model: As the functions are given it; a network that takes or gives anything else than one tensor stands in a
            wrapper (`Called`) from here on.
        batches: Samples, token ids or texts.
        device: Where forwards run; None: where the network is.
        most: Samples at most; ``"auto"`` is 2,000 images or 128 windows of text, None all.
        in_place: Whether `model` itself is walked.
        forward, inputs: As of `prune`.
        tokenizer: Reads texts.
        length: Tokens of a window cut from texts; None is 1,024, or as many as the network takes.
        scored: Whether texts are read from their beginning, for a measurement.
        seed: Of the windows that are drawn.

    Raises:
        ConfigError: If `model` is no network, or a setting does not fit.
        DataError: If `batches` holds no samples that fit.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected a torch.nn.Module, got a {type(model).__name__}.")
    refuse_finished(model)
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):  # what torch.compile was given; the new network is compiled again by whoever wants it
        model = inner
    if most not in ("auto", None) and (not is_whole(most) or most < 1):
        raise ConfigError(f"num_samples: expected a whole number from 1, auto or None, got {most!r}.")
    place = torch.device(device) if device is not None else _home(model)
    if is_decoder(model):
        found = _windows(model, batches, most, tokenizer, length, scored, seed)
        # Measurements hold a network ready and give it back; a copy of a large one would take its memory again.
        network = model if scored else (model if in_place else copy.deepcopy(model)).eval()
        return Given(network, found, place, Inside())
    network = (model if in_place else copied(model)).to(place).eval()
    folded = fold_(network)
    rest = iter([batches] if isinstance(batches, Tensor) else batches)
    first = next(rest, None)
    if first is None:
        raise DataError("batches: expected at least one image, got none.")
    if isinstance(first, str):
        raise DataError(
            f"batches: texts are for language models of transformers, and {type(model).__name__} is none; give tensors."
        )
    known = () if forward is not None or inputs is not None else named_inputs(network, first)
    form: Form | None = None
    if forward is not None or known:
        form = Form(read_of(first, known, forward))

    def part(batch: Any) -> tuple[Any, Tensor | None]:
        if form is None:
            return parted(batch, inputs)
        return form.pack(read_of(batch, known, forward)), labels_of(batch)

    # A loader of a whole training set must not fill the memory.
    images = from_batches(itertools.chain([first], rest), most=_at_most(most, PAPER_SAMPLES), part=part)
    example = example_of(images, place)
    if form is None and _gives_logits(network, example):
        check_images(network, example)
        return Given(network, images, place, Inside(folded=folded), part)
    inside = Inside(form or Form(example), forward, folded)
    network = inside.wrap(network)
    check_images(network, example)
    return Given(network, images, place, inside, part)


def _at_most(asked: int | str | None, otherwise: int | None) -> int | None:
    """A number of samples, None for all; ``"auto"`` is the other one."""
    return asked if asked is None or isinstance(asked, int) else otherwise


def _windows(
    model: nn.Module,
    batches: Batches,
    most: int | str | None,
    tokenizer: Any,
    length: int | None,
    scored: bool,
    seed: int,
) -> TokenWindows:
    """Token ids as they are given, or windows of texts: drawn, or from their beginning where they are scored."""
    from modhifi_cli.models.hf import text_input

    text = text_input(model.config, tokenizer)
    rest = iter([batches] if isinstance(batches, Tensor | str) else batches)
    first = next(rest, None)
    if isinstance(first, str):
        if tokenizer is None:
            raise ConfigError("tokenizer: texts are read with the network's own tokenizer; give tokenizer=…, or token ids.")
        wanted = _at_most(most, None if scored else SEQUENCES)
        own = min(LENGTH, text.max_length) if length is None else length
        texts = [one for one in itertools.chain([first], rest) if one]
        return windows_of(texts, "texts", sequences=wanted, length=own, seed=seed, preprocess=text, labelled=scored)
    kept = _at_most(most, None if scored else SEQUENCES)
    given = [] if first is None else list(itertools.chain([first], itertools.islice(rest, kept)))
    ids = [found for found in (_ids(one) for one in given) if found is not None]
    if not given or len(ids) < len(given):
        told = "nothing" if not given else f"a {type(given[0]).__name__}"
        raise DataError(
            "batches: a language model reads texts, or ids of tokens [sequences, length] int64 (or dictionaries with "
            f"input_ids); got {told}."
        )
    found = of_tokens(ids, preprocess=text, most=kept)
    lengths = sorted({len(window) for window in found.windows})
    if not scored and len(lengths) > 1:
        raise DataError(
            f"batches: calibration windows must be of one length, got {lengths[0]} to {lengths[-1]} tokens; cut them alike, "
            "or give texts with tokenizer=…."
        )
    return found


def _ids(batch: Any) -> Tensor | None:
    """The ids of a batch, or None where there are none."""
    if isinstance(batch, Mapping):
        batch = batch.get("input_ids")
    elif isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
        batch = batch[0]
    elif isinstance(batch, list) and batch and all(is_whole(one) for one in batch):
        batch = torch.tensor(batch)
    fits = isinstance(batch, Tensor) and batch.dim() in (1, 2) and not batch.is_floating_point() and batch.numel() > 0
    return batch if fits else None


def _home(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in _tensors(model)), torch.device("cpu"))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _gives_logits(model: nn.Module, example: Tensor) -> bool:
    """Whether the network answers with one tensor ``[samples, numbers]``; one that fails is told of later."""
    try:
        with torch.inference_mode():
            answer = model(example)
    except FORWARD_ERRORS:
        return True
    return isinstance(answer, Tensor) and answer.dim() == 2 and len(answer) == len(example)
