"""What every study looks at: one network, its images, and some of its layers.

A layer is a convolution or linear layer as a consumer: its components are the channels (or features) that it reads.
Statistics are gathered with one walk over the images; the network is left as found.
"""

import copy
import functools
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.engine.gathering import LayerMoments
from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError, nearest
from modhifi_cli.evaluation import agreement, top1
from modhifi_cli.evaluation.forward import RememberedLogits
from modhifi_cli.graph.answers import respond
from modhifi_cli.graph.segments import inputs_seen
from modhifi_cli.graph.trace import Trace, trace
from modhifi_cli.numerics.scoring import Singleton
from modhifi_cli.records import Consumer, ImageSource, Progress

HANDFUL = 6  # layers that a study looks at where nobody chose
_FEWEST_COMPONENTS = 8  # of a layer: about fewer, shares of components say nothing


@dataclass(frozen=True)
class Subject:
    """A network and its images.

    Attributes:
        model: The trained network in evaluation mode, on `device`.
        calibration: Unlabelled images, or windows of text.
        evaluation: Held-out images, labelled, or held-out text; or None.
        example: Two inputs, ``[2, channels, height, width]``, or token ids ``[2, length]``.
        untrained: Makes the same network with fresh weights.
        draw: (name of a data source, seed) → its images in the order of that draw; "" is the calibration data.
        sources: Names of further data sources.
        asked: ``"auto"``, ``"last N"``, or the layers that the user chose (or modules that hold some).
        seeds: For everything that is drawn.
        steps: The pruning steps by name: scoring, selection, compensation, allocation, statistics; and `target`,
            `round_to` and `block` of a `Budget`.
        batch_size: Images a forward.
        device: Where the forwards run.
    """

    model: nn.Module
    calibration: ImageSource
    evaluation: ImageSource | None
    example: Tensor
    untrained: Callable[[], nn.Module]
    draw: Callable[[str, int], ImageSource]
    sources: tuple[str, ...] = ()
    asked: str | tuple[str, ...] = "auto"
    seeds: tuple[int, ...] = (0,)
    steps: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    device: torch.device = torch.device("cpu")
    _found: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def reads_text(self) -> bool:
        """Whether the network is a language model."""
        return not self.example.is_floating_point()

    @functools.cached_property
    def trace(self) -> Trace:
        """Order and data flow of the network's modules."""
        return trace(self.model, self.example.to(self.device))

    @functools.cached_property
    def eligible(self) -> tuple[str, ...]:
        """Layers that can be studied, in execution order.

        Raises:
            UnsupportedModelError: If there is none.
        """
        order = _run_once(self.model, self.example.to(self.device)) if self.reads_text else tuple(self.trace.visits)
        found = tuple(name for name in order if _readable(self.model.get_submodule(name)))
        if not found:
            raise UnsupportedModelError(
                f"the network {type(self.model).__name__} has no convolution or linear layer with at least "
                f"{_FEWEST_COMPONENTS} inputs that runs once, so there is nothing to study."
            )
        return found

    def layers(self, most: int | None = HANDFUL) -> tuple[str, ...]:
        """The layers that the user chose, or a handful spread over the depth (all of them with None).

        Raises:
            ConfigError: If a chosen name is no module, or holds no layer that can be studied; or if ``last N`` asks
                for more layers than there are.
        """
        if isinstance(self.asked, str) and self.asked.split()[:1] == ["last"]:
            number = self.asked.removeprefix("last").strip()
            if not number.isdigit() or not 1 <= int(number) <= len(self.eligible):
                raise ConfigError(f"layers='{self.asked}' must be 'last N' with N from 1 to {len(self.eligible)}.")
            return self.eligible[-int(number) :]
        if self.asked != "auto":
            names = (self.asked,) if isinstance(self.asked, str) else self.asked
            return _chosen(names, self.eligible, dict(self.model.named_modules()))
        known = self.eligible
        if self.reads_text:
            # As in the paper: what reads the MLPs' hidden neurons, which are more than the residual stream is wide.
            stream = self.model.config.hidden_size
            known = tuple(name for name in known if self.model.get_submodule(name).in_features > stream) or known
        if most is None or len(known) <= most:
            return known
        places = [round(number * (len(known) - 1) / (most - 1)) for number in range(most)]
        return tuple(known[place] for place in places)

    def consumers(
        self,
        names: Sequence[str],
        *,
        model: nn.Module | None = None,
        source: ImageSource | None = None,
        images: int | None = None,
        item: str = "",
    ) -> Generator[Progress, None, dict[str, Consumer]]:
        """The layers as the numerics see them, from one walk over the images.

        Args:
            names: Layers.
            model: A network of the same architecture; None for the trained one.
            source: Images; None for the calibration images.
            images: How many, from the first; None for all.
            item: What is at work, for progress.

        Raises:
            DataError: If there are fewer images than asked for.
        """
        model = self.model if model is None else model
        source = self.calibration if source is None else source
        wanted = len(source) if images is None else images
        if wanted > len(source):
            raise DataError(
                f"{source.protocol.get('path', 'data')}: {wanted} images are asked for, there are {len(source)}; "
                "ask for fewer in the study's settings, or raise data.num_samples."
            )
        moments = {
            name: LayerMoments(name, model.get_submodule(name), positions_per_image=None, seed=0, hold_out=False)
            for name in names
        }
        for batch, done in _first_batches(source, wanted, self.batch_size):
            with torch.no_grad(), inputs_seen(model, {name: found.update for name, found in moments.items()}):
                respond(model, batch.to(self.device))
            yield Progress("images", item, done, wanted)
        return {name: self._consumer(name, model, found) for name, found in moments.items()}

    def scores(self, consumer: Consumer) -> Tensor:
        """One score per component of a layer, summed over its outputs, ``[components]`` float64."""
        scoring = self.steps.get("scoring") or Singleton()
        if not scoring.needs_statistics:
            raise ConfigError(
                f"scoring: {type(scoring).__name__} does not look at what a layer reads, so there is nothing to study; "
                "choose scoring=singleton, saliency, energy or fluctuation."
            )
        return sum(votes.sum(0) for votes in scoring([consumer], ()).votes)

    def scores_of(
        self, names: Sequence[str], *, source: ImageSource | None = None, images: int | None = None, item: str = ""
    ) -> Generator[Progress, None, dict[str, Tensor]]:
        """`scores` of the layers from one walk. Those of the calibration images are remembered."""

        def scored() -> Generator[Progress, None, dict[str, Tensor]]:
            consumers = yield from self.consumers(names, source=source, images=images, item=item)
            return {name: self.scores(consumer).cpu() for name, consumer in consumers.items()}

        return (yield from (scored() if source is not None else self.remembered((tuple(names), images), scored)))

    def remembered(
        self, key: Hashable, make: Callable[[], Generator[Progress, None, Any]]
    ) -> Generator[Progress, None, Any]:
        """What `make` finds about the intact network, found once however many cells ask."""
        if key not in self._found:
            self._found[key] = yield from make()
        return self._found[key]

    def quality(self, model: nn.Module, *, item: str = "") -> Generator[Progress, None, float]:
        """Accuracy on the labelled images in percent; without labels, agreement with the dense network's answers.

        For a language model the share of next tokens, in percent, that it predicts as the dense network does.
        """
        if self.reads_text:
            return (yield from self._token_agreement(model, item))
        steps: list[Progress] = []
        common = {
            "evaluation_data": self.evaluation,
            "calibration_data": self.calibration,
            "example": self.example[:1],
            "device": self.device,
            "batch_size": self.batch_size,
            "progress": steps.append,
        }
        if self.evaluation is not None:
            measured = top1.measure(models={"edited": model}, **common)
        else:
            measured = agreement.measure(models={"dense": self._answers, "edited": model}, **common)
        if steps:
            yield Progress("images", item, steps[-1].done, steps[-1].total)
        return measured[0].value

    @property
    def quality_label(self) -> str:
        """What `quality` is called, with its unit."""
        if self.reads_text:
            return "next tokens predicted as by the dense network, %"
        return "top-1 accuracy, %" if self.evaluation is not None else "agreement with the dense network, % of images"

    @functools.cached_property
    def _answers(self) -> nn.Module:
        return RememberedLogits(copy.deepcopy(self.model))

    def _token_agreement(self, model: nn.Module, item: str) -> Generator[Progress, None, float]:
        source = self.evaluation or self.calibration
        remembered = self._found.setdefault("tokens", [])
        dense = None if remembered else self._answers.model
        same = total = done = 0
        for number, (tokens, _) in enumerate(
            source.batches(max(1, min(self.batch_size, 2048 // self.example.shape[1])))
        ):
            tokens = tokens.to(self.device)
            with torch.no_grad():
                if dense is not None:
                    remembered.append(respond(dense, tokens).argmax(-1).cpu())
                answers = respond(model, tokens).argmax(-1).cpu()
            same += int((answers == remembered[number]).sum())
            total += answers.numel()
            done += len(tokens)
            yield Progress("windows", item, done, len(source))
        return 100 * same / total

    def _consumer(self, name: str, model: nn.Module, moments: LayerMoments) -> Consumer:
        module = model.get_submodule(name)
        norm = None if self.reads_text else self.trace.norm_of.get(name)
        behind = norm is not None and model.get_submodule(norm).running_mean is not None
        return Consumer(
            name=name,
            weight=module.weight.detach().flatten(1).double(),
            statistics=moments.result().statistics,
            components=components_of(module),
            in_group=components_of(module),
            centred=behind or module.bias is not None,
        )


def components_of(module: nn.Module) -> int:
    """Components that a layer reads: input channels, or input features."""
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def zero_components_(module: nn.Module, components: Tensor) -> None:
    """Set everything that a layer makes of some of its components to zero.

    Args:
        module: `nn.Linear` or `nn.Conv2d` without groups; its weight is changed in place.
        components: Indices of input channels or features, int64.
    """
    with torch.no_grad():
        module.weight[:, components.to(module.weight.device)] = 0


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Within it parameters and buffers may be overwritten in place; afterwards they are as before."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(before)


def not_for(study: str, reason: str, others: Sequence[str]) -> UnsupportedModelError:
    """The error of a study that does not apply to a network, with those that do."""
    return UnsupportedModelError(f"{study}: {reason}; studies that apply: {', '.join(others)} (name=…).")


def _run_once(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Linear layers that run exactly once in a forward, in their order."""
    seen: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _, __, name=name: seen.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            respond(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(name for name in seen if seen.count(name) == 1)


def _readable(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return module.in_features >= _FEWEST_COMPONENTS
    if type(module).__name__ != "Conv2d" or not isinstance(module, nn.Conv2d):
        return False  # a subclass may change its input before the convolution
    return module.groups == 1 and module.in_channels >= _FEWEST_COMPONENTS and module.padding_mode == "zeros"


def _chosen(asked: Sequence[str], eligible: Sequence[str], modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    found: set[str] = set()
    for name in asked:
        inside = {layer for layer in eligible if layer == name or layer.startswith(name + ".")}
        if not inside and name in modules:
            raise ConfigError(
                f"layers: '{name}' holds no convolution or linear layer with at least {_FEWEST_COMPONENTS} inputs that "
                f"runs once; {nearest(name, eligible)}"
            )
        if not inside:
            raise ConfigError(f"layers: the network has no module '{name}'; {nearest(name, eligible)}")
        found |= inside
    return tuple(layer for layer in eligible if layer in found)


def _first_batches(source: ImageSource, wanted: int, batch_size: int) -> Iterator[tuple[Tensor, int]]:
    """The first images of a source batch by batch, with how many there were so far."""
    done = 0
    for images, _ in source.batches(batch_size):
        images = images[: wanted - done]
        done += len(images)
        yield images, done
        if done == wanted:
            return
