"""Features of queries and keys as components: their curves, their trials and their edit.

No layer reads them: the logits of attention do, as a product. Any basis of a head's features gives the same product, so
they are written in one in which each carries its own share of the logits' energy (`numerics.query_key`), and the last go.
Nothing has to be repaired: the same formula says what the kept ones become.
"""

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi_cli.engine.edit import tensor_edits
from modhifi_cli.engine.gathering import Gathered
from modhifi_cli.engine.walk import Walk
from modhifi_cli.graph.components import ComponentGroup, Slot, bias_of, weight_of
from modhifi_cli.numerics.moments import second_moment
from modhifi_cli.numerics.query_key import query_key_spectrum, reduce_query_key
from modhifi_cli.records import Edit, ModuleEdit, Progress


@dataclass(frozen=True)
class Product:
    """What one attention's queries and keys are, head by head.

    Attributes:
        name: Of the part.
        places: Where their features lie, the queries' and the keys': layer, ``[features, heads]`` int64.
        moments: S_q and S_k, ``[2, heads, features, features]`` float64; the keys' centred.
    """

    name: str
    places: tuple[tuple[nn.Module, Tensor], tuple[nn.Module, Tensor]]
    moments: Tensor

    def errors(self) -> list[float]:
        """Share of the logits' energy that is lost without 0, 1, 2, … features of every head, down to one."""
        energy = query_key_spectrum(*self.moments, name=self.name).sum(0).flip(0)
        lost = energy.cumsum(0) / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)
        return [0.0, *lost[:-1].tolist()]

    def turn(self, kept: int) -> Tensor:
        """A and B of all heads that keep so many features, ``[2, heads, features, kept]`` float64."""
        heads = [reduce_query_key(q, k, kept, name=self.name) for q, k in zip(*self.moments, strict=True)]
        return torch.stack([torch.stack([one.queries for one in heads]), torch.stack([one.keys for one in heads])])

    @torch.no_grad()
    def hollow_(self, removed: int) -> None:
        """Make attention behave as if features were gone, without changing a shape: Q' = Q A Bᵀ (for a trial)."""
        first, second = self.turn(self.moments.shape[-1] - removed)
        self._write_(0, first @ second.mT)

    @torch.no_grad()
    def write_(self, turn: Tensor) -> None:
        """Write queries and keys in other bases, ``[2, heads, features, kept]``: in the first rows, the others stay."""
        for side in (0, 1):
            self._write_(side, turn[side])

    def _write_(self, side: int, turns: Tensor) -> None:
        layer, rows = self.places[side]
        for head, turn in enumerate(turns):
            for tensor in (weight_of(layer), bias_of(layer)):
                if tensor is None:
                    continue
                mine = rows[:, head].to(tensor.device)
                new = turn.mT.to(tensor.device) @ tensor[mine].double()
                tensor[mine[: len(new)]] = new.to(tensor.dtype)


def product_of(walk: Walk, part: ComponentGroup, gathered: Mapping[str, Gathered]) -> Product:
    """Queries and keys as they stand, with their moments from those of what their layers read (method.md M12).

    Args:
        walk: Its network as it stands.
        part: The features of one attention.
        gathered: Moments of the inputs of the layers that write them, by module.
    """
    alive = walk.layout.alive(part)
    places, moments = [], []
    for side, slot in enumerate(part.producers):
        layer = walk.model.get_submodule(slot.module)
        rows = walk.layout.outputs(slot, alive)
        seen = gathered[slot.module].statistics
        where = seen.mean.device
        weight = weight_of(layer).detach().to(where, torch.float64)[rows.T.to(where)]  # [heads, features, inputs]
        moment = weight @ second_moment(seen, centred=True) @ weight.mT
        if side == 0:
            mean = weight @ seen.mean
            if (bias := bias_of(layer)) is not None:
                mean = mean + bias.detach().to(mean)[rows.T.to(where)]
            moment = moment + mean[..., :, None] * mean[..., None, :]
        places.append((layer, rows))
        moments.append(moment)
    return Product(part.name, (places[0], places[1]), torch.stack(moments))


def edit_product_(walk: Walk, part: ComponentGroup, iteration: int, keep: int) -> Generator[Progress, None, Edit]:
    """Cut the features of queries and keys that carry least of the logits.

    Args:
        walk: Standing at the part's stop; its network is edited in place.
        part: What is cut.
        iteration: Pass of the schedule.
        keep: Features that every head keeps, fewer than live.
    """
    started = time.perf_counter()
    slots: dict[str, Slot] = {slot.module: slot for slot in part.producers}
    gathered = yield from walk.gather(part, tuple(slots.values()), hold_out=False, also={})
    gathered_at = time.perf_counter()
    product = product_of(walk, part, gathered)
    alive = walk.layout.alive(part).numel()
    error, turn = product.errors()[alive - keep], product.turn(keep)
    product.write_(turn)
    kept = torch.arange(keep)
    cut = walk.cut_(part, kept)
    walk.turned_(part, turn)
    walk.edited_(list(slots), [])
    changed = list(dict.fromkeys((*walk.take_refreshed_(), *slots)))
    tensors = {one.module: one.tensors for one in tensor_edits(walk.model, changed)}
    turns = {slot.module: turn.cpu() for slot in part.followers}
    seconds = {"gathering": gathered_at - started, "solving": time.perf_counter() - gathered_at}
    return Edit(
        name=part.name,
        iteration=iteration,
        modules=tuple(
            ModuleEdit(name, cut.outputs.get(name), cut.inputs.get(name), tensors.get(name, {}), turn=turns.get(name))
            for name in dict.fromkeys((*changed, *part.modules))
        ),
        kept=kept,
        removed=torch.arange(keep, alive),
        facts={
            "components": alive, "kept": keep, "dead_outputs": 0, "fidelity": {part.name: 1 - error},
            "rows": {name: one.statistics.rows for name, one in gathered.items()}, "seconds": seconds,
            **walk.facts(part),
        },
        state=walk.state,
    )  # fmt: skip
