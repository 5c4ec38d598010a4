"""The walk over a network that reads images: from cut to cut of its data flow, group after group in forward order.

Activations are carried to the last cut in front of everything that is still to change. BatchNorms behind an edit are
stale: a walk re-estimates them, in execution order, before anything behind them is looked at.
"""

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from modhifi_cli.engine.activations import Activations, set_statistics_
from modhifi_cli.engine.class_features import MapSummaries, map_summaries
from modhifi_cli.engine.gathering import DepthwiseMoments, Gathered, Gathering, LayerMoments, TargetMoments
from modhifi_cli.engine.impact import Impact, images_for
from modhifi_cli.engine.labelling import Labels, image_labels
from modhifi_cli.engine.memory import SUMS, bytes_of_sums, host_bytes, limit_bytes, place_of_sums
from modhifi_cli.engine.plan import check_weights, discover, example_of, refuse_nothing
from modhifi_cli.engine.site import features_kept
from modhifi_cli.engine.team import Team
from modhifi_cli.engine.walk import Budget, Cut, Looking, Pair, Recipe, Repair, Stop, Surveyed
from modhifi_cli.engine.widths import GroupWidths
from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError
from modhifi_cli.graph.components import (
    ComponentGroup,
    Layout,
    Slot,
    bias_of,
    has_weight,
    is_upsampling,
    output_size,
    reading_weight,
    reads_features,
    weight_of,
)
from modhifi_cli.graph.counting import output_positions
from modhifi_cli.graph.parts import is_part, part_of
from modhifi_cli.graph.segments import Look, Segments
from modhifi_cli.graph.surgery import slice_module_
from modhifi_cli.graph.trace import Join
from modhifi_cli.numerics.batchnorm import input_scale, output_moments
from modhifi_cli.numerics.linalg import at_least_float32, feature_index
from modhifi_cli.numerics.moments import reorder
from modhifi_cli.numerics.scoring import Place
from modhifi_cli.records import Consumer, EditState, ImageSource, Note, Progress
from modhifi_cli.roles import Scoring, looks_at_classes, solves_towards_dense

_LEAST_WORTH = 1e-3  # of the largest γ of a layer scale: outputs that count less could not be told from nothing
_FEWEST_HELD_OUT = 8  # images; fewer say less than images that were fitted to
# A survey looks at one block of five images in so many that at least this many images are left, and in the layer at hand
# twice as many rows as features: what chooses widths and subsets needs less than what weights are fitted to.
_SURVEYED, _ROWS_A_FEATURE = 128, 2


