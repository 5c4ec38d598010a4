"""ModHiFi-U (arXiv:2511.19566): pairs (output, component) of late layers that carry the forget class are zeroed or negated."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modhifi_cli.engine.gathering import LayerMoments
from modhifi_cli.errors import ConfigError
from modhifi_cli.numerics.contributions import ContributionMoments, contribution_moments
from modhifi_cli.numerics.fidelity import saliency, singleton_fidelity
from modhifi_cli.records import Consumer, ModuleEdit
from modhifi_cli.unlearning.method import Fit, LayerEdit, Method, Site, given_share, saved

_CARRIES_NOTHING = 1e-3  # fidelity that is as good as none, so that pairs of no use to anybody are no great finding


class ModHiFiU(Method):
    """The pairs (output, component) that carry the forget class are zeroed or negated.

    Args:
        fraction: Share of a layer's pairs that go, or ``"auto"``: the smallest that forgets.
        operation: ``"zero"`` (BatchNorm networks), ``"negate"`` (LayerNorm networks with residual paths), or
            ``"auto"``: by whether the network has a BatchNorm.
        score: ``"singleton"`` (M4) or ``"saliency"`` (M6), both of forget samples alone as published; or
            ``"contrastive"`` (ours), M4 of forget samples over M4 of retain samples: what carries both stays.

    Raises:
        ConfigError: If an argument is out of range.
    """

    def __init__(self, *, fraction: float | str = "auto", operation: str = "auto", score: str = "singleton") -> None:
        if operation not in ("auto", "zero", "negate"):
            raise ConfigError(f"method.operation must be auto, zero or negate; got {operation!r}.")
        if score not in ("singleton", "saliency", "contrastive"):
            raise ConfigError(f"method.score must be singleton, saliency or contrastive; got {score!r}.")
        self.forget_only = score != "contrastive"  # what retain samples need has to be seen to be spared
        self.given = given_share("fraction", fraction)
        self.operation = operation
        self.score = score

    def fit(self, site: Site) -> Fit:
        """As `Method.fit`."""
        operation = self.operation
        if operation == "auto":
            norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in site.model.modules())
            operation = "zero" if norms else "negate"
        return _PairScores(site, operation, self.score)


class _PairScores:
    def __init__(self, site: Site, operation: str, score: str) -> None:
        self._site, self._operation, self._score = site, operation, score
        self._moments = {forget: site.moments() for forget in ((True, False) if score == "contrastive" else (True,))}

    def update(self, inputs: Tensor, numbers: Tensor, given: Mapping[str, Tensor]) -> None:
        for forget, moments in self._moments.items():
            use = self._site.fitted(numbers, forget=forget)
            if bool(use.any()):
                moments.update(inputs[use.to(inputs.device)])

    def solve(self, strength: float) -> LayerEdit:
        layer = self._site.layer
        weight = layer.module.weight.detach()
        scores = (saliency if self._score == "saliency" else singleton_fidelity)(self._contributions(True))
        if self._score == "contrastive":
            scores = scores / (singleton_fidelity(self._contributions(False)) + _CARRIES_NOTHING)
        count = max(1, round(strength * scores.numel()))
        chosen = scores.flatten().argsort(descending=True, stable=True)[:count]
        factor = torch.ones(scores.numel(), dtype=weight.dtype, device=weight.device)
        factor[chosen] = 0.0 if self._operation == "zero" else -1.0
        factor = factor.view(*scores.shape, *[1] * (weight.ndim - 2))
        return LayerEdit(
            (ModuleEdit(layer.name, tensors={"weight": saved(weight * factor)}),),
            {"pairs": count, "of": scores.numel(), "operation": self._operation},
        )

    def _contributions(self, forget: bool) -> ContributionMoments:
        moments: LayerMoments = self._moments[forget]
        components = self._site.layer.module.weight.shape[1]
        return contribution_moments(
            Consumer(
                name=self._site.layer.name,
                weight=self._site.weight,
                statistics=moments.result().statistics,
                components=components,
                in_group=components,
                centred=self._site.norm is not None,
            )
        )
