"""The roles that steps of the method and pieces around it play, as Protocols: what a new one has to offer.

A role is played by any object of this shape; nobody asks for a class or for an attribute that may be missing. What a
caller has to know beforehand is an attribute of the class.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from torch import Tensor

from modhifi_cli.records import Consumer, ImageSource, Results

if TYPE_CHECKING:
    from torch import Generator

__all__ = ["Allocation", "Compensation", "ImageSource", "Schedule", "Scores", "Scoring", "Selection", "Solution"]


class Scores(Protocol):
    """Votes on the components of one group.

    Attributes:
        votes: For every consumer ``[voters, components]`` float64, larger is more worth keeping.
        dead_outputs: Outputs without energy, which cast no vote.
    """

    @property
    def votes(self) -> tuple[Tensor, ...]: ...

    @property
    def dead_outputs(self) -> int: ...


class Solution(Protocol):
    """A compensated weight.

    Attributes:
        weight: ``[outputs, kept features]`` float64.
        ridge: λ of a joint solve, or None.
    """

    @property
    def weight(self) -> Tensor: ...

    @property
    def ridge(self) -> float | None: ...


class Scoring(Protocol):
    """Scores of a group's components. Named in configs/scoring.

    Attributes:
        needs_statistics: Whether it looks at the moments of what the consumers read.
        needs_labels: Whether it looks at the classes of the samples; it is then given ``places``, too.
    """

    @property
    def needs_statistics(self) -> bool: ...

    @property
    def needs_labels(self) -> bool: ...

    def __call__(
        self, consumers: Sequence[Consumer], producers: Sequence[Tensor], *, generator: "Generator", **places: Any
    ) -> Scores:
        """Votes of every consumer, from the consumers and the producers' weights by component."""


class ClassScoring(Scoring, Protocol):
    """A scoring that looks at the classes of the samples."""

    def summary(self, maps: Tensor) -> Tensor:
        """What it keeps of a component's maps, ``[images, components]`` float64."""


def looks_at_classes(scoring: Scoring) -> TypeGuard[ClassScoring]:
    """Whether a scoring is one of classes, as it says itself."""
    return scoring.needs_labels


class Selection(Protocol):
    """From votes or moments to the kept components of a group. Named in configs/selection.

    Attributes:
        needs_statistics: Whether it looks at the moments of what the consumers read.
    """

    @property
    def needs_statistics(self) -> bool: ...

    def __call__(self, scores: Scores, consumers: Sequence[Consumer], *, keep: int) -> Tensor:
        """Kept components, ``[keep]`` int64 sorted."""

    def ranked(self, scores: Scores, consumers: Sequence[Consumer]) -> list[int]:
        """All components, those first that are kept longest."""


class Compensation(Protocol):
    """What the kept components' weights become. Named in configs/compensation.

    Attributes:
        needs_statistics: Whether it looks at the moments of what the consumer reads.
        wants_held_out: Whether some samples shall be kept apart.
        reference: ``"current"`` or ``"dense"``: whether layers are solved again towards the dense network at the end;
            ``"auto"``: those that can be.
    """

    @property
    def needs_statistics(self) -> bool: ...

    @property
    def wants_held_out(self) -> bool: ...

    @property
    def reference(self) -> str: ...

    def solve(self, consumer: Consumer, kept: Tensor) -> Solution:
        """The weight on the features of the kept components of the consumer's whole input."""


class DenseCompensation(Compensation, Protocol):
    """A compensation by which layers are solved again towards the dense network.

    Attributes:
        ridge: λ, or ``"auto"``: the best of the grid on held-out samples.
        grid: Ridges to try.
    """

    @property
    def ridge(self) -> float | str: ...

    @property
    def grid(self) -> Sequence[float]: ...

    def fit(self, every: Any, held_out: Any = None, *, centred: bool) -> tuple[Tensor, float, float | None]:
        """The change of a weight that a `Regression` asks for, its ridge, and by how much it errs less on held-out rows.

        The last is below 0 for better, and None where nothing was held out.
        """


def solves_towards_dense(compensation: Compensation) -> TypeGuard[DenseCompensation]:
    """Whether layers are solved again towards the dense network at the end, as the compensation says itself."""
    return compensation.reference in ("dense", "auto")


class Allocation(Protocol):
    """How many components each group keeps. Named in configs/allocation.

    Attributes:
        needs_curves: Whether it looks at error curves.
    """

    @property
    def needs_curves(self) -> bool: ...

    def __call__(
        self,
        sizes: Sequence[int],
        present: Sequence[int],
        removed_share: Callable[[Sequence[int]], float],
        *,
        sparsity: float,
        steps: Sequence[int],
        curves: Sequence[Sequence[float]] | None = None,
        stepwise: bool = False,
    ) -> list[int]:
        """Widths of all groups."""


class Schedule(Protocol):
    """Wanted share → share after each pass. Named in configs/schedule."""

    def __call__(self, sparsity: float) -> Sequence[float]:
        """Shares that rise to the wanted one."""


class Source(ImageSource, Protocol):
    """Samples of a network, from files, from a hub or made up. Named in configs/data."""

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches of inputs with labels or None, always in the same order."""


class Tracker(Protocol):
    """Shows the metrics of many runs side by side. Named in configs/tracker; what it needs is asked for when it is made."""

    def write(self, run: Path, results: Results, words: Mapping[str, str]) -> Path:
        """Take in a finished run, its results and the settings of its command; where that was written."""


class Measure(Protocol):
    """A measurement of networks. Named in configs/evaluation."""

    def __call__(self, *, models: Mapping[str, Any], **given: Any) -> tuple[Any, ...]:
        """Measurements of every network, with their protocols."""
