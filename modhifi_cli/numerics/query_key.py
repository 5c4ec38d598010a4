"""Fewer features of queries and keys in an attention head, in closed form from second moments (method.md M12).

A head's logits are L = Q Kᵀ with Q, K ``[tokens, d]``. Keeping r features means Q' = Q A, K' = K B with A, B ``[d, r]``;
the mean squared error of the logits over pairs of rows,

    E‖q (I − A Bᵀ) kᵀ‖² = ‖S_q^½ (I − A Bᵀ) S_k^½‖²_F ,      S_q = E[qᵀq],  S_k = E[kᵀk],

is least (Eckart and Young) where S_q^½ A Bᵀ S_k^½ is the truncated SVD U_r Σ_r V_rᵀ of S_q^½ S_k^½, so

    A = S_q^-½ U_r Σ_r^½,   B = S_k^-½ V_r Σ_r^½,   error = Σ_{i>r} σ_i² .

The softmax does not see what all keys share, so S_k may be centred. A and B go into the projections, biases included.
Float64 throughout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi_cli.errors import NumericsError

_FLOOR = 1e-10  # of the largest eigenvalue: directions below it are not inverted


@dataclass(frozen=True)
class QueryKey:
    """What one head's queries and keys become.

    Attributes:
        queries: A, ``[features, kept]`` float64: Q' = Q A.
        keys: B, ``[features, kept]`` float64: K' = K B.
        error: Share of the logits' energy that is lost, 0 … 1.
    """

    queries: Tensor
    keys: Tensor
    error: float


def query_key_spectrum(queries: Tensor, keys: Tensor, *, name: str = "attention") -> Tensor:
    """Energies σ_i² of the logits' independent parts of every head, descending; their sum is E[L²].

    Args:
        queries: S_q, ``[heads, features, features]``.
        keys: S_k, same shape.
        name: For messages.

    Returns:
        ``[heads, features]`` float64.
    """
    return torch.stack([_decompose(q, k, name)[1].square() for q, k in zip(queries, keys, strict=True)])


def reduce_query_key(queries: Tensor, keys: Tensor, kept: int, *, name: str = "attention") -> QueryKey:
    """The best `kept` features of one head's queries and keys.

    Args:
        queries: S_q, ``[features, features]``.
        keys: S_k, same shape.
        kept: 1 … features.
        name: For messages.

    Raises:
        NumericsError: If moments are not finite or `kept` is out of range.
    """
    if not 1 <= kept <= len(queries):
        raise NumericsError(f"{name}: between 1 and {len(queries)} query/key features can be kept, got {kept}.")
    (left, sizes, right), inverses = _decompose(queries, keys, name, both=True)
    root = sizes[:kept].sqrt()
    total = float(sizes.square().sum())
    lost = float(sizes[kept:].square().sum()) / total if total else 0.0
    return QueryKey(inverses[0] @ left[:, :kept] * root, inverses[1] @ right[:, :kept] * root, lost)


def _decompose(queries: Tensor, keys: Tensor, name: str, both: bool = False) -> tuple:
    queries, keys = queries.double(), keys.double()
    if not bool(torch.isfinite(queries).all() and torch.isfinite(keys).all()):
        raise NumericsError(f"{name}: moments of queries and keys must be finite; check weights and images.")
    (first, first_inverse), (second, second_inverse) = _roots(queries), _roots(keys)
    left, sizes, right = torch.linalg.svd(first @ second)
    return ((left, sizes, right.mT), (first_inverse, second_inverse)) if both else (left, sizes)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """S^½ and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(moment)
    usable = values > _FLOOR * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
    root = torch.where(usable, values.clamp(min=0).sqrt(), 0.0)
    inverse = torch.where(usable, 1 / root.where(usable, torch.ones_like(root)), 0.0)
    return vectors * root @ vectors.mT, vectors * inverse @ vectors.mT
