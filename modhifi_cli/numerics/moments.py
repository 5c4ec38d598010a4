"""Streaming first and second moments of a layer's input rows: exact, float64, in bounded memory.

`RowMoments` takes rows, `ConvMoments` takes maps and knows the two cheap cases: a pointwise conv needs no unfold, and
a stride-1 conv shares one correlation between all pairs of taps at the same offset. Products are float32 of the
inputs' rows, their sums float64, so the split into batches does not matter beyond float32 rounding of one product.

Features whose mean lies far above their spread (sigmoids, large biases) are summed around the mean of the first batch:
otherwise the rounding of a product, 1e-7 of the squared mean, would be larger than the covariance itself.
"""

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement, product

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics.linalg import add_gram_, exact_products, mirror_upper_, quick_layout
from modhifi_cli.numerics.rows import Window, draw_positions, rows_at, unfold_columns
from modhifi_cli.records import Statistics

# Bytes of one unfolded or laid-out chunk: enough rows for a fast product, small beside the activations themselves.
_CHUNK_BYTES = 96 * 2**20
# Up to this many channels a CPU correlates maps as a convolution's weight gradient rather than by matrix products.
_THIN_CHANNELS = 128
# Features with a mean above so many spreads are summed around it; others as they are, which costs nothing.
_FAR = 4.0


class RowMoments:
    """Moments of rows that come in any number of batches.

    As long as there are no more rows than features the rows themselves are kept, so that a wide linear layer behind
    a flatten (25,088 features) never builds S.

    Args:
        features: Features of a row.
        name: Layer name, for messages.
    """

    def __init__(self, features: int, *, name: str = "layer"):
        self._features = features
        self._name = name
        self._rows = 0
        self._shift: Tensor | None = None  # [features, 1] float32, what is taken off every row; None: not known yet
        self._sum: Tensor | None = None  # of shifted rows, like the Gram; kept samples are as they came
        self._gram: Tensor | None = None
        self._samples: list[Tensor] = []

    @exact_products
    def update(self, rows: Tensor) -> None:
        """Add rows ``[rows, features]`` (any floating type and strides; they are copied where they are kept).

        Raises:
            NumericsError: If a value is not finite.
        """
        if rows.ndim != 2 or rows.shape[1] != self._features:
            raise ValueError(f"{self._name}: rows of {self._features} features expected, got {tuple(rows.shape)}.")
        self._add(rows.detach().T)

    def result(self) -> Statistics:
        """Moments of all rows so far; more may be added afterwards.

        Raises:
            NumericsError: If there was no row.
        """
        if self._sum is None or self._shift is None or not self._rows:
            raise no_rows(self._name)
        off = self._sum / self._rows
        shift = self._shift[:, 0].double()
        if self._gram is None:
            return Statistics(rows=self._rows, mean=off + shift, samples=torch.cat(self._samples))
        moment = mirror_upper_(self._gram / self._rows)
        if bool(shift.any()):
            moment += torch.outer(shift, off) + torch.outer(off + shift, shift)
            moment = (moment + moment.T) / 2
        return Statistics(rows=self._rows, mean=off + shift, second_moment=moment)

    def _add(self, columns: Tensor) -> None:
        count = columns.shape[1]
        if count == 0:
            return
        columns = columns.to(torch.float32)
        near = self._near(columns)
        sums = near.sum(1).double()
        refuse_not_finite(sums, self._name)
        self._sum = sums if self._sum is None else self._sum.add_(sums)
        self._rows += count
        if self._gram is None and self._rows <= self._features:
            # A copy: the next layer may overwrite its input in place (ReLU(inplace=True)).
            self._samples.append(columns.T.clone(memory_format=torch.contiguous_format))
            return
        add_gram_(self._started_gram(columns), near)

    def _near(self, columns: Tensor) -> Tensor:
        """Rows around the first batch's mean, where that is far off. The shift is float32, so taking it off is exact."""
        if self._shift is None:
            self._shift = far_mean(columns.T)[:, None]
        return columns - self._shift if bool(self._shift.any()) else columns

    def _started_gram(self, columns: Tensor) -> Tensor:
        if self._gram is None:
            self._gram = columns.new_zeros(self._features, self._features, dtype=torch.float64)
            for samples in self._samples:
                add_gram_(self._gram, self._near(samples.T))
            self._samples = []
        return self._gram


