"""Membership inference: can one tell from a network's answers which images it was trained on?

Two attacks. *Confidence*: a support vector classifier on the probability of the true class, trained on images of the
retain classes with known membership and asked about others, as in the literature on machine unlearning (Jia et al.,
2023, arXiv:2304.04934). *Loss*: whether an image's cross-entropy is below a threshold (Yeom et al., 2018,
arXiv:1709.01604), here without choosing one: the area under the curve over all thresholds. Both are at chance, 0.5, on
a network that was trained on none of the images.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from modhifi_cli.errors import NumericsError


@dataclass(frozen=True)
class Attack:
    """What the confidence attack finds.

    Attributes:
        accuracy: Balanced accuracy in telling members from non-members that it was not trained on, 0 … 1; chance 0.5.
        error: Standard error of that accuracy.
        trained_on: Members and as many non-members that the classifier was trained on.
        asked: Members and as many non-members that the accuracy is measured on.
        as_non_members: Share of each further set of images that it takes for non-members, 0 … 1.
    """

    accuracy: float
    error: float
    trained_on: int
    asked: int
    as_non_members: dict[str, float]


def confidence_attack(
    members: Tensor, others: Tensor, further: dict[str, Tensor], *, samples: int = 1000, seed: int = 0
) -> Attack:
    """Train a support vector classifier on confidences and measure it on those that were held back.

    As many members as non-members are used, at most `samples` of each; half of them train, the others are asked.

    Args:
        members: Probability of the true class for images that the network was trained on, ``[members]`` in 0 … 1.
        others: The same for images that it was not trained on, ``[others]``.
        further: Sets of images to be sorted, by name, each ``[images]``; an empty one is left out.
        samples: Limit of each side.
        seed: Of the draw.

    Raises:
        NumericsError: If there are fewer than four of either, or a value is not a number.
    """
    from sklearn.svm import SVC

    if not all(values.isfinite().all() for values in (members, others, *further.values())):
        raise NumericsError("a membership attack needs finite confidences, got NaN; check the weights of the network.")
    count = min(len(members), len(others), samples)
    if count < 4:
        raise NumericsError(
            f"a membership attack needs at least four members and four others, got {len(members)} and {len(others)}; "
            "give more calibration and evaluation images."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = [side[torch.randperm(len(side), generator=generator)[:count]].double() for side in (members, others)]
    half = count // 2
    trained = torch.cat([side[:half] for side in drawn])[:, None].numpy()
    # C = 3 and gamma = auto are the literature's; one feature, so gamma = 1.
    classifier = SVC(C=3.0, gamma="auto", kernel="rbf").fit(trained, np.repeat([1, 0], half))

    def share_of_members(values: Tensor) -> float:
        return float(classifier.predict(values.double()[:, None].numpy()).mean())

    hits, misses = (share_of_members(side[half:]) for side in drawn)
    left = count - half
    error = 0.5 * sqrt((hits * (1 - hits) + misses * (1 - misses)) / left)
    as_others = {name: 1 - share_of_members(values) for name, values in further.items() if len(values)}
    return Attack((hits + 1 - misses) / 2, error, half, left, as_others)


def area_under_curve(low: Tensor, high: Tensor) -> tuple[float, float]:
    """Chance that a value of one set is below one of the other, ties counting half; and its error under chance.

    With the losses of members and of other images this is the loss-threshold attack over all thresholds: 0.5 is chance,
    above it members have smaller losses.

    Args:
        low: ``[first]``, may hold infinity, at least one.
        high: ``[second]``, likewise.

    Returns:
        The area in 0 … 1, and its standard error where both sets come from one distribution.
    """
    values = torch.cat([low.double(), high.double()])
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    # Mid-ranks: equal values share the mean of the ranks that they take up.
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts.double() - 1) / 2)[place]
    first, second = len(low), len(high)
    below = first * second - (float(ranks[:first].sum()) - first * (first + 1) / 2)
    return below / (first * second), sqrt((first + second + 1) / (12 * first * second))
