"""Calibration activations carried from cut to cut, and the walks that look at them and refresh BatchNorm on the way.

Carrying makes a run's work grow linearly with depth: what lies in front of the group at work is never computed again.
An activation is carried only while it fits the given memory, on the device or, where that is too small, on the host;
beyond that a walk starts further in front, which is slower and gives the same numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from modhifi_cli.engine.gathering import held_out_behind, held_out_images
from modhifi_cli.engine.team import Team
from modhifi_cli.graph.segments import Look, Segments
from modhifi_cli.numerics.batchnorm import BatchNormMoments, ChannelMoments
from modhifi_cli.records import ImageSource, Progress


class Activations:
    """The calibration set inside one network, standing at a cut.

    Args:
        model: Network in evaluation mode on `device`; it may be edited behind the present cut at any time.
        segments: Its cuts.
        calibration: The images.
        batch_size: Images a forward.
        device: Where forwards run and activations are kept.
        limit_bytes: Largest activation (over all images) that may be kept.
        host_bytes: Largest one that waits in the host's memory instead; 0 where the device is the host.
        team: Other processes with a share of the images; these activations are of this one's own.
    """

    def __init__(
        self,
        model: nn.Module,
        segments: Segments,
        calibration: ImageSource,
        *,
        batch_size: int,
        device: torch.device,
        limit_bytes: float,
        host_bytes: float = 0.0,
        team: Team | None = None,
    ) -> None:
        self.model = model
        self.segments = segments
        self.team = team or Team()
        self.first, behind = self.team.share(len(calibration))
        self.samples = behind - self.first
        self._source = calibration if self.team.size == 1 else _Chosen(calibration, torch.arange(self.first, behind))
        self._batch_size = batch_size
        self._device = device
        self.limit_bytes, self._host_bytes = limit_bytes, host_bytes
        self._images: list[Tensor] | None = None
        self._cut: str | None = None
        self._carried: list[Tensor] | None = None
        self._held: dict[str, list[Tensor]] = {}

    def restart(self) -> None:
        """Go back to the images, for another round over the network."""
        self._move(None, None)

    def position(self) -> tuple[str | None, list[Tensor] | None]:
        """Where the calibration set stands, for `return_to`; valid as long as nothing in front of it is edited."""
        return self._cut, self._carried

    def return_to(self, position: tuple[str | None, list[Tensor] | None]) -> None:
        """Go back to an earlier position, to try another edit of what lies behind it."""
        self._move(*position)

    def _move(self, cut: str | None, carried: list[Tensor] | None) -> None:
        self._cut, self._carried, self._held = cut, carried, {}

    def hold(self, names: Sequence[str], *, item: str = "") -> Iterator[Progress]:
        """Keep what modules behind the present cut give, so that nothing computes it again before the next one.

        Held answers are right as long as nothing in front of those modules is edited, nor they themselves. As many are
        kept as fit into the memory for one carried activation, the first ones first.

        Args:
            names: In forward order; what is held already, stands at the cut, or runs more than once is passed over.
            item: What is at work, for progress.
        """
        calls = self.segments.trace.calls
        names = [name for name in dict.fromkeys(names) if name not in (*self._here, *self._held, *calls)]
        taken = sum(self._size(outputs[0]) for outputs in self._held.values())
        fresh: dict[str, list[Tensor]] = {}
        for number, (batch, done, total) in enumerate(self._batches(self._carried)):
            given: dict[str, Tensor] = {}
            if names:
                self.segments.run(
                    batch,
                    start=self._cut,
                    outputs={name: self._keep_in(given, name) for name in names},
                    answers=self._answers(number),
                )
            if number == 0:
                sizes = accumulate((self._size(given[name]) for name in names), initial=taken)
                names = [name for name, size in zip(names, list(sizes)[1:], strict=True) if size <= self.limit_bytes]
            if not names:
                return
            for name in names:
                fresh.setdefault(name, []).append(given[name])
            yield Progress("images", item, done, total)
        self._held |= fresh

    @property
    def _here(self) -> frozenset[str]:
        """The modules whose very output is carried."""
        return frozenset() if self._cut is None else self.segments.trace.same[self._cut]

    def _keep_in(self, found: dict[str, Tensor], name: str, *, side: str = "output", last: bool = False) -> Look:
        """Keeps what passes by: as it is where nothing writes into it later, else a copy."""
        copied = not last and self.segments.overwritten(name, side=side)

        def look(tensor: Tensor) -> None:
            # A part of something larger would keep all of it.
            part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
            found[name] = tensor.clone() if copied or (part and not last) else tensor

        return look

    def _answers(self, number: int) -> dict[str, Tensor]:
        return {name: outputs[number] for name, outputs in self._held.items()}

    def only(self, numbers: Tensor) -> "Activations":
        """Some of the images, standing at the same cut; what is done with them leaves these activations alone.

        Args:
            numbers: Which images, ``[chosen]`` int64 sorted.
        """
        chosen = Activations(
            self.model,
            self.segments,
            _Chosen(self._source, numbers),
            batch_size=self._batch_size,
            device=self._device,
            limit_bytes=self.limit_bytes,
            host_bytes=self._host_bytes,
        )
        if self._carried is not None:
            batches = zip(self._carried, numbers.new_tensor(range(self.samples)).split(self._batch_size), strict=True)
            rows = (batch[torch.isin(of, numbers).to(batch.device)] for batch, of in batches)
            chosen._cut, chosen._carried = self._cut, list(_rebatched(rows, self._batch_size))
        return chosen

    def walk(
        self,
        looks: Mapping[str, Look],
        *,
        stale: Sequence[str] = (),
        item: str = "",
    ) -> Iterator[Progress]:
        """Show every look its module's inputs over all images; BatchNorms in `stale` that run before are refreshed.

        Args:
            looks: Module name → function called with the module's first input, batch after batch.
            stale: BatchNorm modules whose statistics no longer describe their input, in any order. Those that run
                before the last look are re-estimated in place, in execution order, before anything behind them is
                looked at.
            item: What is at work, for progress.
        """
        visits = self.segments.trace.visits
        end = max((visits[name].enter for name in looks), default=0)
        yield from self._go(dict(looks), self._between(stale, end), end, item, advance=None)

    def advance(self, cut: str | None, *, stale: Sequence[str] = (), item: str = "") -> Iterator[Progress]:
        """Carry the activations forward to `cut`, refreshing the stale BatchNorms in front of it on the way."""
        if cut is None or cut == self._cut:
            return
        if cut in self._held and not stale:
            self._move(cut, self._held[cut])
            return
        end = self.segments.trace.visits[cut].leave
        yield from self._go({}, self._between(stale, end), end + 1, item, advance=cut)

    def refresh(self, stale: Sequence[str], *, item: str = "") -> Iterator[Progress]:
        """Re-estimate all stale BatchNorms behind the present cut."""
        visits = self.segments.trace.visits
        if stale:
            end = max(visits[name].enter for name in stale) + 1
            yield from self._go({}, self._between(stale, end), end, item, advance=None)

    def held_out_images(self, count: int) -> Tensor:
        """Those of the first images held out of fits that are this process's own.

        Args:
            count: How many there are at most, over all processes.

        Returns:
            ``[at most count, channels, height, width]`` on the device; none of fewer than five.
        """
        found: list[Tensor] = []
        number, behind = self.first, held_out_behind(count)
        for batch in self._image_batches():
            numbers = torch.arange(number, number + len(batch))
            chosen = held_out_images(numbers) & (numbers < behind)
            found.append(batch[chosen.to(batch.device)].to(self._device))
            number += len(batch)
            if number >= behind:
                break
        return torch.cat(found)

    def outputs(self, name: str, look: Look, *, item: str = "") -> Iterator[Progress]:
        """Show a look the output of one module over all images, batch after batch."""
        for batch, done, total in self._batches(self._carried):
            output = self.segments.run(batch, start=self._cut, until=name)
            assert output is not None  # it was asked for
            look(output)
            yield Progress("images", item, done, total)

    def seen(
        self, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor], int, int]]:
        """What modules read and give, batch after batch, from where the activations stand.

        Args:
            inputs: Modules whose first input is wanted.
            outputs: Modules whose output is wanted.

        Returns:
            For every batch inputs by name, outputs by name, its number from 1, and the number of batches.
        """
        wanted = [name for name in outputs if name not in (*self._here, *self._held)]
        last = len(inputs) + len(wanted) == 1  # a run that ends with its only look goes no further: nothing is overwritten
        for number, (batch, done, total) in enumerate(self._batches(self._carried)):
            read: dict[str, Tensor] = {}
            given = self._answers(number)
            given |= dict.fromkeys(self._here, batch)
            if inputs or wanted:
                self.segments.run(
                    batch,
                    start=self._cut,
                    looks={name: self._keep_in(read, name, side="input", last=last) for name in inputs},
                    outputs={name: self._keep_in(given, name, last=last) for name in wanted},
                    # A block that answers at once would not show what is read inside it.
                    answers={
                        name: answer
                        for name, answer in self._answers(number).items()
                        if not any(one.startswith(f"{name}.") for one in inputs)
                    },
                )
            yield read, {name: given[name] for name in outputs}, done, total

    def _between(self, stale: Sequence[str], end: int) -> list[str]:
        visits = self.segments.trace.visits
        return sorted((n for n in stale if visits[n].enter < end), key=lambda n: visits[n].enter)

    def _go(
        self, looks: dict[str, Look], stale: list[str], end: int, item: str, *, advance: str | None
    ) -> Iterator[Progress]:
        visits = self.segments.trace.visits
        cut, carried = self._cut, self._carried
        here = visits[cut].leave if cut is not None else 0
        for stop, stop_clock in self._stops(here, end, [*looks, *stale], advance):
            inside = [n for n in stale if here < visits[n].enter < stop_clock]
            for name in inside:
                yield from self._refresh_one(name, cut, carried, item)
            seen = {n: look for n, look in looks.items() if here < visits[n].enter < stop_clock}
            here = stop_clock
            if stop is None and not seen:
                continue
            stored: list[Tensor] | None = [] if stop is not None else None
            for number, (batch, done, total) in enumerate(self._batches(carried)):
                answers = self._answers(number)
                output = self.segments.run(batch, start=cut, looks=seen, until=stop, answers=answers)
                if stored is not None and output is not None:
                    kept = self._kept(output)
                    stored = None if kept is None else [*stored, kept]
                    if stored is None and not seen:
                        break
                yield Progress("images", item, done, total)
            if stored is not None:
                cut, carried = stop, stored
        if advance is not None and cut != self._cut:
            self._move(cut, carried)

    def _stops(
        self, here: int, end: int, events: Sequence[str], advance: str | None
    ) -> list[tuple[str | None, int]]:
        """Cuts worth stopping at: those that something happened in front of, and the last that can still be reached."""
        visits = self.segments.trace.visits
        clocks = sorted(visits[name].enter for name in events)
        stops: list[tuple[str | None, int]] = []
        previous = here
        for cut in self.segments.trace.cuts:
            leave = visits[cut].leave
            if not here < leave < end:
                continue
            happened = any(previous < clock < leave for clock in clocks)
            if (happened or cut == advance) and self.segments.usable(cut):
                stops.append((cut, leave))
                previous = leave
        if advance is None:
            stops.append((None, end + 1))
        return stops

    def _refresh_one(
        self, name: str, cut: str | None, carried: list[Tensor] | None, item: str
    ) -> Iterator[Progress]:
        module = self.model.get_submodule(name)
        moments = BatchNormMoments(len(module.get_buffer("running_mean")), name=name)
        for number, (batch, done, total) in enumerate(self._batches(carried)):
            self.segments.run(batch, start=cut, looks={name: moments.update}, answers=self._answers(number))
            yield Progress("images", item, done, total)
        set_statistics_(module, self.team.mean(moments.result()))

    def _kept(self, output: Tensor) -> Tensor | None:
        """One batch where all of them may wait: on the device, on the host, or nowhere."""
        size = self._size(output)
        if size <= self.limit_bytes:
            return output
        if size > self._host_bytes:
            return None
        host = output.to("cpu")
        return host.pin_memory() if output.device.type == "cuda" else host

    def _size(self, output: Tensor) -> float:
        """Bytes over all images, of an output for some of them."""
        return output.numel() * output.element_size() / output.shape[0] * self.samples

    def _batches(self, carried: list[Tensor] | None) -> Iterator[tuple[Tensor, int, int]]:
        total = -(-self.samples // self._batch_size)
        batches = self._image_batches() if carried is None else iter(carried)
        for done, batch in enumerate(batches, start=1):
            yield batch.to(self._device, non_blocking=True), done, total

    def _image_batches(self) -> Iterator[Tensor]:
        if self._images is not None:
            yield from self._images
            return
        kept: list[Tensor] | None = []
        for inputs, _ in self._source.batches(self._batch_size):
            inputs = inputs.to(self._device)
            if kept is not None:
                waiting = self._kept(inputs)
                kept = None if waiting is None else [*kept, waiting]
            yield inputs
        self._images = kept


class _Chosen:
    """Some images of a source, in its order."""

    def __init__(self, source: ImageSource, numbers: Tensor) -> None:
        self.protocol = source.protocol
        self._source = source
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, None]]:
        """Full batches but for the last; labels are not handed on."""

        def rows() -> Iterator[Tensor]:
            start = 0
            for inputs, _ in self._source.batches(batch_size):
                of = torch.arange(start, start + len(inputs))
                yield inputs[torch.isin(of, self._numbers)]
                start += len(inputs)

        for batch in _rebatched(rows(), batch_size):
            yield batch, None


def _rebatched(parts: Iterator[Tensor], batch_size: int) -> Iterator[Tensor]:
    waiting: Tensor | None = None
    for part in parts:
        waiting = part if waiting is None else torch.cat([waiting, part])
        while len(waiting) >= batch_size:
            yield waiting[:batch_size]
            waiting = waiting[batch_size:]
    if waiting is not None and len(waiting):
        yield waiting


def set_statistics_(module: nn.Module, moments: ChannelMoments) -> None:
    """Give a BatchNorm new running statistics, in place.

    The variance over the rows is stored, not the one over rows − 1: evaluation then standardises the calibration set
    exactly as a training-mode forward over all of it at once would.
    """
    module.get_buffer("running_mean").copy_(moments.mean)
    module.get_buffer("running_var").copy_(moments.variance)
