"""Small linear algebra that several files here share: feature indices, block-triangular Grams, positive solves.

Matrices are symmetric, float64 where a system is solved; batches come first (``[outputs, n, n]``).
"""

import torch
from torch import Tensor

# One float32 product sums at most this many rows before it goes into the float64 total, so that the rounding of a
# total does not grow with the size of a batch.
_ROWS_PER_PRODUCT = 32768
# A pivot that lost this share of its matrix's largest entry is rounding, not information.
_PIVOT_TOLERANCE = 1e-13


def feature_index(components: Tensor, features_per_component: int) -> Tensor:
    """Features of the given components, in their order.

    Args:
        components: Component indices, ``[kept]`` int64.
        features_per_component: p ≥ 1.

    Returns:
        ``[kept × p]`` int64: component × p + offset.
    """
    offsets = torch.arange(features_per_component, device=components.device)
    return (components[:, None] * features_per_component + offsets).flatten()


def add_gram_(total: Tensor, columns: Tensor) -> Tensor:
    """Add ``columns · columnsᵀ`` to the upper block triangle of `total`, in place.

    Only blocks on and above the diagonal are computed, which saves nearly half of a wide product; the block size
    depends on the number of features alone, and `mirror_upper_` completes the matrix when the sum is done.

    Args:
        total: ``[features, features]`` float64.
        columns: ``[features, rows]`` float32 or float64, any strides.

    Returns:
        `total`.
    """
    features = columns.shape[0]
    step = _block(features)
    for part in columns.split(_ROWS_PER_PRODUCT, dim=1):
        for start in range(0, features, step):
            stop = min(start + step, features)
            total[start:stop, start:].add_(part[start:stop] @ part[start:].T)
    return total


def mirror_upper_(total: Tensor) -> Tensor:
    """Make a matrix summed by `add_gram_` exactly symmetric, in place: the upper triangle is copied to the lower.

    Args:
        total: ``[features, features]``.

    Returns:
        `total`.
    """
    step = _block(total.shape[0])
    for start in range(0, total.shape[0], step):
        stop = min(start + step, total.shape[0])
        block = total[start:stop, start:stop]
        block.copy_((block + block.T) / 2)
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def solve_positive(matrices: Tensor, targets: Tensor) -> Tensor:
    """Solve symmetric positive semi-definite systems, by Cholesky where it holds and by pseudo-inverse where not.

    Args:
        matrices: ``[batch, n, n]`` float64.
        targets: ``[batch, n]`` float64.

    Returns:
        ``[batch, n]``; the least-norm least-squares solution of a singular system.
    """
    factors, failed = torch.linalg.cholesky_ex(matrices)
    pivots = factors.diagonal(dim1=-2, dim2=-1).square()
    scale = matrices.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(matrices.dtype).tiny)
    sound = (failed == 0) & (pivots.amin(-1) > _PIVOT_TOLERANCE * matrices.shape[-1] * scale)
    solved = torch.empty_like(targets)
    if sound.all():
        return torch.cholesky_solve(targets[..., None], factors)[..., 0]
    if sound.any():
        solved[sound] = torch.cholesky_solve(targets[sound][..., None], factors[sound])[..., 0]
    for index in (~sound).nonzero().flatten().tolist():
        solved[index] = _pseudo_solve(matrices[index], targets[index])
    return solved


def _pseudo_solve(matrix: Tensor, target: Tensor) -> Tensor:
    # eigh, not inv: two identical channels make the Gram singular, and the least-norm solution shares their weight.
    values, vectors = torch.linalg.eigh(matrix)
    floor = values[-1].clamp_min(0) * matrix.shape[-1] * 1e-14
    inverse = torch.where(values > floor, 1 / values, torch.zeros_like(values))
    return vectors @ (inverse * (vectors.T @ target))


def _block(features: int) -> int:
    # Eight blocks a side leave 9/16 of the work; below 256 columns a product is too thin to run at full speed.
    return max(256, -(-features // 8))
