"""How one layer forgets: three methods of unlearning, each from one walk over the samples (`collapse.py` has a fourth).

A method gives an accumulator that sees the layer's inputs once, and answers with the tensors that replace the layer's
own (and those of a BatchNorm right behind it) for a strength: a share of pairs or filters, or the weight β of the
forget samples. Which layers, in which order and how strongly is left to `unlearn.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modhifi_cli.engine.gathering import Gathering, LayerMoments
from modhifi_cli.errors import ConfigError, is_number, is_whole
from modhifi_cli.numerics.contrast import Aim, Group, aim_at, contrast
from modhifi_cli.numerics.contributions import ContributionMoments, contribution_moments
from modhifi_cli.numerics.discriminability import BOUNDS, WITNESSES, class_moments, one_against_rest
from modhifi_cli.numerics.fidelity import saliency, singleton_fidelity
from modhifi_cli.numerics.rows import unfold_rows
from modhifi_cli.records import Consumer, ModuleEdit
from modhifi_cli.unlearning.closings import Closing

_CARRIES_NOTHING = 1e-3  # fidelity that is as good as none, so that pairs of no use to anybody are no great finding
SHARES = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BETAS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)


@dataclass(frozen=True)
class Layer:
    """One layer that may be edited.

    Attributes:
        name: Module name.
        module: `nn.Conv2d` without groups, or `nn.Linear`.
        norm: Name of the BatchNorm that reads exactly this layer's output, or None.
        classifier: Whether its output is the logits.
        positions: Of a linear layer over tokens those that the logits depend on, ``[read]`` int64 sorted; None: all.
        closing: Where it ends a block, how; found only for methods that ask for it.
    """

    name: str
    module: nn.Module
    norm: str | None
    classifier: bool = False
    positions: Tensor | None = None
    closing: Closing | None = None


@dataclass(frozen=True)
class Samples:
    """What is known of the calibration images, by their number.

    Attributes:
        labels: Class of each, ``[images]`` int64.
        forget: Whether it is of a forget class, ``[images]`` bool.
        fitted: Whether the edit may be computed from it, ``[images]`` bool; the others judge it.
        resembles: For forget samples the retain class with the largest logit of the dense network, else the label,
            ``[images]`` int64.
        forget_classes: Sorted.
        classes: Number of logits.
        logits: Of the dense network, ``[images, classes]`` float32.
    """

    labels: Tensor
    forget: Tensor
    fitted: Tensor
    resembles: Tensor
    forget_classes: tuple[int, ...]
    classes: int
    logits: Tensor

    def posterior(self, sharpness: float = 1.0) -> Tensor:
        """What the dense network would answer without the forget classes, ``[images, classes]``, each row sums to 1.

        Args:
            sharpness: Above 0: what the logits of forget samples are multiplied with first. 1 leaves them; the larger,
                the more of a sample goes to the one class that it resembles most.
        """
        others = self.logits * torch.where(self.forget, sharpness, 1.0)[:, None]
        others[:, list(self.forget_classes)] = -torch.inf
        return others.softmax(1)


@dataclass(frozen=True)
class LayerEdit:
    """What replaces a layer's tensors.

    Attributes:
        modules: As in `Edit`.
        facts: JSON-able account.
    """

    modules: tuple[ModuleEdit, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Accumulator(Protocol):
    """Sees the inputs of one layer, then solves for any strength."""

    def update(self, inputs: Tensor, numbers: Tensor, given: Mapping[str, Tensor]) -> None:
        """Add a batch.

        Args:
            inputs: Of the layer, ``[batch, …]``.
            numbers: Of the images, ``[batch]`` int64.
            given: Outputs of the modules that the layer's `Closing.reads` names, where the method asked for closings.
        """

    def solve(self, strength: float) -> LayerEdit:
        """The layer's edit at a strength."""


