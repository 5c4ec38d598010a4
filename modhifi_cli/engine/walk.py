"""What pruning asks of a network that it walks over: where to stop, what to look at there, how to cut, what follows.

The method is one; networks differ in how they are walked. `image_walk.py` goes from cut to cut of a data flow that a
trace has found, `token_walk.py` from layer to layer of a decoder. Everything else in this room is written once, for any
walk.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modhifi_cli.engine.gathering import DepthwiseMoments, Gathered, LayerMoments, TargetMoments
from modhifi_cli.engine.prices import Params, Price, as_price
from modhifi_cli.graph.components import ComponentGroup, Layout, Refusal, Slot
from modhifi_cli.numerics.scoring import Place
from modhifi_cli.records import Consumer, EditState, Note, Progress
from modhifi_cli.roles import Allocation, Compensation, Schedule, Scoring, Selection


@dataclass(frozen=True)
class Recipe:
    """The steps of the method, from `modhifi_cli.numerics`.

    Attributes:
        scoring: Scores of a part's components.
        selection: From scores to the kept components.
        compensation: Repair of whoever reads them.
        allocation: Widths of all parts for a wanted share.
        schedule: Wanted share → share after each pass.
        classifier: ``"keep"`` the last layer as the cuts leave it, or ``"refit"`` it in closed form to the dense
            network's logits; ``"auto"`` refits where the logits come out of a linear layer.
        seed: For everything that is drawn.
    """

    scoring: Scoring
    selection: Selection
    compensation: Compensation
    allocation: Allocation
    schedule: Schedule
    classifier: str = "keep"
    seed: int = 0

    @property
    def needs_statistics(self) -> bool:
        """Whether any step looks at what the layers read."""
        return any(step.needs_statistics for step in (self.scoring, self.selection, self.compensation))


@dataclass(frozen=True)
class Budget:
    """What is asked for.

    Attributes:
        sparsity: Share to be removed, in [0, 1).
        target: What the share counts, from `modhifi_cli.engine.prices`, or the name of what is counted.
        round_to: Widths are multiples of it; ``"auto"``: of what suits each part where it runs (`rounding`).
        block: Channels that the runtime which will serve the network computes together.
    """

    sparsity: float
    target: Price | str = Params()
    round_to: int | str = 1
    block: int = 1

    @property
    def price(self) -> Price:
        """What the share counts.

        Raises:
            ConfigError: If nothing counted has the name that was given.
        """
        return as_price(self.target)


@dataclass(frozen=True)
class Stop:
    """A place where a walk stands still: a group of an image network, a layer of a decoder.

    Attributes:
        name: For progress.
        parts: What may be cut there, in forward order.
    """

    name: str
    parts: tuple[ComponentGroup, ...]


@dataclass(frozen=True)
class Cut:
    """What was cut: what of every module was kept, by module name, in the coordinates before.

    Attributes:
        outputs: Kept outputs.
        inputs: Kept inputs.
        attributes: Attributes that changed with the widths.
    """

    outputs: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    attributes: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Repair:
    """The new weight of one consumer.

    Attributes:
        weight: ``[outputs, kept features]`` float64, component-major.
        constant: What the repaired layer lacks of the output's mean, ``[outputs]``; None to leave it.
        fidelity: Of this weight; None where nothing was measured.
        subset_fidelity: Of the best weight on the same components.
        ridge: Of a joint solve.
    """

    weight: Tensor
    constant: Tensor | None = None
    fidelity: float | None = None
    subset_fidelity: float | None = None
    ridge: float | None = None


class Trial(Protocol):
    """Held-out samples in the network as it stands, on which cuts are tried."""

    def stand_before(self, part: ComponentGroup) -> None:
        """Go to where the next trials begin; nothing in front of it may be edited by them."""

    def edited(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Within it parameters and buffers of these modules may be overwritten in place."""

    def measure(self) -> float:
        """How much the answers have changed, from 0; changes of different parts add up."""


@dataclass(frozen=True)
class Surveyed:
    """One part as a survey finds it.

    Attributes:
        part: The part.
        gathered: Moments of its consumers' inputs, by module; without the samples of the trial where there are enough.
        trial: Where its cuts can be tried.
        lasting: Whether its cut is made from the same look, so that what is found of it now need not be found again.
    """

    part: ComponentGroup
    gathered: Mapping[str, Gathered]
    trial: Trial
    lasting: bool = False


@dataclass(frozen=True)
class Pair:
    """One batch of a layer beside the dense network.

    Attributes:
        inputs: What the layer reads.
        targets: What it should give.
        done: Batches so far.
        total: Batches.
    """

    inputs: Tensor
    targets: Tensor
    done: int
    total: int


Looking = Generator[Progress, None, dict[str, Gathered]]


