"""How much a trial edit moves the logits: what makes errors of different layers comparable."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from modhifi_cli.engine.team import Team
from modhifi_cli.graph.components import ComponentGroup
from modhifi_cli.graph.segments import Segments

TRIAL_DEPTHS = (0.2, 0.5, 0.8)  # shares of a group whose removal is tried
_BATCH = 64  # images a forward
_FEWEST = 16  # images of a trial


def images_for(samples: int, parts: int) -> int:
    """How many of the calibration images a trial runs on: every group costs half a forward over them for each depth.

    All trials together take no longer than one forward over all images, as long as that leaves each of them 16 images.
    """
    wanted = min(max(samples // 16, 32), 256)
    return min(wanted, max(2 * samples // (len(TRIAL_DEPTHS) * max(parts, 1)), _FEWEST))


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


@contextmanager
def restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it the own parameters and buffers of some modules may be overwritten in place."""
    before = [(tensor, tensor.detach().clone()) for module in modules for tensor in _own(module)]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


class Impact:
    """Compares a network under trial edits with itself.

    Args:
        segments: The network in evaluation mode, as it stands, and its cuts.
        images: What it is compared on, ``[images, channels, height, width]``; with several processes this one's own.
        limit_bytes: Largest activation, over all images, that may be kept so that a trial need not run what lies in
            front of its edit.
        team: Other processes with images of their own.
    """

    def __init__(
        self, segments: Segments, images: Tensor, *, limit_bytes: float = 0.0, team: Team | None = None
    ) -> None:
        self._segments = segments
        self._team = team or Team()
        self._batches = images.split(_BATCH)
        self._limit = limit_bytes
        self._cut: str | None = None
        self._carried: Sequence[Tensor] = self._batches
        self._logits = self._run()
        every = self._team.gather(self._logits)
        spread = (every - every.mean(0)).square().sum()
        self._spread = float(spread.clamp(min=torch.finfo(spread.dtype).tiny))

    @torch.no_grad()
    def stand_before(self, part: ComponentGroup) -> None:
        """Carry the images to the last cut in front of whoever reads the part, as long as nothing is edited.

        Args:
            part: Next trials overwrite what reads it.
        """
        visits = self._segments.trace.visits
        end = min(visits[slot.module].enter for slot in part.readers if slot.module in visits)
        if self._cut is not None and visits[self._cut].leave >= end:
            self._cut, self._carried = None, self._batches
        here = -1 if self._cut is None else visits[self._cut].leave
        while (cut := self._segments.last_before(end, behind=here)) is not None:
            if (carried := self._carry(cut)) is not None:
                self._cut, self._carried = cut, carried
                return
            end = visits[cut].leave  # too large to be kept: a cut further in front may fit

    def _carry(self, cut: str) -> list[Tensor] | None:
        carried: list[Tensor] = []
        count = sum(map(len, self._batches))
        for batch in self._carried:
            output = self._segments.run(batch, start=self._cut, until=cut)
            if output is None or output.numel() * output.element_size() / len(output) * count > self._limit:
                return None
            carried.append(output)
        return carried

    def edited(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Within it parameters and buffers of these modules may be overwritten in place; afterwards they are as before."""
        return restored(modules)

    def measure(self) -> float:
        """Squared change of the logits as a share of their variance over the images, from 0."""
        moved = (self._run() - self._logits).square().sum()
        self._team.add_up_(moved)
        return float(moved) / self._spread

    @torch.no_grad()
    def _run(self) -> Tensor:
        whole = (self._segments.whole(batch, start=self._cut) for batch in self._carried)
        return torch.cat([logits.flatten(1).double() for logits in whole])
