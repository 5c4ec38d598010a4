"""Collapse: late blocks answer with what the classes that stay look like, and with nothing else.

Behind a block every image shall show a mixture of the mean features of the retain classes, mixed as the dense network
would answer if the forget classes did not exist:

    t(x) = Σ_k p_k(x) m_k,      p = softmax of the dense logits without the forget classes,  m_k = E[h | class k]

so that all that is left of an image there is how the other classes share it, which is what a network that never saw the
forgotten class could say. The layer that ends the block is solved for it by least squares over retain rows and, with
weight β, forget rows (`numerics.contrast`); the residual stream s is part of the target, o = t − s, since a branch that
kept its own part alone would leave the class in the shortcut. The classifier behind is solved for the dense logits of
the retain images and their mixture on the forget images.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from modhifi_cli.errors import ConfigError, is_number
from modhifi_cli.numerics.batchnorm import input_scale
from modhifi_cli.numerics.contrast import Aim
from modhifi_cli.numerics.cross import CrossMoments
from modhifi_cli.numerics.moments import second_moment
from modhifi_cli.records import Statistics
from modhifi_cli.unlearning.method import (
    BETAS,
    Fit,
    LayerEdit,
    Method,
    Samples,
    Site,
    check_depth,
    check_ridge,
    check_shares,
    given_beta,
)


class CollapseU(Method):
    """Ours: what late blocks give is rebuilt from the mean features of the classes that stay.

    Args:
        beta: Weight β of the forget samples, or ``"auto"``: the largest tried whose loss of retain accuracy on held-out
            calibration images stays within what is allowed.
        depth: Blocks in front of the classifier whose last layer is edited.
        collapse: 0 … 1: how far retain samples are moved to their mixture as well, in the network's last block.
        earlier: The same in the blocks before it.
        sharpness: Above 0: 1 mixes forget samples as the dense network would answer them without their class; the
            larger, the more each goes to the one class that it resembles most.
        ridge: Towards the present weights, times the mean energy of a feature.

    Raises:
        ConfigError: If an argument is out of range.
    """

    strength = "beta"
    strengths = BETAS
    edits_classifier = True
    closings = True

    def __init__(
        self,
        *,
        beta: float | str = 0.5,
        depth: int = 3,
        ridge: float = 1e-3,
        collapse: float = 1.0,
        earlier: float = 0.0,
        sharpness: float = 4.0,
    ) -> None:
        self.given = given_beta(beta)
        check_depth(depth, least=1)
        check_ridge(ridge)
        check_shares(collapse=collapse, earlier=earlier)
        if not is_number(sharpness) or not 0 < sharpness < 1e6:
            raise ConfigError(f"method.sharpness must be a number above 0; got {sharpness!r}.")
        self.sharpness = float(sharpness)
        self.collapse, self.earlier = float(collapse), float(earlier)
        self.depth, self.ridge = depth, float(ridge)

    def fit(self, site: Site) -> Fit:
        """As `Method.fit`."""
        return _Mixtures(site, self)


class _Mixtures:
    """Moments of inputs and of wanted outputs, of retain and of forget samples."""

    def __init__(self, site: Site, method: CollapseU) -> None:
        self._site, self._ridge, layer = site, method.ridge, site.layer
        self._share = 1.0 if layer.classifier else method.collapse if layer.closing.last else method.earlier
        self._posterior = site.samples.posterior(method.sharpness)
        self._means = _class_logits(site.samples) if site.means is None else site.means
        # All positions, always: the wanted outputs are known for each.
        self._moments = {forget: site.moments(everywhere=True) for forget in (False, True)}
        self._cross = {forget: CrossMoments(layer.module, name=layer.name) for forget in (False, True)}

    @torch.no_grad()
    def update(self, inputs: Tensor, numbers: Tensor, given: Mapping[str, Tensor]) -> None:
        wanted = self._wanted(inputs, numbers, given)
        if self._site.layer.positions is not None:
            read = self._site.layer.positions.to(inputs.device)
            inputs, wanted = inputs[:, read], wanted[:, read]
        for forget in (False, True):
            use = self._site.fitted(numbers, forget=forget).to(inputs.device)
            if bool(use.any()):
                self._moments[forget].update(inputs[use])
                self._cross[forget].update(inputs[use], wanted[use])

    def solve(self, strength: float) -> LayerEdit:
        retain, forget = (self._moments[which].result().statistics for which in (False, True))
        kept, moved = (self._cross[which].result() for which in (False, True))
        _, edit = self._site.contrast(
            retain,
            forget,
            Aim(moved.cross, moved.mean),
            beta=strength,
            ridge=self._ridge,
            retain_aim=self._blended(retain, Aim(kept.cross, kept.mean)),
        )
        closing = self._site.layer.closing
        if closing is None:
            return edit
        return replace(edit, facts={**edit.facts, "place": closing.place, "residual": closing.stream})

    def _blended(self, retain: Statistics, mixture: Aim) -> Aim:
        """What the retain rows shall give: some of what they give now, some of their mixture."""
        weight, bias = self._site.weight, self._site.bias
        present = weight @ second_moment(retain, centred=False) + torch.outer(bias, retain.mean)
        return Aim(
            self._share * mixture.cross + (1 - self._share) * present,
            self._share * mixture.mean + (1 - self._share) * (weight @ retain.mean + bias),
        )

    def _wanted(self, inputs: Tensor, numbers: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The outputs of the layer, before a BatchNorm, that give the mixture: of the shape of its output."""
        layer, samples, norm = self._site.layer, self._site.samples, self._site.norm
        posterior, means = self._posterior[numbers].to(inputs), self._means.to(inputs)
        mixture = (posterior @ means.flatten(1)).view(-1, *means.shape[1:])
        if layer.classifier:
            # Retain images keep their logits, but for those of the forget classes, which are theirs to no one.
            logits = samples.logits[numbers].to(inputs)
            columns = list(samples.forget_classes)
            logits[:, columns] = means[0, columns]
            return torch.where(samples.forget[numbers].to(inputs.device)[:, None], mixture, logits)
        own = layer.module.forward(inputs)  # not a call: hooks must not run again
        if norm is None:
            return layer.closing.solved(mixture - layer.closing.beside(own, given), own)
        stream = layer.closing.beside(norm.forward(own), given)
        scale, usable = input_scale(norm.running_var, norm.eps, None if norm.weight is None else norm.weight.detach())
        shift = torch.zeros_like(scale) if norm.bias is None else norm.bias.detach()
        shape = [1, -1] + [1] * (own.dim() - 2)
        solved = (mixture - stream - shift.view(shape)) * scale.view(shape) + norm.running_mean.view(shape)
        # Outputs whose γ is next to nothing stay as they are.
        return torch.where(usable.view(shape), solved, own)


def _class_logits(samples: Samples) -> Tensor:
    """Mean dense logits of every class over its fitted samples; those of the forget classes are the same for all.

    Returns:
        ``[classes, classes]`` float32. A class without samples has the mean of all retain samples.
    """
    retain = samples.fitted & ~samples.forget
    means = samples.logits[retain].mean(0).repeat(samples.classes, 1)
    nothing = means[0, list(samples.forget_classes)].clone()
    for cls in range(samples.classes):
        own = retain & (samples.labels == cls)
        if bool(own.any()):
            means[cls] = samples.logits[own].mean(0)
    means[:, list(samples.forget_classes)] = nothing
    return means
