"""How well a filter tells classes apart: lower bounds on the total variation between its features under two classes.

DisCEdit (Murti and Bhattacharyya, NeurIPS 2024), method.md section 5. P is a filter's feature φ(x) under one class, Q
under the others; the bounds need first and second moments only, so one pass over labelled images is enough. Everything
is float64 and vectorised over filters: means are ``[…, filters, d]``, covariances ``[…, filters, d, d]``.

Covariances are those of the sample itself (divided by n, not n − 1), so every bound is exact for the sample. A bound
stays a lower bound when something is added to a covariance; that is how singular ones and rounding are dealt with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi_cli.errors import NumericsError

# Shares that are always added to a feature's variance, of that variance and of its squared mean: what float64 second
# moments cannot resolve. They make every system regular, and a bound that they move is the lower for it.
_OF_VARIANCE = 1e-12
_OF_MEAN = 1e-12
_BISECTIONS = 60  # of an interval of length one, to the last bit of float64
_CHUNK = 2**22  # entries of one block of classes × filters


@dataclass(frozen=True)
class ClassMoments:
    """First and second moments of the features of every filter under every class, not centred.

    Attributes:
        counts: Images of each class, ``[classes]`` int64.
        mean: E[φ | class], ``[classes, filters, d]`` float64, feature units; zero for a class without images.
        second: E[φ φᵀ | class], ``[classes, filters, d, d]`` float64, feature units²; zero for a class without images.
        names: Names of the classes for messages, or None for their numbers.
    """

    counts: Tensor
    mean: Tensor
    second: Tensor
    names: Sequence[str] | None = None

    @property
    def present(self) -> Tensor:
        """Classes that have images, ``[present]`` int64 sorted."""
        return self.counts.nonzero().flatten()

    def covariance(self, cls: int | Tensor) -> Tensor:
        """Cov[φ | class], ``[filters, d, d]``, or ``[classes, filters, d, d]`` for an index tensor."""
        return _covariance(self.mean[cls], self.second[cls])


class ClassAccumulator:
    """Sums `ClassMoments` over batches; the split into batches does not matter.

    Args:
        classes: Number of classes.
        names: Names of the classes for messages, or None.
        place: What the features belong to (a layer), for messages.
    """

    def __init__(self, classes: int, *, names: Sequence[str] | None = None, place: str = "features") -> None:
        self._classes, self._names, self._place = classes, names, place
        self._counts = torch.zeros(classes, dtype=torch.int64)
        self._sum: Tensor | None = None
        self._gram: Tensor | None = None

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: φ, ``[images, filters, d]``, any floating type.
            labels: Class of each image, ``[images]`` int64 in 0 … classes − 1.

        Raises:
            NumericsError: If a feature is not finite, or a label is no class.
        """
        if features.ndim != 3 or labels.shape != features.shape[:1]:
            raise ValueError(f"features [images, filters, d] and labels [images] expected, got {tuple(features.shape)}")
        features = features.detach().double()
        labels = labels.to(features.device)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self._classes:
            wrong = labels[(labels < 0) | (labels >= self._classes)][0]
            raise NumericsError(
                f"{self._place}: a label is {int(wrong)}, but there are {self._classes} classes, numbered from 0; give "
                "labels that belong to this network."
            )
        if not bool(torch.isfinite(features).all()):
            raise NumericsError(f"{self._place}: a feature is NaN or infinite; use other images or another witness.")
        if self._sum is None or self._gram is None:
            filters, d = features.shape[1:]
            self._sum = features.new_zeros(self._classes, filters, d)
            self._gram = features.new_zeros(self._classes, filters, d, d)
        # A product with the indicator and not index_add, whose order of summation is free on a graphics card.
        member = torch.nn.functional.one_hot(labels, self._classes).T.to(features.dtype)
        self._sum += (member @ features.flatten(1)).view_as(self._sum)
        squares = features[..., :, None] * features[..., None, :]
        self._gram += (member @ squares.flatten(1)).view_as(self._gram)
        self._counts += member.sum(1).round().to(torch.int64).cpu()

    def result(self) -> ClassMoments:
        """Moments of everything so far; more may be added afterwards.

        Raises:
            NumericsError: If there was no image.
        """
        if self._sum is None or self._gram is None or not int(self._counts.sum()):
            raise NumericsError(f"{self._place}: there are no images to take class statistics from; give at least one.")
        per_class = self._counts.clamp_min(1).to(self._sum.device, torch.float64)
        return ClassMoments(
            counts=self._counts.clone(),
            mean=self._sum / per_class[:, None, None],
            second=self._gram / per_class[:, None, None, None],
            names=self._names,
        )


