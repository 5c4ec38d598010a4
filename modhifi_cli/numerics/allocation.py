"""How many components each group keeps, so that a budget over the whole network is met.

An allocation sees sizes and a function that tells the removed share for any widths; it knows neither modules nor what
the share counts (parameters, FLOPs, components).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from modhifi_cli.errors import ConfigError

RemovedShare = Callable[[Sequence[int]], float]


class UnreachableShare(ConfigError):
    """Even the smallest widths do not remove the wanted share.

    Attributes:
        reachable: Share that they remove.
    """

    def __init__(self, message: str, reachable: float) -> None:
        super().__init__(message)
        self.reachable = reachable


@dataclass(frozen=True)
class Uniform:
    """The same share of every group, found by bisection; single groups then move by one step to come nearer.

    Attributes:
        floor: Smallest share of a group that may remain, in (0, 1].
    """

    needs_curves: ClassVar[bool] = False

    floor: float = 0.05

    def __call__(
        self,
        sizes: Sequence[int],
        present: Sequence[int],
        removed_share: RemovedShare,
        *,
        sparsity: float,
        steps: Sequence[int],
        curves: Sequence[Sequence[float]] | None = None,
        stepwise: bool = False,
    ) -> list[int]:
        """Widths of all groups.

        Args:
            sizes: Components of each group in the dense network.
            present: Components of each group now; no width exceeds it.
            removed_share: Widths → share removed of the dense network, 0 … 1, rising as widths fall.
            sparsity: Wanted share, in [0, 1).
            steps: For each group what its widths are multiples of, or the present width where that is smaller or
                unchanged.
            curves: Unused.
            stepwise: Unused.

        Returns:
            Components that each group keeps.

        Raises:
            ConfigError: If even the smallest widths do not remove the wanted share.
        """
        if sparsity <= removed_share(present):
            return list(present)
        smallest = _even(sizes, present, 0.0, steps, self.floor)
        _refuse_unreachable(removed_share(smallest), sparsity)
        low, high = 0.0, 1.0
        for _ in range(40):
            share = (low + high) / 2
            widths = _even(sizes, present, share, steps, self.floor)
            low, high = (share, high) if removed_share(widths) >= sparsity else (low, share)
        widths = _even(sizes, present, low, steps, self.floor)
        return _refine(sizes, present, widths, smallest, removed_share, sparsity, steps)


@dataclass(frozen=True)
class Global:
    """Uneven widths: the summed relative error of all groups as small as the budget allows (method.md M11).

    Starting from the present widths, again and again the group that pays the least error for what it saves gives up
    components. A group looks several steps ahead, so that a steep step before a flat stretch does not stop it; what a
    step saves is asked anew each time, since the cost of a layer is a product of two widths. In the end pairs of groups
    exchange steps, one wider and one narrower, while that lowers the error: with wide steps the last ones of the
    descent fall where they fit and not where they cost least.

    Attributes:
        floor: Smallest share of a group that may remain, in (0, 1].
        strides: In about how many moves a group would lose everything; more are finer and slower.
    """

    needs_curves: ClassVar[bool] = True

    floor: float = 0.1
    strides: int = 64

    def __call__(
        self,
        sizes: Sequence[int],
        present: Sequence[int],
        removed_share: RemovedShare,
        *,
        sparsity: float,
        steps: Sequence[int],
        curves: Sequence[Sequence[float]] | None = None,
        stepwise: bool = False,
    ) -> list[int]:
        """Widths of all groups.

        Args:
            sizes: Components of each group in the dense network.
            present: Components of each group now; no width exceeds it.
            removed_share: Widths → share removed of the dense network, 0 … 1, rising as widths fall.
            sparsity: Wanted share, in [0, 1).
            steps: For each group what its widths are multiples of, or the present width where that is smaller or
                unchanged.
            curves: For each group its relative error after the removal of 0, 1, 2, … of the present components. None,
                where there were too few samples to measure them: then every group loses the same share (`Uniform`).
            stepwise: Whether the share moves in jumps (measured time), so that what a few components save says
                nothing of what more of them save: then a group looks down its whole ladder.

        Returns:
            Components that each group keeps.

        Raises:
            ConfigError: If even the smallest widths do not remove the wanted share.
        """
        if curves is None:
            return Uniform(self.floor)(sizes, present, removed_share, sparsity=sparsity, steps=steps)
        if sparsity <= removed_share(present):
            return list(present)
        smallest = _even(sizes, present, 0.0, steps, self.floor)
        _refuse_unreachable(removed_share(smallest), sparsity)
        ladders = [
            _ladder(now, low, step, max(1, round(size / step / self.strides)))
            for size, now, low, step in zip(sizes, present, smallest, steps, strict=True)
        ]
        rungs, widths = [0] * len(sizes), list(present)
        share = removed_share(widths)
        while share < sparsity:
            cheapest = self._cheapest_jump if stepwise else self._cheapest
            move = cheapest(ladders, rungs, widths, present, curves, removed_share, share)
            if move is None:
                break
            group, rung = move
            rungs[group], widths[group] = rung, ladders[group][rung]
            share = removed_share(widths)
        widths = _refine(sizes, present, widths, smallest, removed_share, sparsity, steps)
        return widths if stepwise else _exchanged(present, widths, smallest, curves, removed_share, sparsity, steps)

    def _cheapest(
        self,
        ladders: Sequence[Sequence[int]],
        rungs: Sequence[int],
        widths: Sequence[int],
        present: Sequence[int],
        curves: Sequence[Sequence[float]],
        removed_share: RemovedShare,
        share: float,
    ) -> tuple[int, int] | None:
        """The group whose error rises least for what the network saves, and how far down its ladder it goes."""
        best: tuple[float, int, int] | None = None
        for group, ladder in enumerate(ladders):
            here = rungs[group]
            if here + 1 >= len(ladder):
                continue
            error = curves[group][present[group] - widths[group]]
            ahead = range(here + 1, min(here + 5, len(ladder)))
            slopes = [(curves[group][present[group] - ladder[r]] - error) / (widths[group] - ladder[r]) for r in ahead]
            slope, rung = min((max(slope, 0.0), r) for slope, r in zip(slopes, ahead, strict=True))
            one_down = [*widths[:group], ladder[here + 1], *widths[group + 1 :]]
            saved = (removed_share(one_down) - share) / (widths[group] - ladder[here + 1])
            if saved > 0 and (best is None or slope / saved < best[0]):
                best = (slope / saved, group, rung)
        if best is None:
            return None
        return best[1], best[2]

    def _cheapest_jump(
        self,
        ladders: Sequence[Sequence[int]],
        rungs: Sequence[int],
        widths: Sequence[int],
        present: Sequence[int],
        curves: Sequence[Sequence[float]],
        removed_share: RemovedShare,
        share: float,
    ) -> tuple[int, int] | None:
        """As `_cheapest`, with what is saved asked for every rung that a group could go down to."""
        best: tuple[float, int, int] | None = None
        for group, ladder in enumerate(ladders):
            error = curves[group][present[group] - widths[group]]
            for rung in _ahead(rungs[group], len(ladder)):
                saved = removed_share([*widths[:group], ladder[rung], *widths[group + 1 :]]) - share
                rise = max(curves[group][present[group] - ladder[rung]] - error, 0.0)
                if saved > 0 and (best is None or rise / saved < best[0]):
                    best = (rise / saved, group, rung)
        return None if best is None else (best[1], best[2])


def _ahead(rung: int, rungs: int) -> list[int]:
    """Rungs below one, dense at first and then sparser: all of a short ladder, some of a long one."""
    steps = [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    return [rung + step for step in steps if rung + step < rungs]


def _ladder(present: int, smallest: int, step: int, stride: int) -> list[int]:
    """Widths a group can be reduced to, from the present one down: multiples of `step`, about `stride` steps apart."""
    top = present // step * step
    lower = range(top if top < present else top - step * stride, smallest - 1, -step * stride)
    return list(dict.fromkeys([present, *(max(width, smallest) for width in lower), smallest]))


def _refuse_unreachable(reachable: float, sparsity: float) -> None:
    if reachable < sparsity:
        raise UnreachableShare(
            f"sparsity={sparsity:g} cannot be reached: the groups that may be pruned give at most {reachable:.3f}; "
            "lower sparsity, exclude fewer modules, lower round_to or allocation.floor.",
            reachable,
        )


def _even(
    sizes: Sequence[int], present: Sequence[int], share: float, steps: Sequence[int], floor: float
) -> list[int]:
    """Widths that keep the same share of every group, as near as the steps allow."""
    return [_width(size, now, share, step, floor) for size, now, step in zip(sizes, present, steps, strict=True)]


def _width(size: int, present: int, share: float, step: int, floor: float) -> int:
    lowest = max(1, -(-int(size * floor) // step) * step) if size * floor >= 1 else min(step, size)
    width = max(round(size * share / step) * step, lowest)
    return min(width, present)


def _refine(
    sizes: Sequence[int],
    present: Sequence[int],
    widths: list[int],
    smallest: Sequence[int],
    removed_share: RemovedShare,
    sparsity: float,
    steps: Sequence[int],
) -> list[int]:
    """Move single groups by one step while that brings the share nearer to the wanted one."""
    best = abs(removed_share(widths) - sparsity)
    order = sorted(range(len(sizes)), key=lambda g: widths[g] / sizes[g])
    for group in order:
        step = steps[group]
        for neighbour in ((widths[group] // step + 1) * step, (widths[group] - 1) // step * step):
            width = min(neighbour, present[group])
            if width < smallest[group] or width == widths[group]:
                continue
            trial = [*widths[:group], width, *widths[group + 1 :]]
            miss = abs(removed_share(trial) - sparsity)
            if miss < best - 1e-12:
                widths, best = trial, miss
                break
    return widths


_Move = tuple[int, int, float, float]  # group, its width, changes of error and of share
_OVER = 0.005  # share beyond what was wanted that an exchange may remove
_TRIED = 16  # exchanges whose removed share is asked for, the best ones first


def _exchanged(
    present: Sequence[int],
    widths: list[int],
    smallest: Sequence[int],
    curves: Sequence[Sequence[float]],
    removed_share: RemovedShare,
    sparsity: float,
    steps: Sequence[int],
) -> list[int]:
    """Exchange steps between two groups while the summed error falls and no less is removed than is wanted."""
    share = removed_share(widths)
    least, most = min(sparsity, share), max(sparsity, share) + _OVER
    while True:
        wider: list[_Move] = []
        narrower: list[_Move] = [(-1, 0, 0.0, 0.0)]  # no group at all is one, too
        for group, width in enumerate(widths):
            error = curves[group][present[group] - width]
            for number in (1, 2):
                for moves, other in (
                    (wider, min((width // steps[group] + number) * steps[group], present[group])),
                    (narrower, (-(-width // steps[group]) - number) * steps[group]),
                ):
                    if other == width or other < smallest[group]:
                        continue
                    moved = removed_share([*widths[:group], other, *widths[group + 1 :]]) - share
                    moves.append((group, other, curves[group][present[group] - other] - error, moved))
        pairs = sorted(
            (up[2] + down[2], up[0], up[1], down[0], down[1])
            for up in wider
            for down in narrower
            if up[0] != down[0] and up[2] + down[2] < -1e-9 and share + up[3] + down[3] >= least - _OVER
        )
        for _, up_group, up_width, down_group, down_width in pairs[:_TRIED]:
            trial = list(widths)
            trial[up_group] = up_width
            if down_group >= 0:
                trial[down_group] = down_width
            removed = removed_share(trial)
            if least <= removed <= most:
                widths, share = trial, removed
                break
        else:
            return widths
