"""Backward elimination (M10): the order in which a group's components can go, and the error after each of them.

Every consumer keeps its weights optimal for what is left, so the cost of a component counts what the others can make
up for. Two devices make one step cheap. Removing features J with L Lᵀ = H_JJ is H ← H − U Uᵀ and W ← W − V Uᵀ with
U = H_{:,J} L⁻ᵀ and V = W_J L⁻ᵀ, and the squared columns of V are the cost; such factors are collected and applied a
panel at a time, as one product. And candidates are compared by the diagonal blocks of H and WᵀW alone, kept up to date.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi_cli.errors import IllPosedError
from modhifi_cli.numerics.contributions import finite_weight, output_energy
from modhifi_cli.numerics.linalg import feature_index
from modhifi_cli.numerics.moments import second_moment
from modhifi_cli.records import Consumer

# Removed features whose update is put off until it is one product.
_PANEL = 96
# Removed features are cut out once they are this share of the matrices: a copy costs less than dragging them on.
_COMPACT = 0.15
# Rows instead of H above this many features: H of 25,088 features would take 5 GB.
_WIDEST_INVERSE = 8192
# Above these, rows and outputs of such wide layers are mixed down by a seeded random projection, which keeps their
# second moments right in expectation (a cost to about 6 % each).
_MOST_ROWS, _MOST_OUTPUTS = 1024, 512
# Features of the widest consumer up to which "auto" removes one component at a time.
_ONE_AT_A_TIME = 2048
DEFAULT_RIDGE = 1e-4  # the paper's


@dataclass(frozen=True)
class Elimination:
    """A group's components in the order of their removal.

    Attributes:
        order: Removed components, cheapest first, ``[removed]`` int64.
        errors: Summed relative error of the consumers after each removal, ``[removed + 1]`` float64, from 0, never
            falling. It counts the ridge on changed weights, so it is a little above the error on the rows.
        components: Of the group.
    """

    order: Tensor
    errors: Tensor
    components: int

    def kept(self, keep: int) -> Tensor:
        """What is left at a width, ``[keep]`` int64 sorted. The removal must have gone that far."""
        removed = self.components - keep
        if not 0 <= removed <= len(self.order):
            raise ValueError(f"keep must lie in {self.components - len(self.order)} … {self.components}, got {keep}.")
        alive = torch.ones(self.components, dtype=torch.bool, device=self.order.device)
        alive[self.order[:removed]] = False
        return alive.nonzero().flatten()


def elimination(
    consumers: Sequence[Consumer], *, keep: int = 1, block: int | str = "auto", ridge: float = DEFAULT_RIDGE
) -> Elimination:
    """Remove a group's components one after the other, always the one that costs all consumers together least.

    The cost of component j with features J in one consumer is tr(W_J (H_JJ)⁻¹ W_Jᵀ) / E‖y‖², H = (S_alive + λ m I)⁻¹
    with m the mean diagonal of S, centred where the consumer is; the costs of the consumers are added. Components of a
    consumer behind the group's (`in_group`) always stay and help to make up.

    A consumer with fewer rows than features and more than 8,192 features never gets an H: it is worked on through its
    rows (Woodbury), at most 1,024 mixtures of them and 512 mixtures of its outputs, mixed with a fixed seed.

    Args:
        consumers: Of one group, so with the same `in_group`.
        keep: Where to stop, 1 … in_group.
        block: How many of the cheapest are removed together before the rest is compared anew; ``"auto"``: one up to
            2,048 features, above it proportionally more (3 of 512 components of 9 features).
        ridge: λ > 0. It also stands in for what few rows cannot tell apart.

    Returns:
        Order and errors down to `keep`. Equal costs go by index, lowest first.

    Raises:
        NumericsError: If a consumer's output has no energy, a weight is not finite, or λ is too small for its moments.
    """
    components = consumers[0].in_group
    if not 1 <= keep <= components:
        raise ValueError(f"keep must lie in 1 … {components}, got {keep}.")
    if isinstance(block, str):
        block = -(-max(consumer.weight.shape[1] for consumer in consumers) // _ONE_AT_A_TIME)
    states = [_State(consumer, ridge, block) for consumer in consumers]
    alive = torch.ones(components, dtype=torch.bool, device=consumers[0].weight.device)
    order: list[Tensor] = []  # on their device, as everything in the loop: a card would be waited for at every step
    removed = 0
    nothing = alive.new_zeros(1, dtype=torch.float64)
    errors = [nothing]
    while components - removed > keep:
        costs = sum((state.costs() for state in states), nothing).masked_fill(~alive, torch.inf)
        count = min(block, components - removed - keep)
        chosen = costs.argmin()[None] if count == 1 else costs.argsort(stable=True)[:count]
        alive[chosen] = False
        order.append(chosen)
        removed += count
        spent = sum((state.remove_(chosen) for state in states), nothing)
        errors.append(errors[-1][-1] + spent.cumsum(0))
    for state in states:
        state.check()
    return Elimination(torch.cat([alive.new_zeros(0, dtype=torch.int64), *order]), torch.cat(errors), components)


class _State:
    """One consumer while its components go. Features that are gone stay in place until the next compaction."""

    def __init__(self, consumer: Consumer, ridge: float, block: int):
        self._energy = output_energy(consumer)
        self._name = consumer.name
        weight = finite_weight(consumer)
        self._per = weight.shape[1] // consumer.components
        # Present place of every component of the group; −1 where it was compacted away.
        self._place = torch.arange(consumer.in_group, device=weight.device)
        self._gone = torch.zeros(consumer.components, dtype=torch.bool, device=weight.device)
        self._failed = torch.zeros((), dtype=torch.bool, device=weight.device)  # looked at once a panel
        self._rows: Tensor | None = None  # X, where it stands for H
        self._inverse: Tensor  # H, where X does not
        self._blocks: Tensor  # diagonal blocks of H and of WᵀW, [components, features, features]
        self._products: Tensor
        statistics = consumer.statistics
        if statistics.samples is not None and statistics.features > _WIDEST_INVERSE:
            self._start_from_rows(consumer, statistics.samples.double(), weight, ridge)
        else:
            moment = second_moment(statistics, centred=consumer.centred).clone()
            moment.diagonal().add_(ridge * moment.diagonal().mean())
            self._inverse = torch.cholesky_inverse(self._factor(moment))
            self.check()
            if len(weight) > weight.shape[1]:
                weight = torch.linalg.qr(weight, mode="r").R  # costs see WᵀW alone
            self._carried, self._outputs = weight.clone(), len(weight)
        self._one = torch.eye(self._per, dtype=torch.float64, device=weight.device)
        # Factors Uᵀ and Vᵀ that were not applied yet, `_waiting` rows of each.
        room = _PANEL + block * self._per
        self._left = weight.new_empty(room, self._carried.shape[1])
        self._right = weight.new_empty(room, len(self._carried))
        self._waiting = 0
        self._refresh()

    def costs(self) -> Tensor:
        """Relative cost of removing each component of the group alone, ``[in_group]``; anything for those gone."""
        if self._per == 1:
            costs = self._products[:, 0, 0] / self._blocks[:, 0, 0]
        else:
            factors = torch.linalg.cholesky_ex(self._blocks).L
            costs = torch.cholesky_solve(self._products, factors).diagonal(dim1=1, dim2=2).sum(1)
        return costs[self._place.clamp_min(0)] / self._energy

    def remove_(self, components: Tensor) -> Tensor:
        """Remove components ``[chosen]``; relative cost that each adds to those before it, ``[chosen]`` ≥ 0."""
        places = self._place[components]
        features = feature_index(places, self._per)
        weight = self._carried_columns(features)
        curvature = self._curvature_rows(features, weight)
        factor = self._factor(curvature[:, features])
        if len(features) == 1:  # what a solver would do, without one
            left, right = curvature / factor, weight.T / factor
        else:
            left = torch.linalg.solve_triangular(factor, curvature, upper=False)
            right = torch.linalg.solve_triangular(factor, weight.T, upper=False)
        self._update_blocks(left, right[:, : self._outputs])
        until = self._waiting + len(features)
        self._left[self._waiting : until], self._right[self._waiting : until] = left, right
        self._waiting = until
        self._gone[places] = True
        self._clear_blocks()
        if until >= _PANEL:
            self._flush()
        return right[:, : self._outputs].square().sum(1).view(-1, self._per).sum(1) / self._energy

    def _factor(self, matrix: Tensor) -> Tensor:
        if matrix.numel() == 1:
            factor, failed = matrix.sqrt(), ~(matrix > 0).all()
        else:
            factor, info = torch.linalg.cholesky_ex(matrix)
            failed = info != 0
        self._failed |= failed
        return factor

    def check(self) -> None:
        """Raise IllPosedError if a matrix so far was not positive definite."""
        if self._failed:
            raise IllPosedError(
                f"{self._name}: backward elimination needs moments that are positive definite with their ridge, got a "
                f"singular matrix; raise selection.ridge."
            )

    def _start_from_rows(self, consumer: Consumer, rows: Tensor, weight: Tensor, ridge: float) -> None:
        # H = (I − Xᵀ P) / c with P = (c I + X Xᵀ)⁻¹ X. Removing features changes P just as it changes W, so P is
        # carried along below the weights.
        statistics = consumer.statistics
        generator = torch.Generator().manual_seed(0)
        rows = rows - statistics.mean if consumer.centred else rows
        rows = _mixed(rows, _MOST_ROWS, generator) / statistics.rows**0.5
        weight = _mixed(weight, _MOST_OUTPUTS, generator)
        self._floor = float(ridge * rows.square().sum(0).mean())
        gram = rows @ rows.T
        gram.diagonal().add_(self._floor)
        self._rows = rows
        self._carried = torch.cat([weight, torch.cholesky_solve(rows, self._factor(gram))])
        self.check()
        self._outputs = len(weight)

    def _carried_columns(self, features: Tensor) -> Tensor:
        left, right = self._left[: self._waiting], self._right[: self._waiting]
        return self._carried[:, features].addmm_(right.T, left[:, features], alpha=-1)

    def _curvature_rows(self, features: Tensor, columns: Tensor) -> Tensor:
        if self._rows is None:
            left = self._left[: self._waiting]
            return self._inverse[features].addmm_(left[:, features].T, left, alpha=-1)
        # P is symmetric in the sense Xᵀ P = Pᵀ X, so the carried columns of J give the rows of J.
        rows = (columns[self._outputs :].T @ self._rows).neg_()
        rows[torch.arange(len(features), device=rows.device), features] += 1
        return rows.div_(self._floor)

    def _update_blocks(self, left: Tensor, right: Tensor) -> None:
        # (W − V Uᵀ)ᵀ (W − V Uᵀ) on the diagonal blocks, from Vᵀ W.
        waiting = slice(0, self._waiting)
        shared = right @ self._carried[: self._outputs]
        shared.addmm_(right @ self._right[waiting, : self._outputs].T, self._left[waiting], alpha=-1)
        size = len(self._blocks)
        mine, shared = (
            part[:, : size * self._per].view(len(left), size, self._per).permute(1, 2, 0) for part in (left, shared)
        )
        crossed = torch.bmm(mine, shared.transpose(1, 2))
        self._products -= crossed + crossed.transpose(1, 2)
        self._products += torch.bmm(mine @ (right @ right.T), mine.transpose(1, 2))
        self._blocks -= torch.bmm(mine, mine.transpose(1, 2))

    def _clear_blocks(self) -> None:
        gone = self._gone[: len(self._blocks), None, None]
        self._blocks = torch.where(gone, self._one, self._blocks)
        self._products.masked_fill_(gone, 0)

    def _flush(self) -> None:
        left, right = self._left[: self._waiting], self._right[: self._waiting]
        self._carried.addmm_(right.T, left, alpha=-1)
        if self._rows is None:
            self._inverse.addmm_(left.T, left, alpha=-1)
        self._waiting = 0
        self.check()
        if self._gone.sum() > _COMPACT * len(self._gone):
            self._compact()
        self._refresh()

    def _compact(self) -> None:
        stay = (~self._gone).nonzero().flatten()
        features = feature_index(stay, self._per)
        self._carried = self._carried[:, features]
        if self._rows is None:
            self._inverse = self._inverse.index_select(0, features).index_select(1, features)
        else:
            self._rows = self._rows[:, features]
        self._left = self._left.new_empty(len(self._left), len(features))
        fresh = torch.full_like(self._gone, -1, dtype=torch.int64)
        fresh[stay] = torch.arange(len(stay), device=stay.device)
        self._place = torch.where(self._place >= 0, fresh[self._place.clamp_min(0)], -1)
        self._gone = self._gone[stay]

    def _refresh(self) -> None:
        # Diagonal blocks of H and WᵀW of the group anew: rounding of their updates does not add up over panels.
        size = int(self._place.max()) + 1
        weight = self._carried[: self._outputs, : size * self._per].view(self._outputs, size, self._per)
        by_component = weight.permute(1, 2, 0)
        self._products = torch.bmm(by_component, by_component.transpose(1, 2))
        if self._rows is None:
            within = self._inverse[: size * self._per, : size * self._per]
            self._blocks = within.view(size, self._per, size, self._per).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            self._blocks = self._blocks.clone()
        else:
            inputs, solved = (
                part[:, : size * self._per].view(len(part), size, self._per).permute(1, 2, 0)
                for part in (self._rows, self._carried[self._outputs :])
            )
            self._blocks = torch.bmm(inputs, solved.transpose(1, 2)).neg_()
            self._blocks.diagonal(dim1=1, dim2=2).add_(1)
            self._blocks /= self._floor
        self._clear_blocks()


def _mixed(rows: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most `most` random mixtures of rows ``[rows, features]`` with the same expected Gram rowsᵀ rows."""
    if len(rows) <= most:
        return rows
    mixing = torch.randn(most, len(rows), generator=generator, dtype=torch.float64) / most**0.5
    return mixing.to(rows.device) @ rows