def class_moments(
    features: Tensor, labels: Tensor, classes: int, *, names: Sequence[str] | None = None, place: str = "features"
) -> ClassMoments:
    """Moments of features that are all here, ``[images, filters, d]``, labels ``[images]``; as `ClassAccumulator`."""
    accumulator = ClassAccumulator(classes, names=names, place=place)
    step = max(1, _CHUNK // max(1, features[0].numel() * features.shape[-1])) if len(features) else 1
    for part, own in zip(features.split(step), labels.split(step), strict=True):
        accumulator.update(part, own)
    return accumulator.result()


# ------------------------------------------------------------------------------------------------------------ witnesses


def spatial_sum(maps: Tensor) -> Tensor:
    """1ᵀx of every filter's map: the variable whose moments BatchNorm normalises by.

    Args:
        maps: ``[images, filters, …positions]`` (or ``[images, filters]``), any floating type.

    Returns:
        ``[images, filters]`` float64, input units.
    """
    return maps.detach().flatten(2).sum(2, dtype=torch.float64) if maps.ndim > 2 else maps.detach().double()


def squared_norm(maps: Tensor) -> Tensor:
    """‖x‖² of every filter's map.

    Args:
        maps: ``[images, filters, …positions]`` (or ``[images, filters]``), any floating type.

    Returns:
        ``[images, filters]`` float64, input units².
    """
    squares = maps.detach().square()  # float32 squares, float64 sums: a copy in float64 would double the memory
    return squares.flatten(2).sum(2, dtype=torch.float64) if maps.ndim > 2 else squares.double()


def sum_features(sums: Tensor) -> Tensor:
    """Feature φ = 1ᵀx, ``[images, filters]`` → ``[images, filters, 1]``."""
    return sums[..., None]


def quadratic_features(sums: Tensor) -> Tensor:
    """Features φ = [s, s²] with s = 1ᵀx over its root mean square.

    The scale is one number for each filter over all images given, the same for all classes; every bound here is
    unchanged by it, and it keeps s² and s in one range.

    Args:
        sums: 1ᵀx of all images, ``[images, filters]`` float64.

    Returns:
        ``[images, filters, 2]``, unitless.
    """
    size = sums.square().mean(0).sqrt()
    scaled = sums / torch.where(size > 0, size, torch.ones_like(size))
    return torch.stack([scaled, scaled.square()], dim=-1)


def exp_norm_features(norms: Tensor, *, largest: float = 1.0) -> Tensor:
    """Feature φ = exp(s‖x‖²), with one s ≤ 1 for each filter, the same for all classes.

    exp(‖x‖²) itself overflows for a map of norm 27, and long before that its mean is one image's. So s is the largest
    number up to 1 with s‖x‖² ≤ `largest` for every image given: where maps are small it is the published witness, and
    else a witness of the same form. A bound holds for any fixed function, hence for any s.

    Args:
        norms: ‖x‖² of all images, ``[images, filters]`` float64, ≥ 0.
        largest: Largest exponent, above 0 and at most 300 (second moments are exp(2 × that)).

    Returns:
        ``[images, filters, 1]`` in [1, exp(largest)], unitless.
    """
    if not 0 < largest <= 300:
        raise ValueError(f"largest must lie in (0, 300], got {largest}.")
    scale = (largest / norms.amax(0).clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1)
    return (norms * scale).exp()[..., None]


@dataclass(frozen=True)
class Witness:
    """One kind of feature φ of a filter's map.

    Attributes:
        summary: Maps → one number for each image and filter, ``[images, filters]`` float64. All that has to be kept.
        features: Those numbers of all images → ``[images, filters, d]``.
    """

    summary: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]


WITNESSES: Mapping[str, Witness] = {
    "sum": Witness(spatial_sum, sum_features),
    "quadratic": Witness(spatial_sum, quadratic_features),
    "exp_norm": Witness(squared_norm, exp_norm_features),
}


# --------------------------------------------------------------------------------------------------- two distributions


