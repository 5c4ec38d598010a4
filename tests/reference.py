"""Slow float64 re-implementations of the numerics, written another way: explicit patches and contributions, lstsq.

Nothing here is shared with the package. Contributions are materialised, expectations are means over rows, and least
squares goes through `numpy.linalg.lstsq`.
"""

import itertools

import numpy
import torch
from torch import Tensor


def patches(maps: Tensor, kernel, stride=(1, 1), padding=(0, 0), dilation=(1, 1)) -> Tensor:
    """Im2col rows by loops, ``[images × positions, channels × taps]`` float64."""
    batch, channels, height, width = maps.shape
    source = maps.double()
    rows = []
    down = (height + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    across = (width + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    for image, y, x in itertools.product(range(batch), range(down), range(across)):
        row = torch.zeros(channels, kernel[0], kernel[1], dtype=torch.float64)
        for a, b in itertools.product(range(kernel[0]), range(kernel[1])):
            line = y * stride[0] - padding[0] + a * dilation[0]
            column = x * stride[1] - padding[1] + b * dilation[1]
            if 0 <= line < height and 0 <= column < width:
                row[:, a, b] = source[image, :, line, column]
        rows.append(row.flatten())
    return torch.stack(rows)


def contributions(rows: Tensor, weight: Tensor, components: int, *, centred: bool) -> Tensor:
    """Every a_{ci}(x), ``[outputs, rows, components]`` float64, less its mean over the rows where `centred`."""
    outputs, features = weight.shape
    per = features // components
    result = torch.zeros(outputs, len(rows), components, dtype=torch.float64)
    for output, component in itertools.product(range(outputs), range(components)):
        block = slice(component * per, (component + 1) * per)
        result[output, :, component] = rows[:, block].double() @ weight[output, block].double()
    return result - result.mean(1, keepdim=True) if centred else result


def singleton_scores(parts: Tensor) -> Tensor:
    """Singleton fidelity by fitting the one scale of every component with lstsq, ``[outputs, components]``."""
    outputs, _, components = parts.shape
    scores = torch.zeros(outputs, components, dtype=torch.float64)
    for output, component in itertools.product(range(outputs), range(components)):
        scores[output, component] = fidelity_of(parts[output], [component])
    return scores


def fidelity_of(parts: Tensor, kept) -> float:
    """Subset fidelity of one output from its contributions ``[rows, components]``."""
    target = parts.sum(1)
    fitted = parts[:, list(kept)] @ least_squares(parts[:, list(kept)], target)
    return float(1 - (target - fitted).square().mean() / target.square().mean())


def least_squares(matrix: Tensor, target: Tensor) -> Tensor:
    """Least-norm least-squares solution."""
    return torch.from_numpy(numpy.linalg.lstsq(matrix.numpy(), target.numpy(), rcond=None)[0])


def compensated_scales(parts: Tensor, kept, *, ridge: float, towards: float) -> Tensor:
    """Scales of the kept contributions of one output: min E[(y − Σ δ a)²] + λ·|δ − towards|², by stacking rows."""
    chosen = parts[:, list(kept)]
    count = len(parts)
    strength = ridge * float(chosen.square().mean(0).mean())
    anchor = torch.eye(len(kept), dtype=torch.float64) * (strength * count) ** 0.5
    matrix = torch.cat([chosen, anchor])
    target = torch.cat([parts.sum(1), anchor @ torch.full((len(kept),), towards, dtype=torch.float64)])
    return least_squares(matrix, target)


def union(votes: list[Tensor], keep: int) -> list[int]:
    """The union rule by growing p one at a time; ties by number of votes at that p, then summed score, then index."""
    rows = [row for block in votes for row in block]
    size = len(rows[0])
    orders = [sorted(range(size), key=lambda i, row=row: (-float(row[i]), i)) for row in rows]
    kept: list[int] = []
    for p in range(1, size + 1):
        seats = [i for order in orders for i in order[:p]]
        fresh = [i for i in range(size) if i in seats and i not in kept]
        if len(kept) + len(fresh) <= keep:
            kept += fresh
        else:
            total = [sum(float(row[i]) for row in rows) for i in range(size)]
            fresh.sort(key=lambda i: (-seats.count(i), -total[i], i))
            kept += fresh[: keep - len(kept)]
        if len(kept) == keep:
            break
    return sorted(kept)


def joint_weight(rows: Tensor, weight: Tensor, features, *, ridge: float, centred: bool) -> Tensor:
    """Weight on the kept features: min E|y − W' x_C|² + λ · mean energy · |W' − W_C|², by stacking rows for lstsq."""
    data = rows.double() - rows.double().mean(0) if centred else rows.double()
    chosen = data[:, features]
    strength = ridge * float(chosen.square().mean())
    anchor = torch.eye(len(features), dtype=torch.float64) * (strength * len(data)) ** 0.5
    matrix = torch.cat([chosen, anchor])
    target = torch.cat([data @ weight.T, anchor @ weight[:, features].T])
    return least_squares(matrix, target).T


def joint_share(rows: Tensor, weight: Tensor, features, *, centred: bool) -> float:
    """Share of the output energy that the best linear map of the features rebuilds."""
    data = rows.double() - rows.double().mean(0) if centred else rows.double()
    target = data @ weight.T
    fitted = data[:, features] @ least_squares(data[:, features], target)
    return float(1 - (target - fitted).square().sum() / target.square().sum())


def held_out_ridge(rows: Tensor, held: Tensor, weight: Tensor, features, grid, *, centred: bool) -> float:
    """The ridge whose weight, fitted on `rows`, has the least error on `held`, constant included where centred."""
    losses = {}
    for ridge in grid:
        fitted = joint_weight(rows, weight, features, ridge=ridge, centred=centred)
        lost = rows.double() @ weight.T - rows.double()[:, features] @ fitted.T
        error = held.double() @ weight.T - held.double()[:, features] @ fitted.T
        losses[ridge] = float((error - lost.mean(0) if centred else error).square().mean())
    return min(losses, key=losses.get)


def backward_elimination(cases, keep: int, ridge: float) -> tuple[list[int], list[float]]:
    """Greedy removal by solving every candidate set anew.

    Each case is (rows, weight, components, in_group, centred). The error of a set is the ridge loss, with a ridge on
    the change of every weight (removed ones too), as a share of the output energy, summed over the cases.
    """

    def error(removed: list[int]) -> float:
        total = 0.0
        for rows, weight, components, _, centred in cases:
            data = rows.double() - rows.double().mean(0) if centred else rows.double()
            per = data.shape[1] // components
            features = [f for f in range(data.shape[1]) if f // per not in removed]
            target = data @ weight.T
            strength = ridge * float(data.square().mean())
            anchor = torch.eye(data.shape[1], dtype=torch.float64) * (strength * len(data)) ** 0.5
            matrix = torch.cat([data, anchor])
            whole = matrix @ weight.T
            fitted = matrix[:, features] @ least_squares(matrix[:, features], whole)
            total += float((whole - fitted).square().sum() / target.square().sum())
        return total

    order, errors = [], [0.0]
    for _ in range(cases[0][3] - keep):
        costs = {i: error([*order, i]) for i in range(cases[0][3]) if i not in order}
        cheapest = min(costs, key=costs.get)
        order.append(cheapest)
        errors.append(costs[cheapest])
    return order, errors
