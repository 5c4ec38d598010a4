"""The only unfold: how the input of a conv or linear layer becomes rows x of the method, component-major.

A row is one im2col patch (feature = channel × taps + tap, as in ``weight.flatten(1)``) or one vector of a linear
layer's input. Rows at chosen positions can be read without unfolding the rest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from modhifi_cli.errors import UnsupportedModelError


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
    def of(cls, kernel_size, stride=1, padding=0, dilation=1) -> "Window":
        """Take PyTorch's spellings: an int or a pair, and ``"same"`` or ``"valid"`` for the padding.

        Raises:
            UnsupportedModelError: For ``"same"`` with an even extent, which pads one side more than the other.
        """
        kernel_size, stride, dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        if padding == "valid":
            padding = (0, 0)
        elif padding == "same":
            extents = [step * (taps - 1) for taps, step in zip(kernel_size, dilation, strict=True)]
            if any(extent % 2 for extent in extents):
                raise UnsupportedModelError(
                    f"A convolution with padding='same' needs an odd extent, got kernel_size={kernel_size} and "
                    f"dilation={dilation}: leave the layer alone with exclude=[its name]."
                )
            padding = (extents[0] // 2, extents[1] // 2)
        return cls(kernel_size, stride, _pair(padding), dilation)

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


def unfold_rows(inputs: Tensor, *, kernel_size=None, stride=1, padding=0, dilation=1) -> Tensor:
    """Every row of a layer's input.

    Args:
        inputs: Maps ``[batch, channels, height, width]`` of a conv, or ``[..., features]`` of a linear layer.
        kernel_size: Of the conv, int or pair; None for a linear layer, whose other settings are then ignored.
        stride: Of the conv, int or pair.
        padding: Of the conv, int, pair, ``"same"`` or ``"valid"``; zeros.
        dilation: Of the conv, int or pair.

    Returns:
        ``[rows, channels × taps]`` or ``[rows, features]``, in the inputs' type; rows ordered image, then position
        (row by row). A view with swapped strides for a conv.
    """
    if kernel_size is None:
        return inputs.reshape(-1, inputs.shape[-1])
    return unfold_columns(inputs, Window.of(kernel_size, stride, padding, dilation)).T


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


def rows_at(maps: Tensor, positions: Tensor, *, kernel_size, stride=1, padding=0, dilation=1) -> Tensor:
    """Rows of a conv's input at given positions only.

    Args:
        maps: ``[batch, channels, height, width]``.
        positions: Output positions of each image, row by row, ``[batch, count]`` int64.
        kernel_size: Of the conv, int or pair; likewise `stride`, `padding` and `dilation` as in `unfold_rows`.

    Returns:
        ``[batch × count, channels × taps]``: the same values as those rows of `unfold_rows`.
    """
    window = Window.of(kernel_size, stride, padding, dilation)
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


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
