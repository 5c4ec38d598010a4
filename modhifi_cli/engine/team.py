"""Several processes that share one calibration set: each walks over its own sequences, and their sums become one.

Everything that is decided (scores, subsets, widths, repairs) follows from the sums, so that every process decides the
same and edits its own copy of the network alike; only numbers are exchanged, never weights. That they did is checked
wherever something was edited.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi_cli.errors import EndedElsewhere, NumericsError


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

    def agree(self, place: str, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Stop all processes where they do not hold the same tensors.

        Args:
            place: Where the network was edited, for the message.
            tensors: Its tensors by name.
            device: Where numbers are exchanged.

        Raises:
            NumericsError: In the first process, if they differ.
            EndedElsewhere: In the others.
        """
        if self.size == 1:
            return
        digest = hashlib.sha256()
        for name, tensor in tensors.items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        number = int.from_bytes(digest.digest()[:7], "big")
        ends = torch.tensor([number, -number], dtype=torch.int64, device=device)
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
        if ends[0] == -ends[1]:
            return
        told = (
            f"{place}: expected the same kept sets and weights in all {self.size} processes, got different ones; start "
            "all of them with the same settings, data and versions, on cards of one kind."
        )
        raise NumericsError(told) if self.rank == 0 else EndedElsewhere(told)
