"""What a way to forget is: a `Method` gives every layer a `Fit`, which sees the layer's inputs once and solves for any strength.

A fit answers with the tensors that replace the layer's own (and those of a BatchNorm right behind it) for a strength:
a share of pairs or filters, or the weight β of the forget samples. The methods stand in files of their own; which
layers, in which order and how strongly is left to `layers.py` and `search.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modhifi_cli.engine.gathering import Gathering, LayerMoments
from modhifi_cli.errors import ConfigError, is_number, need_whole
from modhifi_cli.numerics.contrast import Asked, Contrast, choose_ridge, contrast
from modhifi_cli.records import ModuleEdit
from modhifi_cli.unlearning.closings import Closing

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
class Site:
    """One layer in its network, with the samples that flow through: all that a fit may know.

    Attributes:
        layer: The layer.
        samples: What is known of the images.
        model: The network, edited up to this layer.
        gathering: How statistics are gathered.
        seed: For everything that is drawn.
        means: Mean output of every class at the layer's closing, ``[classes, …]``, for methods that ask for it.
    """

    layer: Layer
    samples: Samples
    model: nn.Module
    gathering: Gathering
    seed: int
    means: Tensor | None = None

    @property
    def norm(self) -> nn.Module | None:
        """The BatchNorm right behind the layer."""
        return None if self.layer.norm is None else self.model.get_submodule(self.layer.norm)

    @property
    def weight(self) -> Tensor:
        """``[outputs, features]`` float64."""
        return self.layer.module.weight.detach().double().flatten(1)

    @property
    def bias(self) -> Tensor:
        """``[outputs]`` float64; zeros where the layer has none."""
        own = getattr(self.layer.module, "bias", None)
        return self.weight.new_zeros(len(self.weight)) if own is None else own.detach().double()

    def fitted(self, numbers: Tensor, *, forget: bool) -> Tensor:
        """Which images of a batch the edit may be computed from, of the forget or of the retain samples: bool.

        Args:
            numbers: Of the images, ``[batch]`` int64.
            forget: Which of the two.
        """
        return (self.samples.fitted & (self.samples.forget == forget))[numbers]

    def moments(self, *, everywhere: bool = False) -> LayerMoments:
        """A fresh accumulator of the layer's input moments; `everywhere` draws no positions, whatever is set."""
        positions = None if everywhere else self.gathering.positions_per_image
        return LayerMoments(
            self.layer.name, self.layer.module, positions_per_image=positions, seed=self.seed, hold_out=False
        )

    def contrast(self, asked: Asked, *, beta: float, ridge: float) -> tuple[Contrast, "LayerEdit"]:
        """The closed form of `numerics.contrast` for this layer, and the edit that writes it; arguments as there."""
        found = contrast(
            self.weight, self.bias, asked, beta=beta, ridge=ridge, constant=self._constant, name=self.layer.name
        )
        facts = {"moved": found.moved, "retain_rows": asked.retain.rows, "forget_rows": asked.forget.rows}
        return found, LayerEdit(self.replaced(found.weight, found.constant), facts)

    def choose_ridge(
        self, asked: tuple[Asked, Asked], *, beta: float, ridges: Sequence[float], worth: Tensor | None
    ) -> float:
        """`numerics.contrast.choose_ridge` for this layer; arguments as there."""
        return choose_ridge(
            self.weight, self.bias, asked, beta=beta, ridges=ridges, worth=worth,
            constant=self._constant, name=self.layer.name,
        )  # fmt: skip

    @property
    def _constant(self) -> bool:
        """Whether there is a place for a constant."""
        return getattr(self.layer.module, "bias", None) is not None or self.norm is not None

    def replaced(self, weight: Tensor, constant: Tensor) -> tuple[ModuleEdit, ...]:
        """A new weight, and what is added to the constant: in the bias, or else in the BatchNorm's running mean."""
        layer, norm, old = self.layer, self.norm, self.layer.module.weight
        tensors = {"weight": saved(weight.view_as(old).to(old.dtype))}
        own = getattr(layer.module, "bias", None)
        if own is not None:
            tensors["bias"] = saved((own.double() + constant).to(own.dtype))
        edits = [ModuleEdit(layer.name, tensors=tensors)]
        if own is None and norm is not None:
            mean = norm.running_mean
            moved = saved((mean.double() - constant).to(mean.dtype))
            edits.append(ModuleEdit(layer.norm, tensors={"running_mean": moved}))
        return tuple(edits)


@dataclass(frozen=True)
class LayerEdit:
    """What replaces a layer's tensors.

    Attributes:
        modules: As in `Edit`.
        facts: JSON-able account.
    """

    modules: tuple[ModuleEdit, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Fit(Protocol):
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

    strength: str = "fraction"
    strengths: Sequence[float] = SHARES
    given: float | None
    edits_classifier: bool = False
    depth: int | None = None
    forget_only: bool = False
    closings: bool = False

    def fit(self, site: Site) -> Fit:
        """A fresh fit of one layer."""


def given_share(name: str, value: float | str | None) -> float | None:
    """A share as a number, or None where it shall be searched for (``"auto"``).

    Raises:
        ConfigError: If it is neither.
    """
    if value == "auto" or value is None:
        return None
    if not is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"method.{name} must be a share with 0 < {name} <= 1, or auto; got {value!r}.")
    return float(value)


def given_beta(beta: float | str) -> float | None:
    """β as a number, or None where it shall be searched for.

    Raises:
        ConfigError: If it is neither a number from 0 nor ``"auto"``.
    """
    if beta != "auto" and (not is_number(beta) or not 0 <= beta < 1e12):
        raise ConfigError(f"method.beta must be a number from 0, or auto; got {beta!r}.")
    return None if beta == "auto" else float(beta)


def check_ridge(ridge: float | str, *, or_auto: bool = False) -> None:
    """Raise ConfigError if a ridge is no number from 0, nor ``"auto"`` where that may be asked for."""
    if not (or_auto and ridge == "auto") and (not is_number(ridge) or not 0 <= ridge < 1e12):
        raise ConfigError(
            f"method.ridge must be a number from 0; got {ridge!r}." + (" auto chooses one." if or_auto else "")
        )


def check_depth(depth: int, *, least: int, of_least: str = "") -> None:
    """Raise ConfigError if a depth is no whole number from `least` (whose meaning `of_least` tells)."""
    need_whole("method.depth", depth, least, of_least)


def check_shares(**values: float) -> None:
    """Raise ConfigError if one of a method's arguments is no number from 0 to 1."""
    for name, value in values.items():
        if not is_number(value) or not 0 <= value <= 1:
            raise ConfigError(f"method.{name} must be a number from 0 to 1; got {value!r}.")


def saved(tensor: Tensor) -> Tensor:
    """A copy for an edit, on the CPU."""
    return tensor.detach().cpu().clone()
