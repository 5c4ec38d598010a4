"""The walk over a causal decoder: layer after layer, each on the device while it is at work.

Heads of attention and hidden neurons of the MLP are the parts of a layer. Several processes may share the calibration
set; only sums are exchanged, so that all decide and edit alike.
"""

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.engine.decoder_widths import Widths
from modhifi_cli.engine.flow import Flow, Seen, rows_read
from modhifi_cli.engine.forecast import Run, forecast
from modhifi_cli.engine.gathering import Gathered, LayerMoments, TargetMoments, held_out_images
from modhifi_cli.engine.impact import restored
from modhifi_cli.engine.memory import peaks
from modhifi_cli.engine.plan import check_weights
from modhifi_cli.engine.team import Team
from modhifi_cli.engine.walk import Budget, Cut, Looking, Pair, Recipe, Repair, Stop, Surveyed
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.evaluation.visiting import free_memory
from modhifi_cli.graph.components import ComponentGroup, Layout, Slot, bias_of, weight_of
from modhifi_cli.graph.decoder import KINDS, UNITS, Call, find_parts, leave, run_layer, slice_part_
from modhifi_cli.graph.experts import of_experts, open_experts_
from modhifi_cli.graph.heads import free_heads_
from modhifi_cli.models.hf import accepts_heads
from modhifi_cli.numerics.scoring import Place
from modhifi_cli.records import Consumer, EditState, ImageSource, Note, Progress, Statistics
from modhifi_cli.roles import Scoring, solves_towards_dense

_TRIAL_TOKENS = 1536  # held-out tokens on which a trial runs: each costs half a forward on average
_ROWS = 64  # tokens whose predictions over the vocabulary stay in a processor's cache


@dataclass(frozen=True)
class DecoderOptions:
    """What is special to decoders. Named in configs/decoder.

    Attributes:
        components: Which of ``"mlp"`` (hidden neurons, the paper; of experts each its own), ``"attention"`` (heads) and
            ``"experts"`` (whole experts with their rows of the router) are pruned.
        unit: What goes of attention: ``"kv_group"`` a KV head with its query heads, ``"query_head"`` the same number of
            query heads from every KV head, ``"auto"`` the former from 4 KV heads on.
        add_bias: Give consumers without a bias one that carries the mean of what was removed. It changes the
            architecture, so the folder then needs `modhifi_cli.load_model`.
        native: With even widths, whether head counts are chosen among those that the family's configuration accepts.
        offload: Whether the hidden states of the calibration tokens wait on the CPU.

    Raises:
        ConfigError: If a value is unknown.
    """

    components: Sequence[str] = ("mlp",)
    unit: str = "auto"
    add_bias: bool = False
    native: bool = True
    offload: bool = False

    def __post_init__(self) -> None:
        if not self.components or not set(self.components) <= set(KINDS):
            raise ConfigError(f"decoder.components must name some of mlp, attention and experts, got {list(self.components)}.")
        if {"mlp", "experts"} <= set(self.components):
            raise ConfigError(
                "decoder.components: neurons and whole experts are cut one after the other, since what one costs depends on "
                "the other; prune with components=[experts] first, then the new folder with components=[mlp]."
            )
        if self.unit not in UNITS:
            raise ConfigError(f"decoder.unit must be one of {', '.join(UNITS)}, got '{self.unit}'.")


