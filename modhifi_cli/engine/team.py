"""Several processes that share one calibration set: each walks over its own sequences, and their sums become one.

Everything that is decided (scores, subsets, widths, repairs) follows from the sums, so that every process decides the
same and edits its own copy of the network alike; only numbers are exchanged, never weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """This process's place among those that `torchrun` started; alone by default.

    Attributes:
        rank: Number of this process.
        size: How many there are. With more than one `torch.distributed` must be initialised.
    """

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> tuple[int, int]:
        """First sequence of this process and the one behind its last, of `count` in all."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def add_up_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes, bit by bit the same in each."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
