"""How much a trial edit moves the logits: what makes errors of different layers comparable."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

IMPACT_IMAGES = 256  # enough for a ratio of two sums of squares; every group costs one forward over them


class Impact:
    """Compares a network under trial edits with itself.

    Args:
        model: Network in evaluation mode, as it stands.
        images: What it is compared on, ``[images, channels, height, width]``.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self._model = model
        self._images = images
        self._logits = self._run()
        spread = (self._logits - self._logits.mean(0)).square().sum()
        self._spread = float(spread.clamp(min=torch.finfo(spread.dtype).tiny))

    @contextmanager
    def edited(self) -> Iterator[None]:
        """Within it parameters and buffers may be overwritten in place; afterwards they are as before."""
        before = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        try:
            yield
        finally:
            self._model.load_state_dict(before)

    def measure(self) -> float:
        """Squared change of the logits as a share of their variance over the images, from 0."""
        return float((self._run() - self._logits).square().sum()) / self._spread

    @torch.no_grad()
    def _run(self) -> Tensor:
        return torch.cat([self._model(batch).flatten(1).double() for batch in self._images.split(64)])
