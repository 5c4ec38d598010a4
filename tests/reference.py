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
