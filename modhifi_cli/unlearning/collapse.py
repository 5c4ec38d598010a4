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

import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from modhifi_cli.engine.gathering import held_out_images
from modhifi_cli.errors import ConfigError, is_number
from modhifi_cli.numerics.batchnorm import input_scale
from modhifi_cli.numerics.contrast import Aim, Asked
from modhifi_cli.numerics.cross import CrossMoments, CrossStatistics, merge_cross
from modhifi_cli.numerics.moments import merge, second_moment
from modhifi_cli.records import Statistics
from modhifi_cli.unlearning.closings import as_shaped
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

RIDGES = (1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0)
_PLENTY = 10  # retain rows for each feature, from which on the least ridge will do


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
        ridge: Towards the present weights, times the mean energy of a feature, or ``"auto"``: 0.001, but
            in a layer with fewer than ten retain rows for each feature every fifth image is left out of the solution and
            judges ridges (`numerics.contrast.choose_ridge`).

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
        ridge: float | str = "auto",
        collapse: float = 1.0,
        earlier: float = 0.0,
        sharpness: float = 4.0,
    ) -> None:
        self.given = given_beta(beta)
        check_depth(depth, least=1)
        check_ridge(ridge, or_auto=True)
        check_shares(collapse=collapse, earlier=earlier)
        if not is_number(sharpness) or not 0 < sharpness < 1e6:
            raise ConfigError(f"method.sharpness must be a number above 0; got {sharpness!r}.")
        self.sharpness = float(sharpness)
        self.collapse, self.earlier = float(collapse), float(earlier)
        self.depth, self.ridge = depth, None if ridge == "auto" else float(ridge)

    def fit(self, site: Site) -> Fit:
        """As `Method.fit`."""
        return _Mixtures(site, self)


class _Mixtures:
    """Moments of inputs and of wanted outputs, of retain and of forget samples, those that judge the ridge apart."""

    def __init__(self, site: Site, method: CollapseU) -> None:
        self._site, self._ridge, layer = site, method.ridge, site.layer
        self._share = 1.0 if layer.classifier else method.collapse if layer.closing.last else method.earlier
        self._posterior = site.samples.posterior(method.sharpness)
        self._means = _class_logits(site.samples) if site.means is None else site.means
        self._judges = _every_fifth(site.samples) if method.ridge is None else torch.zeros_like(site.samples.forget)
        # All positions, always: the wanted outputs are known for each.
        kinds = itertools.product((False, True), (False, True) if method.ridge is None else (False,))
        self._sums = {
            kind: (site.moments(everywhere=True), CrossMoments(layer.module, name=layer.name)) for kind in kinds
        }

    @torch.no_grad()
    def update(self, inputs: Tensor, numbers: Tensor, given: Mapping[str, Tensor]) -> None:
        wanted = self._wanted(inputs, numbers, given)
        if self._site.layer.positions is not None:
            read = self._site.layer.positions.to(inputs.device)
            inputs, wanted = inputs[:, read], wanted[:, read]
        for (forget, judges), (moments, cross) in self._sums.items():
            use = self._site.fitted(numbers, forget=forget) & (self._judges[numbers] == judges)
            use = use.to(inputs.device)
            if bool(use.any()):
                moments.update(inputs[use])
                cross.update(inputs[use], wanted[use])

    def solve(self, strength: float) -> LayerEdit:
        parts = {kind: (moments.result().statistics, cross.result()) for kind, (moments, cross) in self._sums.items()}
        solved, ridge = [parts[False, False], parts[True, False]], self._ridge
        if ridge is None:
            judged, ridge = [parts[False, True], parts[True, True]], RIDGES[0]
            count = solved[0][0].rows + judged[0][0].rows
            if count < _PLENTY * self._site.weight.shape[1]:
                ridge = self._site.choose_ridge(
                    (self._asked(*solved), self._asked(*judged)), beta=strength, ridges=RIDGES, worth=self._worth()
                )
            else:
                pairs = zip(solved, judged, strict=True)
                solved = [(merge(ours[0], theirs[0]), merge_cross(ours[1], theirs[1])) for ours, theirs in pairs]
        found, edit = self._site.contrast(self._asked(*solved), beta=strength, ridge=ridge)
        facts, closing = {**edit.facts, "ridge": ridge}, self._site.layer.closing
        if closing is not None:
            return replace(edit, facts=facts | {"place": closing.place, "residual": closing.stream})
        # The same is asked of the forgotten rows everywhere: no ridge may hold them back.
        rows = list(self._site.samples.forget_classes)
        found.weight[rows], found.constant[rows] = 0, (self._means[0].to(found.constant) - self._site.bias)[rows]
        return LayerEdit(self._site.replaced(found.weight, found.constant), facts)

    def _asked(self, retain: tuple[Statistics, CrossStatistics], forget: tuple[Statistics, CrossStatistics]) -> Asked:
        (rows, kept), (others, moved) = retain, forget
        return Asked(rows, others, Aim(moved.cross, moved.mean), self._blended(rows, Aim(kept.cross, kept.mean)))

    def _worth(self) -> Tensor | None:
        """What one unit of each output is worth behind the BatchNorm or the layer scale, 0 where it is not steered."""
        norm, closing = self._site.norm, self._site.layer.closing
        if closing is None:
            answered = torch.ones(self._site.samples.classes)
            answered[list(self._site.samples.forget_classes)] = 0
            return answered
        if norm is None:
            return closing.scale
        scale, usable = _steered(norm)
        return torch.where(usable, 1 / torch.where(usable, scale, torch.ones_like(scale)), torch.zeros_like(scale))

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
        mixture = as_shaped(mixture, own)
        if norm is None:
            return layer.closing.solved(mixture - layer.closing.beside(own, given), own)
        stream = layer.closing.beside(norm.forward(own), given)
        scale, usable = _steered(norm)
        shift = torch.zeros_like(scale) if norm.bias is None else norm.bias.detach()
        shape = [1, -1] + [1] * (own.dim() - 2)
        solved = (mixture - stream - shift.view(shape)) * scale.view(shape) + norm.running_mean.view(shape)
        # Outputs whose γ is next to nothing stay as they are.
        return torch.where(usable.view(shape), solved, own)


def _steered(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What one unit behind a BatchNorm is worth in front of it, and where that is not too much to ask, by channel."""
    return input_scale(norm.running_var, norm.eps, None if norm.weight is None else norm.weight.detach())


def _every_fifth(samples: Samples) -> Tensor:
    """Which of the fitted images of either kind judge a ridge, ``[images]`` bool: at least one of each."""
    judges = torch.zeros_like(samples.forget)
    for kind in (samples.forget, ~samples.forget):
        numbers = (samples.fitted & kind).nonzero().flatten()
        chosen = held_out_images(torch.arange(len(numbers)))
        judges[numbers[chosen] if bool(chosen.any()) else numbers[-1:]] = True
    return judges


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
