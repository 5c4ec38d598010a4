"""How good a calibration set is for a network, real or made up, without labels.

One walk over the images tells how far the statistics entering every BatchNorm are from the stored ones, how many
directions the features of every layer really use, whether the predictions are balanced, and how well a repair fitted to
some of the images serves the others. What is found decides whether BatchNorm may be re-estimated on the set.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi_cli.data.inversion import batchnorms, distance, statistics_of
from modhifi_cli.engine.gathering import LayerMoments
from modhifi_cli.errors import NumericsError
from modhifi_cli.evaluation.sample import SampleAnswers
from modhifi_cli.graph.components import weight_of
from modhifi_cli.graph.inputs import FORWARD_ERRORS, not_taken
from modhifi_cli.numerics.compensation import Joint, kept_weight
from modhifi_cli.numerics.fidelity import layer_fidelity
from modhifi_cli.numerics.regression import regressions
from modhifi_cli.records import Consumer, ImageSource, Progress

# Measured on ResNet-20, ResNet-56 and the embedded network: modhifi_cli/README.md, "Data from nothing".
POOR_DISTANCE = 0.08  # mean distance of BatchNorm statistics beyond which they must not be re-estimated
_FEW_CLASSES = 0.5  # entropy of the predictions as a share of the largest possible
_MANY_TWINS = 0.1
_OVERFITTED = 2.0  # held-out error over fitted error of a trial repair
_ALIVE = 1e-4  # of the layer's mean channel variance: channels below vary in no image
_TWIN = 0.999  # correlation of two thumbnails that counts as the same picture
_THUMBNAIL = 8
_MOST_COMPARED = 2000
_POSITIONS = 16  # of every image, for the channel covariances
_TRIED = 3  # layers on which a repair is tried
_WIDEST = 1200  # features of such a layer


@dataclass(frozen=True)
class LayerQuality:
    """What a set shows of one layer's input.

    Attributes:
        layer: Module name of a conv or linear layer.
        channels: Of its input.
        coverage: Share of them that vary over the set, 0 … 1.
        effective_rank: exp of the entropy of the channel covariance's eigenvalues, 1 … channels.
    """

    layer: str
    channels: int
    coverage: float
    effective_rank: float


@dataclass(frozen=True)
class Repair:
    """A trial: half of a layer's input channels, those of least energy, removed and repaired on four images in five.

    Attributes:
        layer: Module name.
        fitted: Relative error of the layer's output on the images that were fitted to, 0 … 1.
        held_out: The same on the others.
    """

    layer: str
    fitted: float
    held_out: float


@dataclass(frozen=True)
class Quality:
    """The quality of a calibration set for a network.

    Attributes:
        samples: Images.
        batchnorm: BatchNorm → distance of what enters it from the stored statistics; empty where none are stored.
        distance: Their mean, or None.
        folded: Whether there are BatchNorms and what they store says nothing (`inversion.statistics_of`).
        layers: What is seen of every layer.
        repairs: Trial repairs; empty with fewer than ten images.
        classes: Logits of the network.
        classes_seen: Classes that are predicted at least once.
        balance: Entropy of the predicted classes over that of a perfect balance, 0 … 1.
        confidence: Mean probability of the predicted class, 0 … 1.
        twins: Share of images that have a (nearly) identical one before them, 0 … 1.
        warnings: Sentences about what is poor.
        sample: What the run's page says of the predictions (`SampleAnswers.result`), from the same forward.
    """

    samples: int
    batchnorm: Mapping[str, float]
    distance: float | None
    layers: tuple[LayerQuality, ...]
    repairs: tuple[Repair, ...]
    classes: int
    classes_seen: int
    balance: float
    confidence: float
    twins: float
    folded: bool = False
    warnings: tuple[str, ...] = ()
    sample: Mapping[str, float | int] = field(default_factory=dict)

    @property
    def may_reestimate(self) -> bool:
        """Whether BatchNorm may be re-estimated on the set.

        Not where it was folded into the weights: what it divides by is no statistic of what enters it, and dividing by
        one instead would make another network.
        """
        return not self.folded and (self.distance is None or self.distance <= POOR_DISTANCE)

    def to_json(self) -> dict[str, Any]:
        """Plain values, less what the page has of its own."""
        values = asdict(self) | {"may_reestimate": self.may_reestimate}
        del values["sample"]
        return values


@torch.no_grad()
def assess(
    model: nn.Module, source: ImageSource, *, batch_size: int = 64, device: torch.device | str = "cpu"
) -> Iterator[Progress | Quality]:
    """Look at a calibration set with a network's eyes; the `Quality` comes last.

    Args:
        model: Dense network in evaluation mode on `device`; left as found.
        source: The images.
        batch_size: Images a forward.
        device: Where the forwards run.

    Raises:
        NumericsError: If activations are not finite.
    """
    norms = {id(norm) for norm in statistics_of(model)}
    names = {name: module for name, module in model.named_modules()}
    stored = {name: _NormSums() for name, module in names.items() if id(module) in norms}
    layers = {name: _Channels() for name, module in names.items() if _is_consumer(module)}
    trials = _trial_repairs({name: names[name] for name in layers}) if len(source) >= 10 else {}

    def hook(name: str) -> Any:
        def hear(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name in stored:
                stored[name].add(module, inputs[0])
            if name in layers:
                layers[name].add(module, inputs[0])
            if name in trials:
                trials[name].update(inputs[0])

        return hear

    handles = [names[name].register_forward_pre_hook(hook(name)) for name in (*stored, *layers)]
    logits, thumbnails, done, answers = [], [], 0, SampleAnswers()
    try:
        for images, _ in source.batches(batch_size):
            try:
                answer = model(images.to(device))
            except FORWARD_ERRORS as error:
                raise not_taken(model, tuple(images.shape), error) from error
            logits.append(answer.flatten(1).float().cpu())
            answers.see(images)
            answers.hear(logits[-1].double())
            if done < _MOST_COMPARED:
                thumbnails.append(_thumbnails(images.float()))
            done += len(images)
            yield Progress("quality", "calibration images", done, len(source))
    finally:
        for handle in handles:
            handle.remove()
    probabilities = torch.cat(logits).softmax(1)
    if not bool(torch.isfinite(probabilities).all()):
        raise NumericsError(
            "the network's logits on the calibration data are NaN or infinite; check weights and preprocessing."
        )
    sure, predicted = probabilities.max(1)
    classes = probabilities.shape[1]
    shares = torch.bincount(predicted, minlength=classes).double() / len(predicted)
    found = {name: sums.distance(names[name]) for name, sums in stored.items() if sums.rows}
    quality = Quality(
        samples=done,
        batchnorm=found,
        distance=sum(found.values()) / len(found) if found else None,
        layers=tuple(channels.result(name) for name, channels in layers.items() if channels.rows),
        repairs=tuple(_try(name, names[name], moments) for name, moments in trials.items() if layers[name].rows),
        classes=classes,
        classes_seen=int((shares > 0).sum()),
        folded=not norms and bool(batchnorms(model)),
        balance=_entropy(shares) / float(torch.tensor(float(max(2, min(classes, done)))).log()),
        confidence=float(sure.mean()),
        twins=_twins(torch.cat(thumbnails)[:_MOST_COMPARED]),
        sample=answers.result(),
    )
    yield replace(quality, warnings=_warnings(quality))


def _trial_repairs(layers: Mapping[str, nn.Module]) -> dict[str, LayerMoments]:
    """Accumulators of the few layers that a repair is tried on, spread over the network."""
    rows = {name: weight_of(layer)[0] for name, layer in layers.items()}
    chosen = [name for name, row in rows.items() if row.numel() <= _WIDEST and len(row) >= 4]
    return {
        name: LayerMoments(name, layers[name], positions_per_image=None, seed=0, hold_out=True)
        for name in chosen[len(chosen) // 6 :: max(1, len(chosen) // _TRIED)][:_TRIED]
    }


def _thumbnails(images: Tensor) -> Tensor:
    """A few numbers of each sample, ``[batch, numbers]``: averages of pixels, or of neighbouring numbers of other inputs."""
    if images.dim() == 4:
        return F.adaptive_avg_pool2d(images, _THUMBNAIL).flatten(1)
    flat = images.flatten(1)
    return flat if flat.shape[1] <= _THUMBNAIL**2 else F.adaptive_avg_pool1d(flat[:, None], _THUMBNAIL**2)[:, 0]


def _warnings(quality: Quality) -> tuple[str, ...]:
    found = []
    if quality.folded:
        found.append(
            "what BatchNorm stores here says nothing of the training (mean 0 and one variance everywhere: folded into "
            "the weights, or untrained)"
        )
    elif not quality.may_reestimate:
        found.append(
            f"the calibration images look unlike those of the training: the distance of BatchNorm statistics from the "
            f"stored ones is {quality.distance:.3f} (real images stay far below {POOR_DISTANCE:g})"
        )
    if quality.balance < _FEW_CLASSES:
        found.append(
            f"the network sees {quality.classes_seen} of {quality.classes} classes in the calibration images, very "
            f"unevenly (balance {quality.balance:.2f} of 1)"
        )
    if quality.twins > _MANY_TWINS:
        found.append(f"{quality.twins:.0%} of the calibration images are copies of others")
    worst = max(quality.repairs, key=lambda trial: trial.held_out / max(trial.fitted, 1e-12), default=None)
    if worst is not None and worst.held_out > _OVERFITTED * worst.fitted and worst.held_out > 0.01:
        found.append(
            f"the calibration images are too few or too different to repair from: at {worst.layer} a trial repair "
            f"leaves an error of {worst.fitted:.1%} on the images it was fitted to and of {worst.held_out:.1%} on others"
        )
    return tuple(found)


def _is_consumer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or isinstance(module, nn.Conv2d) and module.groups == 1


class _NormSums:
    """Sums of a BatchNorm's input about its stored mean, float64."""

    def __init__(self) -> None:
        self.rows = 0
        self._first = self._second = torch.zeros((), dtype=torch.float64)

    def add(self, norm: nn.Module, maps: Tensor) -> None:
        maps = maps.flatten(2) if maps.ndim > 2 else maps[..., None]
        about = (maps - norm.get_buffer("running_mean")[:, None]).double()
        self.rows += maps.shape[0] * maps.shape[2]
        self._first = self._first + about.sum((0, 2))
        self._second = self._second + about.square().sum((0, 2))

    def distance(self, norm: nn.Module) -> float:
        found = float(distance(norm, self.rows, self._first, self._second))
        if found != found:
            raise NumericsError(
                "activations on the calibration data are NaN or infinite; check weights and preprocessing."
            )
        return found


