"""Scores: how much each component of a group matters. Every class here can be named in a configs/scoring file.

A score is called with the group's consumers and producers and gives votes: rows of scores over the group's components,
one row for each voter (an output of a consumer, or one for a whole criterion). Selection does the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from modhifi_cli.numerics.contributions import ContributionMoments, contribution_energies, contribution_moments
from modhifi_cli.numerics.fidelity import saliency, singleton_fidelity
from modhifi_cli.records import Consumer


@dataclass(frozen=True)
class Scores:
    """Votes on the components of one group.

    Attributes:
        votes: For each consumer (or criterion) ``[voters, in_group]`` float64, larger is more worth keeping.
        dead_outputs: Outputs without energy that cast no vote.
    """

    votes: tuple[Tensor, ...]
    dead_outputs: int = 0


@dataclass(frozen=True)
class Singleton:
    """Singleton fidelity (M4), the paper's score: what each component rebuilds alone of each output."""

    needs_statistics: ClassVar[bool] = True

    def __call__(
        self,
        consumers: Sequence[Consumer],
        producers: Sequence[Tensor] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Scores:
        """Votes of every live output of every consumer, in [0, 1]. Raises NumericsError if a layer is dead."""
        return _output_votes(consumers, singleton_fidelity)


@dataclass(frozen=True)
class Saliency:
    """Unnormalised saliency (M6), the score of the paper's vision appendix: E[y_c a_{ci}], output units²."""

    needs_statistics: ClassVar[bool] = True

    def __call__(
        self,
        consumers: Sequence[Consumer],
        producers: Sequence[Tensor] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Scores:
        """Votes of every live output of every consumer. Raises NumericsError if a layer is dead."""
        return _output_votes(consumers, saliency)


@dataclass(frozen=True)
class Energy:
    """Energy of a component's contributions, as in Wanda: E[x_i²] ‖W_{:,i}‖² (M7), the diagonal of Σ_c Q_c.

    A component of several features sums E[(w_{ci}ᵀ x_i)²] over the outputs, which is the same for one feature. Raw
    moments: a constant input counts as much as a varying one.
    """

    needs_statistics: ClassVar[bool] = True

    def __call__(
        self,
        consumers: Sequence[Consumer],
        producers: Sequence[Tensor] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Scores:
        """One row of energies for each consumer, output units²."""
        return _energy_votes(consumers, centred=False)


@dataclass(frozen=True)
class Fluctuation:
    """Energy of what varies in a component's contributions, as in FLAP: Var[x_i] ‖W_{:,i}‖².

    A component of several features sums Var[w_{ci}ᵀ x_i] over the outputs, which is the same for one feature. Made for
    layers whose constant part is restored in a bias or BatchNorm.
    """

    needs_statistics: ClassVar[bool] = True

    def __call__(
        self,
        consumers: Sequence[Consumer],
        producers: Sequence[Tensor] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Scores:
        """One row of variances for each consumer, output units²."""
        return _energy_votes(consumers, centred=True)


@dataclass(frozen=True)
class Magnitude:
    """Norm of all the weights that produce a component, over all producers: the baseline without data.

    Attributes:
        order: 1 or 2.
    """

    order: int = 2
    needs_statistics: ClassVar[bool] = False

    def __call__(
        self, consumers: Sequence[Consumer], producers: Sequence[Tensor], *, generator: torch.Generator | None = None
    ) -> Scores:
        """One row of norms, weight units. Producers are ``[in_group, weights]`` each."""
        powers = [weights.double().flatten(1).abs().pow(self.order).sum(1) for weights in producers]
        return Scores((torch.stack(powers).sum(0).pow(1 / self.order)[None],))


@dataclass(frozen=True)
class Random:
    """A seeded random order: the baseline without knowledge."""

    needs_statistics: ClassVar[bool] = False

    def __call__(
        self, consumers: Sequence[Consumer], producers: Sequence[Tensor] = (), *, generator: torch.Generator
    ) -> Scores:
        """One row uniform in [0, 1), drawn from the generator."""
        size = consumers[0].in_group if consumers else len(producers[0])
        return Scores((torch.rand(1, size, generator=generator, dtype=torch.float64),))


def _output_votes(consumers: Sequence[Consumer], score: Callable[[ContributionMoments], Tensor]) -> Scores:
    votes, dead = [], 0
    for consumer in consumers:
        moments = contribution_moments(consumer)
        votes.append(score(moments)[moments.alive, : consumer.in_group])
        dead += len(moments.e) - len(votes[-1])
    return Scores(tuple(votes), dead)


def _energy_votes(consumers: Sequence[Consumer], *, centred: bool) -> Scores:
    energies = [contribution_energies(replace(consumer, centred=centred)) for consumer in consumers]
    return Scores(
        tuple(part.sum(0)[None, : consumer.in_group] for part, consumer in zip(energies, consumers, strict=True))
    )
