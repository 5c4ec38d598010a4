"""How much of a layer's output a set of its input components carries: subset, singleton, layer and joint fidelity.

All are shares of output energy, 1 for everything. Subset and singleton fidelity let every contribution be rescaled,
joint fidelity lets the kept weights change freely, layer fidelity takes the weight as it is, which makes it the number
to report.
"""

import torch
from torch import Tensor

from modhifi_cli.numerics.contributions import ContributionMoments, output_energy, output_moment, remembered
from modhifi_cli.numerics.linalg import feature_index, solve_positive
from modhifi_cli.numerics.regression import kept_weight, regressions
from modhifi_cli.records import Consumer


def subset_fidelity(gram: Tensor, kept: Tensor) -> Tensor:
    """Share of output energy that the kept components rebuild, each optimally rescaled (M3).

    ModHiFi, arXiv:2511.19566:  FS_c(C) = max_δ (1 − E[(y_c − Σ_{i∈C} δ_i a_{ci})²] / e_c) = r_Cᵀ Q_CC⁺ r_C / e_c.

    Args:
        gram: Similarity matrices Q_c, ``[..., components, components]`` float64, output units².
        kept: Kept components, ``[kept]`` int64; may be empty.

    Returns:
        ``[...]`` in [0, 1], unitless; 1 for all components, never falling when one is added. An output without energy
        scores 0.
    """
    batch = gram.shape[:-2]
    gram = gram.reshape(-1, *gram.shape[-2:])
    energy = gram.sum((1, 2))
    target = gram.sum(2).index_select(1, kept)
    scales = solve_positive(gram.index_select(1, kept).index_select(2, kept), target) if len(kept) else target
    return _share((scales * target).sum(1), energy).clamp(0, 1).view(batch)


def singleton_fidelity(moments: ContributionMoments) -> Tensor:
    """Share of each output's energy that each component rebuilds alone, rescaled optimally (M4).

    ModHiFi, arXiv:2511.19566:  s_{ci} = r_{ci}² / (d_{ci} e_c).

    Args:
        moments: Of one layer.

    Returns:
        ``[outputs, components]`` float64 in [0, 1], unitless. A component without energy and a dead output score 0.

    Raises:
        NumericsError: If every output of the layer is dead.
    """
    scores = _share(moments.r.square(), moments.d * moments.e[:, None]).clamp_(max=1)
    return scores * moments.alive[:, None]


def saliency(moments: ContributionMoments) -> Tensor:
    """Unnormalised saliency R_{ci} = r_{ci} = E[y_c a_{ci}] (M6), as in the paper's vision appendix.

    Args:
        moments: Of one layer.

    Returns:
        ``[outputs, components]`` float64, output units², any sign. A dead output scores 0.

    Raises:
        NumericsError: If every output of the layer is dead.
    """
    return moments.r * moments.alive[:, None]


def layer_fidelity(consumer: Consumer, kept: Tensor, weight: Tensor | None = None) -> float:
    """Share of the layer's output energy that is left with only the kept components: 1 − Σ_c err_c / Σ_c e_c.

    Exact on the calibration rows, and centred where the consumer is (its constant is then restored elsewhere).

    Args:
        consumer: The layer before the edit.
        kept: Kept components of its whole input, ``[kept]`` int64 sorted.
        weight: Weight on the kept features, ``[outputs, kept features]``; None for the sliced original.

    Returns:
        At most 1; below 0 where the edit does more harm than removing the layer.

    Raises:
        NumericsError: If the layer's output has no energy at all.
    """
    original = consumer.weight.double()
    features = feature_index(kept.to(original.device), original.shape[1] // consumer.components)
    change = original.clone()
    if weight is None:
        change[:, features] = 0
    else:
        change[:, features] -= weight.to(change)
    energy = output_energy(consumer)
    return 1 - max(float((output_moment(consumer, change) * change).sum()), 0.0) / energy


@remembered
def joint_fidelity(consumer: Consumer, kept: Tensor) -> float:
    """Joint subset fidelity: the share of output energy that a linear map of the kept features can rebuild at best.

    The layer fidelity of the exact joint least squares (M8 at λ = 0), so it says what a kept set is worth whichever
    rule chose it and however it is then repaired. On the calibration rows it is never below the fidelity of any
    weight on the same features, and never falls when a component is added.

    Args:
        consumer: The layer before the edit.
        kept: Kept components of its whole input, ``[kept]`` int64 sorted; may be empty.

    Returns:
        In [0, 1], unitless. 1 where there are no more rows than kept features: few rows claim too much.

    Raises:
        NumericsError: If the layer's output has no energy at all.
    """
    every = regressions(consumer, kept)[0]
    if consumer.centred:
        every = every.about(every.inputs, every.targets)
    weight = kept_weight(consumer, kept) + every.widened(every.nearest())
    return min(max(layer_fidelity(consumer, kept, weight), 0.0), 1.0)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    alive = whole > 0
    return torch.where(alive, part / torch.where(alive, whole, torch.ones_like(whole)), torch.zeros_like(part))
