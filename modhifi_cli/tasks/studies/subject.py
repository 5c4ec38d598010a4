"""What every study looks at: one network, its images, and some of its layers.

A layer is a convolution or linear layer as a consumer: its components are the channels (or features) that it reads.
Statistics are gathered with one walk over the images; the network is left as found.
"""

import copy
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError, nearest
from modhifi_cli.evaluation import agreement, top1
from modhifi_cli.evaluation.forward import RememberedLogits
from modhifi_cli.graph.segments import inputs_seen
from modhifi_cli.graph.trace import Trace, trace
from modhifi_cli.numerics.scoring import Singleton
from modhifi_cli.records import Consumer, ImageSource, Progress
from modhifi_cli.tasks.gathering import LayerMoments

HANDFUL = 6  # layers that a study looks at where nobody chose
_FEWEST_COMPONENTS = 8  # of a layer: about fewer, shares of components say nothing


@dataclass(frozen=True)
class Subject:
    """A network and its images.

    Attributes:
        model: The trained network in evaluation mode, on `device`.
        calibration: Unlabelled images.
        evaluation: Held-out images, labelled, or None.
        example: Two inputs, ``[2, channels, height, width]``.
        untrained: Makes the same network with fresh weights.
        draw: (name of a data source, seed) → its images in the order of that draw; "" is the calibration data.
        sources: Names of further data sources.
        asked: ``"auto"``, ``"last N"``, or the layers that the user chose (or modules that hold some).
        seeds: For everything that is drawn.
        steps: The pruning steps by name: scoring, selection, compensation, allocation, statistics; and `target`.
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
        found = tuple(name for name in self.trace.visits if _readable(self.model.get_submodule(name)))
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
        if most is None or len(self.eligible) <= most:
            return self.eligible
        places = [round(number * (len(self.eligible) - 1) / (most - 1)) for number in range(most)]
        return tuple(self.eligible[place] for place in places)

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
                model(batch.to(self.device))
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

    def quality(self, model: nn.Module, *, item: str = "") -> Generator[Progress, None, float]:
        """Accuracy on the labelled images in percent; without labels, agreement with the dense network's answers."""
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
        return "top-1 accuracy, %" if self.evaluation is not None else "agreement with the dense network, % of images"

    @functools.cached_property
    def _answers(self) -> nn.Module:
        return RememberedLogits(copy.deepcopy(self.model))

    def _consumer(self, name: str, model: nn.Module, moments: LayerMoments) -> Consumer:
        module = model.get_submodule(name)
        norm = self.trace.norm_of.get(name)
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


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Within it parameters and buffers may be overwritten in place; afterwards they are as before."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(before)


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
