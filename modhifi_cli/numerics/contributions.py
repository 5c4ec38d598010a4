"""What input contributions a_{ci} = w_{ci}ᵀ x_i say about a layer, from its moments: never from the contributions.

`contribution_moments` gives the sums that scores need, at the price of one product W S. `similarity` gives the matrices
Q_c that compensation needs, for a few outputs at a time. Both take either form of the statistics, centred where the
consumer is.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from modhifi_cli.errors import IllPosedError, NumericsError
from modhifi_cli.numerics.linalg import feature_index
from modhifi_cli.numerics.moments import reorder, second_moment
from modhifi_cli.records import Consumer

# An output with less than this share of the largest output's energy is dead: it scores 0 and casts no vote.
DEAD_SHARE = 1e-12
# Bytes of float64 that one step may hold beside the statistics.
_CHUNK_BYTES = 256 * 2**20
# Float64 values of one product of `SimilarityBlocks` that stay in the cache until they are summed.
_CACHED_VALUES = 2**17


@dataclass(frozen=True)
class ContributionMoments:
    """First look at a layer's contributions (M2), over all components of its input.

    Attributes:
        name: Layer name, for messages.
        r: E[y_c a_{ci}], ``[outputs, components]`` float64, output units².
        d: E[a_{ci}²], ``[outputs, components]`` float64, ≥ 0.
        e: E[y_c²], ``[outputs]`` float64, ≥ 0.
    """

    name: str
    r: Tensor
    d: Tensor
    e: Tensor

    @property
    def alive(self) -> Tensor:
        """Which outputs carry energy, ``[outputs]`` bool.

        Raises:
            NumericsError: If none does.
        """
        alive = self.e > DEAD_SHARE * self.e.max()
        if not alive.any():
            raise IllPosedError(
                f"{self.name}: at least one output must have energy on the calibration data, got {len(self.e)} dead "
                f"outputs; check the weights and the calibration images, or leave the layer alone with "
                f"exclude=[{self.name}]."
            )
        return alive


def contribution_moments(consumer: Consumer) -> ContributionMoments:
    """Moments of the contributions and the output (M2): r_c = Q_c 1, d_{ci} = (Q_c)_ii, e_c = 1ᵀ Q_c 1.

    From M = E[y xᵀ] = W S and the diagonal blocks of S alone.

    Args:
        consumer: The layer; all components of its input, not only the group's.

    Returns:
        Moments, centred where the consumer is. Rounding below zero is cut off.

    Raises:
        NumericsError: If a weight is not finite.
    """
    weight = finite_weight(consumer)
    blocks = weight.view(len(weight), consumer.components, -1)
    cross = output_moment(consumer, weight).view_as(blocks)
    r = (cross * blocks).sum(2)
    return ContributionMoments(consumer.name, r, contribution_energies(consumer), r.sum(1).clamp_min_(0))


def contribution_energies(consumer: Consumer) -> Tensor:
    """d_{ci} = (Q_c)_ii = E[a_{ci}²] (M2) alone: from the diagonal blocks of S, without the product W S.

    Args:
        consumer: The layer; all components of its input, not only the group's.

    Returns:
        ``[outputs, components]`` float64 ≥ 0, output units², centred where the consumer is.

    Raises:
        NumericsError: If a weight is not finite.
    """
    weight = finite_weight(consumer)
    by_component = weight.view(len(weight), consumer.components, -1).transpose(0, 1)
    energies = weight.new_empty(len(weight), consumer.components)
    for part, diagonal in _diagonal_blocks(consumer):
        energies[:, part] = (torch.bmm(by_component[part], diagonal) * by_component[part]).sum(2).T
    return energies.clamp_min_(0)


def finite_weight(consumer: Consumer) -> Tensor:
    """The consumer's weight, ``[outputs, features]`` float64.

    Raises:
        NumericsError: If a weight is not finite.
    """
    weight = consumer.weight.double()
    if not torch.isfinite(weight).all():
        raise NumericsError(
            f"{consumer.name}: every weight must be finite, got NaN or infinity; load other weights (model.weights=)."
        )
    return weight


def remembered(function: Callable[..., float]) -> Callable[..., float]:
    """A number of a consumer, and of some of its components, that is computed once as long as the consumer lives.

    Several steps of one edit ask for the same: at 1,536 features it costs as much as a factorisation. Nobody overwrites the
    tensors of a consumer.

    Args:
        function: Of a consumer and any index tensors.
    """
    known: WeakKeyDictionary[Consumer, dict[tuple, float]] = WeakKeyDictionary()

    @functools.wraps(function)
    def once(consumer: Consumer, *components: Tensor) -> float:
        numbers = known.setdefault(consumer, {})
        key = tuple(tuple(some.tolist()) for some in components)
        if key not in numbers:
            numbers[key] = function(consumer, *components)
        return numbers[key]

    return once


@remembered
def output_energy(consumer: Consumer) -> float:
    """Energy of the layer's whole output, Σ_c E[y_c²] > 0, output units², centred where the consumer is.

    Raises:
        NumericsError: If there is none (a single centred row has none), or a weight is not finite.
    """
    weight = finite_weight(consumer)
    energy = float((output_moment(consumer, weight) * weight).sum())
    if not energy > 0:
        raise IllPosedError(
            f"{consumer.name}: at least one output must have energy on the calibration data, got {len(weight)} dead "
            f"outputs; check the weights and the calibration images, or leave the layer alone with "
            f"exclude=[{consumer.name}]."
        )
    return energy


def output_moment(consumer: Consumer, weight: Tensor) -> Tensor:
    """M = E[y xᵀ] = weight · S of a layer with the consumer's input, centred where the consumer is.

    Args:
        consumer: Gives the moments and whether they are centred.
        weight: ``[outputs, features]`` float64; the consumer's own, or a change of it.

    Returns:
        ``[outputs, features]`` float64.
    """
    if consumer.centred and consumer.statistics.rows == 1:
        raise IllPosedError(
            f"{consumer.name}: one calibration row has no spread that tells components apart, so one image is too few; "
            "raise data.num_samples."
        )
    statistics = consumer.statistics
    if statistics.samples is None:
        cross = weight @ statistics.summed
        if consumer.centred:
            cross.addr_(weight @ statistics.mean, statistics.mean, alpha=-1)
        return cross
    cross = torch.zeros_like(weight)
    step = max(1, _CHUNK_BYTES // (8 * statistics.features))
    for part in statistics.samples.split(step):
        rows = part.double() - statistics.mean if consumer.centred else part.double()
        cross.addmm_((rows @ weight.T).T, rows, alpha=1 / statistics.rows)
    return cross


def similarity(consumer: Consumer, *, outputs: slice | Tensor = slice(None), kept: Tensor | None = None) -> Tensor:
    """Component similarity matrices Q_c (M1): (Q_c)_ij = w_{ci}ᵀ S_ij w_{cj} = E[a_{ci} a_{cj}].

    Args:
        consumer: The layer.
        outputs: Which outputs c; everything at once takes outputs × components² × 8 bytes.
        kept: Components to look at, ``[kept]`` int64, or None for all.

    Returns:
        ``[outputs, kept, kept]`` float64, symmetric, centred where the consumer is.
    """
    return SimilarityBlocks(consumer, kept).of(outputs)


class SimilarityBlocks:
    """Q_c restricted to some components, chunk by chunk: prepares S once, then serves any outputs.

    Attributes:
        size: Number of components looked at, n.
        per: Features per component, p.
        weight: ``[outputs, p, n]`` float64: taps before components, so that the longest axis is innermost.
        moment: S in the same order, ``[n, p, p, n]`` float64 (component, tap, tap, component), or None where the rows
            themselves serve better.

    Args:
        consumer: The layer.
        kept: Components, ``[kept]`` int64, or None for all.
    """

    def __init__(self, consumer: Consumer, kept: Tensor | None = None):
        statistics = consumer.statistics
        device = statistics.mean.device
        kept = torch.arange(consumer.components, device=device) if kept is None else kept.to(device)
        self.size = len(kept)
        self.per = statistics.features // consumer.components
        self._rows = statistics.rows
        order = feature_index(kept, self.per).view(self.size, self.per).T.flatten()
        self.weight = consumer.weight.to(statistics.mean)[:, order].view(-1, self.per, self.size)
        self.moment: Tensor | None = None
        self._samples: Tensor  # the rows, [n, rows, p]; there where `moment` is not
        chosen = reorder(statistics, order)
        if chosen.samples is not None and 8 * chosen.features**2 > 2 * _CHUNK_BYTES:
            # Fewer rows than features: going through the contributions of a few outputs is cheaper than building S.
            samples = chosen.samples.double()
            if consumer.centred:
                samples -= chosen.mean
            self._samples = samples.view(-1, self.per, self.size).permute(2, 0, 1).contiguous()
            return
        moment = second_moment(chosen, centred=consumer.centred)
        self.moment = moment.view(self.per, self.size, self.per, self.size).permute(1, 0, 2, 3).contiguous()

    @property
    def outputs_per_chunk(self) -> int:
        """How many outputs keep one chunk of Q within a quarter of a gibibyte."""
        return max(1, _CHUNK_BYTES // (8 * max(self.size, 1) ** 2))

    def of(self, outputs: slice | Tensor = slice(None)) -> Tensor:
        """Q_c of the given outputs, ``[outputs, n, n]`` float64."""
        weight = self.weight[outputs]
        if self.moment is None:
            return self._from_samples(weight)
        if self.per == 1:
            return self.moment[:, 0, 0] * weight.transpose(1, 2) * weight
        result = weight.new_empty(len(weight), self.size, self.size)
        step = max(1, _CACHED_VALUES // max(self.size * self.per, 1))
        for part in range(0, len(weight), step):
            some = weight[part : part + step]
            flat = some.flatten(1)
            for row in range(self.size):
                # Over the taps of i, then over those of j: [outputs, taps] @ [taps, taps × components].
                product = some[:, :, row] @ self.moment[row].view(self.per, -1)
                product.mul_(flat)
                torch.sum(product.view(-1, self.per, self.size), 1, out=result[part : part + step, row])
        return result

    def _from_samples(self, weight: Tensor) -> Tensor:
        result = weight.new_empty(len(weight), self.size, self.size)
        step = max(1, _CHUNK_BYTES // (8 * self._samples.shape[0] * self._samples.shape[1]))
        for part in range(0, len(weight), step):
            some = weight[part : part + step]
            parts = torch.bmm(self._samples, some.permute(2, 1, 0)).permute(2, 0, 1)  # [outputs, components, rows]
            torch.bmm(parts, parts.transpose(1, 2), out=result[part : part + step])
        return result.div_(self._rows)


def _diagonal_blocks(consumer: Consumer) -> Iterator[tuple[slice, Tensor]]:
    # S_ii of a run of components at a time: [components, features per component, features per component].
    statistics, components = consumer.statistics, consumer.components
    per = statistics.features // components
    means = statistics.mean.view(components, per)
    if statistics.samples is None:
        diagonal = statistics.summed.view(components, per, components, per).diagonal(dim1=0, dim2=2)
        diagonal = diagonal.permute(2, 0, 1)
        if consumer.centred:
            diagonal = diagonal - means[:, :, None] * means[:, None, :]
        yield slice(0, components), diagonal
        return
    step = max(1, _CHUNK_BYTES // (8 * per * (statistics.samples.shape[0] + per)))
    for start in range(0, components, step):
        part = slice(start, min(start + step, components))
        rows = statistics.samples[:, part.start * per : part.stop * per].double()
        if consumer.centred:
            rows -= statistics.mean[part.start * per : part.stop * per]
        by_component = rows.view(len(rows), -1, per).transpose(0, 1)
        yield part, torch.bmm(by_component.transpose(1, 2), by_component) / statistics.rows