class TokenWalk:
    """A causal decoder on its calibration tokens (`walk.Walk`).

    Args:
        model: Dense causal decoder, evaluation mode. It stays on the device it is on; layers visit `device` one by one.
        calibration: Token windows.
        options: What is special to decoders.
        exclude: Names of modules to leave alone.
        batch_size: Sequences a forward, at most.
        device: Where layers run.
        team: Other processes that run the same with their share of the calibration set; None for none.

    Raises:
        ConfigError: If a setting is out of range.
        DataError: If there are no calibration tokens.
        NumericsError: If a weight is not finite.
        UnsupportedModelError: If nothing in the network can be pruned.
    """

    what = "layers"
    trial_ridge = 1e-2  # tokens are few and alike

    def __init__(
        self,
        model: nn.Module,
        calibration: ImageSource,
        *,
        options: DecoderOptions | None = None,
        exclude: Sequence[str] = (),
        batch_size: int = 8,
        device: torch.device | str = "cpu",
        team: Team | None = None,
    ) -> None:
        if len(calibration) == 0:
            raise DataError("the calibration data holds no tokens; give data.sequences at least 1.")
        self.options = options or DecoderOptions()
        check_weights(model)
        open_experts_(model)
        free_heads_(model)
        self.model, self.samples = model, len(calibration)
        self.decoder = find_parts(model, components=self.options.components, unit=self.options.unit, exclude=exclude)
        self.refused = self.decoder.refused
        self.parts = tuple(part.group for part in self.decoder.parts)
        self._part = {part.name: part for part in self.decoder.parts}
        self._of_layer = [
            tuple(part.group for part in self.decoder.parts if part.layer == number)
            for number in range(len(self.decoder.layers))
        ]
        self.stops = tuple(Stop(n, parts) for n, parts in zip(self.decoder.layers, self._of_layer, strict=True))
        self.layout = Layout(model, self.parts)
        self.restores_always = self.options.add_bias
        self._example = next(iter(calibration.batches(1)))[0][:1]
        self.length = self._example.shape[1]
        self.flow = Flow(
            model,
            self.decoder.layers,
            calibration,
            batch_size=batch_size,
            device=torch.device(device),
            offload=self.options.offload,
            team=team or Team(),
        )
        self._dense: Flow | None = None
        self._twin: nn.Module | None = None  # the whole dense network, where layers are cut more than once
        self._towards_dense, self._where_added, self._passes = False, False, 1
        self._predicted: Tensor | None = None  # what the dense network says on the trial's tokens, for later passes
        self._number, self._layer, self._dense_layer = 0, nn.Module(), nn.Module()
        self._behind: list[Tensor] = []  # what the dense network's layer at work gives, as far as it was asked
        self._added: dict[str, bool] = {}  # whether readers' outputs are added to the stream as they are
        self._silent: list[str] = []  # experts that no calibration token was given to
        self._edits = 0

    def prepare(self, recipe: Recipe, passes: int) -> Iterator[Progress | Note]:
        """Say what memory will be needed and whether it is there; keep the dense network if layers are cut in several passes."""
        self._towards_dense, self._passes = solves_towards_dense(recipe.compensation), passes
        self._where_added = recipe.compensation.reference == "auto"
        self._twin = copy.deepcopy(self.model) if self._towards_dense and passes > 1 else None
        run = Run(
            sequences=self.samples,
            length=self.length,
            batch_size=self.flow.batch_size,
            passes=passes,
            reference="dense" if self._towards_dense else recipe.compensation.reference,
            hold_out=recipe.compensation.wants_held_out or recipe.allocation.needs_curves,
            uneven=recipe.allocation.needs_curves,
            statistics=recipe.needs_statistics,
            offload=self.options.offload,
            dense_copies=0,
        )
        expected = forecast(self.model, self.decoder, run)
        yield Note(expected.on_the_card())
        lacking = expected.does_not_fit(free_memory(self.flow.device))
        if lacking is not None:
            yield Note(f"warning: {lacking}")

    def prices(self, recipe: Recipe, budget: Budget) -> Widths:
        """What widths cost."""
        example = self._example.to(self.flow.device)
        widths = Widths(self.model, self.decoder, example, allocation=recipe.allocation, budget=budget)
        if self.options.native and not recipe.allocation.needs_curves:
            widths.restrict_heads(lambda heads, kv_heads: accepts_heads(self.model, heads, kv_heads))
        return widths

    def begin(self) -> Iterator[Progress]:
        """Stand in front of the first layer."""
        yield from self.flow.restart()
        self._dense = self.flow.copied() if self._towards_dense else None

    @contextmanager
    def at(self, stop: Stop) -> Iterator[None]:
        """The layer on the device, the dense one beside it where it is looked at."""
        self._number = self.stops.index(stop)
        with self.flow.at_work(self._number) as layer:
            self._layer = layer
            if self._dense is not None:
                twin = layer if self._twin is None else self._twin.get_submodule(stop.name)
                self._dense_layer = copy.deepcopy(twin).to(self.flow.device)
            before, self._behind = self._edits, []
            yield
            if self._edits > before:
                self.flow.team.agree(stop.name, layer.state_dict(), self.flow.device)
            self._dense_layer = nn.Module()

    def leave(self, stop: Stop) -> Iterator[Progress]:
        """Let the tokens go on through the layer as it is now."""
        if stop is self.stops[-1]:
            return
        yield from self.flow.advance(self._layer, self._number, stop.name)
        if self._dense is not None and self._behind:
            self._dense.arrive(self._behind)
        elif self._dense is not None:
            yield from self._dense.advance(self._dense_layer, self._number, stop.name)

    def consumers(self, part: ComponentGroup) -> tuple[Slot, ...]:
        """Whoever reads the part: one linear layer."""
        return part.consumers

    def centred(self, name: str) -> bool:
        """Whether the constant part of a layer's output can be restored."""
        return self.model.get_submodule(name).bias is not None or self.options.add_bias

    def repairs(self, part: ComponentGroup) -> bool:
        """Whether readers are fitted anew: not the sum over experts, whose tokens go to other experts after the cut."""
        return self._part[part.name].kind != "experts"

    def norm_behind(self, name: str) -> str | None:
        """Decoders have no BatchNorm."""
        return None

    def draw(self, part: ComponentGroup) -> int:
        """Number of the part's layer."""
        return self._part[part.name].layer

    def facts(self, part: ComponentGroup) -> dict[str, Any]:
        """What a component of the part is."""
        return {"kind": self._part[part.name].kind, "unit": self._part[part.name].unit}

    def class_looks(self, part: ComponentGroup, scoring: Scoring) -> dict[str, Any]:
        """Text has no classes."""
        return {}

    def places(self, looks: Mapping[str, Any]) -> tuple[Place, ...]:
        """Text has no classes."""
        return ()

    @property
    def state(self) -> EditState:
        """Nothing is left open behind an edit."""
        return EditState()

    def resume_(self, state: EditState) -> None:
        """An applied edit brings its layer's tensors from the disk: back onto the device with them."""
        self._layer.to(self.flow.device)

    def notes(self) -> Iterator[Note]:
        """What memory was needed, and which experts the calibration data say nothing of."""
        if self._silent:
            yield Note(
                f"warning: the router gives no calibration token to {len(self._silent)} experts ({self._silent[0]} the first), "
                "so these were cut by their weights alone; raise data.sequences, or give more varied text."
            )
        used = peaks(self.flow.device)
        if "card" in used:
            yield Note(f"memory on the card, measured: {used['card'] / 1e9:.2f} GB at most")
            return
        peak = used["process"] / 1e9
        yield Note(f"memory of the process, measured: {peak:.2f} GB at most, network and libraries included")

    # ------------------------------------------------------------------------------------------------------ looking

    def gather(self, part: ComponentGroup, slots: Sequence[Slot], *, hold_out: bool, also: Mapping[str, Any]) -> Looking:
        """Moments of what the part's reader reads, in front of the layer at work."""
        return (yield from self._look(slots, part.name, hold_out=hold_out))

    def survey(self) -> Iterator[Progress | Surveyed]:
        """Every part of the network as it stands, one layer at a time.

        Weights are fitted without the held-out sequences and tried on these, where there is one.
        """
        self._dense = None
        yield from self.flow.restart()
        numbers = torch.arange(self.samples)
        held = numbers[held_out_images(numbers)]
        held_out = len(held) > 0
        with self.flow.resident():
            chosen = (held if held_out else numbers)[: max(1, _TRIAL_TOKENS // self.length)]
            trial = TokenTrial(self, chosen, self._predicted)
            if self._passes > 1 and trial.dense is not None:
                self._predicted = trial.dense.cpu()
            for stop in self.stops:
                with self.at(stop):
                    if stop.parts:
                        slots = [part.consumers[0] for part in stop.parts]
                        gathered = yield from self._look(slots, stop.name, hold_out=held_out)
                        gathered = {name: one.without_held_out() for name, one in gathered.items()}
                        for part in stop.parts:
                            yield Surveyed(part, gathered, trial)
                    yield from self.leave(stop)
                trial.advance()

    def _look(self, slots: Sequence[Slot], item: str, *, hold_out: bool) -> Looking:
        moments = {slot.module: self.sums(slot.module, hold_out=hold_out) for slot in slots}
        looks = {self.model.get_submodule(name): own.update for name, own in moments.items()}
        yield from self.flow.look(self._layer, self._number, looks, item)
        return {name: self._asked(name, own.result()) for name, own in moments.items()}

    def _asked(self, name: str, found: Gathered) -> Gathered:
        """The moments, but of an expert that no token was given to: nothing is known of its neurons, so all count alike.

        Otherwise it would stay as wide as it is, and the experts of its layer could not be put together again.
        """
        statistics = found.statistics
        samples = statistics.samples
        silent = not bool((statistics.summed if samples is None else samples).any())
        if not silent or of_experts(self.model, name) is None:
            return found
        if name not in self._silent:
            self._silent.append(name)
        alike = Statistics(statistics.rows, torch.zeros_like(statistics.mean), torch.eye(statistics.features).to(statistics.mean))
        return Gathered(alike, None if found.held_out is None else alike, None if found.fitted is None else alike)

    # ------------------------------------------------------------------------------------------------------ editing

    def turned_(self, part: ComponentGroup, turn: Tensor) -> None:
        """No part of a decoder is a product, so an edit that says so is another network's (`DataError`)."""
        raise DataError(f"the saved edit of '{part.name}' turns features of a product, which it is not; it is another run's.")

    def cut_(self, part: ComponentGroup, kept: Tensor) -> Cut:
        """Slice the part's writers and reader, and set the head counts that follow."""
        own = self._part[part.name]
        self._edits += 1
        outputs, inputs, attributes = slice_part_(self.model, self.layout, own, kept)
        self.flow.edited(part.modules)
        return Cut(outputs, inputs, {own.parent: attributes} if attributes else {})

    def settle_(self, slot: Slot, consumer: Consumer, kept: Tensor, repair: Repair, *, alone: bool) -> list[str]:
        """Put the constant of a repaired reader into its bias, which it may be given for that."""
        if repair.constant is not None:
            self._set_bias_(slot.module, repair.constant, add=True)
        return []

    def _set_bias_(self, name: str, constant: Tensor, *, add: bool) -> None:
        reader = self.model.get_submodule(name)
        bias = bias_of(reader)
        with torch.no_grad():
            if bias is None:
                reader.bias = nn.Parameter(constant.to(weight_of(reader)), requires_grad=False)
            elif add:
                bias.add_(constant.to(bias))
            else:
                bias.copy_(constant)

    def edited_(self, sources: Sequence[str], changed: Sequence[str]) -> None:
        """Nothing behind a layer depends on statistics of the past."""

    def take_refreshed_(self) -> list[str]:
        """Nothing is refreshed on the way."""
        return []

    def finish_(self) -> Generator[Progress, None, list[str]]:
        """Nothing is left to put right."""
        yield from ()
        return []

    # ------------------------------------------------------------------------------------ towards the dense network

    def solvable(self, stop: Stop, cut: Sequence[ComponentGroup]) -> list[str]:
        """The readers of the layer at work that write into the residual stream, once anything in front or here was cut.

        What is cut in a layer changes nothing in front of it, so a layer is final as soon as its parts are.
        """
        if self._dense is None or not cut:
            return []
        first = min(self._part[part.name].layer for part in cut)
        readers = [part.consumers[0].module for part in stop.parts] if self._number >= first else []
        readers = [name for name in readers if of_experts(self.model, name) is None]  # a token's expert is not one module
        return [name for name in readers if not self._where_added or self._is_added(name)]

    def pairs(self, name: str) -> Iterator[Progress | Pair]:
        """What a reader reads beside what it should give: y_dense plus what the stream in front of it lacks.

        For an MLP that closes the layer this is y + (out_dense − out_edited), for attention
        y_dense + (in_dense − in_edited), with in and out the streams in front of and behind the layer (M9).

        Raises:
            ConfigError: If the layer's output is not added to the stream as it is.
        """
        assert self._dense is not None
        part = self._part[name]
        local = name.removeprefix(self.stops[self._number].name).removeprefix(".")
        reader, dense_reader = self._layer.get_submodule(local), self._dense_layer.get_submodule(local)
        self._refuse_norm(name)
        both = zip(self.flow.batches(self._number), self._dense.batches(self._number), strict=True)
        attention = part.kind == "attention"
        for (hidden, call, done), (dense_hidden, _, _) in both:
            with torch.no_grad():
                inputs, output, behind = _watched(self._layer, reader, hidden, call, whole=not attention)
                if attention:
                    _, dense_output, _ = _watched(self._dense_layer, dense_reader, dense_hidden, call, whole=False)
                    target = dense_output.float() + (dense_hidden.float() - hidden.float())
                else:
                    assert behind is not None, "the whole layer has run"
                    target = output.float() + (self._dense_behind(done - 1, dense_hidden, call).float() - behind.float())
            bias = bias_of(reader)
            target = target if bias is None else target - bias.detach().float()
            yield Pair(inputs.float(), target, done, self.flow.parts)

    def _dense_behind(self, place: int, hidden: Tensor, call: Call) -> Tensor:
        """A batch of the dense network's hidden states behind the layer at work; what was computed serves to go on, too."""
        if place == len(self._behind):
            self._behind.append(self.flow.waiting(run_layer(self._dense_layer, hidden, call)))
        return self._behind[place].to(self.flow.device)

    def sums(self, name: str, *, hold_out: bool = True, exact: bool = False) -> LayerMoments:
        """An accumulator of a layer's inputs, over all processes."""
        module = self.model.get_submodule(name)
        return LayerMoments(name, module, positions_per_image=None, seed=0, hold_out=hold_out, **self._shared)

    def aims(self, name: str) -> TargetMoments:
        """An accumulator of a layer's inputs against its targets, over all processes."""
        return TargetMoments(name, self.model.get_submodule(name), **self._shared)

    @property
    def _shared(self) -> dict[str, Any]:
        return {"first": self.flow.first, "team": self.flow.team, "device": self.flow.device}

    def settle_dense_(self, name: str, mean: Callable[[], Tensor], moments: Callable[[], Any]) -> list[str]:
        """Put the constant of a reader that was solved again into its bias."""
        reader = self.model.get_submodule(name)
        self.flow.edited([name])
        if self.centred(name):
            bias = bias_of(reader)
            self._set_bias_(name, mean() if bias is None else mean() + bias.detach().double(), add=False)
        return []

    def worth(self, name: str) -> Tensor | None:
        """Nothing stands between a layer and the stream."""
        return None

    def residual(self, name: str) -> str | None:
        """The stream behind the layer."""
        return self.stops[self._part[name].layer].name

    def _refuse_norm(self, name: str) -> None:
        """The reader's output must be added to the residual stream as it is."""
        if not self._is_added(name):
            raise ConfigError(
                f"compensation.reference=dense needs layers that add their output to the residual stream as it is, and "
                f"{self._part[name].name} does not (a normalisation follows it); set compensation.reference=current."
            )

    @torch.no_grad()
    def _is_added(self, name: str) -> bool:
        """Whether a reader's output is added to the residual stream as it is; asked once, of the first tokens at hand."""
        part = self._part[name]
        if name not in self._added:
            reader = self.model.get_submodule(name)
            hidden, call, _ = next(self.flow.batches(self._number))
            _, output, _ = _watched(self._layer, reader, hidden, call, whole=False)
            others = [
                self.model.get_submodule(other.consumer.module)
                for other in self.decoder.parts
                if other.layer == part.layer and other.kind == "mlp" and part.kind == "attention"
            ]
            whole = _silenced(self._layer, others, hidden, call)
            without = _silenced(self._layer, [*others, reader], hidden, call)
            # Streams hundreds of times as large as an output round it away in half precision: that much is no norm's doing.
            rounding = 2 * torch.finfo(whole.dtype).eps * whole.abs().double()
            error = ((whole.double() - without.double() - output.double()).abs() - rounding).max()
            self._added[name] = bool(error <= 1e-2 * output.abs().max())
        return self._added[name]


class TokenTrial:
    """Some calibration tokens in the network as it stands, which are tried from the layer at work to the logits.

    Args:
        walk: Standing in front of its first layer.
        numbers: Of the sequences, in the whole calibration set; each process tries its own.
        dense: What the dense network predicts for its own tokens, `dense` of an earlier trial of the same sequences; None:
            the network as it stands is the dense one.

    Attributes:
        dense: Probabilities ``[tokens, vocabulary]`` float32 that are the measure of every trial.
    """

    def __init__(self, walk: TokenWalk, numbers: Tensor, dense: Tensor | None = None) -> None:
        self._walk, self._flow = walk, walk.flow
        self._hidden = self._flow.chosen(numbers)
        self._tokens = len(numbers) * walk.length
        self._at = 0
        self.dense = None if dense is None else dense.to(self._flow.device)
        if len(self._hidden):
            self._calls = [self._flow.call(number, self._hidden) for number in range(len(walk.stops))]
            logits = self._logits(0)
            if self.dense is None:
                self.dense = torch.cat([rows.float().softmax(-1) for rows in logits.split(_ROWS)])
            self._own = self._cross_entropy(logits)

    def stand_before(self, part: ComponentGroup) -> None:
        """The trial stands in front of the layer at work."""

    def edited(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Within it parameters of these modules may be overwritten in place."""
        return restored(modules)

    def measure(self) -> float:
        """By how much the edited layer raises KL(dense ‖ present), mean over the trial's tokens, nats.

        Not the divergence from the network as it stands: of two cuts whose errors take each other back, or add up, the sum
        alone says what they cost together.
        """
        total = torch.zeros(1, dtype=torch.float64, device=self._flow.device)
        if len(self._hidden):
            total += (self._cross_entropy(self._logits(self._at)) - self._own).to(total.device)
        self._flow.team.add_up_(total)
        return max(float(total) / self._tokens, 0.0)

    @torch.no_grad()
    def advance(self) -> None:
        """Go on behind the layer at work, which is dense again."""
        if len(self._hidden):
            with self._flow.at_work(self._at) as layer:
                self._hidden = run_layer(layer, self._hidden, self._calls[self._at])
        self._at += 1

    @torch.no_grad()
    def _logits(self, number: int) -> Tensor:
        hidden, layers = self._hidden, self._walk.decoder.layers
        for later in range(number, len(layers)):
            with self._flow.at_work(later, keep=later == self._at) as layer:
                hidden = run_layer(layer, hidden, self._calls[later])
        return leave(self._walk.model, layers, hidden).flatten(0, -2)

    def _cross_entropy(self, logits: Tensor) -> Tensor:
        """Sum over the tokens of −Σ p log q, p the dense network's predictions, q those of logits ``[tokens, vocabulary]``.

        A few rows at a time: a vocabulary is so large that every further pass over all rows takes longer than the layers.
        """
        assert self.dense is not None, "there are tokens, so there are predictions"
        rows = zip(self.dense.split(_ROWS), logits.split(_ROWS), strict=True)
        losses = [single.logsumexp(-1) - torch.linalg.vecdot(p, single) for p, z in rows for single in [z.float()]]
        return torch.cat(losses).sum(dtype=torch.float64)


def _watched(
    layer: nn.Module, reader: nn.Module, hidden: Tensor, call: Call, *, whole: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input and output of one module, and what is behind the layer, if the whole of it is to run."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen.extend(rows_read(module, tensor, hidden.shape[:2]) for tensor in (inputs[0], output))
        if not whole:
            raise Seen

    handle = reader.register_forward_hook(hook)
    behind = None
    try:
        behind = run_layer(layer, hidden, call)
    except Seen:
        pass
    finally:
        handle.remove()
    return seen[0], seen[1], behind


def _silenced(layer: nn.Module, modules: Sequence[nn.Module], hidden: Tensor, call: Call) -> Tensor:
    """What is behind the layer when some modules answer zero."""
    handles = [module.register_forward_hook(lambda *args: torch.zeros_like(args[2])) for module in modules]
    try:
        return run_layer(layer, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
