"""How many components each group keeps, so that a budget over the whole network is met.

An allocation sees sizes and a function that tells the removed share for any widths; it knows neither modules nor what
the share counts (parameters, FLOPs, components).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modhifi_cli.errors import ConfigError

RemovedShare = Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class Uniform:
    """The same share of every group, found by bisection; single groups then move by one step to come nearer.

    Attributes:
        floor: Smallest share of a group that may remain, in (0, 1].
    """

    floor: float = 0.05

    def __call__(
        self, sizes: Sequence[int], present: Sequence[int], removed_share: RemovedShare, *, sparsity: float, step: int
    ) -> list[int]:
        """Widths of all groups.

        Args:
            sizes: Components of each group in the dense network.
            present: Components of each group now; no width exceeds it.
            removed_share: Widths → share removed of the dense network, 0 … 1, rising as widths fall.
            sparsity: Wanted share, in [0, 1).
            step: Widths are multiples of it, or the present width where that is smaller or unchanged.

        Returns:
            Components that each group keeps.

        Raises:
            ConfigError: If even the smallest widths do not remove the wanted share.
        """
        if sparsity <= removed_share(present):
            return list(present)
        smallest = [self._width(size, now, 0.0, step) for size, now in zip(sizes, present, strict=True)]
        reachable = removed_share(smallest)
        if reachable < sparsity:
            raise ConfigError(
                f"sparsity={sparsity:g} cannot be reached: the groups that may be pruned give at most {reachable:.3f}; "
                "lower sparsity, exclude fewer modules, lower round_to or allocation.floor."
            )
        low, high = 0.0, 1.0
        for _ in range(40):
            share = (low + high) / 2
            widths = [self._width(size, now, share, step) for size, now in zip(sizes, present, strict=True)]
            low, high = (share, high) if removed_share(widths) >= sparsity else (low, share)
        widths = [self._width(size, now, low, step) for size, now in zip(sizes, present, strict=True)]
        return self._refine(sizes, present, widths, smallest, removed_share, sparsity, step)

    def _width(self, size: int, present: int, share: float, step: int) -> int:
        lowest = max(1, -(-int(size * self.floor) // step) * step) if size * self.floor >= 1 else min(step, size)
        width = max(round(size * share / step) * step, lowest)
        return min(width, present)

    def _refine(
        self,
        sizes: Sequence[int],
        present: Sequence[int],
        widths: list[int],
        smallest: Sequence[int],
        removed_share: RemovedShare,
        sparsity: float,
        step: int,
    ) -> list[int]:
        """Widen single groups by one step while that brings the share nearer to the wanted one."""
        best = abs(removed_share(widths) - sparsity)
        order = sorted(range(len(sizes)), key=lambda g: widths[g] / sizes[g])
        for group in order:
            for change in (step, -step):
                width = min(widths[group] + change, present[group])
                if width < smallest[group] or width == widths[group]:
                    continue
                trial = [*widths[:group], width, *widths[group + 1 :]]
                miss = abs(removed_share(trial) - sparsity)
                if miss < best - 1e-12:
                    widths, best = trial, miss
                    break
        return widths
