"""Moments of the inputs of consumer layers, gathered while activations flow by: from modules to `Statistics`."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from modhifi_cli.numerics.cross import CrossMoments, CrossStatistics, merge_cross
from modhifi_cli.numerics.depthwise import FilterMoments, FilterStatistics
from modhifi_cli.numerics.moments import ConvMoments, RowMoments, merge
from modhifi_cli.records import Statistics

_HELD_OUT_EVERY = 5  # one image in five chooses the ridge


def held_out_images(numbers: Tensor) -> Tensor:
    """Which images are held out of a fit, by their number in the calibration set: ``[images]`` bool."""
    return numbers % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1


@dataclass(frozen=True)
class Gathering:
    """How statistics are gathered.

    Attributes:
        positions_per_image: Output positions drawn per image and convolution (rows of the statistics), or None for
            all of them. Fewer are cheaper and no longer exact.
        carry_gigabytes: Largest activation, over all images, that is carried from cut to cut instead of recomputed,
            in 10⁹ bytes; ``"auto"`` takes a sixth of the memory that is free now.
    """

    positions_per_image: int | None = None
    carry_gigabytes: float | str = "auto"


@dataclass(frozen=True)
class Gathered:
    """Moments of one layer's input rows.

    Attributes:
        statistics: Over all images.
        held_out: Over every fifth image alone, or None where nobody asked for it or there are fewer than five.
        fitted: Over the others, or None in the same cases.
    """

    statistics: Statistics
    held_out: Statistics | None
    fitted: Statistics | None = None


class LayerMoments:
    """Accumulates the moments of one conv or linear layer's input rows.

    Args:
        name: Module name, for messages.
        module: `nn.Conv2d` without groups, `nn.Linear`, or a `nn.Conv1d` of one tap or a
            `nn.ConvTranspose2d`, which are linear layers along another dimension.
        positions_per_image: As in `Gathering`.
        seed: For the drawn positions.
        hold_out: Whether every fifth image is also kept apart.
    """

    def __init__(
        self, name: str, module: nn.Module, *, positions_per_image: int | None, seed: int, hold_out: bool
    ) -> None:
        def accumulator() -> ConvMoments | RowMoments:
            if isinstance(module, nn.Linear):
                return RowMoments(module.in_features, name=name)
            if isinstance(module, nn.Conv1d | nn.ConvTranspose2d):
                return RowMoments(module.in_channels, name=name)
            return ConvMoments(
                module.in_channels,
                kernel_size=module.kernel_size,
                stride=module.stride,
                padding=module.padding,
                dilation=module.dilation,
                name=name,
                padding_mode=module.padding_mode if max(module.kernel_size) > 1 else "zeros",
                positions_per_image=positions_per_image,
                generator=torch.Generator().manual_seed(seed),
            )

        by_pixel = isinstance(module, nn.Conv1d | nn.ConvTranspose2d)
        self._linear = isinstance(module, nn.Linear) or by_pixel
        self._channels = 1 if by_pixel else -1  # dimension of the features of a row
        self._fitted = accumulator()
        self._held_out = accumulator() if hold_out else None
        self._images = 0
        self._held_images = 0

    def update(self, inputs: Tensor) -> None:
        """Add one batch: maps ``[batch, channels, height, width]``, or features ``[batch, …, features]``.

        Raises:
            NumericsError: If a value is not finite.
        """
        if self._held_out is None:
            self._add(self._fitted, inputs)
            return
        # By the number of the image, so that the split into batches does not matter.
        numbers = torch.arange(self._images, self._images + len(inputs), device=inputs.device)
        held = held_out_images(numbers)
        self._images += len(inputs)
        self._held_images += int(held.sum())
        self._add(self._fitted, inputs[~held])
        if bool(held.any()):
            self._add(self._held_out, inputs[held])

    def result(self) -> Gathered:
        """Moments of everything so far.

        Raises:
            NumericsError: If there was no row.
        """
        fitted = self._fitted.result()
        if self._held_out is None or not self._held_images:
            return Gathered(fitted, None)
        held_out = self._held_out.result()
        return Gathered(merge(fitted, held_out), held_out, fitted)

    def _add(self, moments: ConvMoments | RowMoments, inputs: Tensor) -> None:
        moments.update(inputs.movedim(self._channels, -1).flatten(0, -2) if self._linear else inputs)


_Moments = TypeVar("_Moments", CrossMoments, FilterMoments)


class _HeldOutApart(Generic[_Moments]):
    """Two accumulators of inputs with wanted outputs: of the images that are fitted, and of those held out."""

    def __init__(self, fitted: _Moments, held_out: _Moments) -> None:
        self._fitted, self._held_out = fitted, held_out
        self._images = 0

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        """Add one batch of inputs and of wanted outputs at the same rows.

        Raises:
            NumericsError: If a value that is looked at is not finite.
        """
        held = held_out_images(torch.arange(self._images, self._images + len(inputs), device=inputs.device))
        self._images += len(inputs)
        for moments, use in ((self._fitted, ~held), (self._held_out, held)):
            if bool(use.any()):
                moments.update(inputs[use], targets[use])


class TargetMoments(_HeldOutApart[CrossMoments]):
    """Accumulates the cross moments of one layer's input rows with wanted outputs, held-out images apart.

    Args:
        name: Module name, for messages.
        module: `nn.Conv2d` without groups, or `nn.Linear`.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(CrossMoments(module, name=name), CrossMoments(module, name=name))

    def result(self) -> tuple[CrossStatistics, CrossStatistics | None]:
        """Over all images, and over the held-out ones alone (None where there are fewer than five).

        Raises:
            NumericsError: If there was no image.
        """
        fitted = self._fitted.result()
        if self._images < _HELD_OUT_EVERY:
            return fitted, None
        held_out = self._held_out.result()
        return merge_cross(fitted, held_out), held_out


class DepthwiseMoments(_HeldOutApart[FilterMoments]):
    """Accumulates what a depthwise convolution's filters are fitted to, held-out images apart.

    Args:
        name: Module name, for messages.
        module: Depthwise `nn.Conv2d`.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(FilterMoments(module, name=name), FilterMoments(module, name=name))

    def result(self) -> tuple[FilterStatistics, FilterStatistics | None, FilterStatistics]:
        """Over all images, over the held-out ones alone (None where there are fewer than five), and over the others.

        Raises:
            NumericsError: If there was no image.
        """
        fitted = self._fitted.result()
        if self._images < _HELD_OUT_EVERY:
            return fitted, None, fitted
        held_out = self._held_out.result()
        return fitted.merged(held_out), held_out, fitted
