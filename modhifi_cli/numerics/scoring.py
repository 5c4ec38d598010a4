"""Scores: how much each component of a group matters. Every class here can be named in a configs/scoring file.

A score is called with the group's consumers and producers and gives votes: rows of scores over the group's components,
one row for each voter (an output of a consumer, or one for a whole criterion). Selection does the rest. Scores that say
`needs_labels` are also given the places where the components can be looked at, with the images' classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from modhifi_cli.errors import ConfigError, UnsupportedModelError, is_number, is_whole, nearest
from modhifi_cli.numerics.contributions import ContributionMoments, contribution_energies, contribution_moments
from modhifi_cli.numerics.discriminability import (
    BOUNDS,
    WITNESSES,
    ClassMoments,
    class_moments,
    discriminability,
    pairwise_tvs,
)
from modhifi_cli.numerics.fidelity import saliency, singleton_fidelity
from modhifi_cli.numerics.moments import second_moment
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
    needs_labels: ClassVar[bool] = False

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
    needs_labels: ClassVar[bool] = False

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
    needs_labels: ClassVar[bool] = False

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
    needs_labels: ClassVar[bool] = False

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
class Wanda:
    """Wanda's score of a weight, |W| times the root mean square of its input (arXiv:2306.11695), summed by components."""

    needs_statistics: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def __call__(
        self,
        consumers: Sequence[Consumer],
        producers: Sequence[Tensor] = (),
        *,
        generator: torch.Generator | None = None,
    ) -> Scores:
        """One row of sums for each consumer, output units."""
        votes = []
        for consumer in consumers:
            size = second_moment(consumer.statistics, centred=False).diagonal().clamp(min=0).sqrt()
            each = (consumer.weight.double().abs().to(size) * size).sum(0)
            votes.append(each.view(consumer.components, -1).sum(1)[None, : consumer.in_group])
        return Scores(tuple(votes))


@dataclass(frozen=True)
class Magnitude:
    """Norm of all the weights that produce a component, over all producers: the baseline without data.

    Attributes:
        order: 1 or 2.
    """

    order: int = 2
    needs_statistics: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

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
    needs_labels: ClassVar[bool] = False

    def __call__(
        self, consumers: Sequence[Consumer], producers: Sequence[Tensor] = (), *, generator: torch.Generator
    ) -> Scores:
        """One row uniform in [0, 1), drawn from the generator."""
        size = consumers[0].in_group if consumers else len(producers[0])
        return Scores((torch.rand(1, size, generator=generator, dtype=torch.float64),))


@dataclass(frozen=True)
class Place:
    """What the images look like to a group's components at one place of the network, with the images' classes.

    Attributes:
        name: Module at whose input that is, for messages.
        summaries: One number for each image and component, ``[images, in_group]`` float64: the score's `summary` of
            the component's map.
        labels: Class of each image, ``[images]`` int64.
        classes: Number of classes.
    """

    name: str
    summaries: Tensor
    labels: Tensor
    classes: int


@dataclass(frozen=True)
class DisCEditSP:
    """DisCEdit-SP: how far apart a component's features lie under the class that it knows best and under the others.

    Murti and Bhattacharyya, NeurIPS 2024. The score is a lower bound on the total variation, the largest over classes.
    A component that is read in several places counts with the largest of them.

    Attributes:
        witness: Feature of a map, of `discriminability.WITNESSES`: ``"sum"``, ``"quadratic"`` or ``"exp_norm"``.
        bound: Of `discriminability.BOUNDS`: ``"witness"`` (D1), ``"fisher"`` (D2), ``"minimax_published"`` (D3),
            ``"minimax"`` (D3') or ``"ensemble"`` (D4).
        robust: ρ ≥ 0 against estimation error, a share of every feature's variance.
        least_images: Images that a class must have to be looked at, at least 1.

    Raises:
        ConfigError: If one of these is unknown or out of range.
    """

    witness: str = "sum"
    bound: str = "minimax"
    robust: float = 0.0
    least_images: int = 10
    needs_statistics: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    def __post_init__(self):
        _check_class_settings(self.witness, self.robust, self.least_images)
        if self.bound not in BOUNDS:
            raise ConfigError(f"scoring.bound: unknown bound '{self.bound}', {nearest(str(self.bound), BOUNDS)}")

    def summary(self, maps: Tensor) -> Tensor:
        """What has to be kept of maps ``[images, components, …positions]``: ``[images, components]`` float64."""
        return WITNESSES[self.witness].summary(maps)

    def __call__(
        self,
        consumers: Sequence[Consumer],
        producers: Sequence[Tensor] = (),
        *,
        generator: torch.Generator | None = None,
        places: Sequence[Place],
    ) -> Scores:
        """One row in [0, 1]. Raises NumericsError if too few classes have enough images."""
        found = [
            discriminability(
                _moments_at(place, self.witness), bound=self.bound, robust=self.robust, least=self.least_images
            )[0].amax(0)
            for place in places
        ]
        return Scores((torch.stack(found).amax(0)[None],))


@dataclass(frozen=True)
class TVSPrune:
    """TVSPrune: how far the best-separated pair of classes lies apart, taking a component's features as Gaussian.

    1 − exp(−F/4) by pairs (method.md section 5); a component is the first to go that is small for every pair. A
    component that is read in several places counts with the largest of them.

    Attributes:
        witness: As in `DisCEditSP`.
        robust: As in `DisCEditSP`.
        least_images: As in `DisCEditSP`.

    Raises:
        ConfigError: If one of these is unknown or out of range.
    """

    witness: str = "sum"
    robust: float = 0.0
    least_images: int = 10
    needs_statistics: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    def __post_init__(self):
        _check_class_settings(self.witness, self.robust, self.least_images)

    def summary(self, maps: Tensor) -> Tensor:
        """As `DisCEditSP.summary`."""
        return WITNESSES[self.witness].summary(maps)

    def __call__(
        self,
        consumers: Sequence[Consumer],
        producers: Sequence[Tensor] = (),
        *,
        generator: torch.Generator | None = None,
        places: Sequence[Place],
    ) -> Scores:
        """One row in [0, 1). Raises NumericsError if fewer than two classes have enough images."""
        found = [
            pairwise_tvs(_moments_at(place, self.witness), robust=self.robust, least=self.least_images)
            for place in places
        ]
        return Scores((torch.stack(found).amax(0)[None],))


def _check_class_settings(witness: str, robust: float, least_images: int) -> None:
    if witness not in WITNESSES:
        raise ConfigError(f"scoring.witness: unknown witness '{witness}', {nearest(str(witness), WITNESSES)}")
    if not is_number(robust) or not 0 <= robust < float("inf"):
        raise ConfigError(f"scoring.robust must be a number of at least 0, got {robust!r}: set it to 0.")
    if not is_whole(least_images) or least_images < 1:
        raise ConfigError(f"scoring.least_images must be a whole number of at least 1, got {least_images!r}.")


def _moments_at(place: Place, witness: str) -> ClassMoments:
    features = WITNESSES[witness].features(place.summaries)
    if len(features) != len(place.labels):  # windows of an image stand beside each other like images
        raise UnsupportedModelError(
            f"{place.name}: expected one map for each of {len(place.labels)} images, got {len(features)}, since this "
            "layer reads images in parts; choose a scoring that asks for no classes, such as scoring=singleton."
        )
    return class_moments(features, place.labels, place.classes, place=place.name)


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
