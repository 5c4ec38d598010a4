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

import torch
from torch import Tensor, nn

from modhifi_cli.engine.gathering import Gathering, LayerMoments
from modhifi_cli.errors import ConfigError, is_number, is_whole
from modhifi_cli.numerics.batchnorm import input_scale
from modhifi_cli.numerics.contrast import Aim, contrast
from modhifi_cli.numerics.cross import CrossMoments
from modhifi_cli.numerics.moments import second_moment
from modhifi_cli.records import Statistics
from modhifi_cli.unlearning.forgetting import (
    BETAS,
    Accumulator,
    Layer,
    LayerEdit,
    Samples,
    check_ridge,
    check_shares,
    given_beta,
    replaced,
)


class CollapseU:
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
    forget_only = False
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
        if not is_whole(depth) or depth < 1:
            raise ConfigError(f"method.depth must be a whole number from 1; got {depth!r}.")
        check_ridge(ridge)
        check_shares(collapse=collapse, earlier=earlier)
        if not is_number(sharpness) or not 0 < sharpness < 1e6:
            raise ConfigError(f"method.sharpness must be a number above 0; got {sharpness!r}.")
        self.sharpness = float(sharpness)
        self.collapse, self.earlier = float(collapse), float(earlier)
        self.depth, self.ridge = depth, float(ridge)

    def accumulator(
        self,
        layer: Layer,
        samples: Samples,
        model: nn.Module,
        gathering: Gathering,
        seed: int,
        means: Tensor | None = None,
    ) -> Accumulator:
        """As `Method.accumulator`."""
        share = 1.0 if layer.classifier else self.collapse if layer.closing.last else self.earlier
        return _Mixtures(layer, samples, model, seed, self.ridge, share, self.sharpness, means)


class _Mixtures:
    """Moments of inputs and of wanted outputs, of retain and of forget samples."""

    def __init__(
        self,
        layer: Layer,
        samples: Samples,
        model: nn.Module,
        seed: int,
        ridge: float,
        share: float,
        sharpness: float,
        means: Tensor | None,
    ) -> None:
        self._layer, self._samples, self._ridge, self._share = layer, samples, ridge, share
        self._norm = None if layer.norm is None else model.get_submodule(layer.norm)
        self._posterior = samples.posterior(sharpness)
        self._means = _class_logits(samples) if means is None else means
        self._axis = -1 if isinstance(layer.module, nn.Linear) else 1
        # All positions, always: the wanted outputs are known for each.
        self._moments = {
            forget: LayerMoments(layer.name, layer.module, positions_per_image=None, seed=seed, hold_out=False)
            for forget in (False, True)
        }
        self._cross = {forget: CrossMoments(layer.module, name=layer.name) for forget in (False, True)}

    @torch.no_grad()
    def update(self, inputs: Tensor, numbers: Tensor, given: Mapping[str, Tensor]) -> None:
        wanted = self._wanted(inputs, numbers, given)
        if self._layer.positions is not None:
            read = self._layer.positions.to(inputs.device)
            inputs, wanted = inputs[:, read], wanted[:, read]
        samples = self._samples
        for forget in (False, True):
            use = (samples.fitted & (samples.forget == forget))[numbers].to(inputs.device)
            if bool(use.any()):
                self._moments[forget].update(inputs[use])
                self._cross[forget].update(inputs[use], wanted[use])

    def solve(self, strength: float) -> LayerEdit:
        module = self._layer.module
        weight = module.weight.detach().double().flatten(1)
        own = getattr(module, "bias", None)
        bias = weight.new_zeros(len(weight)) if own is None else own.detach().double()
        retain, forget = (self._moments[which].result().statistics for which in (False, True))
        kept, moved = (self._cross[which].result() for which in (False, True))
        found = contrast(
            weight,
            bias,
            retain=retain,
            forget=forget,
            aim=Aim(moved.cross, moved.mean),
            retain_aim=self._blended(weight, bias, retain, Aim(kept.cross, kept.mean)),
            beta=strength,
            ridge=self._ridge,
            constant=own is not None or self._norm is not None,
            name=self._layer.name,
        )
        facts = {"moved": found.moved, "retain_rows": retain.rows, "forget_rows": forget.rows}
        if self._layer.closing is not None:
            facts |= {"place": self._layer.closing.place, "residual": self._layer.closing.stream}
        return LayerEdit(replaced(self._layer, self._norm, found.weight, found.constant), facts)

    def _blended(self, weight: Tensor, bias: Tensor, retain: Statistics, mixture: Aim) -> Aim:
        """What the retain rows shall give: some of what they give now, some of their mixture."""
        present = weight @ second_moment(retain, centred=False) + torch.outer(bias, retain.mean)
        return Aim(
            self._share * mixture.cross + (1 - self._share) * present,
            self._share * mixture.mean + (1 - self._share) * (weight @ retain.mean + bias),
        )

    def _wanted(self, inputs: Tensor, numbers: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The outputs of the layer, before a BatchNorm, that give the mixture: of the shape of its output."""
        posterior, means = self._posterior[numbers].to(inputs), self._means.to(inputs)
        mixture = (posterior @ means.flatten(1)).view(-1, *means.shape[1:])
        if self._layer.classifier:
            # Retain images keep their logits, but for those of the forget classes, which are theirs to no one.
            logits = self._samples.logits[numbers].to(inputs)
            columns = list(self._samples.forget_classes)
            logits[:, columns] = means[0, columns]
            forget = self._samples.forget[numbers].to(inputs.device)
            return torch.where(forget[:, None], mixture, logits)
        own = self._layer.module.forward(inputs)  # not a call: hooks must not run again
        if self._norm is None:
            return mixture - self._layer.closing.beside(own, given)
        norm = self._norm
        stream = self._layer.closing.beside(norm.forward(own), given)
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
