"""Healing: a pruned network is trained towards the dense network's own answers, without labels. Off by default.

Beside the fine-tuning that unlearning offers, this is the only place that takes gradients of weights. The targets are
what the dense network gives for the same unlabelled samples: its answers (KL divergence) and the outputs of its blocks.
First every block is trained by itself: each is handed what the one before gives and its error ends there, so the memory
of one block's backward is enough. Then the whole network is trained at once. Samples that were held out of all fits
judge after every epoch, and what was before stays unless they get better: the result is never worse on them than what
came in, whatever the learning rate.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from modhifi_cli.data.inversion import batchnorms
from modhifi_cli.data.making import made_up
from modhifi_cli.engine.gathering import held_out_images
from modhifi_cli.errors import ConfigError, DataError, is_number, need_whole
from modhifi_cli.graph.answers import respond, tensors_of
from modhifi_cli.graph.components import output_size
from modhifi_cli.graph.decoder import decoder_layers
from modhifi_cli.graph.trace import trace
from modhifi_cli.records import Edit, EditState, ImageSource, ModuleEdit, Progress

STEP = "healing"  # name of the edit, and how it is told from those in closed form
LEAST_SAMPLES = 5  # one in five is held out
_STAGES = ("blocks", "whole")
_SAVE_SECONDS = 60.0  # between states that a run can go on from
_WARM_UP = 0.05  # share of a stage's steps over which the learning rate rises
_DIVERGED = 10.0  # times the first divergence on held-out samples
_WAYS = (0.75, 0.5, 0.25)  # shares of the way that are tried beside the whole
_OF_MADE_UP = 0.5  # where no held-out sample is of the world
_AT_ONCE = 4096  # tokens of one forward that judges


@dataclass(frozen=True)
class Distill:
    """How a network is healed; named in configs/healing/.

    Attributes:
        epochs: Walks over the samples with the whole network.
        block_epochs: Walks before that in which every block is trained by itself.
        lr: Largest learning rate of AdamW (no weight decay); it rises over 5 % of a stage's steps and falls to 0 as a
            cosine.
        batch_size: Images of a step.
        sequences: Token windows of a step, for language models.
        temperature: Both networks' logits are divided by it in the divergence that is trained; ``"infinite"`` compares
            the logits themselves; ``"auto"``: that for images, 2 for text.
        match: Weight of the mean relative error of the blocks' outputs beside the divergence, with the whole network.
        augment: Whether images are mirrored and moved by up to an eighth of their size, anew in every epoch.
        batchnorm: ``"stored"``: BatchNorms keep the statistics of the closed form; ``"batches"``: they standardise each
            batch by itself while the network trains, and the running averages of that are kept.
        way: Share of the way from the closed form to what was trained that is gone in the end, above 0 to 1; weights in
            between often do better elsewhere than both (Wortsman et al., 2022). ``"auto"``: what held-out samples like
            best of all four quarters; where samples are made up, which held-out ones are too, half.

    Raises:
        ConfigError: If a value is out of range.
    """

    epochs: int = 5
    block_epochs: int = 1
    lr: float = 1e-3
    batch_size: int = 64
    sequences: int = 4
    temperature: float | str = "auto"
    match: float = 1.0
    augment: bool = True
    batchnorm: str = "stored"
    way: float | str = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "block_epochs"):
            need_whole(f"healing.{name}", getattr(self, name), 0)
        if self.epochs + self.block_epochs == 0:
            raise ConfigError(
                "healing.epochs and healing.block_epochs are both 0, so nothing is trained; set healing=none."
            )
        for name in ("batch_size", "sequences"):
            need_whole(f"healing.{name}", getattr(self, name), 1)
        if not is_number(self.lr) or not 0 < self.lr < math.inf:
            raise ConfigError(f"healing.lr must be a number above 0; got {self.lr!r}.")
        if self.temperature not in ("auto", "infinite") and not (is_number(self.temperature) and self.temperature > 0):
            raise ConfigError(
                f"healing.temperature must be a number above 0, infinite or auto; got {self.temperature!r}."
            )
        if not is_number(self.match) or not 0 <= self.match < float("inf"):
            raise ConfigError(f"healing.match must be a number from 0; got {self.match!r}.")
        if not isinstance(self.augment, bool):
            raise ConfigError(f"healing.augment must be true or false; got {self.augment!r}.")
        if self.batchnorm not in ("stored", "batches"):
            raise ConfigError(f"healing.batchnorm must be stored or batches; got {self.batchnorm!r}.")
        if self.batchnorm == "batches" and self.batch_size < 2:
            raise ConfigError(
                "healing.batchnorm=batches standardises each batch by itself, which takes healing.batch_size from 2; got 1."
            )
        if self.way != "auto" and not (is_number(self.way) and 0 < self.way <= 1):
            raise ConfigError(f"healing.way must be a number above 0 up to 1, or auto; got {self.way!r}.")


@dataclass(frozen=True)
class HealingState:
    """Everything an interrupted healing goes on from.

    Attributes:
        tensors: ``"now/NAME"``, ``"best/NAME"`` parameters (and running averages, where BatchNorms follow),
            ``"first/NAME"`` and ``"second/NAME"`` AdamW's averages.
        facts: JSON-able: where it stands, and what the held-out samples said.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Healed:
    """What the healing came to.

    Attributes:
        before: Mean divergence KL(dense ‖ pruned) on the held-out samples before, nats (of a token, for text).
        after: The same of the network that is kept; never more than `before`.
        trained: Whether anything that was trained is kept.
        epochs: Epochs that were run, of both stages.
        samples: Samples trained on.
        held_out: Samples that judged.
        way: Share of the way from the closed form to what was trained that is kept.
        history: Epoch by epoch stage, epoch and divergence on the held-out samples.
        warnings: Sentences the user must see.
    """

    before: float
    after: float
    trained: bool
    epochs: int
    samples: int
    held_out: int
    way: float = 1.0
    history: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where outputs of blocks are compared.

    Attributes:
        module: Name, the same in both networks.
        axis: Of the channels.
        channels: Which of the dense network's channels the pruned one still has, ``[kept]`` int64, or None for all.
    """

    module: str
    axis: int
    channels: Tensor | None


def about(healed: Healed) -> str:
    """One sentence that says whether a network is trained, and what held-out samples made of it."""
    change = (
        f"KL to the dense network on {healed.held_out} held-out samples {healed.before:.4g} before, "
        f"{healed.after:.4g} after"
    )
    if not healed.trained:
        return f"healing changed nothing ({change})."
    gone = "" if healed.way == 1 else f", {healed.way:.0%} of the way"
    return (
        f"healed by {healed.epochs} epochs of training towards the dense network's own answers on {healed.samples} "
        f"unlabelled samples{gone} ({change}): these results are trained, not those of a closed form alone."
    )


def check_samples(count: int) -> None:
    """Refuse, before any work, to heal without samples that can judge.

    Raises:
        ConfigError: If none can be held out.
    """
    if count < LEAST_SAMPLES:
        raise ConfigError(
            f"healing=distill keeps what it trains only if held-out samples get better, which takes at least "
            f"{LEAST_SAMPLES} calibration samples; got {count}: raise their number, or set healing=none."
        )


def heal_(
    model: nn.Module,
    dense: nn.Module,
    calibration: ImageSource,
    *,
    recipe: Distill,
    edits: Sequence[Edit] = (),
    device: torch.device | str = "cpu",
    seed: int = 0,
    state: HealingState | None = None,
) -> Iterator[Progress | HealingState | Edit | Healed]:
    """Train `model` in place towards `dense`, yielding progress, states to go on from, an edit if it helps, a summary.

    All samples are kept in memory. Embeddings and the head of a language model are not trained. Training is in float32;
    what judges is the network in its own precision.

    Args:
        model: The pruned network, evaluation mode.
        dense: The network before any edit.
        calibration: Unlabelled samples; every fifth is held out.
        recipe: How.
        edits: What made `model` of `dense`: they say which channels are left.
        device: Where it runs.
        seed: Of the order of the samples and their augmentation.
        state: To go on from; the result is that of an undisturbed run.

    Raises:
        ConfigError: If no sample can be held out.
        DataError: If `state` is of another network.
    """
    check_samples(len(calibration))
    device = torch.device(device)
    homes = [(network, next(network.parameters()).device) for network in (model, dense)]
    for network, _ in homes:
        network.to(device).eval()
    samples = torch.cat([inputs for inputs, _ in calibration.batches(64)])
    try:
        if recipe.way == "auto" and made_up(calibration.protocol):
            recipe = dataclasses.replace(recipe, way=_OF_MADE_UP)
        yield from _Work(model, dense, samples, recipe, edits, device, seed).go(state)
    finally:
        for network, home in homes:
            network.to(home)


class _Work:
    """One healing at work."""

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        samples: Tensor,
        recipe: Distill,
        edits: Sequence[Edit],
        device: torch.device,
        seed: int,
    ) -> None:
        self.model, self.dense, self.recipe, self.device, self.seed = model, dense, recipe, device, seed
        held = held_out_images(torch.arange(len(samples)))
        self.fitted, self.held = samples[~held], samples[held]
        self.reads_text = not samples.is_floating_point()
        self.size = recipe.sequences if self.reads_text else recipe.batch_size
        chosen = (2.0 if self.reads_text else "infinite") if recipe.temperature == "auto" else recipe.temperature
        self.temperature = math.inf if chosen == "infinite" else float(chosen)
        self.places = find_places(model, dense, samples[:2].to(device), edits)
        self.student = copy.deepcopy(model).float()
        fixed = _not_trained(self.student) if self.reads_text else set()
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(id(parameter) not in fixed)
            if id(parameter) not in fixed:
                self.parameters[name] = parameter
        self.history: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.learned: dict[str, Tensor] = {**self.parameters, **self.follow_()}
        self.start = self.present()

    def follow_(self) -> dict[str, Tensor]:
        """Let the student's BatchNorms follow the batches if asked for; their running averages by name."""
        if self.recipe.batchnorm == "stored":
            return {}
        found: dict[str, Tensor] = {}
        for name, module in batchnorms(self.student).items():
            module.train()
            found |= {f"{name}.{key}": getattr(module, key) for key in ("running_mean", "running_var")}
        if not found:
            self.warnings.append(
                "healing.batchnorm=batches changes nothing: this network has no BatchNorm with running averages."
            )
        return found

    def go(self, state: HealingState | None) -> Iterator[Progress | HealingState | Edit | Healed]:
        if state is None:
            self.before = yield from self.judge("before healing")
            self.best, self.lowest, stage, epoch, step = self.present(), self.before, 0, 0, 0
            averages = None
        else:
            stage, epoch, step, averages = self.restore_(state)
        for number in range(stage, len(_STAGES)):
            if state is None or number > stage:
                self.begin_()
            yield from self.train(number, epoch, step, averages)
            epoch, step, averages = 0, 0, None
        way, nearest = yield from self.settle_()
        trained = self.lowest < self.before
        if not trained and math.isfinite(nearest):
            self.warnings.append(
                f"healing did not bring held-out samples nearer to the dense network (KL {self.before:.4g} before, "
                f"{nearest:.4g} at best): what was before is kept."
            )
        epochs, fitted, held = len(self.history), len(self.fitted), len(self.held)
        healed = Healed(
            self.before, self.lowest, trained, epochs, fitted, held, way, tuple(self.history), tuple(self.warnings)
        )
        if trained:
            yield self.edit(healed)
        yield healed

    def settle_(self) -> Generator[Progress, None, tuple[float, float]]:
        """Go the way from the closed form to the best that was trained, or the share of it that is to be kept.

        Returns:
            That share, and the divergence of the nearest network that might have been kept.
        """
        whole, kept, seen = self.best, 1.0, [row["kl"] for row in self.history]
        ways = _WAYS if self.recipe.way == "auto" else (float(self.recipe.way),)
        if self.lowest < self.before and ways != (1.0,):
            if self.recipe.way != "auto":  # the whole way is not to be kept
                self.best, self.lowest, seen = self.start, self.before, []
            for way in ways:
                self.write_(
                    {name: torch.lerp(self.start[name].float(), end.float(), way) for name, end in whole.items()}
                )
                seen.append((yield from self.judge(f"{way:.0%} of the way")))
                if seen[-1] < self.lowest:
                    self.lowest, self.best, kept = seen[-1], self.present(), way
        self.write_(self.best)
        return kept, min(seen, default=math.inf)

    # ------------------------------------------------------------------------------------------------------ training

    def train(
        self, number: int, first_epoch: int, first_step: int, averages: Mapping[str, Tensor] | None
    ) -> Iterator[Progress | HealingState]:
        """One stage from where it stands to its end, or to where it diverges."""
        stage = _STAGES[number]
        epochs = self.recipe.block_epochs if stage == "blocks" else self.recipe.epochs
        steps = len(self.batches(torch.arange(len(self.fitted))))
        optimiser = torch.optim.AdamW(self.parameters.values(), lr=self.recipe.lr, weight_decay=0.0)
        if averages:
            for name, parameter in self.parameters.items():
                done = torch.tensor(float(first_epoch * steps + first_step))
                optimiser.state[parameter] = {
                    "step": done, "exp_avg": averages[f"first/{name}"].to(self.device),
                    "exp_avg_sq": averages[f"second/{name}"].to(self.device),
                }  # fmt: skip
        saved = time.monotonic()
        for epoch in range(first_epoch, epochs):
            order = self.batches(torch.randperm(len(self.fitted), generator=self.drawn(number, epoch)))
            for step in range(first_step if epoch == first_epoch else 0, steps):
                rate = self.recipe.lr * _rate(epoch * steps + step, epochs * steps)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                batch = self.batch(order[step], self.drawn(number, epoch, step))
                optimiser.zero_grad(set_to_none=True)
                loss = self.losses(batch, apart=stage == "blocks")
                if not math.isfinite(loss):
                    self.diverged(stage, epoch, f"a loss of {loss}")
                    return
                optimiser.step()
                item = f"{stage}, epoch {epoch + 1} of {epochs}"
                yield Progress("healing", item, epoch * steps + step + 1, epochs * steps)
                if time.monotonic() - saved > _SAVE_SECONDS and step + 1 < steps:
                    yield self.state(number, epoch, step + 1, optimiser)
                    saved = time.monotonic()
            self.write_(self.trained())
            kl = yield from self.judge(f"{stage}, epoch {epoch + 1}")
            self.history.append({"stage": stage, "epoch": epoch + 1, "kl": kl})
            if kl < self.lowest:
                self.lowest, self.best = kl, self.present()
            if not kl < _DIVERGED * max(self.before, 1e-3):
                self.diverged(stage, epoch, f"a divergence of {kl:.3g} on held-out samples, {self.before:.3g} before")
                return
            yield self.state(number, epoch + 1, 0, optimiser)
            saved = time.monotonic()

    def losses(self, batch: Tensor, *, apart: bool) -> float:
        """Gradients of one batch into the parameters; the loss.

        With `apart` the error of every block is sent back at once, and only into that block.
        """
        theirs: dict[str, Tensor] = {}
        with torch.no_grad(), _watched(self.dense, {p.module: _keep_in(theirs, p.module) for p in self.places}):
            wanted = respond(self.dense, batch).float()
        gaps: list[Tensor] = []

        def compare(place: Place) -> Callable[[Tensor], Tensor | None]:
            def look(ours: Tensor) -> Tensor | None:
                gap = _gap(ours.clone(), theirs[place.module], place)  # what follows may write into its input
                if apart:
                    (gap / len(self.places)).backward()
                    gaps.append(gap.detach())
                    return ours.detach()
                gaps.append(gap)
                return None

            return look

        with torch.enable_grad(), _watched(self.student, {p.module: compare(p) for p in self.places}):
            answers = respond(self.student, batch.float() if batch.is_floating_point() else batch).float()
            loss = divergence(wanted, answers, self.temperature)
            if gaps and not apart and self.recipe.match:
                loss = loss + self.recipe.match * torch.stack(gaps).mean()
            loss.backward()
        return float(loss.detach()) + (float(torch.stack(gaps).mean()) if apart and gaps else 0.0)

    @torch.no_grad()
    def begin_(self) -> None:
        """A stage begins with the best so far, so that one that lost its way costs the next nothing."""
        for name, tensor in self.learned.items():
            tensor.copy_(self.best[name])

    def batches(self, order: Tensor) -> list[Tensor]:
        """The order of an epoch, batch by batch; a lone last sample, which no BatchNorm can follow, joins the others."""
        parts = list(order.split(self.size))
        if self.recipe.batchnorm == "batches" and len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        return parts

    def batch(self, numbers: Tensor, generator: torch.Generator) -> Tensor:
        batch = self.fitted[numbers]
        if self.recipe.augment and not self.reads_text:
            batch = augmented(batch, generator)
        return batch.to(self.device)

    def drawn(self, *numbers: int) -> torch.Generator:
        seed = self.seed
        for number in numbers:
            seed = (seed * 1_000_003 + number + 1) % 2**63
        return torch.Generator().manual_seed(seed)

    def diverged(self, stage: str, epoch: int, what: str) -> None:
        self.warnings.append(
            f"healing diverged ({what}, {stage}, epoch {epoch + 1}) with healing.lr={self.recipe.lr:g}: the stage ended "
            f"there{'' if self.lowest < self.before else ', and the best so far is the closed form'}; lower healing.lr."
        )

    # ------------------------------------------------------------------------------------------------------- judging

    @torch.no_grad()
    def judge(self, item: str) -> Generator[Progress, None, float]:
        """Mean divergence of the network as it is from the dense one, over the held-out samples."""
        at_once = max(1, _AT_ONCE // self.held.shape[1]) if self.reads_text else 64
        total, parts = 0.0, self.held.split(at_once)
        for number, batch in enumerate(parts, start=1):
            batch = batch.to(self.device)
            wanted, answers = (respond(network, batch).float() for network in (self.dense, self.model))
            total += float(divergence(wanted, answers, 1.0)) * len(batch)
            yield Progress("healing", f"held-out samples, {item}", number, len(parts))
        return total / len(self.held)

    def trained(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.learned.items()}

    def present(self) -> dict[str, Tensor]:
        """The network's own tensors as they are, copied."""
        return {name: _tensor(self.model, name).detach().clone() for name in self.learned}

    @torch.no_grad()
    def write_(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            _tensor(self.model, name).copy_(tensor)

    def edit(self, healed: Healed) -> Edit:
        modules: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.best.items():
            if not torch.equal(tensor, self.start[name]):
                module, _, own = name.rpartition(".")
                modules.setdefault(module, {})[own] = tensor.cpu()
        parts = tuple(ModuleEdit(module, tensors=tensors) for module, tensors in modules.items())
        nothing = torch.arange(0)
        return Edit(STEP, 0, parts, nothing, nothing, {"healed": dataclasses.asdict(healed)}, EditState(step=STEP))

    # --------------------------------------------------------------------------------------------------------- state

    def state(self, stage: int, epoch: int, step: int, optimiser: torch.optim.Optimizer) -> HealingState:
        tensors = {f"now/{name}": tensor for name, tensor in self.trained().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.parameters.items():
            own = optimiser.state[parameter]
            if own:
                tensors |= {f"first/{name}": own["exp_avg"], f"second/{name}": own["exp_avg_sq"]}
        facts = {"stage": stage, "epoch": epoch, "step": step, "before": self.before, "lowest": self.lowest,
                 "history": list(self.history), "warnings": list(self.warnings)}  # fmt: skip
        return HealingState({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, facts)

    @torch.no_grad()
    def restore_(self, state: HealingState) -> tuple[int, int, int, dict[str, Tensor]]:
        facts = state.facts
        try:
            for name, tensor in self.learned.items():
                tensor.copy_(state.tensors[f"now/{name}"])
            self.best = {name: state.tensors[f"best/{name}"].to(self.device) for name in self.learned}
            self.before, self.lowest = float(facts["before"]), float(facts["lowest"])
            self.history = [dict(row) for row in facts["history"]]
            self.warnings = [str(text) for text in facts.get("warnings", ())]
            place = int(facts["stage"]), int(facts["epoch"]), int(facts["step"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"the saved state of the healing does not fit this network ({error}); remove healing.safetensors from "
                "the run's folder to begin the healing again."
            ) from error
        averages = {key: value for key, value in state.tensors.items() if key.startswith(("first/", "second/"))}
        return *place, averages


def divergence(wanted: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """Mean over samples (and tokens) of τ² KL(softmax(wanted / τ) ‖ softmax(answers / τ)), nats.

    Args:
        wanted: Logits of the dense network, ``[…, classes]``.
        answers: Logits that are judged, same shape.
        temperature: τ > 0; τ² keeps the gradient's size. Infinite is the limit, half the mean over classes of
            (Δ − mean Δ)² with Δ the difference of the logits.
    """
    if math.isinf(temperature):
        gap = wanted - answers
        return (gap - gap.mean(-1, keepdim=True)).square().mean() / 2
    first = functional.log_softmax(wanted / temperature, -1).flatten(0, -2)
    second = functional.log_softmax(answers / temperature, -1).flatten(0, -2)
    return temperature**2 * functional.kl_div(second, first, reduction="batchmean", log_target=True)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image mirrored or not, and moved by up to an eighth of its size; what comes in from outside is 0.

    Args:
        images: ``[batch, channels, height, width]``, normalised.
        generator: Where the draws come from.
    """
    batch, _, height, width = images.shape
    down, across = height // 8, width // 8
    mirrored = torch.rand(batch, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    padded = functional.pad(images, (across, across, down, down))
    top = torch.randint(0, 2 * down + 1, (batch,), generator=generator)
    left = torch.randint(0, 2 * across + 1, (batch,), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    each = torch.arange(batch)[:, None, None, None]
    return padded[each, torch.arange(images.shape[1])[None, :, None, None], rows, columns]


def find_places(model: nn.Module, dense: nn.Module, example: Tensor, edits: Sequence[Edit]) -> tuple[Place, ...]:
    """Where blocks end: the decoder layers, or of the cuts of an image network the last in front of each layer.

    A cut whose channels are not all left is used where an edit of the layer that writes them says which are.

    Args:
        model: The pruned network.
        dense: The dense one.
        example: Two samples.
        edits: What made the one of the other.
    """
    if not example.is_floating_point():
        return tuple(Place(name, -1, None) for name in decoder_layers(model))
    traced = trace(dense, example)
    kinds = nn.Linear | nn.modules.conv._ConvNd
    layers = [name for name in traced.visits if isinstance(dense.get_submodule(name), kinds)]
    cuts, following = [], math.inf
    for cut in reversed(traced.cuts):
        leave = traced.visits[cut].leave
        if any(leave < traced.visits[name].enter < following for name in layers):
            cuts.append(cut)
            following = leave
    shapes: tuple[dict[str, Tensor], ...] = ({}, {})
    for network, seen in zip((dense, model), shapes, strict=True):
        with torch.no_grad(), _watched(network, {cut: _keep_in(seen, cut) for cut in cuts}):
            network(example)
    kept = {name: channels for name, channels in _kept_outputs(edits).items() if name in layers}
    found = []
    for cut in reversed(cuts):
        if cut not in shapes[0] or cut not in shapes[1]:
            continue  # it gives no tensor
        wide, narrow = shapes[0][cut].shape, shapes[1][cut].shape
        changed = [axis for axis, (of, to) in enumerate(zip(wide, narrow, strict=True)) if of != to]
        if not changed:
            found.append(Place(cut, 1 if len(wide) == 4 else -1, None))
            continue
        writers = [
            name
            for name, channels in kept.items()
            if len(changed) == 1
            and traced.visits[name].leave <= traced.visits[cut].leave
            and output_size(dense.get_submodule(name)) == wide[changed[0]]
            and len(channels) == narrow[changed[0]]
        ]
        if writers:
            last = max(writers, key=lambda name: traced.visits[name].leave)
            axis = 1 if len(wide) == 4 else -1
            if changed[0] == axis % len(wide):
                found.append(Place(cut, axis, kept[last].to(example.device)))
    return tuple(found)


def _kept_outputs(edits: Sequence[Edit]) -> dict[str, Tensor]:
    """Layer → its outputs that all edits together leave, in the numbers of the dense network, ``[kept]`` int64."""
    found: dict[str, Tensor] = {}
    for part in (part for edit in edits for part in edit.modules):
        if part.kept_outputs is not None:
            before = found.get(part.module)
            found[part.module] = part.kept_outputs if before is None else before[part.kept_outputs]
    return found


def _tensor(model: nn.Module, name: str) -> Tensor:
    module, _, own = name.rpartition(".")
    return getattr(model.get_submodule(module), own)


def _not_trained(model: nn.Module) -> set[int]:
    """Parameters of embeddings and of the head of a language model, by identity."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    find_head = getattr(model, "get_output_embeddings", None)
    head = None if find_head is None else find_head()
    modules += [] if head is None else [head]
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _rate(step: int, steps: int) -> float:
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _gap(ours: Tensor, theirs: Tensor, place: Place) -> Tensor:
    """Squared error of a block's output as a share of the dense one's size: of each token, or of all maps together."""
    if place.channels is not None:
        theirs = theirs.index_select(place.axis, place.channels)
    error, size = (ours - theirs.float()).square(), theirs.float().square()
    if place.axis == 1 and theirs.dim() == 4:
        return error.mean() / size.mean().clamp(min=1e-12)
    return (error.mean(-1) / size.mean(-1).clamp(min=1e-12)).mean()


def _keep_in(found: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    def look(tensor: Tensor) -> None:
        found[name] = tensor.detach().clone()  # a clone: the next layer may write into it

    return look


class _watched:
    """Show functions the outputs of modules during forwards; a tensor that one returns takes the output's place."""

    def __init__(self, model: nn.Module, looks: Mapping[str, Callable[[Tensor], Tensor | None]]) -> None:
        self._model, self._looks = model, looks
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for name, look in self._looks.items():
            self._handles.append(self._model.get_submodule(name).register_forward_hook(_shown(look)))

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def _shown(look: Callable[[Tensor], Tensor | None]) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: Any) -> Any:
        seen = next(tensors_of(output))
        instead = look(seen)
        if instead is None:
            return None
        return instead if isinstance(output, Tensor) else (instead, *output[1:])

    return hook
