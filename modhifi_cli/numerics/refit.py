"""Refitting the last layer to the dense network's logits: the dense-target least squares (M9) where it is simplest.

Nothing follows the classifier, so the target is the dense logits themselves and no residual stream has to be brought
in. It repairs what all edits together have shifted, from unlabelled images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics.regression import Regression

GRID = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Refit:
    """A refitted linear layer.

    Attributes:
        weight: ``[outputs, features]`` float64.
        bias: ``[outputs]`` float64.
        ridge: The ridge that was chosen, times the mean energy of a feature; None where no change was better on the
            held-out rows, and weight and bias are the present ones.
        error_before: E|t − (W x + b)|² / E|t − E t|² on the held-out rows with the weights as they were.
        error_after: The same with the weights fitted without the held-out rows.
    """

    weight: Tensor
    bias: Tensor
    ridge: float | None
    error_before: float
    error_after: float


def refit(
    inputs: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, *, held_out: Tensor, grid: Sequence[float] = GRID
) -> Refit:
    """Weights and bias that rebuild `targets` from `inputs`, with a ridge towards the present weights (M9).

    The ridge is chosen on the held-out rows; the final fit uses all rows.

    Args:
        inputs: The layer's present inputs, ``[rows, features]``, input units.
        targets: What it shall give, ``[rows, outputs]``: the dense network's logits for the same images.
        weight: Present weight, ``[outputs, features]``.
        bias: Present bias, ``[outputs]``.
        held_out: Which rows choose the ridge, ``[rows]`` bool; some, not all.
        grid: Ridges to try, times the mean energy of a feature.

    Raises:
        NumericsError: If inputs or targets are not finite, or the rows cannot be parted.
    """
    inputs, targets, weight, bias = (tensor.double() for tensor in (inputs, targets, weight, bias))
    if not bool(torch.isfinite(inputs).all()) or not bool(torch.isfinite(targets).all()):
        raise NumericsError("classifier: its inputs and the dense logits must be finite; check weights and images.")
    if not 0 < int(held_out.sum()) < len(inputs):
        raise NumericsError(
            f"classifier: a refit needs at least 5 calibration images, got {len(inputs)}; raise data.num_samples or "
            "set classifier=keep."
        )
    residual = targets - inputs @ weight.T - bias
    fitting = _centred(inputs[~held_out], residual[~held_out])
    center_in, center_out = inputs[~held_out].mean(0), residual[~held_out].mean(0)
    unseen_in, unseen_out = inputs[held_out] - center_in, residual[held_out] - center_out
    errors = {ridge: _error(unseen_in, unseen_out, fitting.solve(ridge)) for ridge in grid}
    ridge = min(sorted(errors, reverse=True), key=errors.__getitem__)
    spread = float((targets[held_out] - targets.mean(0)).square().sum(1).mean().clamp(min=1e-300))
    before = float(residual[held_out].square().sum(1).mean())
    if errors[ridge] >= before:
        return Refit(weight, bias, None, before / spread, before / spread)
    change = _centred(inputs, residual).solve(ridge)
    return Refit(
        weight=weight + change,
        bias=bias + residual.mean(0) - change @ inputs.mean(0),
        ridge=ridge,
        error_before=before / spread,
        error_after=errors[ridge] / spread,
    )


def _centred(inputs: Tensor, targets: Tensor) -> Regression:
    rows = len(inputs)
    mean, aim = inputs.mean(0), targets.mean(0)
    inputs, targets = inputs - mean, targets - aim
    nothing = torch.zeros_like(mean), torch.zeros_like(aim)
    return Regression(rows, inputs.T @ inputs / rows, targets.T @ inputs / rows, *nothing, features=inputs.shape[1])


def _error(inputs: Tensor, targets: Tensor, change: Tensor) -> float:
    return float((targets - inputs @ change.T).square().sum(1).mean())