class _Channels:
    """Covariance of a layer's input channels, over a grid of positions of every image."""

    def __init__(self) -> None:
        self.rows = 0
        self._mean = self._moment = torch.zeros((), dtype=torch.float64)

    def add(self, module: nn.Module, inputs: Tensor) -> None:
        if isinstance(module, nn.Linear):
            rows = inputs.flatten(0, -2).double()
        else:
            step = max(1, round((inputs.shape[2] * inputs.shape[3] / _POSITIONS) ** 0.5))
            rows = inputs[:, :, step // 2 :: step, step // 2 :: step].permute(0, 2, 3, 1).flatten(0, 2).double()
        self.rows += len(rows)
        self._mean = self._mean + rows.sum(0)
        self._moment = self._moment + rows.T @ rows

    def result(self, name: str) -> LayerQuality:
        mean = self._mean / self.rows
        covariance = self._moment / self.rows - torch.outer(mean, mean)
        spread = covariance.diagonal().clamp_min(0)
        shares = torch.linalg.eigvalsh(covariance).clamp_min(0)
        shares = shares / shares.sum().clamp_min(1e-300)
        alive = spread > _ALIVE * spread.mean()
        rank = float(torch.tensor(_entropy(shares)).exp())
        return LayerQuality(name, len(mean), float(alive.double().mean()), rank)


def _try(name: str, module: nn.Module, moments: LayerMoments) -> Repair:
    gathered = moments.result()
    assert gathered.held_out is not None  # ten images hold two out
    weight = weight_of(module).flatten(1).double()
    channels = weight_of(module).shape[1]
    consumer = Consumer(name, weight, gathered.statistics, channels, channels, True, gathered.held_out)
    energy = (
        gathered.statistics.summed.diagonal()
        if gathered.statistics.samples is None
        else gathered.statistics.samples.double().square().mean(0)
    )
    worth = (weight.square().sum(0) * energy).view(channels, -1).sum(1)
    kept = worth.topk(max(1, channels // 2)).indices.sort().values.cpu()
    ridge = Joint().solve(consumer, kept).ridge
    assert ridge is not None  # a joint solve always has one
    every, held = regressions(consumer, kept, gathered.held_out)
    fit = every.without(held)
    fit = fit.about(fit.inputs, fit.targets)
    repaired = kept_weight(consumer, kept) + every.widened(fit.solve(ridge))

    def error(of: Any) -> float:
        return 1 - layer_fidelity(replace(consumer, statistics=of), kept, repaired)

    try:
        whole, apart = error(gathered.statistics), error(gathered.held_out)
    except NumericsError:  # the layer is silent on these images
        return Repair(name, 0.0, 0.0)
    rows, held_rows = gathered.statistics.rows, gathered.held_out.rows
    return Repair(name, max((rows * whole - held_rows * apart) / (rows - held_rows), 0.0), apart)


def _entropy(shares: Tensor) -> float:
    positive = shares[shares > 0]
    return float(-(positive * positive.log()).sum())


def _twins(thumbnails: Tensor) -> float:
    """Share of pictures that an earlier one nearly equals."""
    centred = thumbnails - thumbnails.mean(1, keepdim=True)
    flat = centred.norm(dim=1) < 1e-6
    unit = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
    alike = (unit @ unit.T).masked_fill(flat[:, None] != flat[None, :], 0.0)
    alike = torch.where(flat[:, None] & flat[None, :], torch.ones_like(alike), alike)
    # Equal up to exposure is not enough: the thumbnails themselves must be as near.
    scale = centred.norm(dim=1)
    near = (thumbnails.mean(1)[:, None] - thumbnails.mean(1)[None, :]).abs() < 0.02
    near &= (scale[:, None] - scale[None, :]).abs() <= 0.02 * torch.maximum(scale[:, None], scale[None, :]) + 1e-6
    twin = ((alike > _TWIN) & near).tril(-1).any(1)
    return float(twin.double().mean())
