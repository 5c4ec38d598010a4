"""Directions that only the forgotten classes have: what is left of their prototypes beside those of the other classes.

A prototype is the mean input row of a class. With P the orthogonal projection onto the span of the retain prototypes
the directions are an orthonormal basis U of the residuals (I − P) p_f of the forget prototypes, and

    W' = W (I − α U Uᵀ)

takes a share α of them out of a layer: the mean output of every retain class stays exactly what it was, since Uᵀ p_r is
0, and that of a forget class loses α W U Uᵀ p_f. The idea is that of DAMP (arXiv:2604.15166); this is our reading of
its description, not its code. Float64.
"""

import torch
from torch import Tensor

from modhifi_cli.errors import NumericsError

_NOTHING = 1e-6  # length of a residual, as a share of its prototype's, that is rounding


def forget_directions(forget: Tensor, retain: Tensor, *, name: str = "layer") -> Tensor:
    """An orthonormal basis of what the forget prototypes have beside the retain prototypes.

    Args:
        forget: Prototypes of the forget classes, ``[classes, features]``.
        retain: Prototypes of the others, ``[classes, features]``.
        name: Layer name, for messages.

    Returns:
        ``[features, directions]`` float64; no direction where the retain prototypes span everything.

    Raises:
        NumericsError: If a prototype is not finite.
    """
    forget, retain = forget.double(), retain.double()
    if not bool(torch.isfinite(forget).all() and torch.isfinite(retain).all()):
        raise NumericsError(f"{name}: class prototypes must be finite, got NaN or infinity; check weights and images.")
    basis = _basis(retain.T, float(retain.norm(dim=1).max()) if len(retain) else 0.0)
    left = forget.T
    for _ in range(2):  # once more for what rounding left of the retain span
        left = left - basis @ (basis.T @ left)
    return _basis(left, float(forget.norm(dim=1).max()))


def without_directions(weight: Tensor, directions: Tensor, strength: float) -> Tensor:
    """W (I − α U Uᵀ), ``[outputs, features]`` float64.

    Args:
        weight: ``[outputs, features]``.
        directions: U, ``[features, directions]``, orthonormal columns.
        strength: α; 1 removes the directions, 2 mirrors them.
    """
    weight, directions = weight.double(), directions.to(weight.device)
    return weight - strength * (weight @ directions) @ directions.T


def _basis(columns: Tensor, scale: float) -> Tensor:
    """Orthonormal basis of a span, ``[features, rank]``; what is shorter than rounding of `scale` is nothing."""
    if not columns.numel():
        return columns.new_zeros(columns.shape[0], 0)
    left, lengths, _ = torch.linalg.svd(columns, full_matrices=False)
    return left[:, lengths > _NOTHING * max(scale, torch.finfo(torch.float64).tiny)]