class Walk(Protocol):
    """A network on its calibration data.

    Attributes:
        model: The network; it is edited in place.
        layout: Which components live, and where.
        parts: What may be cut, in forward order.
        stops: The same by where the walk stands still.
        refused: What is left alone, and why.
        samples: Number of calibration samples.
        what: What is counted in progress: ``"groups"`` or ``"layers"``.
        trial_ridge: Ridge of trial repairs.
        restores_always: Whether consumers get their constant back whatever the compensation.
    """

    model: nn.Module
    layout: Layout
    parts: tuple[ComponentGroup, ...]
    stops: tuple[Stop, ...]
    refused: tuple[Refusal, ...]
    samples: int
    what: str
    trial_ridge: float
    restores_always: bool

    def prepare(self, recipe: Recipe, passes: int) -> Iterator[Progress | Note]:
        """Get ready for a recipe: labels, the dense network beside this one, a word on memory."""

    def prices(self, recipe: Recipe, budget: Budget) -> Any:
        """What widths cost (`Widths`)."""

    def begin(self) -> Iterator[Progress]:
        """Go back to the samples, for a pass."""

    def at(self, stop: Stop) -> AbstractContextManager[None]:
        """Within it the stop's parts may be looked at and cut."""

    def leave(self, stop: Stop) -> Iterator[Progress]:
        """Go on behind a stop as it is now; called within `at`."""

    def gather(self, part: ComponentGroup, slots: Sequence[Slot], *, hold_out: bool, also: Mapping[str, Any]) -> Looking:
        """Moments of what the given consumers of a part read, by module; `also` are looks that ride along."""

    def survey(self) -> Iterator[Progress | Surveyed]:
        """Every part of the network as it stands, from one walk."""

    def consumers(self, part: ComponentGroup) -> tuple[Slot, ...]:
        """The part's consumers that have weights, each once."""

    def centred(self, name: str) -> bool:
        """Whether the constant part of a layer's output can be restored."""

    def class_looks(self, part: ComponentGroup, scoring: Scoring) -> dict[str, Any]:
        """What a score of classes looks at, by module; nothing for any other score."""

    def places(self, looks: Mapping[str, Any]) -> tuple[Place, ...]:
        """What those looks have seen, with the samples' classes."""

    def draw(self, part: ComponentGroup) -> int:
        """A number for what is drawn at a part."""

    def cut_(self, part: ComponentGroup, kept: Tensor) -> Cut:
        """Cut a part to the kept ones of its living components."""

    def turned_(self, part: ComponentGroup, turn: Tensor) -> None:
        """Take note that a product's features are others than the dense network's: `ModuleEdit.turn`."""

    def settle_(self, slot: Slot, consumer: Consumer, kept: Tensor, repair: Repair, *, alone: bool) -> list[str]:
        """Put right what follows a consumer that has its repaired weight; names of what has new tensors."""

    def edited_(self, sources: Sequence[str], changed: Sequence[str]) -> None:
        """Take note that layers were edited, and which modules behind them are right already."""

    def take_refreshed_(self) -> list[str]:
        """Modules that the walk itself has put right since it was last asked."""

    def facts(self, part: ComponentGroup) -> dict[str, Any]:
        """What else the report says of a part."""

    @property
    def state(self) -> EditState:
        """What resuming needs."""

    def resume_(self, state: EditState) -> None:
        """Take up the state behind an edit that was applied, not computed."""

    def finish_(self) -> Generator[Progress, None, list[str]]:
        """Put right what still is stale; names of what has new tensors."""

    def notes(self) -> Iterator[Note]:
        """Sentences for the end of a run."""

    def repairs(self, part: ComponentGroup) -> bool:
        """Whether a part's readers are fitted anew after a cut."""

    def norm_behind(self, name: str) -> str | None:
        """The BatchNorm with running statistics that reads exactly this layer's output, or None."""

    # Towards the dense network (M9)

    def solvable(self, stop: Stop, cut: Sequence[ComponentGroup]) -> list[str]:
        """Layers that are to be solved again now, behind the parts that were cut, in forward order."""

    def pairs(self, name: str) -> Iterator[Progress | Pair]:
        """A layer's inputs beside what it should give, batch after batch, standing in front of it."""

    def sums(self, name: str, *, hold_out: bool = True, exact: bool = False) -> LayerMoments:
        """An accumulator of a layer's inputs."""

    def aims(self, name: str) -> TargetMoments | DepthwiseMoments:
        """An accumulator of a layer's inputs against its targets; of a depthwise one filter by filter."""

    def residual(self, name: str) -> str | None:
        """What stands for the residual stream that a layer's output goes into; None where it goes into none."""

    def worth(self, name: str) -> Tensor | None:
        """What a unit of each of a layer's outputs is worth in the stream that they go into, ``[outputs]``; None for 1."""

    def settle_dense_(self, name: str, mean: Callable[[], Tensor], moments: Callable[[], Any]) -> list[str]:
        """Put right what follows a layer that was solved again.

        Args:
            name: The layer, with its new weight.
            mean: What the targets' mean lacks with the bias left out, ``[outputs]``.
            moments: Mean and variance of its output, for a BatchNorm that is re-estimated.
        """


def drawn(recipe: Recipe, walk: Walk, part: ComponentGroup, iteration: int) -> torch.Generator:
    """The generator of what is drawn at a part in a pass."""
    return torch.Generator().manual_seed(recipe.seed + 1_000_003 * iteration + 7_919 * walk.draw(part))