class Method(Protocol):
    """One way to forget; named in configs/method/.

    Attributes:
        strength: Its name for the strength, ``"fraction"`` or ``"beta"``.
        strengths: What a search tries, in this order, up to the first that is good enough.
        given: A fixed strength, or None to search.
        edits_classifier: Whether the classifier is edited too, last, whatever layers are chosen.
        depth: Layers in front of the classifier that are edited by default; None: the last stage.
        forget_only: Whether it looks at the forget samples alone.
        closings: Whether it edits the layers that end a block, and asks for the blocks' mean outputs of every class.
    """

    strength: str
    strengths: Sequence[float]
    given: float | None
    edits_classifier: bool
    depth: int | None
    forget_only: bool
    closings: bool

    def accumulator(
        self,
        layer: Layer,
        samples: Samples,
        model: nn.Module,
        gathering: Gathering,
        seed: int,
        means: Tensor | None = None,
    ) -> Accumulator:
        """A fresh accumulator for one layer; `means` are those of `closings.class_means`, where asked for."""


def _share(name: str, value: float | str | None) -> float | None:
    if value == "auto" or value is None:
        return None
    if not is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"method.{name} must be a share with 0 < {name} <= 1, or auto; got {value!r}.")
    return float(value)


# ------------------------------------------------------------------------------------------------------------ ModHiFi-U


class ModHiFiU:
    """ModHiFi-U (arXiv:2511.19566): the pairs (output, component) that carry the forget class are zeroed or negated.

    Args:
        fraction: Share of a layer's pairs that go, or ``"auto"``: the smallest that forgets.
        operation: ``"zero"`` (BatchNorm networks), ``"negate"`` (LayerNorm networks with residual paths), or
            ``"auto"``: by whether the network has a BatchNorm.
        score: ``"singleton"`` (M4) or ``"saliency"`` (M6), both of forget samples alone as published; or
            ``"contrastive"`` (ours), M4 of forget samples over M4 of retain samples: what carries both stays.

    Raises:
        ConfigError: If an argument is out of range.
    """

    strength = "fraction"
    strengths = SHARES
    edits_classifier = False
    depth = None
    closings = False

    def __init__(self, *, fraction: float | str = "auto", operation: str = "auto", score: str = "singleton") -> None:
        if operation not in ("auto", "zero", "negate"):
            raise ConfigError(f"method.operation must be auto, zero or negate; got {operation!r}.")
        if score not in ("singleton", "saliency", "contrastive"):
            raise ConfigError(f"method.score must be singleton, saliency or contrastive; got {score!r}.")
        self.forget_only = score != "contrastive"  # what retain samples need has to be seen to be spared
        self.given = _share("fraction", fraction)
        self.operation = operation
        self.score = score

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
        operation = self.operation
        if operation == "auto":
            norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
            operation = "zero" if norms else "negate"
        return _PairScores(layer, samples, gathering, seed, operation, self.score)


class _PairScores:
    def __init__(
        self, layer: Layer, samples: Samples, gathering: Gathering, seed: int, operation: str, score: str
    ) -> None:
        self._layer, self._samples = layer, samples
        self._operation, self._score = operation, score
        self._moments = _moments(layer, gathering, seed)
        self._retain = _moments(layer, gathering, seed) if score == "contrastive" else None

    def update(self, inputs: Tensor, numbers: Tensor, given: Mapping[str, Tensor]) -> None:
        _add(self._moments, inputs, numbers, self._samples.forget & self._samples.fitted)
        if self._retain is not None:
            _add(self._retain, inputs, numbers, ~self._samples.forget & self._samples.fitted)

    def _contributions(self, moments: LayerMoments) -> ContributionMoments:
        weight = self._layer.module.weight.detach()
        components = weight.shape[1]
        return contribution_moments(
            Consumer(
                name=self._layer.name,
                weight=weight.double().flatten(1),
                statistics=moments.result().statistics,
                components=components,
                in_group=components,
                centred=self._layer.norm is not None,
            )
        )

    def solve(self, strength: float) -> LayerEdit:
        weight = self._layer.module.weight.detach()
        scores = (saliency if self._score == "saliency" else singleton_fidelity)(self._contributions(self._moments))
        if self._retain is not None:
            scores = scores / (singleton_fidelity(self._contributions(self._retain)) + _CARRIES_NOTHING)
        count = max(1, round(strength * scores.numel()))
        chosen = scores.flatten().argsort(descending=True, stable=True)[:count]
        factor = torch.ones(scores.numel(), dtype=weight.dtype, device=weight.device)
        factor[chosen] = 0.0 if self._operation == "zero" else -1.0
        factor = factor.view(*scores.shape, *[1] * (weight.ndim - 2))
        return LayerEdit(
            (ModuleEdit(self._layer.name, tensors={"weight": _kept(weight * factor)}),),
            {"pairs": count, "of": scores.numel(), "operation": self._operation},
        )


