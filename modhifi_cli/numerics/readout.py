"""What features still say about classes: a linear probe, the nearest class mean, and the recall of either.

A readout is trained on features of one set of images and asked about another. Features are ``[images, features]``
float, labels ``[images]`` int64. Every feature is standardised with the mean and spread of the training images, so that
neither readout depends on the units of a layer.
"""

import warnings

import torch
from torch import Tensor

from modhifi_cli.errors import NumericsError


def linear_probe(
    features: Tensor, labels: Tensor, asked: Tensor, *, strength: float = 1.0, iterations: int = 200
) -> Tensor:
    """Classes that multinomial logistic regression gives, each class of the training images weighing the same.

    Args:
        features: Of the training images, ``[images, features]``, finite.
        labels: Of the training images, ``[images]`` int64, at least two classes.
        asked: Features of other images, ``[others, features]``.
        strength: Inverse of the ridge on the weights, above 0 (scikit-learn's ``C``).
        iterations: Limit of L-BFGS; a probe that has not converged by then is used as it stands.

    Returns:
        ``[others]`` int64, one of the classes in `labels`.

    Raises:
        NumericsError: If features are not finite, or there are fewer than two classes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    features, asked = _standardised(features, labels, asked)
    probe = LogisticRegression(C=strength, max_iter=iterations, class_weight="balanced")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(features.numpy(), labels.numpy())
    return torch.from_numpy(probe.predict(asked.numpy())).to(torch.int64)


def nearest_class_mean(features: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """The class whose mean feature is nearest in Euclidean distance; arguments, result and errors as `linear_probe`.

    Of equally near classes the lowest is given, so features without any variation give the lowest class to all.
    """
    features, asked = _standardised(features, labels, asked)
    classes = labels.unique()
    means = torch.stack([features[labels == cls].mean(0) for cls in classes])
    # Squares written out lose digits where means are far from zero; these are standardised, and float64.
    return classes[torch.cdist(asked, means, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)]


def recall(given: Tensor, labels: Tensor) -> dict[int, float]:
    """Share of each class's images that were given that class, in 0 … 1, by class in rising order.

    Args:
        given: Classes given, ``[images]`` int64.
        labels: True classes, ``[images]`` int64.
    """
    return {int(cls): float((given[labels == cls] == cls).double().mean()) for cls in labels.unique()}


def _standardised(features: Tensor, labels: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    features, asked = features.double(), asked.double()
    if not (features.isfinite().all() and asked.isfinite().all()):
        raise NumericsError("a readout needs finite features, got NaN or infinity; check the weights of the network.")
    if len(labels.unique()) < 2:
        raise NumericsError("a readout needs images of at least two classes, got one; give images of more classes.")
    mean, spread = features.mean(0), features.std(0, correction=0)
    # A constant feature says nothing and becomes zero; its rounding must not be blown up to look like a signal.
    spread = torch.where(spread > 1e-6 * mean.abs(), spread, torch.full_like(spread, torch.inf))
    return (features - mean) / spread, (asked - mean) / spread
