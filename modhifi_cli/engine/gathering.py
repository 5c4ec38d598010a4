"""Moments of the inputs of consumer layers, gathered while activations flow by: from modules to `Statistics`.

Every accumulator keeps one sample in five apart, by its number in the whole calibration set, so that neither the split
into batches nor that into processes matters. Ridges are chosen, and trial cuts are tried, on what was held out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from modhifi_cli.engine.team import Counted, Team
from modhifi_cli.graph.components import input_size, reads_features
from modhifi_cli.numerics.cross import CrossMoments, CrossStatistics, merge_cross
from modhifi_cli.numerics.depthwise import FilterMoments, FilterStatistics
from modhifi_cli.numerics.moments import ConvMoments, PatchMoments, RowMoments, merge
from modhifi_cli.numerics.rows import Window
from modhifi_cli.records import Statistics

_HELD_OUT_EVERY = 5  # one image in five chooses the ridge


def held_out_images(numbers: Tensor) -> Tensor:
    """Which samples are held out of a fit, by their number in the calibration set: ``[samples]`` bool."""
    return numbers % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1


def held_out_behind(count: int) -> int:
    """The first number behind the first `count` samples that are held out."""
    return _HELD_OUT_EVERY * count


@dataclass(frozen=True)
class Gathering:
    """How statistics are gathered.

    Attributes:
        positions_per_image: Output positions drawn per image and convolution (rows of the statistics), or None for
            all of them. Fewer are cheaper and no longer exact.
        carry_gigabytes: Largest activation, over all images, that is carried from cut to cut instead of recomputed,
            in 10⁹ bytes, shared by all networks that carry some; ``"auto"`` takes a sixth of the memory that is free
            where the activations lie when the run begins.
        offload: Whether activations wait in the host's memory instead of the card's: always, never, or ``"auto"`` where
            they do not fit the card. Where there is no card it says nothing.
    """

    positions_per_image: int | None = None
    carry_gigabytes: float | str = "auto"
    offload: bool | str = "auto"


@dataclass(frozen=True)
class Gathered:
    """Moments of one layer's input rows.

    Attributes:
        statistics: Over all samples.
        held_out: Over every fifth sample alone, or None where nobody asked for it or there are fewer than five.
        fitted: Over the others, or None in the same cases.
    """

    statistics: Statistics
    held_out: Statistics | None
    fitted: Statistics | None = None

    def to(self, device: torch.device) -> "Gathered":
        """The same on another device."""
        held_out, fitted = (None if one is None else one.to(device) for one in (self.held_out, self.fitted))
        return Gathered(self.statistics.to(device), held_out, fitted)

    def without_held_out(self) -> "Gathered":
        """The same, its statistics over the samples that are not held out, where some are."""
        return self if self.fitted is None else replace(self, statistics=self.fitted)


Result = TypeVar("Result", bound=Counted, covariant=True)


class Sums(Protocol[Result]):
    """An accumulator of batches."""

    @property
    def update(self) -> Callable[..., None]:
        """Add one batch, whatever tensors make one up."""

    def result(self) -> Result:
        """Moments of everything so far."""


class HeldOutApart(Generic[Result]):
    """Two accumulators of one kind: of the samples that are fitted, and of those held out.

    Args:
        make: Makes an accumulator with ``update`` and ``result``.
        hold_out: Whether any sample is held out.
        first: Number of the first sample that this process sees.
        team: The processes that share the calibration set.
        device: Where the sums of a team are added up.
        place: Where the sums are, if not where the samples come from: samples go there.
    """

    def __init__(
        self,
        make: Callable[[], Sums[Result]],
        *,
        hold_out: bool = True,
        first: int = 0,
        team: Team | None = None,
        device: torch.device | str = "cpu",
        place: torch.device | None = None,
    ) -> None:
        self._fitted, self._held_out = make(), make() if hold_out else None
        self._place = place
        self._next, self._any_held, self._any_fitted = first, False, False
        self._team, self._device = team or Team(), torch.device(device)

    def update(self, *batch: Tensor, again: bool = False) -> None:
        """Add one batch, every tensor with the samples along its first dimension.

        Args:
            batch: The tensors.
            again: Whether these are further rows of the samples that came last.

        Raises:
            NumericsError: If a value that is looked at is not finite.
        """
        if self._place is not None:
            batch = tuple(tensor.to(self._place) for tensor in batch)
        if self._held_out is None:
            self._fitted.update(*batch)
            self._any_fitted |= len(batch[0]) > 0
            return
        self._next -= len(batch[0]) if again else 0
        held = held_out_images(torch.arange(self._next, self._next + len(batch[0])))
        self._next += len(batch[0])
        self._any_held |= bool(held.any())
        self._any_fitted |= not bool(held.all())
        for sums, chosen in ((self._fitted, ~held), (self._held_out, held)):
            if bool(chosen.any()):
                rows = chosen.nonzero().flatten().to(batch[0].device)  # whole samples: several times as quick as a mask
                sums.update(*(tensor.index_select(0, rows) for tensor in batch))

    def results(self) -> tuple[Result, Result | None]:
        """Of the fitted samples, and of the held-out ones (None where there are none), over all processes.

        Raises:
            NumericsError: If there was no sample.
        """
        held_out = self._held_out.result() if self._held_out is not None and self._any_held else None
        if self._team.size == 1:
            return self._fitted.result(), held_out
        # A process may have had held-out samples alone, or none of them: the others' moments are of the same shape.
        fitted = self._fitted.result() if self._any_fitted or held_out is None else held_out
        every = self._team.mean(fitted, nothing=not self._any_fitted)
        if self._held_out is None or not self._team.total(int(self._any_held), self._device):
            return every, None
        return every, self._team.mean(fitted if held_out is None else held_out, nothing=held_out is None)


class LayerMoments:
    """Accumulates the moments of one conv or linear layer's input rows.

    Args:
        name: Module name, for messages.
        module: A convolution without groups, a linear layer, or a `nn.Conv1d` of one tap or a `nn.ConvTranspose2d`, which
            are linear layers along another dimension.
        positions_per_image: As in `Gathering`.
        seed: For the drawn positions.
        hold_out: Whether every fifth sample is also kept apart.
        shared: ``first``, ``team``, ``device`` and ``place`` of `HeldOutApart`.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        positions_per_image: int | None,
        seed: int,
        hold_out: bool,
        **shared: Any,
    ) -> None:
        one_tap = isinstance(module, nn.Conv1d) and module.kernel_size == module.stride == (1,)
        by_pixel = isinstance(module, nn.ConvTranspose2d) or one_tap and module.padding in ((0,), "valid")

        def accumulator() -> Sums[Statistics]:
            if self._linear:
                return _FlatRows(input_size(module), name=name)
            if isinstance(module, nn.Conv2d) and (module.padding_mode == "zeros" or max(module.kernel_size) == 1):
                return ConvMoments(
                    module.in_channels,
                    Window.of_layer(module),
                    name=name,
                    positions_per_image=positions_per_image,
                    generator=torch.Generator().manual_seed(seed),
                )
            assert isinstance(module, nn.modules.conv._ConvNd), "what is no linear layer is a convolution"
            return PatchMoments(
                module.in_channels,
                module.kernel_size,
                stride=module.stride,
                dilation=module.dilation,
                pads=module._reversed_padding_repeated_twice,
                padding_mode=module.padding_mode,
                name=name,
            )

        self._linear = reads_features(module) or by_pixel
        self._channels = -1 if reads_features(module) else 1
        self._sums = HeldOutApart(accumulator, hold_out=hold_out, **shared)

    def update(self, inputs: Tensor | Sequence[Tensor]) -> None:
        """Add one batch: maps ``[batch, channels, height, width]``, or features ``[batch, …, features]``.

        Args:
            inputs: Of the layer; several of the same samples where it runs several times.

        Raises:
            NumericsError: If a value is not finite.
        """
        runs = [inputs] if isinstance(inputs, Tensor) else inputs
        for number, run in enumerate(runs):
            again = number > 0 and len(run) == len(runs[number - 1])
            self._sums.update(run.movedim(self._channels, -1) if self._linear else run, again=again)

    def result(self) -> Gathered:
        """Moments of everything so far.

        Raises:
            NumericsError: If there was no row.
        """
        fitted, held_out = self._sums.results()
        return Gathered(fitted, None) if held_out is None else Gathered(merge(fitted, held_out), held_out, fitted)


