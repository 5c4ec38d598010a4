"""How much a trial edit moves the logits: what makes errors of different layers comparable."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TRIAL_DEPTHS = (0.2, 0.5, 0.8)  # shares of a group whose removal is tried


def images_for(samples: int) -> int:
    """How many of the calibration images a trial runs on: every group costs one forward over them for each depth."""
    return min(max(samples // 16, 32), 256)


def scaled_curve(errors: Sequence[float], moved: Mapping[int, float]) -> list[float]:
    """A group's error curve on the scale of the logits.

    Between the measured depths the scale is interpolated in its logarithm, outside it is that of the nearest. One depth
    alone misleads: near the start of a curve errors are so small that their ratio says nothing about its end.

    Args:
        errors: The group's own relative error after 0, 1, 2, … removals, from 0, rising.
        moved: Removals → measured relative change of the logits; may be empty.

    Returns:
        As many values as `errors`, from 0, never falling.
    """
    depths = sorted(depth for depth in moved if errors[depth] > 0 and moved[depth] > 0)
    if not depths:
        return list(errors)
    scales = [math.log(moved[depth] / errors[depth]) for depth in depths]
    curve, highest = [], 0.0
    for removed, error in enumerate(errors):
        place = bisect_left(depths, removed)
        if place in (0, len(depths)):
            scale = scales[min(place, len(depths) - 1)]
        else:
            before, after = depths[place - 1], depths[place]
            share = (removed - before) / (after - before)
            scale = (1 - share) * scales[place - 1] + share * scales[place]
        highest = max(highest, error * math.exp(scale))
        curve.append(highest)
    return curve


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
