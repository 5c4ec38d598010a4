"""Several processes that share one calibration set: each walks over its own samples, and their sums become one.

Everything that is decided (scores, subsets, widths, repairs) follows from the sums, so that every process decides the
same and edits its own copy of the network alike; only numbers are exchanged, never weights. That they did is checked
wherever something was edited.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from modhifi_cli.errors import ConfigError, EndedElsewhere, NumericsError
from modhifi_cli.numerics.batchnorm import ChannelMoments
from modhifi_cli.numerics.moments import second_moment
from modhifi_cli.records import Statistics


class Counted(Protocol):
    """Means over some rows."""

    @property
    def rows(self) -> int:
        """How many."""


Means = TypeVar("Means", bound=Counted)


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
        """First sample of this process and the one behind its last, of `count` in all."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def refuse_idle(self, count: int, what: str, key: str) -> None:
        """Refuse more processes than there are samples.

        Args:
            count: Calibration samples in all.
            what: Their name, for the message.
            key: The setting that says how many.

        Raises:
            ConfigError: If a process would have none.
        """
        if self.size > max(count, 1):
            raise ConfigError(
                f"{self.size} processes share {count} calibration {what}; start fewer of them, or raise {key}."
            )

    def add_up_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes, bit by bit the same in each."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)

    def total(self, count: int, device: torch.device | str) -> int:
        """A number of something, over all processes."""
        if self.size == 1:
            return count
        summed = torch.tensor([count], dtype=torch.int64, device=device)
        self.add_up_(summed)
        return int(summed)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes in the order of the samples, the same in each.

        Args:
            rows: This process's own, ``[own rows, …]``; their number may differ, and be 0.
        """
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        self.add_up_(counts)
        first = int(counts[: self.rank].sum())
        every = rows.new_zeros(int(counts.sum()), *rows.shape[1:])
        every[first : first + len(rows)] = rows
        self.add_up_(every)
        return every

    def mean(self, own: Means, *, nothing: bool = False) -> Means:
        """Moments over the rows of all processes.

        Args:
            own: Means over this process's rows: a dataclass of ``rows`` and tensors that are means of as many rows.
            nothing: This process has had no row, and `own` says of what shape the others' are.
        """
        return own if self.size == 1 else self._mean(own, 0 if nothing else own.rows)

    def _mean(self, own: Any, rows: int) -> Any:
        """As `mean`, of any such dataclass: what it holds is found by the names of its fields."""
        if isinstance(own, Statistics):
            return self._statistics(own, rows)
        if isinstance(own, ChannelMoments):
            square = own.variance + own.mean.square()
            summed = self._summed({"mean": own.mean, "square": square}, rows)
            return ChannelMoments(
                summed["rows"], summed["mean"], (summed["square"] - summed["mean"].square()).clamp_min(0)
            )
        held = {field.name: getattr(own, field.name) for field in fields(own) if field.name != "rows"}
        return replace(own, **self._summed(held, rows))

    def _statistics(self, own: Statistics, rows: int) -> Statistics:
        every = self.total(rows, own.mean.device)
        whole = self.total(int(own.samples is None), own.mean.device)
        # Samples, too, where there are fewer rows than features.
        if own.samples is not None and not whole and every <= own.features:
            found = self._summed({"mean": own.mean}, rows)
            return Statistics(rows=found["rows"], mean=found["mean"], samples=self.gather(own.samples[:rows]))
        square = second_moment(own, centred=False)
        return Statistics(**self._summed({"mean": own.mean, "second_moment": square}, rows))

    def _summed(self, means: Mapping[str, Tensor], rows: int) -> dict[str, Any]:
        every, found = self.total(rows, next(iter(means.values())).device), {}
        for name, tensor in means.items():
            found[name] = tensor * rows
            self.add_up_(found[name])
            found[name] /= max(every, 1)
        return {"rows": every, **found}

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