# ------------------------------------------------------------------------------------------------------------ DisCEdit-U


class DisCEditU:
    """DisCEdit-U (NeurIPS 2024): the filters that tell the forget class from the others best are silenced.

    Args:
        fraction: Share of a layer's filters that go, or ``"auto"``: the smallest that forgets.
        bound: Lower bound on the total variation, of `discriminability.BOUNDS`.
        witness: Feature of a filter's map, of `discriminability.WITNESSES`.
        robust: ρ ≥ 0 for estimation error, as in the bounds.

    Raises:
        ConfigError: If an argument is out of range.
    """

    strength = "fraction"
    strengths = SHARES
    edits_classifier = False
    depth = None
    forget_only = False
    closings = False

    def __init__(
        self, *, fraction: float | str = "auto", bound: str = "minimax", witness: str = "sum", robust: float = 0.0
    ) -> None:
        for name, value, known in (("bound", bound, BOUNDS), ("witness", witness, WITNESSES)):
            if value not in known:
                raise ConfigError(f"method.{name} must be one of {', '.join(known)}; got {value!r}.")
        if not is_number(robust) or not robust >= 0:
            raise ConfigError(f"method.robust must be a number from 0; got {robust!r}.")
        self.given = _share("fraction", fraction)
        self.bound, self.witness, self.robust = bound, witness, float(robust)

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
        return _FilterBounds(layer, samples, model, self.bound, self.witness, self.robust)


class _FilterBounds:
    def __init__(
        self, layer: Layer, samples: Samples, model: nn.Module, bound: str, witness: str, robust: float
    ) -> None:
        self._layer, self._samples = layer, samples
        self._norm = None if layer.norm is None else model.get_submodule(layer.norm)
        self._bound, self._witness, self._robust = BOUNDS[bound], WITNESSES[witness], robust
        self._summaries: list[Tensor] = []
        self._numbers: list[Tensor] = []

    def update(self, inputs: Tensor, numbers: Tensor, given: Mapping[str, Tensor]) -> None:
        outputs = self._layer.module.forward(inputs)  # not a call: the hook that brought us here would run again
        outputs = outputs.movedim(-1, 1) if isinstance(self._layer.module, nn.Linear) else outputs
        self._summaries.append(self._witness.summary(outputs))
        self._numbers.append(numbers)

    def solve(self, strength: float) -> LayerEdit:
        numbers = torch.cat(self._numbers).cpu()
        use = self._samples.fitted[numbers]
        features = self._witness.features(torch.cat(self._summaries)[use.to(self._summaries[0].device)])
        moments = class_moments(features, self._samples.forget[numbers][use].long(), 2, place=self._layer.name)
        bounds = self._bound(*one_against_rest(moments, 1), robust=self._robust)
        count = max(1, round(strength * len(bounds)))
        chosen = bounds.argsort(descending=True, stable=True)[:count].to(self._layer.module.weight.device)
        names = ("weight", "bias")
        silenced = [(self._layer.name, self._layer.module, names)]
        if self._norm is not None:
            # The filter's constant goes with it: what is left of a silenced filter is zero behind the BatchNorm too.
            silenced.append((self._layer.norm, self._norm, names))
        edits = []
        for name, module, parameters in silenced:
            tensors = {}
            for parameter in parameters:
                tensor = getattr(module, parameter, None)
                if tensor is not None:
                    tensors[parameter] = _kept(tensor.detach().index_fill(0, chosen, 0))
            edits.append(ModuleEdit(name, tensors=tensors))
        facts = {"filters": count, "of": len(bounds), "largest_bound": float(bounds.max()),
                 "smallest_silenced_bound": float(bounds[chosen.cpu()].min())}  # fmt: skip
        return LayerEdit(tuple(edits), facts)


