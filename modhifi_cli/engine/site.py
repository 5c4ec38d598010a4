"""A layer read into numbers and written back: its weight and moments by component, of every kind of layer.

Convolutions, grouped and transposed ones, linear layers of either orientation and fused projections differ in where a
component lies; behind this file they are matrices whose features go component after component.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modhifi_cli.engine.gathering import Gathered
from modhifi_cli.engine.walk import Walk
from modhifi_cli.graph.components import (
    ComponentGroup,
    Slot,
    output_weights,
    reading_weight,
    taps_of,
    write_reading_weight_,
)
from modhifi_cli.graph.parts import part_of
from modhifi_cli.numerics.linalg import feature_index
from modhifi_cli.numerics.moments import reorder
from modhifi_cli.records import Consumer, Statistics


def consumer_of(walk: Walk, slot: Slot, alive: Tensor, gathered: Mapping[str, Gathered]) -> Consumer:
    """One consumer as the numerics see it, the part's living components first; statistics where there are any.

    Its outputs are in the units of the stream that they go into (`Walk.worth`); `own_units` leads back.
    """
    module = walk.model.get_submodule(slot.module)
    features = feature_index(walk.layout.input_order(slot, alive), taps_of(module))
    mine = gathered.get(slot.module)
    weight = reading_weight(module).to(torch.float64)
    weight = weight if mine is None else weight.to(mine.statistics.mean.device)
    if (worth := walk.worth(slot.module)) is not None:
        weight = weight * worth.to(weight)[:, None]
    nothing = Statistics(0, torch.zeros(features.numel(), dtype=torch.float64))
    return Consumer(
        name=slot.module,
        weight=weight[:, features.to(weight.device)],
        statistics=nothing if mine is None else reorder(mine.statistics, features),
        components=features.numel() // (taps_of(module) * slot.entries),
        in_group=alive.numel(),
        centred=walk.centred(slot.module),
        held_out=None if mine is None or mine.held_out is None else reorder(mine.held_out, features),
    )


def own_units(walk: Walk, name: str, values: Tensor) -> Tensor:
    """Weights or constants by output, ``[outputs, …]``, from the units of the stream to those of the layer."""
    worth = walk.worth(name)
    return values if worth is None else values / worth.to(values).view(-1, *[1] * (values.dim() - 1))


def consumers_of(walk: Walk, part: ComponentGroup, gathered: Mapping[str, Gathered]) -> list[Consumer]:
    """All consumers of a part that have weights, in one place: the processor's if one of them found no other room."""
    alive = walk.layout.alive(part)
    places = {one.statistics.mean.device for one in (gathered.get(s.module) for s in walk.consumers(part)) if one}
    if len(places) > 1:
        gathered = {name: one.to(torch.device("cpu")) for name, one in gathered.items()}
    return [consumer_of(walk, slot, alive, gathered) for slot in walk.consumers(part)]


def producers_of(walk: Walk, part: ComponentGroup, consumers: Sequence[Consumer]) -> list[Tensor]:
    """The producers' weights by living component, each ``[components, weights]`` float64; those that have none left out.

    They lie where the consumers' weights do.
    """
    alive = walk.layout.alive(part)
    found = []
    for slot in part.producers:
        weight = output_weights(part_of(walk.model, slot.module))
        if weight is not None:
            rows = walk.layout.outputs(slot, alive).flatten()
            own = weight.to(torch.float64)[rows.to(weight.device)].view(alive.numel(), -1)
            found.append(own.to(consumers[0].weight.device) if consumers else own)
    return found


def with_others(consumer: Consumer, kept: Tensor) -> Tensor:
    """Kept components of the consumer's whole input: those of the part, then all that are not the part's."""
    return torch.cat([kept, torch.arange(consumer.in_group, consumer.components, device=kept.device)])


def features_kept(consumer: Consumer, kept: Tensor) -> Tensor:
    """Features of the kept components of a consumer's whole input, ``[features]`` int64."""
    return feature_index(with_others(consumer, kept), consumer.weight.shape[1] // consumer.components)


def kept_positions(slot: Slot, consumer: Consumer, kept: Tensor, order: Tensor) -> Tensor:
    """The channels that a consumer keeps, the part's first, in the order of its reading weight."""
    mine = order[: consumer.in_group * slot.entries].view(-1, slot.entries)[kept]
    return torch.cat([mine.flatten(), order[consumer.in_group * slot.entries :]])


def write_weight_(module: torch.nn.Module, weight: Tensor, channels: Tensor) -> None:
    """Give a layer a weight whose features are ordered by component, in place.

    Args:
        module: The layer, already of the right width.
        weight: ``[outputs, features]`` float64, the features of ``channels[0]`` first.
        channels: A number for each input channel in that order, ``[channels]``; their ranks are the positions.
    """
    natural = feature_index(torch.argsort(channels), taps_of(module))
    write_reading_weight_(module, weight[:, natural.to(weight.device)])