def far_mean(each: Tensor) -> Tensor:
    """The mean of every channel whose mean is far above its spread, and 0 for the others.

    Args:
        each: ``[rows, channels]`` or ``[batch, channels, …]`` float32, any strides.

    Returns:
        ``[channels]`` float32.
    """
    maps = each.T[None] if each.dim() == 2 else each.flatten(2)
    count = maps.shape[0] * maps.shape[2]
    mean = maps.mean(2).mean(0)
    # From the squares, where they lie: what rounding does to a difference of squares is far below this bound.
    square = torch.linalg.vector_norm(maps, dim=2).double().square().sum(0) / count
    spread = (square - mean.double().square()).clamp(min=0).sqrt()
    return torch.where((mean.abs() > _FAR * spread) & torch.isfinite(mean), mean, torch.zeros_like(mean))


class ConvMoments:
    """Moments of the im2col rows of a convolution's input, from its maps.

    Three ways, all giving the same numbers:

    - a pointwise conv takes the strided pixels as rows;
    - stride 1, dilation 1, an odd square kernel and "same" padding sum one correlation per *offset between taps*
      (13 for 3 × 3, where im2col has 81 blocks) and take the few border rows and columns off again, exactly;
    - anything else, or a subsample of positions, is unfolded in chunks.

    Args:
        channels: Input channels.
        window: The conv's geometry.
        positions_per_image: Take this many random positions of each image instead of all.
        generator: Seeded CPU generator for the positions.
        name: Layer name, for messages.
    """

    def __init__(
        self,
        channels: int,
        window: Window,
        *,
        positions_per_image: int | None = None,
        generator: torch.Generator | None = None,
        name: str = "layer",
    ):
        self._sample: tuple[int, torch.Generator] | None = None  # positions of an image, and what draws them
        if positions_per_image is not None:
            if generator is None:
                raise ValueError(f"{name}: positions_per_image needs a seeded generator.")
            self._sample = positions_per_image, generator
        self._channels = channels
        self._window = window
        self._name = name
        self._rows = RowMoments(channels * window.taps, name=name)
        self._shared = None
        if positions_per_image is None and _shares_taps(window):
            self._shared = _SharedTapMoments(channels, window.kernel_size[0], name=name)

    @exact_products
    def update(self, maps: Tensor) -> None:
        """Add the rows of input maps ``[batch, channels, height, width]``, any floating type.

        Raises:
            NumericsError: If a value is not finite.
        """
        if maps.ndim != 4 or maps.shape[1] != self._channels:
            raise ValueError(f"{self._name}: maps of {self._channels} channels expected, got {tuple(maps.shape)}.")
        maps = maps.detach().to(torch.float32)
        if self._shared is not None:
            self._shared.update(maps)
        elif self._sample is not None:
            self._update_sampled(maps, *self._sample)
        elif self._window.taps == 1 and self._window.padding == (0, 0):
            down, across = self._window.stride
            # `permute` first: the copy then moves whole lines of pixels.
            self._rows._add(maps[:, :, ::down, ::across].permute(1, 0, 2, 3).reshape(self._channels, -1))
        else:
            positions = self._positions_of(maps)
            for part in _split(maps, values_per_image=self._channels * self._window.taps * positions):
                self._rows._add(unfold_columns(part, self._window))

    def result(self) -> Statistics:
        """Moments of all rows so far, features component-major (channel × taps + tap).

        Raises:
            NumericsError: If there was no row.
        """
        return self._rows.result() if self._shared is None else self._shared.result()

    def _update_sampled(self, maps: Tensor, count: int, generator: torch.Generator) -> None:
        positions = self._positions_of(maps)
        count = min(count, positions)
        for part in _split(maps, values_per_image=2 * self._channels * self._window.taps * count):
            drawn = draw_positions(len(part), positions, count, generator=generator)
            self._rows.update(rows_at(part, drawn, self._window))

    def _positions_of(self, maps: Tensor) -> int:
        down, across = self._window.output_size(*maps.shape[2:])
        return down * across


