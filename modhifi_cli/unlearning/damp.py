"""DAMP-like unlearning: the directions that only the forgotten classes have are projected out of every layer's input.

DAMP (arXiv:2604.15166) unlearns classes in closed form, without gradients: class prototypes at the input of each
operator, a forget direction orthogonal to the other classes', and a projection whose strength depends on depth. This
is our reading of that description and is called DAMP-like for it; `numerics.prototypes` has the formula.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, is_number, need_whole
from modhifi_cli.numerics.prototypes import forget_directions, without_directions
from modhifi_cli.numerics.rows import rows_of
from modhifi_cli.records import ModuleEdit
from modhifi_cli.unlearning.method import Fit, LayerEdit, Method, Site, saved

STRENGTHS = (2.0, 1.5, 1.0, 0.75, 0.5, 0.25)


class DampLike(Method):
    """Our reading of DAMP: W' = W (I − α (d / D)^rise U Uᵀ) in each layer, d of D its place among the network's layers.

    Args:
        alpha: Strength α at the last layer, or ``"auto"``: the largest tried whose loss of retain accuracy on held-out
            calibration images stays within what is allowed. 1 removes the directions, 2 mirrors them.
        depth: Layers in front of the classifier that are edited, or None for the last stage.
        rise: How the strength grows with depth; 0: the same everywhere.

    Raises:
        ConfigError: If an argument is out of range.
    """

    strength = "alpha"
    strengths = STRENGTHS
    edits_classifier = True

    def __init__(self, *, alpha: float | str = "auto", depth: int | None = None, rise: float = 1.0) -> None:
        if alpha != "auto" and (not is_number(alpha) or not 0 <= alpha < 1e6):
            raise ConfigError(f"method.alpha must be a number from 0, or auto; got {alpha!r}.")
        if depth is not None:
            need_whole("method.depth", depth, 0, " (the classifier alone), or null")
        if not is_number(rise) or not 0 <= rise < 1e6:
            raise ConfigError(f"method.rise must be a number from 0; got {rise!r}.")
        self.given = None if alpha == "auto" else float(alpha)
        self.depth, self.rise = depth, float(rise)

    def fit(self, site: Site) -> Fit:
        """As `Method.fit`."""
        names = [name for name, module in site.model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        return _Prototypes(site, ((names.index(site.layer.name) + 1) / len(names)) ** self.rise)


class _Prototypes:
    """Sums of a layer's input maps by class; unfolding is linear, so mean maps give mean rows."""

    def __init__(self, site: Site, share: float) -> None:
        self._layer, self._samples, self._share = site.layer, site.samples, share
        self._sums: Tensor | None = None
        self._counts = torch.zeros(site.samples.classes, dtype=torch.float64)

    def update(self, inputs: Tensor, numbers: Tensor, given: Mapping[str, Tensor]) -> None:
        if self._layer.positions is not None:
            inputs = inputs[:, self._layer.positions.to(inputs.device)]
        use = self._samples.fitted[numbers]
        member = torch.nn.functional.one_hot(self._samples.labels[numbers][use], self._samples.classes).to(inputs)
        summed = (member.T @ inputs[use.to(inputs.device)].flatten(1)).double().view(-1, *inputs.shape[1:])
        self._sums = summed if self._sums is None else self._sums.add_(summed)
        self._counts += member.sum(0).double().cpu()

    def solve(self, strength: float) -> LayerEdit:
        module = self._layer.module
        seen = (self._counts > 0).nonzero().flatten().tolist()
        prototypes = {cls: self._prototype(cls) for cls in seen}
        gone = set(self._samples.forget_classes)
        forget = torch.stack([prototypes[cls] for cls in seen if cls in gone])
        retain = torch.stack([prototypes[cls] for cls in seen if cls not in gone])
        directions = forget_directions(forget, retain, name=self._layer.name)
        old = module.weight.detach()
        weight = without_directions(old.flatten(1), directions, strength * self._share)
        own = float((directions.T @ forget.T).norm() / forget.norm().clamp(min=1e-300))
        facts = {"directions": directions.shape[1], "alpha": strength * self._share, "own_share": own}
        tensor = saved(weight.view_as(old).to(old.dtype))
        return LayerEdit((ModuleEdit(self._layer.name, tensors={"weight": tensor}),), facts)

    def _prototype(self, cls: int) -> Tensor:
        """Mean input row of a class over images and positions, ``[features]`` float64."""
        assert self._sums is not None
        mean, module = self._sums[cls] / self._counts[cls].item(), self._layer.module
        return rows_of(module, mean[None]).mean(0)
