"""Fidelity of very many subsets of a layer's components at once, without touching data again.

One Cholesky factor of Q_c in a given order holds the fidelity of *every* leading part of that order: with
P Q_c Pᵀ = L Lᵀ and z = L⁻¹ P r_c the first k components rebuild Σ_{j ≤ k} z_j² of the output's energy. So a thousand
random orders are a thousand random subsets of each size, at the price of a thousand factors.
"""

import torch
from torch import Tensor

from modhifi_cli.numerics.contributions import output_moment
from modhifi_cli.numerics.linalg import feature_index
from modhifi_cli.numerics.moments import second_moment
from modhifi_cli.records import Consumer

# On matrices scaled to a unit diagonal: far above the rounding of a factor of a thousand rows, far below what is read.
_JITTER = 1e-11
_CHUNK_BYTES = 256 * 2**20
_DEAD = 1e-12  # a component with less than this share of the largest energy rebuilds nothing


def random_orders(components: int, count: int, *, generator: torch.Generator) -> Tensor:
    """Random orders of all components, ``[count, components]`` int64; each size's leading parts are uniform subsets."""
    return torch.rand(count, components, generator=generator, dtype=torch.float64).argsort(1)


def leading_fidelity(gram: Tensor, orders: Tensor) -> Tensor:
    """Subset fidelity (M3) of all leading parts of orders, each component rescaled optimally for each output.

    ModHiFi, arXiv:2511.19566:  FS_c(C) = r_Cᵀ Q_CC⁺ r_C / e_c.

    Args:
        gram: Similarity matrices Q_c, ``[outputs, components, components]`` float64, output units².
        orders: Orders of all components, the same for every output ``[orders, components]`` int64, or each output its
            own ``[outputs, orders, components]``.

    Returns:
        ``[outputs, orders, components]`` float64 in [0, 1], never falling along the last axis: entry k − 1 is the
        fidelity of the first k components. Agrees with `fidelity.subset_fidelity` to about 1e-8 (a ridge of 1e-11 on
        the correlations stands in for the pseudo-inverse). An output without energy scores 0.
    """
    outputs, size, _ = gram.shape
    orders = orders.to(gram.device)
    result = gram.new_empty(outputs, orders.shape[-2], size)
    step = max(1, _CHUNK_BYTES // (8 * 3 * size * size))
    for output in range(outputs):
        energy = gram[output].sum()
        if not energy > 0:
            result[output] = 0
            continue
        matrix, scale = _unit_diagonal(gram[output])
        target = gram[output].sum(1) * scale
        own = orders[output] if orders.ndim == 3 else orders
        for start in range(0, len(own), step):
            part = own[start : start + step]
            permuted = matrix[part[:, :, None], part[:, None, :]]
            half = torch.linalg.solve_triangular(_factor(permuted), target[part][..., None], upper=False)[..., 0]
            result[output, start : start + step] = half.square().cumsum(1) / energy
    return result.clamp_(0, 1)


def leading_joint_fidelity(consumer: Consumer, orders: Tensor) -> tuple[Tensor, Tensor]:
    """Joint fidelity of all leading parts of orders: the kept weights are free, one factor serves all outputs.

    With one feature per component and no weight of zero this *is* the subset fidelity (M3) of every output.

    Args:
        consumer: The layer.
        orders: Orders of all components of its input, ``[orders, components]`` int64.

    Returns:
        Rebuilt energy ``[outputs, orders, components]`` float64, output units², never falling along the last axis, and
        the whole energy ``[outputs]``. Centred where the consumer is.
    """
    weight = consumer.weight.double()
    moment = second_moment(consumer.statistics, centred=consumer.centred)
    cross = output_moment(consumer, weight)
    energy = (cross * weight).sum(1).clamp_min(0)
    matrix, scale = _unit_diagonal(moment)
    targets = cross * scale
    per = weight.shape[1] // consumer.components
    result = weight.new_empty(len(weight), len(orders), consumer.components)
    for number, order in enumerate(orders.to(weight.device)):
        features = feature_index(order, per)
        factor = _factor(matrix[features[:, None], features][None])[0]
        half = torch.linalg.solve_triangular(factor, targets[:, features].T, upper=False)
        result[:, number] = half.square().cumsum(0)[per - 1 :: per].T
    return torch.minimum(result, energy[:, None, None]), energy


def _unit_diagonal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix scaled to a unit diagonal, and the scale ``[n]`` (0 for what has no energy, whose row becomes 0)."""
    diagonal = matrix.diagonal()
    alive = diagonal > _DEAD * diagonal.max()
    scale = torch.where(alive, diagonal.clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt(), 0.0)
    scaled = matrix * scale[:, None] * scale
    scaled.diagonal().fill_(1.0)
    return scaled, scale


def _factor(matrices: Tensor) -> Tensor:
    """Lower factors ``[batch, n, n]`` of matrices with a unit diagonal; more is added to it where rounding asks."""
    jitter = _JITTER
    while True:
        matrices.diagonal(dim1=1, dim2=2).fill_(1.0 + jitter)
        factors, failed = torch.linalg.cholesky_ex(matrices)
        if not failed.any():
            return factors
        jitter *= 100
