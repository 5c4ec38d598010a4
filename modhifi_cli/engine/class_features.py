"""Where a group's components are looked at for what they know of the classes, and the sums taken there.

DisCEdit asks how far apart a filter's maps lie under two classes. A component that one layer alone writes, with a
BatchNorm right behind it, is looked at in front of that BatchNorm: this is the filter's own map, and the variable whose
moments BatchNorm normalises by. A component of a residual stream has several producers and no map of its own, so it is
looked at where the stream is read: the input of every consumer with weights. The same holds where no BatchNorm follows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from modhifi_cli.graph.components import ComponentGroup, Layout, Slot


class MapSummaries:
    """One number for each image and component: a summary of the component's map at the input of one module.

    Args:
        positions: Channels (or features) of each component in that input, ``[components, entries]`` int64.
        summary: Maps ``[images, components, …]`` → ``[images, components]`` float64.
        linear: Whether features lie along the last dimension, ``[batch, …, features]``.
    """

    def __init__(self, positions: Tensor, summary: Callable[[Tensor], Tensor], *, linear: bool) -> None:
        self._positions, self._summary, self._linear = positions, summary, linear
        self._found: list[Tensor] = []

    def update(self, inputs: Tensor) -> None:
        """Add one batch of the module's inputs."""
        inputs = inputs.detach()
        if self._linear and inputs.ndim > 2:
            inputs = inputs.movedim(-1, 1)
        maps = inputs[:, self._positions.flatten().to(inputs.device)].unflatten(1, tuple(self._positions.shape))
        self._found.append(self._summary(maps))

    def result(self) -> Tensor:
        """All images so far in their order, ``[images, components]`` float64."""
        return torch.cat(self._found)


def map_summaries(
    model: nn.Module,
    layout: Layout,
    group: ComponentGroup,
    consumers: Sequence[Slot],
    norm: str | None,
    summary: Callable[[Tensor], Tensor],
) -> dict[str, MapSummaries]:
    """What to look at for one group: module name → summaries of its input.

    Args:
        model: The network as it is now.
        layout: Which components live, and where.
        group: The group.
        consumers: Its consumers with weights.
        norm: The BatchNorm right behind the group's only producer; None where there are several, or no BatchNorm.
        summary: As in `MapSummaries`.
    """
    alive = layout.alive(group)
    own = next((slot for slot in group.followers if slot.module == norm), None)
    if own is not None:
        return {own.module: MapSummaries(layout.outputs(own, alive), summary, linear=False)}
    return {
        slot.module: MapSummaries(
            layout.inputs(slot, alive), summary, linear=isinstance(model.get_submodule(slot.module), nn.Linear)
        )
        for slot in consumers
    }
