"""Modules of ours that stand in a network because no ordinary module can hold what pruning leaves behind."""

import torch
from torch import Tensor, nn


class ChannelPadShortcut(nn.Module):
    """Parameter-free shortcut between two stages: subsample in space, then route channels by a saved index map.

    This is option A of He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385, section 3.3),
    written as a map so that it survives pruning of either stage: output channel o is input channel ``source[o]``, or
    zero where ``source[o]`` is −1. It consumes the stream of one stage and produces that of the next, so the two are
    separate groups of coupled channels.

    Args:
        source: Map, ``[out_channels]`` int64, values in −1 … in_channels − 1.
        in_channels: Channels of the input.
        stride: Every how manieth pixel is kept in height and width.
    """

    source: Tensor

    def __init__(self, source: Tensor, in_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = source.numel()
        self.stride = stride
        self.register_buffer("source", source.to(torch.int64))

    @classmethod
    def centred(cls, in_channels: int, out_channels: int, stride: int) -> "ChannelPadShortcut":
        """The dense map: as many zero channels before the input's channels as behind them."""
        source = torch.full((out_channels,), -1)
        before = (out_channels - in_channels) // 2
        source[before : before + in_channels] = torch.arange(in_channels)
        return cls(source, in_channels, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[batch, in_channels, height, width]`` → ``[batch, out_channels, ⌈height/stride⌉, ⌈width/stride⌉]``."""
        routed = inputs[:, :, :: self.stride, :: self.stride].index_select(1, self.source.clamp(min=0))
        # where, not a product: a NaN in the routed channel must not reach a channel that is defined as zero.
        nothing = torch.zeros((), dtype=inputs.dtype, device=inputs.device)
        return torch.where((self.source >= 0)[None, :, None, None], routed, nothing)

    def slice_(self, *, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
        """Keep only the given output and input channels (sorted int64); outputs of removed inputs become zero."""
        source = self.source if outputs is None else self.source[outputs]
        if inputs is not None:
            position = torch.full((self.in_channels + 1,), -1, dtype=torch.int64, device=source.device)
            position[inputs] = torch.arange(inputs.numel(), device=source.device)
            source = position[source]  # a source of −1 reads the extra last entry, which stays −1
            self.in_channels = inputs.numel()
        self.source = source
        self.out_channels = source.numel()

    def extra_repr(self) -> str:
        """Sizes for ``print(model)``."""
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"