def one_against_rest(moments: ClassMoments, cls: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and covariance of a class (P) and of the images of all other classes together (Q).

    Args:
        moments: Of all classes.
        cls: The class, or several, ``[k]`` int64.

    Returns:
        ``mean_p [filters, d], cov_p [filters, d, d], mean_q, cov_q`` float64; with several classes, ``[k, …]`` each.

    Raises:
        NumericsError: If the class has no images, or no other class has any.
    """
    _check_present(moments, cls)
    chosen = torch.as_tensor(cls).reshape(-1)
    weights = moments.counts.double().repeat(len(chosen), 1)
    weights[torch.arange(len(chosen)), chosen] = 0
    total = weights.sum(1, keepdim=True)
    if bool((total == 0).any()):
        raise NumericsError(
            f"class {_name(moments, int(chosen[0]))} is the only one with images, so there is nothing to tell it from; "
            "give images of other classes too."
        )
    # A sum over the others, not total − own, which would lose digits to a rare rest.
    weights = (weights / total).to(moments.mean.device)
    mean = (weights @ moments.mean.flatten(1)).view(len(chosen), *moments.mean.shape[1:])
    second = (weights @ moments.second.flatten(1)).view(len(chosen), *moments.second.shape[1:])
    own_mean, own_covariance, covariance = moments.mean[chosen], moments.covariance(chosen), _covariance(mean, second)
    if isinstance(cls, Tensor) and cls.ndim:
        return own_mean, own_covariance, mean, covariance
    return own_mean[0], own_covariance[0], mean[0], covariance[0]


def between(moments: ClassMoments, a: int, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and covariance of two classes: ``mean_a [filters, d], cov_a [filters, d, d], mean_b, cov_b`` float64.

    Raises:
        NumericsError: If one of them has no images.
    """
    for cls in (a, b):
        _check_present(moments, cls)
    return moments.mean[a], moments.covariance(a), moments.mean[b], moments.covariance(b)


# --------------------------------------------------------------------------------------------------------------- bounds


def witness_bound(mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor, *, robust: float = 0.0) -> Tensor:
    """(D1)  TV ≥ ½ (f̄_P − f̄_Q)² / (f̄⁽²⁾_P + f̄⁽²⁾_Q), the largest over the d features, each a witness f.

    It is never above `fisher_bound`, which is the same bound with the best constant added to the best combination f.

    Args:
        mean_p: ``[…, d]`` float64; likewise `mean_q`.
        cov_p: ``[…, d, d]``; likewise `cov_q`.
        robust: ρ ≥ 0 for estimation error: this share of every feature's variance (both sides summed) is added to it.

    Returns:
        ``[…]`` in [0, 1].
    """
    cov_p, cov_q = _regular(mean_p, cov_p, mean_q, cov_q, robust)
    variances = (cov_p + cov_q).diagonal(dim1=-2, dim2=-1)
    seconds = variances + mean_p.square() + mean_q.square()
    return (_ratio((mean_p - mean_q).square(), seconds) / 2).amax(-1).clamp(0, 1)


def fisher_distance(mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor, *, robust: float = 0.0) -> Tensor:
    """F = Δᵀ (Σ_P + Σ_Q)⁻¹ Δ, ``[…]`` ≥ 0 and finite; arguments as `witness_bound`.

    Features that are constant on both sides but differ give a very large F; features without any variation give 0.
    """
    return _spectrum(mean_p, cov_p, mean_q, cov_q, robust)[1].sum(-1)


def fisher_bound(mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor, *, robust: float = 0.0) -> Tensor:
    """(D2)  TV ≥ F / (2 + F). Arguments and result as `witness_bound`."""
    distance = fisher_distance(mean_p, cov_p, mean_q, cov_q, robust=robust)
    return distance / (2 + distance)


def minimax_squared(mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor, *, robust: float = 0.0) -> Tensor:
    """m² for m = max_u |uᵀΔ| / (√(uᵀΣ_P u) + √(uᵀΣ_Q u)), the minimax probability machine's optimum.

    Since (a + b)² = min over 0 < t < 1 of a²/t + b²/(1 − t), m² = max_t Δᵀ (Σ_P/t + Σ_Q/(1 − t))⁻¹ Δ. In the basis that
    makes Σ_P + Σ_Q the identity and Σ_P = diag(λ) this is Σ_i z_i² t(1 − t) / (λ_i(1 − t) + (1 − λ_i)t), a concave
    function of t whose only stationary point bisection finds. t = ½ gives F/2, hence m² ≥ F/2.

    Arguments as `witness_bound`. Returns ``[…]`` ≥ 0 and finite.
    """
    shares, strengths = _spectrum(mean_p, cov_p, mean_q, cov_q, robust)
    low = torch.zeros_like(strengths[..., :1])
    high = torch.ones_like(low)
    for _ in range(_BISECTIONS):
        t = (low + high) / 2
        depth = shares * (1 - t) + (1 - shares) * t
        slope = (shares * (1 - t).square() - (1 - shares) * t.square()) / depth.square()
        rising = (strengths * slope).sum(-1, keepdim=True) > 0
        low, high = torch.where(rising, t, low), torch.where(rising, high, t)
    t = (low + high) / 2
    found = (strengths * t * (1 - t) / (shares * (1 - t) + (1 - shares) * t)).sum(-1)
    # Never below the value at t = ½, so that rounding cannot turn the order of the bounds round.
    return torch.maximum(found, strengths.sum(-1) / 2)


def minimax_published_bound(
    mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor, *, robust: float = 0.0
) -> Tensor:
    """(D3)  TV ≥ (m / (√2 + m))² as published, never above `fisher_bound`. Arguments and result as `witness_bound`."""
    m = minimax_squared(mean_p, cov_p, mean_q, cov_q, robust=robust).sqrt()
    return (m / (2**0.5 + m)).square()


def minimax_bound(mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor, *, robust: float = 0.0) -> Tensor:
    """(D3')  TV ≥ m² / (1 + m²): the best that means and covariances can say, never below `fisher_bound`.

    Arguments and result as `witness_bound`.
    """
    squared = minimax_squared(mean_p, cov_p, mean_q, cov_q, robust=robust)
    return squared / (1 + squared)


def ensemble_bound(
    mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor, *, robust: float = 0.0, published: bool = False
) -> Tensor:
    """(D4)  The larger of the Fisher bound and the minimax bound.

    With the tight minimax bound this is always that one, and with the published one always Fisher's: the ensemble is
    kept because the method names it, and because it says which part wins.

    Arguments and result as `witness_bound`; `published` takes (D3) instead of (D3').
    """
    minimax = minimax_published_bound if published else minimax_bound
    return torch.maximum(
        fisher_bound(mean_p, cov_p, mean_q, cov_q, robust=robust), minimax(mean_p, cov_p, mean_q, cov_q, robust=robust)
    )


BOUNDS: Mapping[str, Callable[..., Tensor]] = {
    "witness": witness_bound,
    "fisher": fisher_bound,
    "minimax_published": minimax_published_bound,
    "minimax": minimax_bound,
    "ensemble": ensemble_bound,
}


# ---------------------------------------------------------------------------------------------------------- all classes


def discriminability(
    moments: ClassMoments, *, bound: str = "minimax", robust: float = 0.0, least: int = 1
) -> tuple[Tensor, Tensor]:
    """Lower bounds on the total variation between every class and the rest, for every filter.

    Args:
        moments: Of all classes.
        bound: One of `BOUNDS`.
        robust: As in `witness_bound`.
        least: Images that a class must have to be looked at; a class of one or two images looks far from anything.

    Returns:
        Bounds ``[looked_at, filters]`` in [0, 1], and which classes they belong to, ``[looked_at]`` int64 sorted.

    Raises:
        NumericsError: If no class has enough images, or only one class has any.
    """
    chosen = enough(moments, least, needed=1)
    step = max(1, _CHUNK // max(1, moments.second[0].numel()))
    parts = [BOUNDS[bound](*one_against_rest(moments, part), robust=robust) for part in chosen.split(step)]
    return torch.cat(parts), chosen


def pairwise_tvs(moments: ClassMoments, *, robust: float = 0.0, least: int = 1) -> Tensor:
    """How far the best-separated pair of classes is apart under each filter, taking features as Gaussian (TVSPrune).

    1 − exp(−F/4) of two classes; for Gaussians it is never above their squared Hellinger distance, hence never above
    their total variation. A filter is prunable where it is small for *every* pair, so the largest over pairs is kept.

    Args:
        moments: Of all classes.
        robust: As in `witness_bound`.
        least: Images that a class must have to be looked at.

    Returns:
        ``[filters]`` in [0, 1).

    Raises:
        NumericsError: If fewer than two classes have enough images.
    """
    chosen = enough(moments, least, needed=2)
    means, covariances = moments.mean[chosen], moments.covariance(chosen)
    largest = means.new_zeros(means.shape[1])
    step = max(1, _CHUNK // max(1, covariances[0].numel()))
    for first in range(len(chosen) - 1):
        for start in range(first + 1, len(chosen), step):
            others = slice(start, start + step)
            mean, covariance = means[first].expand_as(means[others]), covariances[first].expand_as(covariances[others])
            distance = fisher_distance(mean, covariance, means[others], covariances[others], robust=robust)
            largest = torch.maximum(largest, distance.amax(0))
    return -torch.expm1(-largest / 4)


def enough(moments: ClassMoments, least: int, *, needed: int) -> Tensor:
    """Classes with at least `least` images, ``[…]`` int64 sorted.

    Raises:
        NumericsError: If there are fewer than `needed` of them.
    """
    chosen = (moments.counts >= max(1, least)).nonzero().flatten()
    if len(chosen) < needed:
        raise NumericsError(
            f"only {len(chosen)} of {len(moments.counts)} classes have at least {max(1, least)} images "
            f"({int(moments.counts.sum())} images in all), expected {needed} such classes; give more images with "
            "data.num_samples."
        )
    return chosen


# -------------------------------------------------------------------------------------------------------------- helpers


def _covariance(mean: Tensor, second: Tensor) -> Tensor:
    covariance = second - mean[..., :, None] * mean[..., None, :]
    # A variance of rounding may come out negative.
    covariance.diagonal(dim1=-2, dim2=-1).clamp_min_(0)
    return covariance


def _regular(
    mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor, robust: float
) -> tuple[Tensor, Tensor]:
    """Both covariances with the same diagonal added: ρ and what float64 cannot resolve, half to each."""
    if not robust >= 0:
        raise ValueError(f"robust must be at least 0, got {robust}.")
    variances = (cov_p + cov_q).diagonal(dim1=-2, dim2=-1)
    added = (robust + _OF_VARIANCE) * variances + _OF_MEAN * (mean_p.square() + mean_q.square())
    extra = torch.diag_embed(added / 2)
    return cov_p + extra, cov_q + extra


def _spectrum(
    mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor, robust: float
) -> tuple[Tensor, Tensor]:
    """In the basis where Σ_P + Σ_Q = I and Σ_P = diag(λ): λ ``[…, d]`` in [0, 1], and z² = squares of Δ's parts."""
    cov_p, cov_q = _regular(mean_p, cov_p, mean_q, cov_q, robust)
    difference = mean_p - mean_q
    together = cov_p + cov_q
    size = together.diagonal(dim1=-2, dim2=-1).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))  # nothing varies and nothing differs: Δ = 0 there
    if difference.shape[-1] == 1:
        variance_p = _ratio(cov_p[..., 0], size.square())
        return variance_p.clamp(0, 1), (difference / size).square()
    # Unit diagonals first: then neither a feature's unit nor another's size decides what counts as small.
    together = together / (size[..., :, None] * size[..., None, :])
    own = cov_p / (size[..., :, None] * size[..., None, :])
    values, vectors = torch.linalg.eigh(together)
    # The diagonal is 1 (or 0 for a dead feature), so this floor is far below anything that can be resolved.
    half = vectors / values.clamp_min(_OF_VARIANCE / 2).sqrt()[..., None, :]
    shares, turn = torch.linalg.eigh(half.mT @ own @ half)
    strengths = (turn.mT @ (half.mT @ (difference / size)[..., None]))[..., 0].square()
    return shares.clamp(0, 1), strengths


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp_min(torch.finfo(whole.dtype).tiny), torch.zeros_like(part))


def _check_present(moments: ClassMoments, cls: int | Tensor) -> None:
    for one in torch.as_tensor(cls).reshape(-1).tolist():
        if not 0 <= one < len(moments.counts):
            raise NumericsError(
                f"class {one} does not exist: there are {len(moments.counts)} classes, numbered from 0; give one of "
                "them."
            )
        if not int(moments.counts[one]):
            raise NumericsError(
                f"class {_name(moments, one)} has no images among the {int(moments.counts.sum())} given, so nothing "
                "can be said of it; give images of it or more images in all."
            )


def _name(moments: ClassMoments, cls: int) -> str:
    return str(cls) if moments.names is None else f"{cls} ({moments.names[cls]})"