class PatchMoments:
    """Moments of the rows of a convolution along any number of dimensions, with any padding: unfolded in chunks.

    Args:
        channels: Input channels.
        kernel_size: Taps along each dimension; likewise `stride` and `dilation`.
        pads: As of `torch.nn.functional.pad`: before and after, last dimension first.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        name: Layer name, for messages.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Sequence[int],
        *,
        stride: Sequence[int],
        dilation: Sequence[int],
        pads: Sequence[int],
        padding_mode: str = "zeros",
        name: str = "layer",
    ) -> None:
        self._channels, self._kernel = channels, tuple(kernel_size)
        self._stride, self._dilation, self._pads = tuple(stride), tuple(dilation), list(pads)
        self._mode = "constant" if padding_mode == "zeros" else padding_mode
        self._rows = RowMoments(channels * math.prod(self._kernel), name=name)

    def update(self, maps: Tensor) -> None:
        """Add the rows of input maps ``[batch, channels, …sizes]``, any floating type.

        Raises:
            NumericsError: If a value is not finite.
        """
        maps = functional.pad(maps.detach().to(torch.float32), self._pads, mode=self._mode)
        values = self._channels * math.prod(self._kernel) * math.prod(maps.shape[2:]) // math.prod(self._stride)
        for part in _split(maps, values_per_image=values):
            for dim, taps in enumerate(self._kernel):
                step = self._dilation[dim]
                part = part.unfold(dim + 2, step * (taps - 1) + 1, self._stride[dim])[..., ::step]
            # [batch, channels, …positions, …taps] → [channels, …taps, batch, …positions]
            dims = len(self._kernel)
            order = (1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims))
            self._rows._add(part.permute(order).reshape(self._rows._features, -1))

    def result(self) -> Statistics:
        """Moments of all rows so far, features component-major (channel × taps + tap).

        Raises:
            NumericsError: If there was no row.
        """
        return self._rows.result()


class _SharedTapMoments:
    """Second moment of a stride-1 "same" convolution's rows from correlations shared between taps.

    With taps t = (a, b) and t', channels i and j, and x zero outside the image,

        rows · S[(i,t),(j,t')] = Σ_q x_i(q + t) x_j(q + t'),    q over the output positions.

    Summed over *all* q this depends on the offset t' − t alone: R_d(i, j) = Σ_u x_i(u) x_j(u + d), and R_{−d} = R_dᵀ.
    The positions q that lie outside the image (above or below it, left or right of it) are then taken off: outside rows
    plus outside columns less the corners, which are in both. Only taps that reach back into the image count there.

    Where channels lie far off, x is the map less a mean m inside the image. With u = 1 inside and 0 outside (the padding
    stays zero) a row of the layer is x + m u, so

        S_raw[(i,t),(j,t')] = S[(i,t),(j,t')] + m_i E[u_t x_jt'] + m_j E[x_it u_t'] + m_i m_j E[u_t u_t'],

    where the terms with u are sums over parts of the maps' float64 total: float32 rounding times m would spoil them.
    """

    def __init__(self, channels: int, kernel: int, *, name: str):
        self._channels = channels
        self._kernel = kernel
        self._radius = kernel // 2
        self._name = name
        self._rows = 0
        self._shift: Tensor | None = None  # [channels] float32; None: not known yet, or nothing is far off
        self._totals: dict[tuple[int, int], tuple[Tensor, int]] = {}  # size → sum of shifted maps, number of images
        self._correlations: Tensor | None = None  # [down, across + kernel − 1, channels, channels]
        # Of lines outside, by the taps a that reach back in: from the first to before the last → [a, i, shift, a', j].
        self._above_below: dict[tuple[int, int], Tensor] = {}
        self._left_right: dict[tuple[int, int], Tensor] = {}
        self._corners: dict[tuple[int, int, int, int], Tensor] = {}  # (a, b, a', b') → [channels, channels]

    def update(self, maps: Tensor) -> None:
        batch, channels, height, width = maps.shape
        if batch == 0:
            return
        if self._correlations is None:
            shift = far_mean(maps)
            self._shift = shift if bool(shift.any()) else None
            shape = (self._kernel, 2 * self._kernel - 1, channels, channels)
            self._correlations = maps.new_zeros(shape, dtype=torch.float64)
        if self._shift is not None:
            maps = maps - self._shift[:, None, None]
        total = maps.sum(0).double() if self._shift is None else maps.sum(0, dtype=torch.float64)
        refuse_not_finite(total, self._name)
        before, images = self._totals.get((height, width), (None, 0))
        self._totals[height, width] = total if before is None else before.add_(total), images + batch
        self._rows += batch * height * width
        for part in _split(maps, values_per_image=channels * height * (width + self._kernel - 1)):
            self._add_correlations_(self._correlations, part)
        self._add_outside_lines(maps, self._above_below)
        self._add_outside_lines(maps.transpose(2, 3), self._left_right)
        self._add_corners(maps)

    def result(self) -> Statistics:
        if self._correlations is None:
            raise no_rows(self._name)
        kernel, channels = self._kernel, self._channels
        taps = [(a, b) for a in range(kernel) for b in range(kernel)]
        moment = self._correlations.new_empty(channels, len(taps), channels, len(taps))
        above_below, left_right = self._outside(self._above_below), self._outside(self._left_right)
        for (one, (a, b)), (two, (c, d)) in combinations_with_replacement(enumerate(taps), 2):
            # taps are ordered, so the offset (c − a, d − b) is always in the half plane that was summed.
            block = self._correlations[c - a, d - b + kernel - 1].clone()
            for part in (*above_below.get((a, c, d - b), ()), *left_right.get((b, d, c - a), ())):
                block.sub_(part)
            if (a, b, c, d) in self._corners:
                block.add_(self._corners[a, b, c, d])
            moment[:, one, :, two] = block if one != two else (block + block.T) / 2
            if one != two:
                moment[:, two, :, one] = block.T
        moment /= self._rows
        sums = torch.stack([self._tap_sums(total) for total, _ in self._totals.values()]).sum(0)
        mean = sums.flatten(1) / self._rows
        if self._shift is not None:
            mean, moment = self._moved_back(moment, self._shift.double())
        features = mean.numel()
        return Statistics(rows=self._rows, mean=mean.flatten(), second_moment=moment.reshape(features, features))

    def _moved_back(self, moment: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[channels, taps]`` and S ``[channels, taps, channels, taps]`` of the maps as they came."""
        kernel, taps = self._kernel, self._kernel**2
        across = moment.new_zeros(taps, len(shift), taps)  # E[u_t x_jt']
        both = moment.new_zeros(taps, taps)  # E[u_t u_t']
        for (height, width), (total, images) in self._totals.items():
            rows, columns = self._inside(height), self._inside(width)
            for one, two in product(range(taps), repeat=2):
                (a, b), (c, d) = divmod(one, kernel), divmod(two, kernel)
                # Output positions at which both taps lie inside, seen from the second tap.
                down = _common(rows[a], rows[c], c - self._radius)
                right = _common(columns[b], columns[d], d - self._radius)
                part = total[:, down, right]
                across[one, :, two] += part.sum((1, 2)) / self._rows
                both[one, two] += images * part.shape[1] * part.shape[2] / self._rows
        middle = taps // 2  # its u is 1 everywhere
        mean = across[middle] + shift[:, None] * both[middle]
        moved = shift[:, None, None, None] * across
        raw = moment + moved + moved.permute(2, 3, 0, 1)
        return mean, raw + torch.einsum("i,j,tu->itju", shift, shift, both)

    def _inside(self, size: int) -> list[tuple[int, int]]:
        """For every tap along one side the output positions from … to at which it lies inside the image."""
        return [(max(0, self._radius - tap), min(size, size + self._radius - tap)) for tap in range(self._kernel)]

    def _tap_sums(self, total: Tensor) -> Tensor:
        # [channels, kernel, kernel] of a [channels, height, width] summed over images.
        height, width = total.shape[1:]
        lines = torch.stack([total[:, rows].sum(1) for rows in self._reach(height)], 1)
        return torch.stack([lines[:, :, columns].sum(2) for columns in self._reach(width)], 2)

    def _reach(self, size: int) -> list[slice]:
        # The pixels that tap a sees over all output positions: q + a − radius for q in 0 … size − 1, inside the image.
        shifts = [tap - self._radius for tap in range(self._kernel)]
        return [slice(min(max(shift, 0), size), max(size + min(shift, 0), 0)) for shift in shifts]

    def _add_correlations_(self, correlations: Tensor, maps: Tensor) -> None:
        batch, channels, height, width = maps.shape
        spare = self._kernel - 1
        if maps.device.type == "cpu" and channels <= _THIN_CHANNELS:
            # The correlation is the weight gradient of a convolution of the maps with themselves: one oneDNN call
            # instead of 13 thin products. On two threads 2 times faster at 16 channels, 1.3 at 64, even at 128, slower
            # above; the gap is wider on a busy machine. Not on a GPU, whose convolutions may round to TF32.
            maps = quick_layout(maps)
            padded = functional.pad(maps, (spare, spare, 0, spare))
            shape = (channels, channels, self._kernel, 2 * self._kernel - 1)
            summed = conv2d_weight(padded, shape, maps)
            correlations.add_(summed.permute(2, 3, 0, 1))
            return
        # [channels, height, batch, width + spare]: a shift in the image is a shift of columns. The spare zeros stop it
        # from running into the next line; a shift beyond the last row runs off the end and needs no zeros at all.
        lines = maps.new_zeros(channels, height, batch, width + spare)
        lines[..., :width] = maps.permute(1, 2, 0, 3)
        lines = lines.view(channels, -1)
        length = lines.shape[1]
        for down in range(min(self._kernel, height)):
            for across in range(-spare if down else 0, self._kernel):
                shift = down * batch * (width + spare) + across
                shifted = lines[:, : length - shift] @ lines[:, shift:].T
                correlations[down, across + spare].add_(shifted)

    def _add_outside_lines(self, maps: Tensor, table: dict[tuple[int, int], Tensor]) -> None:
        # For output positions q on the lines above and below the image, whole lines including their ends: products of
        # what any tap sees with what any tap sees `shift` further on; a product of several pairs is one call.
        height, radius, kernel = maps.shape[2], self._radius, self._kernel
        for q in (*range(-radius, 0), *range(height, height + radius)):
            reach = max(0, radius - q), min(kernel, height + radius - q)
            taps = reach[1] - reach[0]
            if taps <= 0:
                continue
            lines = maps[:, :, reach[0] + q - radius : reach[1] + q - radius].permute(2, 1, 0, 3)
            # Spare zeros stop a shift from running into the next line of the batch, and behind the last one.
            left = functional.pad(lines, (0, kernel - 1)).reshape(taps * self._channels, -1)
            right = functional.pad(left, (0, kernel - 1)).unfold(1, left.shape[1], 1)
            _accumulate(table, reach, left @ right.reshape(-1, left.shape[1]).T)

    def _add_corners(self, maps: Tensor) -> None:
        radius, kernel = self._radius, self._kernel
        height, width = maps.shape[2:]
        for down in (*range(-radius, 0), *range(height, height + radius)):
            for across in (*range(-radius, 0), *range(width, width + radius)):
                reach = [
                    (a, b)
                    for a in range(kernel)
                    for b in range(kernel)
                    if 0 <= down + a - radius < height and 0 <= across + b - radius < width
                ]
                pixels = {(a, b): maps[:, :, down + a - radius, across + b - radius] for a, b in reach}
                for one, two in combinations_with_replacement(reach, 2):
                    _accumulate(self._corners, (*one, *two), pixels[one].T @ pixels[two])

    def _outside(self, table: dict[tuple[int, int], Tensor]) -> dict[tuple[int, int, int], list[Tensor]]:
        # (a, a', shift) → its products on all lines; what is stored is shift ≥ 0, and the other half is the transpose.
        found: dict[tuple[int, int, int], list[Tensor]] = {}
        for (start, stop), products in table.items():
            shape = (stop - start, self._channels, stop - start, self._channels, self._kernel)
            for one, two, shift in product(range(start, stop), range(start, stop), range(self._kernel)):
                part = products.view(shape)[one - start, :, two - start, :, shift]
                found.setdefault((one, two, shift), []).append(part)
                if shift:
                    found.setdefault((two, one, -shift), []).append(part.T)
        return found


def second_moment(statistics: Statistics, *, centred: bool) -> Tensor:
    """S, or its centred form S − μμᵀ, from whichever form the statistics hold.

    Args:
        statistics: Moments of a layer's rows.
        centred: Whether to take off μμᵀ.

    Returns:
        ``[features, features]`` float64, symmetric, input units². The stored tensor itself where nothing is to be done.
    """
    if statistics.samples is not None:
        samples = statistics.samples.double()
        if centred:
            samples = samples - statistics.mean
        return samples.T @ samples / statistics.rows
    if not centred:
        return statistics.summed
    return torch.addr(statistics.summed, statistics.mean, statistics.mean, alpha=-1)


def merge(one: Statistics, other: Statistics) -> Statistics:
    """The moments of both sets of rows together.

    Args:
        one: Moments of a layer's rows.
        other: Moments of other rows of the same layer, same features.

    Returns:
        In the form of samples where both are and there are still no more rows than features, else as S.
    """
    rows = one.rows + other.rows
    mean = (one.mean * one.rows + other.mean * other.rows) / rows
    if one.samples is not None and other.samples is not None and rows <= one.features:
        return Statistics(rows, mean, samples=torch.cat([one.samples, other.samples]))
    moment = second_moment(one, centred=False) * (one.rows / rows)
    return Statistics(rows, mean, moment.add_(second_moment(other, centred=False), alpha=other.rows / rows))


def reorder(statistics: Statistics, features: Tensor) -> Statistics:
    """The moments of chosen features, in the order given (a permutation, or a selection).

    Args:
        statistics: Moments of a layer's rows.
        features: Feature indices, ``[chosen]`` int64.

    Returns:
        Moments over the same rows, in the same form.
    """
    features = features.to(statistics.mean.device)
    if torch.equal(features, torch.arange(statistics.features, device=features.device)):
        return statistics  # most layers are in order already, and S may be large
    mean = statistics.mean.index_select(0, features)
    if statistics.samples is not None:
        return Statistics(statistics.rows, mean, samples=statistics.samples.index_select(1, features))
    moment = statistics.summed.index_select(0, features).index_select(1, features)
    return Statistics(statistics.rows, mean, second_moment=moment)


def _common(one: tuple[int, int], two: tuple[int, int], shift: int) -> slice:
    """Where two ranges overlap, moved."""
    start, stop = max(one[0], two[0]), min(one[1], two[1])
    return slice(start + shift, max(stop, start) + shift)


def _shares_taps(window: Window) -> bool:
    kernel = window.kernel_size[0]
    return (
        window.kernel_size == (kernel, kernel)
        and kernel % 2 == 1
        and kernel > 1
        and window.stride == (1, 1)
        and window.dilation == (1, 1)
        and window.padding == (kernel // 2, kernel // 2)
    )


def _split(maps: Tensor, *, values_per_image: int) -> tuple[Tensor, ...]:
    return maps.split(max(1, _CHUNK_BYTES // (4 * max(values_per_image, 1))))


def _accumulate(table: dict, key: tuple, product: Tensor) -> None:
    if key in table:
        table[key].add_(product)
    else:
        table[key] = product.double()


def refuse_not_finite(sums: Tensor, name: str) -> None:
    """Raise a NumericsError if a layer's sums, of any shape, say that one of its inputs was NaN or infinite."""
    if not torch.isfinite(sums).all():
        raise NumericsError(
            f"{name}: every input value must be finite, got NaN or infinity in this layer's activations; check the "
            f"weights and the preprocessing, or try runtime.dtype=float64."
        )


def no_rows(name: str) -> NumericsError:
    """What to say of a layer that has seen no calibration row."""
    return NumericsError(
        f"{name}: moments need at least one calibration row, got none; raise data.num_samples, or leave the layer "
        f"alone with exclude=[{name}] if the network never runs it."
    )
