"""Small linear algebra that several files here share: feature indices, block-triangular Grams, positive solves.

Matrices are symmetric, float64 where a system is solved; batches come first (``[outputs, n, n]``).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# One float32 product sums at most this many rows before it goes into the float64 total, so that the rounding of a
# total does not grow with the size of a batch.
_ROWS_PER_PRODUCT = 32768
# A pivot that lost this share of its matrix's largest entry is rounding, not information.
_PIVOT_TOLERANCE = 1e-13
# Channels of a block in a CPU's own layout of maps.
_CHANNEL_BLOCK = 16
# Iterations shared by many systems: rank of the preconditioner, when to stop, when to give up, and bytes at once.
_PRECONDITIONER_RANK = 128
_RESIDUAL = 1e-8
_ITERATIONS = 300
_CHUNK_BYTES = 256 * 2**20


def exact_products(update: Callable) -> Callable:
    """Within the decorated function float32 products are not rounded to TF32, whatever forwards may do.

    TF32 keeps 10 bits: sums of squares would be off by 5e-4, and small eigenvalues of a Gram with them.
    """

    @functools.wraps(update)
    def exact(*args: Any, **kwargs: Any) -> Any:
        switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)  # whose attributes are made late
        before = [switch.allow_tf32 for switch in switches]
        for switch in switches:
            switch.allow_tf32 = False
        try:
            return update(*args, **kwargs)
        finally:
            for switch, was in zip(switches, before, strict=True):
                switch.allow_tf32 = was

    return exact


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 where it comes in half precision: sums are made of float32 or finer."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def quick_layout(maps: Tensor) -> Tensor:
    """Maps ``[batch, channels, height, width]`` as a CPU's convolutions sum their weight gradients quickest.

    Blocks of channels that do not fill (a pruned layer's) are slow, by 1.3 to 2.5 times; channels last has none.
    """
    if maps.device.type == "cpu" and maps.shape[1] % _CHANNEL_BLOCK:
        return maps.contiguous(memory_format=torch.channels_last)
    return maps


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


def solve_shared(matrix: Tensor, targets: Tensor, *, slack: float = 0.0) -> Tensor:
    """Solve A x = t for many t that share one positive semi-definite A: Cholesky where it holds, else pseudo-inverse.

    Args:
        matrix: A, ``[n, n]`` float64.
        targets: ``[batch, n]`` float64.
        slack: Share of A's mean diagonal that may be added to a singular A: a second Cholesky costs a tenth of the
            eigenvalues that a pseudo-inverse takes.

    Returns:
        ``[batch, n]``; the least-norm least-squares solutions of a singular system, or near them with a slack.
    """
    if not len(matrix):
        return targets.clone()
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if failed == 0 and pivots.amin() > _PIVOT_TOLERANCE * len(matrix) * matrix.diagonal().amax():
        return torch.cholesky_solve(targets.T, factor).T
    if slack > 0:
        lifted = matrix.clone()
        lifted.diagonal().add_(slack * matrix.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(lifted)
        if failed == 0:
            return torch.cholesky_solve(targets.T, factor).T
    return _pseudo_solve(matrix, targets.T).T


def solve_scaled(matrix: Tensor, scales: Tensor, ridge: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Solve (S ∘ s_c s_cᵀ + λ_c I) x_c = t_c for many c that share one S, without a factorisation for each.

    Conjugate gradients in step for all c, so that each iteration is one product with S. The preconditioner writes S as
    a partial Cholesky product plus a diagonal, and inverts that exactly for each c.

    Args:
        matrix: S, ``[n, n]`` float64, positive semi-definite.
        scales: s, ``[batch, n]`` float64.
        ridge: λ, ``[batch]`` float64, ≥ 0.
        targets: t, ``[batch, n]`` float64.

    Returns:
        ``[batch, n]`` to a relative residual of 1e-8, and ``[batch]`` bool: which of them got there.
    """
    # The factor is made for the typical scale; any factor below S is a valid preconditioner for every c.
    typical = scales.square().mean(0).sqrt()
    typical = torch.where(typical > 0, typical, torch.ones_like(typical))
    factor, rest = partial_cholesky(matrix * typical[:, None] * typical, min(_PRECONDITIONER_RANK, len(matrix)))
    factor, rest = factor / typical[:, None], rest / typical.square()
    step = max(1, _CHUNK_BYTES // (8 * max(factor.numel(), 1)))
    parts = [
        _conjugate_gradients(matrix, factor, rest, *part)
        for part in zip(scales.split(step), ridge.split(step), targets.split(step), strict=True)
    ]
    return torch.cat([solved for solved, _ in parts]), torch.cat([converged for _, converged in parts])


def partial_cholesky(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Pivoted Cholesky stopped early: matrix ≈ L Lᵀ, largest remaining diagonal first.

    Args:
        matrix: ``[n, n]`` positive semi-definite.
        rank: Columns of L.

    Returns:
        L ``[n, rank]`` and the diagonal of matrix − L Lᵀ, ``[n]`` ≥ 0. The rest is itself positive semi-definite.
    """
    factor = matrix.new_zeros(len(matrix), rank)
    rest = matrix.diagonal().clone().clamp_min_(0)
    for column in range(rank):
        pivot = rest.argmax()
        height = rest[pivot]
        values = (matrix[:, pivot] - factor[:, :column] @ factor[pivot, :column]) / height.sqrt()
        values = torch.where(height > 0, values, torch.zeros_like(values))
        factor[:, column] = values
        rest = (rest - values.square()).clamp_min_(0)
        rest[pivot] = 0
    return factor, rest


def _conjugate_gradients(
    matrix: Tensor, factor: Tensor, rest: Tensor, scales: Tensor, ridge: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    tiny = torch.finfo(targets.dtype).tiny
    # Diagonal of the preconditioner; a small share of the whole diagonal keeps it positive at the pivots.
    spread = rest + 1e-12 * matrix.diagonal()
    diagonal = (scales.square() * spread + ridge[:, None]).clamp_min(tiny)
    core = torch.bmm((factor.T * (scales.square() / diagonal)[:, None, :]), factor.expand(len(scales), -1, -1))
    core.diagonal(dim1=1, dim2=2).add_(1)
    core, failed = torch.linalg.cholesky_ex(core)

    def precondition(values: Tensor) -> Tensor:
        # (E + B Bᵀ)⁻¹ by Woodbury, with B = diag(s) L.
        values = values / diagonal
        inner = torch.cholesky_solve(((values * scales) @ factor)[..., None], core)[..., 0]
        return values - (inner @ factor.T) * scales / diagonal

    solved, residual = torch.zeros_like(targets), targets.clone()
    limit = _RESIDUAL * targets.norm(dim=1)
    direction = precondition(residual)
    strength = (residual * direction).sum(1)
    for _ in range(_ITERATIONS):
        product = ((direction * scales) @ matrix).mul_(scales).add_(ridge[:, None] * direction)
        length = _ratio(strength, (direction * product).sum(1))[:, None]
        solved.add_(length * direction)
        residual.sub_(length * product)
        if (residual.norm(dim=1) <= limit).all():
            break
        fresh = precondition(residual)
        following = (residual * fresh).sum(1)
        direction.mul_(_ratio(following, strength)[:, None]).add_(fresh)
        strength = following
    return solved, (residual.norm(dim=1) <= limit) & (failed == 0) & torch.isfinite(solved).all(1)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    # A system that is solved already has nothing left to divide.
    return torch.where(whole > 0, part / whole.clamp_min(torch.finfo(whole.dtype).tiny), torch.zeros_like(part))


def _pseudo_solve(matrix: Tensor, target: Tensor) -> Tensor:
    # eigh, not inv: two identical channels make the Gram singular, and the least-norm solution shares their weight.
    values, vectors = torch.linalg.eigh(matrix)
    floor = values[-1].clamp_min(0) * matrix.shape[-1] * 1e-14
    inverse = torch.where(values > floor, 1 / values, torch.zeros_like(values))
    return vectors @ (inverse.view(-1, *[1] * (target.ndim - 1)) * (vectors.T @ target))


def _block(features: int) -> int:
    # Eight blocks a side leave 9/16 of the work; below 256 columns a product is too thin to run at full speed.
    return max(256, -(-features // 8))
