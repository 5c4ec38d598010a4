"""Joint least squares on the kept features: what the removed components carried, rebuilt from the ones that stay (M8).

With t = W_R x_R what an edit takes from the outputs and x_C what it leaves, a change Δ of the kept weights loses
E|t − Δ x_C|². The sums that this needs, E[x_C x_Cᵀ] and E[t x_Cᵀ], come from either form of the statistics; with fewer
rows than kept features they are held in an orthonormal basis of the rows, which loses nothing.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modhifi_cli.numerics.contributions import finite_weight
from modhifi_cli.numerics.linalg import feature_index, solve_shared
from modhifi_cli.records import Consumer, Statistics

# Bytes of float64 rows that are held at once beside the stored float32 ones.
_CHUNK_BYTES = 256 * 2**20
_SLACK = 1e-9


@dataclass(frozen=True)
class Regression:
    """Normal equations of E|t − Δ x_C|² over some rows, not centred; x_C in coordinates z of a basis of n ≤ features.

    Attributes:
        rows: Rows that were summed.
        gram: E[z zᵀ], ``[n, n]`` float64.
        cross: E[t zᵀ], ``[outputs, n]`` float64.
        inputs: E[z], ``[n]`` float64.
        targets: E[t], ``[outputs]`` float64.
        features: Kept features, whose mean energy a ridge is measured in.
        basis: Orthonormal ``[features, n]`` with z = basisᵀ x_C, or None for the features themselves.
    """

    rows: int
    gram: Tensor
    cross: Tensor
    inputs: Tensor
    targets: Tensor
    features: int
    basis: Tensor | None = None

    def without(self, part: "Regression") -> "Regression":
        """The same over the rows that are not in `part`, which must be some of these rows."""
        rows = self.rows - part.rows
        left = {
            name: (self.rows * getattr(self, name) - part.rows * getattr(part, name)) / rows
            for name in ("gram", "cross", "inputs", "targets")
        }
        return replace(self, rows=rows, **left)

    def weighted(self, worth: Tensor) -> "Regression":
        """The same with every output counted in another unit, so that errors of several can be added up.

        Args:
            worth: New units a unit of each output, ``[outputs]``, not 0.
        """
        return replace(self, cross=self.cross * worth[:, None], targets=self.targets * worth)

    def mixed(self, mixing: Tensor) -> "Regression":
        """The same for mixtures of the outputs, ``[mixtures, outputs]``."""
        return replace(self, cross=mixing @ self.cross, targets=mixing @ self.targets)

    def about(self, inputs: Tensor, targets: Tensor) -> "Regression":
        """The same with the given z and t taken off every row: centred about any point, not only their own mean.

        Args:
            inputs: ``[n]``.
            targets: ``[outputs]``.
        """
        gram = self.gram - torch.outer(inputs, self.inputs) - torch.outer(self.inputs - inputs, inputs)
        cross = self.cross - torch.outer(targets, self.inputs) - torch.outer(self.targets - targets, inputs)
        return replace(self, gram=gram, cross=cross, inputs=self.inputs - inputs, targets=self.targets - targets)

    def solve(self, ridge: float, pull: Tensor | None = None) -> Tensor:
        """Δ, in coordinates: (E[t zᵀ] + r D) (E[z zᵀ] + r I)⁻¹ with r = λ · mean energy of a kept feature.

        Args:
            ridge: λ ≥ 0.
            pull: D, what the ridge pulls Δ to, as a change of the kept weights ``[outputs, features]``; None is 0.

        Returns:
            ``[outputs, n]`` float64; least-norm where the system is singular.
        """
        matrix = self.gram.clone()
        strength = ridge * self.gram.trace() / max(self.features, 1)
        matrix.diagonal().add_(strength)
        if pull is None:
            return solve_shared(matrix, self.cross)
        pull = pull if self.basis is None else pull @ self.basis
        return solve_shared(matrix, self.cross + strength * pull)

    def nearest(self) -> Tensor:
        """Δ of the least error, ``[outputs, n]``; where the system is singular, of one that is as small to 1e-9 of |Δ z|²."""
        return solve_shared(self.gram, self.cross, slack=_SLACK)

    def loss(self, change: Tensor) -> float:
        """E|t − Δ z|² − E|t|², output units²: below 0 where Δ, ``[outputs, n]``, is better than no change."""
        return float(((change @ self.gram - 2 * self.cross) * change).sum())

    def widened(self, change: Tensor) -> Tensor:
        """A Δ in coordinates as a change of the kept weights, ``[outputs, features]``."""
        return change if self.basis is None else change @ self.basis.T


def regressions(consumer: Consumer, kept: Tensor, *parts: Statistics) -> list[Regression]:
    """The joint regression of an edit over all rows of the consumer, and over parts of them.

    Args:
        consumer: The layer before the edit.
        kept: Kept components of its whole input, ``[kept]`` int64 sorted.
        parts: Moments of some of the same rows, in the same feature order.

    Returns:
        One over all rows, then one for each part, all in one basis, not centred.

    Raises:
        NumericsError: If a weight is not finite.
    """
    weight = finite_weight(consumer)
    statistics = consumer.statistics
    features = feature_index(kept.to(weight.device), weight.shape[1] // consumer.components)
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[features] = False
    removed = gone.nonzero().flatten()
    lost = weight[:, removed]
    basis = None
    if statistics.samples is not None and len(statistics.samples) < len(features):
        # QR, not the eigenvectors of X Xᵀ: those lose their orthogonality where the rows nearly repeat.
        basis = torch.linalg.qr(statistics.samples.index_select(1, features).double().T).Q
    return [_regression(some, features, removed, lost, basis) for some in (statistics, *parts)]


def kept_weight(consumer: Consumer, kept: Tensor) -> Tensor:
    """The weight on the features of the kept components, ``[outputs, kept features]`` float64."""
    features = feature_index(kept.to(consumer.weight.device), consumer.weight.shape[1] // consumer.components)
    return consumer.weight.double()[:, features]


def _regression(
    statistics: Statistics, features: Tensor, removed: Tensor, lost: Tensor, basis: Tensor | None
) -> Regression:
    if statistics.samples is None:
        inputs, targets = statistics.mean[features], lost @ statistics.mean[removed]
        gram = statistics.summed.index_select(0, features).index_select(1, features)
        cross = lost @ statistics.summed.index_select(0, removed).index_select(1, features)
        if basis is not None:
            inputs, gram, cross = basis.T @ inputs, basis.T @ gram @ basis, cross @ basis
        return Regression(statistics.rows, gram, cross, inputs, targets, len(features), basis)
    size = len(features) if basis is None else basis.shape[1]
    gram, cross = lost.new_zeros(size, size), lost.new_zeros(len(lost), size)
    # Means of these very rows: with few of them a mean rounded to float32 shows in the centred products.
    inputs, targets = lost.new_zeros(size), lost.new_zeros(len(lost))
    step = max(1, _CHUNK_BYTES // (8 * statistics.features))
    for rows in statistics.samples.split(step):
        left = rows.index_select(1, features).double()
        left = left if basis is None else left @ basis
        carried = lost @ rows.index_select(1, removed).double().T
        gram.addmm_(left.T, left)
        cross.addmm_(carried, left)
        inputs += left.sum(0)
        targets += carried.sum(1)
    gram, cross, inputs, targets = (total / statistics.rows for total in (gram, cross, inputs, targets))
    return Regression(statistics.rows, gram, cross, inputs, targets, len(features), basis)