# --------------------------------------------------------------------------------------------------------------- contrast


class ContrastU:
    """Ours: weights that keep the retain outputs and move the forget outputs, in closed form (`numerics.contrast`).

    Args:
        beta: Weight β of the forget samples, or ``"auto"``: the largest tried whose loss of retain accuracy on held-out
            calibration images stays within what is allowed.
        depth: Layers in front of the classifier that are edited.
        ridge: Towards the present weights, times the mean energy of a feature.
        nearest: 0 … 1: whether forget samples go to the retain mean (0) or to the retain class they resemble (1).
        spread: 0 … 1: how much of their own variation they keep.

    Raises:
        ConfigError: If an argument is out of range.
    """

    strength = "beta"
    strengths = BETAS
    edits_classifier = True
    forget_only = False
    closings = False

    def __init__(
        self,
        *,
        beta: float | str = "auto",
        depth: int = 2,
        ridge: float = 1e-3,
        nearest: float = 0.5,
        spread: float = 0.5,
    ) -> None:
        self.given = given_beta(beta)
        if not is_whole(depth) or depth < 0:
            raise ConfigError(f"method.depth must be a whole number from 0 (the classifier alone); got {depth!r}.")
        check_ridge(ridge)
        check_shares(nearest=nearest, spread=spread)
        self.depth, self.ridge = depth, float(ridge)
        self.nearest, self.spread = float(nearest), float(spread)

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
        return _ContrastMoments(layer, samples, model, gathering, seed, self)


class _ContrastMoments:
    def __init__(
        self, layer: Layer, samples: Samples, model: nn.Module, gathering: Gathering, seed: int, method: ContrastU
    ) -> None:
        self._layer, self._samples, self._method = layer, samples, method
        self._norm = None if layer.norm is None else model.get_submodule(layer.norm)
        self._retain = _moments(layer, gathering, seed)
        self._forget = _moments(layer, gathering, seed)
        # Sums of input maps: of every retain class, and of the forget samples that resemble each.
        self._sums: Tensor | None = None
        self._counts = torch.zeros(2 * samples.classes, dtype=torch.float64)

    def update(self, inputs: Tensor, numbers: Tensor, given: Mapping[str, Tensor]) -> None:
        samples = self._samples
        if self._layer.positions is not None:
            inputs = inputs[:, self._layer.positions.to(inputs.device)]
        _add(self._retain, inputs, numbers, ~samples.forget & samples.fitted)
        _add(self._forget, inputs, numbers, samples.forget & samples.fitted)
        use = samples.fitted[numbers]
        groups = samples.resembles[numbers] + samples.classes * samples.forget[numbers].long()
        member = torch.nn.functional.one_hot(groups[use], 2 * samples.classes).to(inputs)
        summed = (member.T @ inputs[use.to(inputs.device)].flatten(1)).double().view(-1, *inputs.shape[1:])
        self._sums = summed if self._sums is None else self._sums.add_(summed)
        self._counts += member.sum(0).double().cpu()

    def solve(self, strength: float) -> LayerEdit:
        module, method = self._layer.module, self._method
        weight = module.weight.detach().double().flatten(1)
        own = getattr(module, "bias", None)
        bias = weight.new_zeros(len(weight)) if own is None else own.detach().double()
        retain, forget = self._retain.result().statistics, self._forget.result().statistics
        found = contrast(
            weight,
            bias,
            retain=retain,
            forget=forget,
            aim=self._aim(weight, bias, forget),
            beta=strength,
            ridge=method.ridge,
            constant=own is not None or self._norm is not None,
            name=self._layer.name,
        )
        return LayerEdit(
            replaced(self._layer, self._norm, found.weight, found.constant),
            {"moved": found.moved, "lost": found.lost, "retain_rows": retain.rows, "forget_rows": forget.rows},
        )

    def _aim(self, weight: Tensor, bias: Tensor, forget: Any) -> Aim:
        classes, counts = self._samples.classes, self._counts.to(weight.device)
        sums = self._sums
        own, theirs = counts[:classes], counts[classes:]

        def rows(total: Tensor, count: Tensor) -> Tensor:
            return _rows_of(self._layer.module, total / count)

        def outputs(rows: Tensor) -> Tensor:
            return weight @ rows + bias[:, None]

        groups = []
        for cls in range(classes):
            if theirs[cls]:
                inputs = rows(sums[classes + cls], theirs[cls])
                # A retain class without samples of its own gives no mean; then all of them stand for it.
                like = rows(sums[cls], own[cls]) if own[cls] else rows(sums[:classes].sum(0), own.sum())
                groups.append(Group(float(theirs[cls] / theirs.sum()), inputs, outputs(like)))
        return aim_at(
            weight,
            bias,
            forget,
            groups,
            retain_outputs=outputs(rows(sums[:classes].sum(0), own.sum())),
            forget_outputs=outputs(rows(sums[classes:].sum(0), theirs.sum())),
            nearest=self._method.nearest,
            spread=self._method.spread,
        )