class TargetMoments:
    """Accumulates the cross moments of one layer's input rows with wanted outputs, held-out samples apart.

    Args:
        name: Module name, for messages.
        module: `nn.Conv2d` without groups, or a linear layer.
        shared: ``first``, ``team``, ``device`` and ``place`` of `HeldOutApart`.
    """

    def __init__(self, name: str, module: nn.Module, **shared: Any) -> None:
        self._sums = HeldOutApart(lambda: CrossMoments(module, name=name), **shared)
        self.update = self._sums.update

    def result(self) -> tuple[CrossStatistics, CrossStatistics | None]:
        """Over all samples, and over the held-out ones alone (None where there are fewer than five).

        Raises:
            NumericsError: If there was no sample.
        """
        fitted, held_out = self._sums.results()
        return (fitted, None) if held_out is None else (merge_cross(fitted, held_out), held_out)


class DepthwiseMoments:
    """Accumulates what a depthwise convolution's filters are fitted to, held-out images apart.

    Args:
        name: Module name, for messages.
        module: The convolution, kept under that name.
        shared: ``first``, ``team``, ``device`` and ``place`` of `HeldOutApart`.
    """

    def __init__(self, name: str, module: nn.Conv2d, **shared: Any) -> None:
        self.module = module
        self._sums = HeldOutApart(lambda: FilterMoments(module, name=name), **shared)
        self.update = self._sums.update

    def result(self) -> tuple[FilterStatistics, FilterStatistics | None, FilterStatistics]:
        """Over all images, over the held-out ones alone (None where there are fewer than five), and over the others.

        Raises:
            NumericsError: If there was no image.
        """
        fitted, held_out = self._sums.results()
        return (fitted, None, fitted) if held_out is None else (fitted.merged(held_out), held_out, fitted)


class _FlatRows(RowMoments):
    """Moments of the features along the last dimension, whatever lies in front of it."""

    def update(self, rows: Tensor) -> None:
        super().update(rows.flatten(0, -2))