class ImageWalk:
    """A network that reads images, on its calibration images (`walk.Walk`).

    One parameter for each setting of a run that says how it is walked.

    Args:
        model: Dense network, evaluation mode. It is moved to `device`.
        calibration: Images; labels are taken from it, or predicted, only for a scoring that needs them.
        exclude: Names of modules to leave alone.
        batchnorm: ``"reestimate"`` running statistics on the calibration images, or keep the ``"stored"`` ones
            (shifted by what the repair of the consumers says).
        batch_size: Images a forward.
        device: Where the forwards run.
        gathering: How statistics are gathered.
        seed: For drawn positions.
        team: Other processes that run the same with their share of the images; None for none.
        query_key: Whether features of queries and keys are parts, too, where attention can lose some.

    Raises:
        ConfigError: If a setting is out of range, or there are more processes than images.
        DataError: If there are no calibration images.
        NumericsError: If a weight is not finite.
        UnsupportedModelError: If the network cannot be run or traced.
    """

    what = "groups"
    trial_ridge = 1e-3
    restores_always = False

    def __init__(
        self,
        model: nn.Module,
        calibration: ImageSource,
        *,
        exclude: Sequence[str] = (),
        batchnorm: str = "reestimate",
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        gathering: Gathering | None = None,
        seed: int = 0,
        team: Team | None = None,
        query_key: bool = False,
    ) -> None:
        if batchnorm not in ("reestimate", "stored"):
            raise ConfigError(f"batchnorm must be 'reestimate' or 'stored', got '{batchnorm}'.")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
        self.device, self.team = torch.device(device), team or Team()
        self.team.refuse_idle(len(calibration), "images", "data.num_samples")
        self.gathering = gathering or Gathering()
        check_weights(model)
        self.model = model.to(self.device).eval()
        self.example = example_of(calibration, self.device)
        self.segments, self.parts, self.refused = discover(model, self.example, exclude=exclude, products=query_key)
        self.excluding = bool(exclude)
        self.layout = Layout(model, self.parts)
        self.stops = tuple(Stop(group.name, (group,)) for group in self.parts)
        self.samples = len(calibration)
        self.reestimate = batchnorm == "reestimate"
        self.labels: Labels | None = None
        self.stale: list[str] = []
        self._calibration, self._batch_size, self._seed = calibration, batch_size, seed
        self._refreshed: list[str] = []
        self._edits = 0
        self._dense: Activations | None = None
        self._solving: list[str] = []  # layers that are solved again towards the dense network, in forward order
        self._keeps_survey = False
        self._surveyed: dict[str, tuple[Gathered, Tensor]] = {}  # moments, and which inputs the layer had
        self._turns: dict[str, Tensor] = {}  # of products: what the features are in terms of the dense network's
        self.activations = self._carried(self.model, self.segments, networks=1)

    def _carried(self, model: nn.Module, segments: Segments, *, networks: int) -> Activations:
        return Activations(
            model,
            segments,
            self._calibration,
            batch_size=self._batch_size,
            device=self.device,
            limit_bytes=limit_bytes(self.gathering, self.device, networks=networks),
            host_bytes=host_bytes(self.gathering, self.device, networks=networks * self.team.size),
            team=self.team,
        )

    def prepare(self, recipe: Recipe, passes: int) -> Iterator[Progress | Note]:
        """Put the dense network beside this one, and find the images' classes, where the recipe asks for it."""
        if solves_towards_dense(recipe.compensation):
            untouched = copy.deepcopy(self.model)
            twin = Segments(untouched, self.example)
            twin.know_usable(self.segments)
            self._dense = self._carried(untouched, twin, networks=2)
            self.activations = self._carried(self.model, self.segments, networks=2)
            readers = {slot.module for group in self.parts for slot in self.consumers(group)}
            solved = all(map(self._is_solvable, readers))
            self._keeps_survey = solved and not self.reestimate
        if recipe.scoring.needs_labels:
            self.labels = yield from _labels(self.model, self._calibration, self.device, self._batch_size)

    def prices(self, recipe: Recipe, budget: Budget) -> GroupWidths:
        """What widths cost.

        Raises:
            ConfigError: If nothing can be pruned because of what is excluded.
            UnsupportedModelError: If nothing can be pruned.
        """
        refuse_nothing(self.parts, self.refused, sparsity=budget.sparsity, excluding=self.excluding)
        return GroupWidths(self.model, self.example[:1], self.parts, recipe.allocation, budget)

    def begin(self) -> Iterator[Progress]:
        """Go back to the images, for a pass."""
        self.activations.restart()
        yield from ()

    def at(self, stop: Stop) -> AbstractContextManager[None]:
        """Nothing has to be fetched for a group."""
        return nullcontext()

    def leave(self, stop: Stop) -> Iterator[Progress]:
        """Activations go on with the next group that is looked at; processes must have edited alike."""
        if self.team.size > 1:
            touched = {name: part_of(self.model, name) for part in stop.parts for name in part.modules}
            owners = {name: one.owner if is_part(one) else one for name, one in touched.items()}
            tensors = {f"{name}.{key}": own for name, one in owners.items() for key, own in one.state_dict().items()}
            self.team.agree(stop.name, tensors, self.device)
        yield from ()

    def consumers(self, part: ComponentGroup) -> tuple[Slot, ...]:
        """The group's consumers that have weights, each once."""
        return tuple(slot for slot in part.consumers if has_weight(self.model.get_submodule(slot.module)))

    def centred(self, name: str) -> bool:
        """Whether the constant part of a layer's output can be restored."""
        module = self.model.get_submodule(name)
        # Where patches overlap, a constant of each of their pixels is none of the outputs'.
        return not is_upsampling(module) and (self.norm_behind(name) is not None or module.bias is not None)

    def _looked_at(self, part: ComponentGroup) -> tuple[Slot, ...]:
        return part.readers if part.product else self.consumers(part)

    def draw(self, part: ComponentGroup) -> int:
        """How many groups lie ahead, this one included."""
        return len(self.parts) - self.parts.index(part)

    def facts(self, part: ComponentGroup) -> dict[str, Any]:
        """Where the classes of the images come from, where a score looked at them."""
        return {} if self.labels is None else {"labels": self.labels.account}

    @property
    def state(self) -> EditState:
        """What resuming needs."""
        return EditState(stale=tuple(self.stale))

    def resume_(self, state: EditState) -> None:
        """Take up the BatchNorms that are stale behind an applied edit."""
        self.stale = list(state.stale)
        self._edits += 1

    def notes(self) -> Iterator[Note]:
        """Nothing is to be said at the end."""
        yield from ()

    # ------------------------------------------------------------------------------------------------------ looking

    def gather(self, part: ComponentGroup, slots: Sequence[Slot], *, hold_out: bool, also: Mapping[str, Any]) -> Looking:
        """Moments of the consumers' inputs, from the last cut in front of everything that is still to change.

        Where every layer behind a cut is solved again towards the dense network and BatchNorms keep their statistics, the
        moments of the survey serve: what the layers lack then is what that solve gives back, and a walk for each group
        brought nothing (docs/results/cost.md).
        """
        if self._surveyed and not also:
            return {slot.module: self._as_surveyed(slot.module) for slot in slots}
        visits = self.segments.trace.visits
        ahead = self.parts[self.parts.index(part) :]
        first = min(visits[name].enter for group in ahead for name in group.modules if name in visits)
        start = self.segments.last_before(first)
        if start is not None:
            yield from self.activations.advance(start, stale=self.stale, item=part.name)
            self._forget_refreshed(before=visits[start].leave)
        looks = {name: summaries.update for name, summaries in also.items()}
        return (yield from self.look(slots, part.name, hold_out=hold_out, also=looks))

    def look(
        self,
        slots: Sequence[Slot],
        item: str,
        *,
        hold_out: bool,
        also: Mapping[str, Look] | None = None,
        among: "Sample | None" = None,
    ) -> Looking:
        """Moments of the given consumers' inputs in one walk from where the activations stand, by module.

        Args:
            slots: The consumers.
            item: What is at work, for progress.
            hold_out: Whether every fifth image is kept apart, too.
            also: Further looks that ride on the walk: module → function of its first input.
            among: Some of the images; all of them if not given.
        """
        sample = among or Sample(self.activations)
        visits = self.segments.trace.visits
        moments: dict[str, LayerMoments] = {}
        beside = 0
        for slot in slots:
            place = self._place_of(slot.module, beside=beside)
            moments[slot.module] = self.sums(slot.module, hold_out=hold_out, place=place)
            beside += SUMS * bytes_of_sums(self._features(slot.module)) if place == self.device else 0
        looks: dict[str, Look] = {name: sample.look(name, accumulator.update) for name, accumulator in moments.items()}
        for name, extra in (also or {}).items():
            looks[name] = _both(looks[name], extra) if name in looks else extra
        last = max(visits[name].enter for name in looks)
        yield from sample.activations.walk(looks, stale=self.stale, item=item)
        self._forget_refreshed(before=last)
        return {name: accumulator.result() for name, accumulator in moments.items()}

    def survey(self) -> Iterator[Progress | Surveyed]:
        """Every group of the network as it stands, from one walk over the images.

        Weights are fitted without the held-out images and tried on these alone: a layer with fewer rows than features (a
        classifier behind global pooling has one row for an image) is rebuilt without any error by as many components as
        there are images, on those images. Where fewer than eight images are held out, nothing is surveyed: the curves
        would let the last layers look free.
        """
        wanted = images_for(self.samples, len(self.parts))
        images = self.team.gather(self.activations.held_out_images(wanted))
        if len(images) < _FEWEST_HELD_OUT:
            return
        team = self.team if len(images) >= self.team.size else Team()  # too few to be shared: everyone tries them all
        first, behind = team.share(len(images))
        slots = {slot.module: slot for group in self.parts for slot in self._looked_at(group)}
        among = self._surveyed_of(tuple(slots.values()))
        gathered = yield from self.look(tuple(slots.values()), "error curves", hold_out=True, among=among)
        if self._keeps_survey:
            whole = {name: replace(one, fitted=None) for name, one in gathered.items()}
            self._surveyed = {name: (one, self.layout.alive_inputs(name)) for name, one in whole.items()}
        gathered = {name: one.without_held_out() for name, one in gathered.items()}
        trial = Impact(self.segments, images[first:behind], limit_bytes=self.activations.limit_bytes, team=team)
        for group in self.parts:
            yield Surveyed(group, gathered, trial, lasting=self._keeps_survey)

    def _surveyed_of(self, slots: Sequence[Slot]) -> "Sample":
        """The images of a survey, in whole blocks of five, so that those held out are the same ones as among all.

        A layer with few rows an image (a classifier) sees more of them than others.
        """
        names = [slot.module for slot in slots]
        positions = output_positions(self.model, self.example[:1], names)
        wanted = {name: _ROWS_A_FEATURE * self._features(name) / max(positions[name], 1) for name in names}
        steps = {name: max(1, int(self.samples / max(_SURVEYED, images))) for name, images in wanted.items()}
        if self.stale or self.team.size > 1:
            return Sample(self.activations)
        common, calls = min(steps.values()), self.segments.trace.calls
        numbers = torch.arange(self.samples)
        some = self.activations if common < 2 else self.activations.only(numbers[in_blocks(numbers, common)])
        # A layer that runs several times shows its rows without their images.
        return Sample(some, {name: step // common for name, step in steps.items() if name not in calls})

    def _as_surveyed(self, name: str) -> Gathered:
        """Moments of the inputs that a layer still has, as the survey saw them."""
        found, were = self._surveyed[name]
        places = torch.searchsorted(were, self.layout.alive_inputs(name))
        features = feature_index(places, found.statistics.features // were.numel())
        held_out = None if found.held_out is None else reorder(found.held_out, features)
        return Gathered(reorder(found.statistics, features), held_out)

    def class_looks(self, part: ComponentGroup, scoring: Scoring) -> dict[str, MapSummaries]:
        """What a score of classes has to look at, by module; nothing for any other score.

        Raises:
            UnsupportedModelError: If a layer that reads the group runs more than once, so that an image has several
                maps.
        """
        if self.labels is None or not looks_at_classes(scoring):
            return {}
        slots = self.consumers(part)
        several = next((slot.module for slot in slots if slot.module in self.segments.trace.calls), None)
        if several is not None:
            raise UnsupportedModelError(
                f"a score of classes looks at one map of each image, and {several} runs more than once in one forward; "
                f"choose another score, or leave its group alone with exclude=[{several}]."
            )
        norm = self.norm_behind(part.producers[0].module) if len(part.producers) == 1 else None
        return map_summaries(self.model, self.layout, part, slots, norm, scoring.summary)

    def places(self, looks: Mapping[str, MapSummaries]) -> tuple[Place, ...]:
        """What those looks have seen, with the images' classes."""
        labels = self.labels
        assert labels is not None, "a score of classes is prepared for"
        seen = {name: self.team.gather(look.result()) for name, look in looks.items()}
        return tuple(Place(name, summaries, labels.values, labels.classes) for name, summaries in seen.items())

    # ------------------------------------------------------------------------------------------------------ editing

    def cut_(self, part: ComponentGroup, kept: Tensor) -> Cut:
        """Slice everything that the group touches."""
        outputs, inputs = self.layout.keep_(part, kept)
        for name in dict.fromkeys((*outputs, *inputs)):
            slice_module_(part_of(self.model, name), outputs=outputs.get(name), inputs=inputs.get(name))
        self._edits += 1
        return Cut(outputs, inputs, {})

    def turned_(self, part: ComponentGroup, turn: Tensor) -> None:
        """Remember what a product's features are in terms of the dense network's, of dense heads.

        Raises:
            DataError: If the turn is not one of this part's.
        """
        before, queries = self._turns.get(part.name), part.producers[0]
        alive = self.layout.alive_outputs(queries.module)
        assert alive is not None
        heads = torch.isin(queries.index, alive).any(0)
        features = part.components if before is None else before.shape[-1]
        fits = (2, int(heads.sum()), features, self.layout.alive(part).numel())
        if tuple(turn.shape) != fits:
            raise DataError(
                f"the saved edit of '{part.name}' turns features {tuple(turn.shape)} where {fits} is expected; it is another run's."
            )
        whole = torch.zeros(2, len(heads), *turn.shape[2:], dtype=torch.float64)
        whole[:, heads] = turn.double().cpu()
        self._turns[part.name] = whole if before is None else before @ whole

    def _as_turned(self, name: str, maps: Tensor) -> Tensor:
        """What a layer of the dense network gives, in the features that this network's layer of the name writes."""
        for part in (one for one in self.parts if one.name in self._turns):
            for slot, turns in zip(part.producers, self._turns[part.name], strict=True):
                if slot.module != name:
                    continue
                kept, index = turns.shape[-1], slot.index.to(maps.device)
                new = torch.einsum("...fh,hfk->...kh", maps[..., index], turns.to(maps))
                maps = maps.index_copy(-1, index[:kept].flatten(), new.flatten(-2))
        return maps

    def settle_(self, slot: Slot, consumer: Consumer, kept: Tensor, repair: Repair, *, alone: bool) -> list[str]:
        """Put the constant of a repaired consumer right, in its bias or in the BatchNorm behind it."""
        module = self.model.get_submodule(slot.module)
        norm = self.norm_behind(slot.module)
        if norm is None:
            if repair.constant is not None:
                own = module.get_parameter("bias")
                with torch.no_grad():
                    own.add_(repair.constant.to(own.device))
            return []
        behind = self.model.get_submodule(norm)
        if not self.reestimate:
            if repair.constant is None:
                return []
            mean = behind.get_buffer("running_mean")
            mean.sub_(repair.constant.to(mean.device))
            return [norm]
        known = alone and repair.fidelity is not None and not is_upsampling(module)
        if known and self.gathering.positions_per_image is None:
            # The consumer's input is what was gathered, so its output's moments follow without another forward.
            inputs = reorder(consumer.statistics, features_kept(consumer, kept))
            bias = bias_of(module)
            bias = None if bias is None else bias.detach().to(repair.weight)
            set_statistics_(behind, output_moments(inputs, repair.weight, bias))
            return [norm]
        return []

    def edited_(self, sources: Sequence[str], changed: Sequence[str]) -> None:
        """Every BatchNorm behind one of the edited layers is stale now, unless it is among those that were just set."""
        if not self.reestimate:
            return
        trace = self.segments.trace
        self.stale = [name for name in self.stale if name not in changed]
        for name in trace.visits:
            module = self.model.get_submodule(name)
            if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
                continue
            behind = any(trace.depends(name, source) for source in sources)
            if behind and name not in changed and name not in self.stale:
                self.stale.append(name)
        self.stale.sort(key=lambda name: trace.visits[name].enter)

    def take_refreshed_(self) -> list[str]:
        """BatchNorms that walks have re-estimated since this was last asked."""
        refreshed, self._refreshed = self._refreshed, []
        return refreshed

    def finish_(self) -> Generator[Progress, None, list[str]]:
        """Re-estimate the BatchNorms that still are stale."""
        yield from self.activations.refresh(list(self.stale), item="batchnorm")
        self._forget_refreshed()
        self.team.agree("the network", self.model.state_dict(), self.device)
        return self.take_refreshed_()

    def repairs(self, part: ComponentGroup) -> bool:
        """Every reader is fitted anew."""
        return True

    def norm_behind(self, name: str) -> str | None:
        """The BatchNorm with running statistics that reads exactly this layer's output."""
        norm = self.segments.trace.norm_of.get(name)
        if norm is None or self.model.get_submodule(norm).running_mean is None:
            return None
        return norm

    def _forget_refreshed(self, *, before: float = float("inf")) -> None:
        """Strike BatchNorms that were re-estimated (they run before the given clock) off the stale list."""
        visits = self.segments.trace.visits
        fresh = [name for name in self.stale if visits[name].enter < before]
        self.stale = [name for name in self.stale if name not in fresh]
        self._refreshed.extend(name for name in fresh if name not in self._refreshed)

    # ------------------------------------------------------------------------------------ towards the dense network

    def solvable(self, stop: Stop, cut: Sequence[ComponentGroup]) -> list[str]:
        """After the last group: every convolution (depthwise ones, too) and linear layer whose input has changed.

        Groups are streams that layers far behind read, too, so nothing is final before all are cut.
        """
        if self._dense is None or stop is not self.stops[-1] or not self._edits:
            return []
        trace = self.segments.trace
        edited = [slot.module for group in cut for slot in self._looked_at(group)]
        read = [slot.module for group in cut for slot in self.consumers(group)]
        self._solving = [
            name
            for name in trace.visits
            if self._is_solvable(name)
            and (name in read or any(trace.depends(name, source) for source in edited))
        ]
        self._surveyed = {}
        self.activations.restart()
        self._dense.restart()
        return list(self._solving)

    def _is_solvable(self, name: str) -> bool:
        module = self.model.get_submodule(name)
        plain = type(module) in (nn.Conv2d, nn.Linear) and (getattr(module, "groups", 1) == 1 or is_depthwise(module))
        # A convolution that runs several times answers maps of several sizes; its targets would, too.
        several = name in self.segments.trace.calls and not isinstance(module, nn.Linear)
        return plain and not several and getattr(module, "padding_mode", "zeros") == "zeros"

    def pairs(self, name: str) -> Iterator[Progress | Pair]:
        """What a layer reads beside what it gives in the dense network.

        Where the layer closes a residual block, what the edited stream lacks there is added to the target, in the units
        of the layer's output (M9).
        """
        assert self._dense is not None
        yield from self._stand_before(name)
        module, norm = self.model.get_submodule(name), self.norm_behind(name)
        join, alive = self._joined(name), self.layout.alive_outputs(name)
        given = () if join is None or join.read else (join.stream,)
        read = (join.stream,) if join is not None and join.read else ()
        scale = self._stream_scale(norm, join, alive)
        axis = -1 if reads_features(module) else 1
        yield from self._hold_dense(name)
        both = zip(
            self.activations.seen(inputs=(name, *read), outputs=given),
            self._dense.seen(inputs=read, outputs=(name, *given)),
            strict=True,
        )
        for (inputs, ours, done, total), (dense_inputs, theirs, _, _) in both:
            target = _channels(self._as_turned(name, theirs[name]), alive, axis)
            was, now = (dense_inputs, inputs) if read else (theirs, ours)
            if join is not None and was[join.stream].shape == theirs[name].shape:
                lacking = _channels(was[join.stream], alive, axis) - now[join.stream]
                target = target + lacking * (scale if axis == -1 or scale.dim() == 0 else scale[:, None, None])
            yield Pair(inputs[name], target, done, total)

    def sums(
        self, name: str, *, hold_out: bool = True, exact: bool = False, place: torch.device | None = None
    ) -> LayerMoments:
        """An accumulator of a layer's inputs; an exact one takes every position."""
        module = self.model.get_submodule(name)
        positions = None if exact else self.gathering.positions_per_image
        shared = {**self._shared, "place": place or self._place_of(name)}
        return LayerMoments(name, module, positions_per_image=positions, seed=self._seed, hold_out=hold_out, **shared)

    def aims(self, name: str) -> TargetMoments | DepthwiseMoments:
        """An accumulator of a layer's inputs against its targets; of a depthwise one filter by filter."""
        module = self.model.get_submodule(name)
        if is_depthwise(module):
            return DepthwiseMoments(name, module, **self._shared)
        return TargetMoments(name, module, **self._shared, place=self._place_of(name))

    def _features(self, name: str) -> int:
        return reading_weight(self.model.get_submodule(name)).shape[1]

    def _place_of(self, name: str, *, beside: int = 0) -> torch.device:
        """Where a layer's moments are; several processes add theirs up where they run."""
        if self.team.size > 1:
            return self.device
        return place_of_sums(self._features(name), self.device, beside=beside)

    @property
    def _shared(self) -> dict[str, Any]:
        return {"first": self.activations.first, "team": self.team, "device": self.device}

    def settle_dense_(self, name: str, mean: Callable[[], Tensor], moments: Callable[[], Any]) -> list[str]:
        """Put the constant right behind a layer that was solved again towards the dense network."""
        assert self._dense is not None
        bias, norm = bias_of(self.model.get_submodule(name)), self.norm_behind(name)
        if norm is None:
            if bias is not None:
                with torch.no_grad():
                    bias.copy_(mean())
            return []
        behind = self.model.get_submodule(norm)
        if self.reestimate:
            set_statistics_(behind, moments())
        else:
            was = self._dense.model.get_submodule(norm).get_buffer("running_mean")
            alive = self.layout.alive_outputs(name)
            was = was if alive is None else was[alive.to(was.device)]
            lacking = mean().to(was.device)
            lacking = lacking if bias is None else lacking - bias.detach().double()
            behind.get_buffer("running_mean").copy_(was - lacking)
        return [norm]

    def dense_answers(self, name: str, *, item: str) -> Generator[Progress, None, Tensor]:
        """What a layer gives in the dense network over all samples of all processes, ``[samples, …]``.

        Where that network is kept beside the edited one it stands far behind by the end, so that this costs next to
        nothing; before anything is edited, this network is the dense one.
        """
        found: list[Tensor] = []
        yield from (self._dense or self.activations).outputs(name, found.append, item=item)
        return self.team.gather(torch.cat(found))

    @property
    def keeps_dense(self) -> bool:
        """Whether the dense network is kept beside the edited one."""
        return self._dense is not None

    def residual(self, name: str) -> str | None:
        """What is added to the output of a layer that closes a residual block."""
        join = self._joined(name)
        return None if join is None else join.stream

    def worth(self, name: str) -> Tensor | None:
        """γ of the layer scale behind a layer: what its outputs are multiplied by on their way into the stream."""
        join = self._joined(name)
        if join is None or join.gamma is None:
            return None
        gamma, alive = join.gamma.flatten(), self.layout.alive_outputs(name)
        gamma = gamma if alive is None else gamma[alive.to(gamma.device)]
        least = _LEAST_WORTH * gamma.abs().max().clamp(min=torch.finfo(gamma.dtype).tiny)
        return torch.where(gamma.abs() > least, gamma, least)

    def _joined(self, name: str) -> Join | None:
        """What a layer's output is added to, behind its BatchNorm or layer scale; None where it is added to nothing."""
        join = self.segments.trace.joins.get(self.norm_behind(name) or name)
        if join is None or join.gamma is None:
            return join
        module = (self._dense or self.activations).model.get_submodule(name)
        axis = -1 if reads_features(module) else -3
        of_channels = join.gamma.dim() >= -axis and join.gamma.shape[axis] == output_size(module)
        return join if of_channels else None

    def _stand_before(self, name: str) -> Iterator[Progress]:
        """Carry both networks to the last cut in front of a layer and put the BatchNorms between them right."""
        assert self._dense is not None
        visits = self.segments.trace.visits
        cut = self._cut_before(name)
        if cut is not None:
            yield from self.activations.advance(cut, stale=self.stale, item=name)
            self._forget_refreshed(before=visits[cut].leave)
            yield from self._dense.advance(cut, item=name)
        between = [stale for stale in self.stale if visits[stale].enter < visits[name].enter]
        yield from self.activations.refresh(between, item=name)
        self._forget_refreshed(before=visits[name].enter)
        solved = self._solving[: self._solving.index(name)] if name in self._solving else []
        yield from self.activations.hold([last for last in solved if self._cut_before(last) == cut], item=name)

    def _cut_before(self, name: str) -> str | None:
        """The last cut in front of a layer at which both networks can stand."""
        assert self._dense is not None
        return self.segments.last_before(self.segments.trace.visits[name].enter, also=self._dense.segments)

    def _hold_dense(self, name: str) -> Iterator[Progress]:
        """One walk of the dense network for all layers up to the next cut: it does not change while they are solved."""
        assert self._dense is not None
        here, visits = self._cut_before(name), self.segments.trace.visits
        later = self._solving[self._solving.index(name) :] if name in self._solving else [name]
        beside = [layer for layer in later if self._cut_before(layer) == here]
        wanted = {*beside, *(join.stream for join in map(self._joined, beside) if join is not None and not join.read)}
        behind = later[len(beside) : len(beside) + 1]
        ordered = sorted(wanted, key=lambda one: visits[one].leave)
        yield from self._dense.hold([*ordered, *filter(None, map(self._cut_before, behind))], item=name)

    def _stream_scale(self, norm: str | None, join: Join | None, alive: Tensor | None) -> Tensor:
        """What one unit of the stream is worth in the layer's output units: σ_c / γ_c, 1 / γ_c or 1.

        γ is that of the BatchNorm behind the layer, or of the layer scale. Outputs whose γ is next to nothing leave the
        residual part out of their target.
        """
        gamma = None if join is None or join.gamma is None else join.gamma.flatten()
        if norm is None and gamma is None:
            return torch.ones((), device=self.device)
        assert self._dense is not None
        if norm is None:
            assert gamma is not None
            scale, _ = input_scale(torch.ones_like(gamma), 0.0, gamma)
        else:
            behind = self._dense.model.get_submodule(norm)
            assert isinstance(behind, nn.modules.batchnorm._BatchNorm)
            weight = weight_of(behind).detach() if behind.affine else None
            if gamma is not None:
                weight = gamma if weight is None else weight * gamma
            scale, _ = input_scale(behind.get_buffer("running_var"), behind.eps, weight)
        return scale if alive is None else scale[alive.to(scale.device)]


@dataclass(frozen=True)
class Sample:
    """Some of the calibration images, and what of these single layers look at.

    Attributes:
        activations: The images.
        steps: Layer → it looks at one block of five of them in so many; at all if it is not here.
    """

    activations: Activations
    steps: Mapping[str, int] = field(default_factory=dict)

    def look(self, name: str, look: Look) -> Look:
        """The look of a layer, which is shown the chosen images' inputs alone."""
        step, seen = self.steps.get(name, 1), 0

        def look_at_some(inputs: Tensor) -> None:
            nonlocal seen
            chosen = in_blocks(torch.arange(seen, seen + len(inputs)), step)
            seen += len(inputs)
            if bool(chosen.any()):
                look(inputs.index_select(0, chosen.nonzero().flatten().to(inputs.device)))

        return look if step == 1 else look_at_some


def in_blocks(numbers: Tensor, step: int) -> Tensor:
    """Which images lie in the first of every `step` blocks of five, by their numbers: bool of the same shape."""
    return numbers // 5 % step == 0


def is_depthwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a convolution with one filter for each channel."""
    return type(module) is nn.Conv2d and 1 < module.groups == module.in_channels == module.out_channels


def _labels(
    model: nn.Module, calibration: ImageSource, device: torch.device, batch_size: int
) -> Generator[Progress, None, Labels]:
    for event in image_labels(model, calibration, device=device, batch_size=batch_size):
        if isinstance(event, Labels):
            return event
        yield event
    raise AssertionError("labelling ends with labels")


def _both(first: Look, second: Look) -> Look:
    def look_twice(inputs: Tensor) -> None:
        first(inputs)
        second(inputs)

    return look_twice


def _channels(maps: Tensor, alive: Tensor | None, axis: int) -> Tensor:
    maps = at_least_float32(maps)
    return maps if alive is None else maps.index_select(axis, alive.to(maps.device))