def given_beta(beta: float | str) -> float | None:
    """β as a number, or None where it shall be searched for.

    Raises:
        ConfigError: If it is neither a number from 0 nor ``"auto"``.
    """
    if beta != "auto" and (not is_number(beta) or not 0 <= beta < 1e12):
        raise ConfigError(f"method.beta must be a number from 0, or auto; got {beta!r}.")
    return None if beta == "auto" else float(beta)


def check_ridge(ridge: float) -> None:
    """Raise ConfigError if a ridge is no number from 0."""
    if not is_number(ridge) or not 0 <= ridge < 1e12:
        raise ConfigError(f"method.ridge must be a number from 0; got {ridge!r}.")


def check_shares(**values: float) -> None:
    """Raise ConfigError if one of a method's arguments is no number from 0 to 1."""
    for name, value in values.items():
        if not is_number(value) or not 0 <= value <= 1:
            raise ConfigError(f"method.{name} must be a number from 0 to 1; got {value!r}.")


def replaced(layer: Layer, norm: nn.Module | None, weight: Tensor, constant: Tensor) -> tuple[ModuleEdit, ...]:
    """A new weight and what is added to the layer's constant: in its bias, or else in the BatchNorm's running mean.

    Args:
        layer: The layer.
        norm: The BatchNorm behind it, or None.
        weight: ``[outputs, features]``.
        constant: ``[outputs]``, output units.
    """
    old = layer.module.weight
    tensors = {"weight": _kept(weight.view_as(old).to(old.dtype))}
    own = getattr(layer.module, "bias", None)
    if own is not None:
        tensors["bias"] = _kept((own.double() + constant).to(own.dtype))
    edits = [ModuleEdit(layer.name, tensors=tensors)]
    if own is None and norm is not None:
        mean = norm.running_mean
        edits.append(ModuleEdit(layer.norm, tensors={"running_mean": _kept((mean.double() - constant).to(mean.dtype))}))
    return tuple(edits)


def _moments(layer: Layer, gathering: Gathering, seed: int) -> LayerMoments:
    return LayerMoments(
        layer.name, layer.module, positions_per_image=gathering.positions_per_image, seed=seed, hold_out=False
    )


def _add(moments: LayerMoments, inputs: Tensor, numbers: Tensor, wanted: Tensor) -> None:
    use = wanted[numbers]
    if bool(use.any()):
        moments.update(inputs[use.to(inputs.device)])


def _rows_of(module: nn.Module, mean: Tensor) -> Tensor:
    """Rows of one mean input, ``[features, positions]`` float64: unfolding is linear, so a mean map gives mean rows."""
    if isinstance(module, nn.Linear):
        return mean.reshape(-1, mean.shape[-1]).T
    rows = unfold_rows(
        mean[None],
        kernel_size=module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
    )
    return rows.T


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()
