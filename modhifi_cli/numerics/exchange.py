"""Local search over kept sets: take in the removed components that would help most, eliminate as many again.

It repairs what backward elimination cannot see, that something removed early would now be worth more than something
kept. A round is accepted only if the joint error of the group, the sum of the consumers' relative errors, falls.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modhifi_cli.numerics.compensation import Joint
from modhifi_cli.numerics.contributions import finite_weight, output_energy
from modhifi_cli.numerics.elimination import elimination
from modhifi_cli.numerics.linalg import feature_index
from modhifi_cli.numerics.moments import reorder, second_moment
from modhifi_cli.records import Consumer

# Above this many features a consumer has no second moment to search on, and its group is left as it is.
_WIDEST = 8192


@dataclass(frozen=True)
class Exchange:
    """A kept set after the search.

    Attributes:
        kept: ``[kept]`` int64 sorted.
        errors: Summed relative error of the group before and after every accepted round, falling.
    """

    kept: Tensor
    errors: tuple[float, ...]


def exchange(consumers: Sequence[Consumer], kept: Tensor, *, rounds: int, ridge: float = 1e-4) -> Exchange:
    """Swap kept and removed components of a group while it pays.

    A round adds the m removed components that each alone would lower the error most, then removes m of all by backward
    elimination. m starts at an eighth of the smaller set and is halved when a round does not pay; single ones are then
    tried from the most promising down, until none pays.

    Args:
        consumers: Of one group.
        kept: Kept components of the group, ``[kept]`` int64 sorted.
        rounds: At most so many, paying or not; 0 for none.
        ridge: λ > 0, times the mean diagonal of S.

    Returns:
        A set of the same size, never worse in the error with that ridge. Groups with a consumer of more than 8,192
        features are left as they are.
    """
    if any(consumer.weight.shape[1] > _WIDEST for consumer in consumers):
        return Exchange(kept, ())
    components = consumers[0].in_group
    error, gains = _look(consumers, kept, ridge)
    errors = [error]
    count, skip = -(-min(len(kept), components - len(kept)) // 8), 0
    for _ in range(rounds):
        if count + skip > components - len(kept) or count == 0:
            break
        added = gains.argsort(descending=True, stable=True)[skip : skip + count]
        pool = torch.cat([kept, added]).sort().values
        narrowed = [_narrowed(consumer, pool, ridge) for consumer in consumers]
        trial = pool[elimination(narrowed, keep=len(kept), ridge=ridge).kept(len(kept))]
        error, fresh = (errors[-1], gains) if torch.equal(trial, kept) else _look(consumers, trial, ridge)
        if error < errors[-1] * (1 - 1e-9):
            kept, gains = trial, fresh
            errors.append(error)
            skip = 0
        elif count > 1:
            count //= 2
        else:
            skip += 1
    return Exchange(kept, tuple(errors))


def _look(consumers: Sequence[Consumer], kept: Tensor, ridge: float) -> tuple[float, Tensor]:
    """Joint error with a kept set, and how much each removed component alone would lower it (−∞ for kept ones)."""
    components = consumers[0].in_group
    gone = torch.ones(components, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    removed = gone.nonzero().flatten()
    gains = torch.full((components,), -torch.inf, dtype=torch.float64, device=kept.device)
    gains[removed] = 0
    error = 0.0
    for consumer in consumers:
        energy, weight = output_energy(consumer), finite_weight(consumer)
        per = weight.shape[1] // consumer.components
        stay, leave = feature_index(_whole(consumer, kept), per), feature_index(removed, per)
        moment = second_moment(consumer.statistics, centred=consumer.centred).clone()
        moment.diagonal().add_(ridge * moment.diagonal().mean())
        factor = torch.linalg.cholesky(moment[stay][:, stay])
        explained = torch.linalg.solve_triangular(factor, moment[stay][:, leave], upper=False)
        # Second moment of what the kept features cannot tell about the removed ones, and its product with the output.
        rest = torch.addmm(moment[leave][:, leave], explained.T, explained, alpha=-1)
        missing = weight[:, leave] @ rest
        error += float((missing * weight[:, leave]).sum()) / energy
        blocks = rest.view(len(removed), per, len(removed), per).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        columns = missing.view(len(weight), len(removed), per).permute(1, 2, 0)
        solved = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), columns, upper=False)
        gains[removed] += solved.square().sum((1, 2)) / energy
    return error, gains


def _narrowed(consumer: Consumer, pool: Tensor, ridge: float) -> Consumer:
    """The consumer as if the group had only the components of the pool, its weights made up for the others."""
    whole = _whole(consumer, pool)
    features = feature_index(whole, consumer.weight.shape[1] // consumer.components)
    return replace(
        consumer,
        weight=Joint(ridge=ridge)(consumer, whole),
        statistics=reorder(consumer.statistics, features),
        components=len(whole),
        in_group=len(pool),
        held_out=None,
    )


def _whole(consumer: Consumer, kept: Tensor) -> Tensor:
    return torch.cat([kept, torch.arange(consumer.in_group, consumer.components, device=kept.device)])
