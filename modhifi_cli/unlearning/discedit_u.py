"""DisCEdit-U (NeurIPS 2024): filters of late layers that tell the forget class from the others best are silenced."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, is_number
from modhifi_cli.numerics.discriminability import BOUNDS, WITNESSES, class_moments, one_against_rest
from modhifi_cli.records import ModuleEdit
from modhifi_cli.unlearning.method import Fit, LayerEdit, Method, Site, given_share, saved


class DisCEditU(Method):
    """The filters that tell the forget class from the others best are silenced.

    Args:
        fraction: Share of a layer's filters that go, or ``"auto"``: the smallest that forgets.
        bound: Lower bound on the total variation, of `discriminability.BOUNDS`.
        witness: Feature of a filter's map, of `discriminability.WITNESSES`.
        robust: ρ ≥ 0 for estimation error, as in the bounds.

    Raises:
        ConfigError: If an argument is out of range.
    """

    def __init__(
        self, *, fraction: float | str = "auto", bound: str = "minimax", witness: str = "sum", robust: float = 0.0
    ) -> None:
        for name, value, known in (("bound", bound, BOUNDS), ("witness", witness, WITNESSES)):
            if value not in known:
                raise ConfigError(f"method.{name} must be one of {', '.join(known)}; got {value!r}.")
        if not is_number(robust) or not robust >= 0:
            raise ConfigError(f"method.robust must be a number from 0; got {robust!r}.")
        self.given = given_share("fraction", fraction)
        self.bound, self.witness, self.robust = bound, witness, float(robust)

    def fit(self, site: Site) -> Fit:
        """As `Method.fit`."""
        return _FilterBounds(site, self)


class _FilterBounds:
    def __init__(self, site: Site, method: DisCEditU) -> None:
        self._site = site
        self._bound, self._witness, self._robust = BOUNDS[method.bound], WITNESSES[method.witness], method.robust
        self._summaries: list[Tensor] = []
        self._numbers: list[Tensor] = []

    def update(self, inputs: Tensor, numbers: Tensor, given: Mapping[str, Tensor]) -> None:
        module = self._site.layer.module
        outputs = module.forward(inputs)  # not a call: the hook that brought us here would run again
        outputs = outputs.movedim(-1, 1) if isinstance(module, nn.Linear) else outputs
        self._summaries.append(self._witness.summary(outputs))
        self._numbers.append(numbers)

    def solve(self, strength: float) -> LayerEdit:
        layer, samples, norm = self._site.layer, self._site.samples, self._site.norm
        numbers = torch.cat(self._numbers).cpu()
        use = samples.fitted[numbers]
        features = self._witness.features(torch.cat(self._summaries)[use.to(self._summaries[0].device)])
        moments = class_moments(features, samples.forget[numbers][use].long(), 2, place=layer.name)
        bounds = self._bound(*one_against_rest(moments, 1), robust=self._robust)
        count = max(1, round(strength * len(bounds)))
        chosen = bounds.argsort(descending=True, stable=True)[:count].to(layer.module.weight.device)
        silenced = {layer.name: layer.module}
        if norm is not None:
            # The filter's constant goes with it: what is left of a silenced filter is zero behind the BatchNorm too.
            silenced[layer.norm] = norm
        edits = []
        for name, module in silenced.items():
            own = {key: getattr(module, key, None) for key in ("weight", "bias")}
            tensors = {
                key: saved(tensor.detach().index_fill(0, chosen, 0)) for key, tensor in own.items() if tensor is not None
            }
            edits.append(ModuleEdit(name, tensors=tensors))
        facts = {"filters": count, "of": len(bounds), "largest_bound": float(bounds.max()),
                 "smallest_silenced_bound": float(bounds[chosen.cpu()].min())}  # fmt: skip
        return LayerEdit(tuple(edits), facts)
