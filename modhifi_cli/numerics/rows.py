"""The only unfold: how the input of a conv or linear layer becomes rows x of the method, component-major.

A row is one im2col patch (feature = channel × taps + tap, as in ``weight.flatten(1)``) or one vector of a linear
layer's input. Rows at chosen positions can be read without unfolding the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from modhifi_cli.errors import UnsupportedModelError

# One number for both directions, or (vertical, horizontal).
Extent = int | Sequence[int]


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution as (vertical, horizontal) pairs.

    Attributes:
        kernel_size: Taps each way.
        stride: Input pixels between neighbouring outputs.
        padding: Zeros on each side.
        dilation: Input pixels between neighbouring taps.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @classmethod
    def of(
        cls, kernel_size: Extent, stride: Extent = 1, padding: Extent | str = 0, dilation: Extent = 1
    ) -> "Window":
        """Take PyTorch's spellings: an int or a pair, and ``"same"`` or ``"valid"`` for the padding.

        Raises:
            UnsupportedModelError: For ``"same"`` with an even extent, which pads one side more than the other.
        """
        taps, stride, dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        if padding == "valid":
            return cls(taps, stride, (0, 0), dilation)
        if not isinstance(padding, str):
            return cls(taps, stride, _pair(padding), dilation)
        down, across = (step * (count - 1) for count, step in zip(taps, dilation, strict=True))
        if down % 2 or across % 2:
            raise UnsupportedModelError(
                f"A convolution with padding='same' needs an odd extent, got kernel_size={taps} and "
                f"dilation={dilation}: leave the layer alone with exclude=[its name]."
            )
        return cls(taps, stride, (down // 2, across // 2), dilation)

    @classmethod
    def of_layer(cls, layer: nn.Conv2d) -> "Window":
        """The geometry of a convolution; errors as of `of`."""
        return cls.of(layer.kernel_size, layer.stride, layer.padding, layer.dilation)

    @property
    def taps(self) -> int:
        """Features per channel."""
        return self.kernel_size[0] * self.kernel_size[1]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the layer's output for an input of this size."""
        sizes = zip((height, width), self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        down, across = [
            (size + 2 * pad - step * (taps - 1) - 1) // stride + 1 for size, taps, stride, pad, step in sizes
        ]
        return down, across


def padded_apart(layer: nn.Conv2d, inputs: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A convolution's input and what zeros are still to be put around it, in numbers.

    ``"same"`` and ``"valid"`` are written out, since functions that work beside a convolution take numbers only.
    """
    if isinstance(layer.padding, str):
        return functional.pad(inputs, layer._reversed_padding_repeated_twice), (0, 0)
    return inputs, layer.padding


def unfold_rows(inputs: Tensor, window: Window | None = None) -> Tensor:
    """Every row of a layer's input.

    Args:
        inputs: Maps ``[batch, channels, height, width]`` of a conv, or ``[..., features]`` of a linear layer.
        window: The conv's geometry; None for a linear layer.

    Returns:
        ``[rows, channels × taps]`` or ``[rows, features]``, in the inputs' type; rows ordered image, then position
        (row by row). A view with swapped strides for a conv.
    """
    return inputs.reshape(-1, inputs.shape[-1]) if window is None else unfold_columns(inputs, window).T


def rows_of(layer: nn.Module, inputs: Tensor) -> Tensor:
    """As `unfold_rows`, with the geometry of the layer that reads the inputs."""
    return unfold_rows(inputs, Window.of_layer(layer) if isinstance(layer, nn.Conv2d) else None)


def unfold_columns(maps: Tensor, window: Window) -> Tensor:
    """The rows of `unfold_rows` as columns, the layout in which a convolution unfolds with one copy.

    Args:
        maps: ``[batch, channels, height, width]``.
        window: The conv's geometry.

    Returns:
        ``[channels × taps, rows]``.
    """
    batch, channels, height, width = maps.shape
    down, across = window.output_size(height, width)
    padded = _padded(maps, window)
    image, channel, line, pixel = padded.stride()
    patches = padded.as_strided(
        (channels, *window.kernel_size, batch, down, across),
        (
            channel,
            window.dilation[0] * line,
            window.dilation[1] * pixel,
            image,
            window.stride[0] * line,
            window.stride[1] * pixel,
        ),
    )
    return patches.reshape(channels * window.taps, batch * down * across)


def draw_positions(batch: int, positions: int, count: int, *, generator: torch.Generator) -> Tensor:
    """Random positions of each image without replacement, drawn image by image so that the batch split is irrelevant.

    Args:
        batch: Number of images.
        positions: Positions an image has (height × width of the layer's output).
        count: How many to draw; all of them where an image has fewer.
        generator: Seeded, on the CPU.

    Returns:
        ``[batch, min(count, positions)]`` int64, sorted within an image, on the CPU.
    """
    count = min(count, positions)
    drawn = [torch.randperm(positions, generator=generator)[:count].sort().values for _ in range(batch)]
    return torch.stack(drawn) if drawn else torch.empty(0, count, dtype=torch.int64)


def rows_at(maps: Tensor, positions: Tensor, window: Window) -> Tensor:
    """Rows of a conv's input at given positions only.

    Args:
        maps: ``[batch, channels, height, width]``.
        positions: Output positions of each image, row by row, ``[batch, count]`` int64.
        window: The conv's geometry.

    Returns:
        ``[batch × count, channels × taps]``: the same values as those rows of `unfold_rows`.
    """
    batch, channels, height, width = maps.shape
    across = window.output_size(height, width)[1]
    padded = _padded(maps, window)
    line = padded.shape[-1]
    positions = positions.to(maps.device)
    corners = (positions // across) * window.stride[0] * line + (positions % across) * window.stride[1]
    down_taps = torch.arange(window.kernel_size[0], device=maps.device) * window.dilation[0] * line
    across_taps = torch.arange(window.kernel_size[1], device=maps.device) * window.dilation[1]
    pixels = corners[:, :, None] + (down_taps[:, None] + across_taps).flatten()
    count = positions.shape[1]
    picked = padded.flatten(2).gather(2, pixels.flatten(1)[:, None].expand(-1, channels, -1))
    return picked.view(batch, channels, count, window.taps).transpose(1, 2).reshape(batch * count, -1)


def _padded(maps: Tensor, window: Window) -> Tensor:
    vertical, horizontal = window.padding
    if vertical or horizontal:
        return functional.pad(maps, (horizontal, horizontal, vertical, vertical)).contiguous()
    return maps.contiguous()


def _pair(value: Extent) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
