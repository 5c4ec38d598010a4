"""Groups of coupled components, and where each component lives in every module it touches.

A group is what has to be removed together: *producers* write the components, *followers* (BatchNorm, GroupNorm, depthwise
and grouped convolutions) pass them on one by one, *consumers* read them. Groups are stated once in the coordinates of the
dense network; `Layout` knows which of those coordinates are still alive after earlier edits.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi_cli.graph.experts import Experts
from modhifi_cli.graph.heads import head_count, head_weights
from modhifi_cli.graph.modules import ChannelPadShortcut
from modhifi_cli.graph.parts import Part, is_part, part_of


@dataclass(frozen=True)
class Slot:
    """Where the components of a group lie along one dimension of one module.

    Attributes:
        module: Module name, or the name of a tensor or number that a module holds (`parts.part_of`).
        index: Dense positions, ``[components, entries]`` int64: row i holds the channels (or features) of component i.
    """

    module: str
    index: Tensor

    @property
    def entries(self) -> int:
        """Channels (or features) per component."""
        return self.index.shape[1]


def complement(positions: Tensor | Collection[int], count: int) -> Tensor:
    """The others of ``0 … count − 1``, int64 sorted."""
    gone = positions if isinstance(positions, Tensor) else torch.tensor([int(one) for one in positions], dtype=torch.int64)
    others = torch.ones(count, dtype=torch.bool)
    others[gone] = False
    return others.nonzero().flatten()


@dataclass(frozen=True)
class ComponentGroup:
    """Components that have to be removed together, in the coordinates of the dense network.

    Attributes:
        name: Name of the first producer in execution order.
        components: Number of components in the dense network.
        producers: Slots along the output dimension of conv, linear or shortcut modules, or along the heads of an
            attention that holds its own projections.
        followers: Slots along the only channel dimension of BatchNorm, GroupNorm and depthwise or grouped convolutions
            (components of the last two are whole groups), along the heads of attention modules and their parts, and
            what modules hold for these channels besides: bare parameters and numbers.
        consumers: Slots along the input dimension of conv, linear or shortcut modules.
        balanced: The components come in so many equal runs (query heads of each KV head), each of which must keep the
            same number of components; 1 for no such constraint.
        product: The components are features of the product of what the first producer writes (queries) with what the
            second writes (keys), head by head; no layer reads them, and any basis of them gives the same product.
    """

    name: str
    components: int
    producers: tuple[Slot, ...]
    followers: tuple[Slot, ...]
    consumers: tuple[Slot, ...]
    balanced: int = 1
    product: bool = False

    @property
    def readers(self) -> tuple[Slot, ...]:
        """Where what a cut needs is seen, and where its effect begins: the consumers, of a product what writes it."""
        return self.producers if self.product else self.consumers

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all modules the group touches, each once."""
        return tuple(dict.fromkeys(slot.module for slot in (*self.producers, *self.followers, *self.consumers)))


@dataclass(frozen=True)
class Refusal:
    """A set of coupled channels that this tool does not edit, and why."""

    name: str
    reason: str


def shared_tensors(model: nn.Module) -> dict[str, str]:
    """Modules that hold a parameter of another module too: name → name of the other. They cannot be cut apart."""
    holders: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            other = holders.setdefault(id(parameter), name)
            if other != name:
                shared |= {name: other, other: shared.get(other, name)}
    for name, module in model.named_modules():  # a bare tensor is named by itself
        for leaf, parameter in module.named_parameters(recurse=False):
            if name in shared and holders[id(parameter)] in shared:
                shared[f"{name}.{leaf}" if name else leaf] = shared[name]
    return shared


def is_transposed(module: object) -> bool:
    """Whether a module is GPT-2's linear layer, transformers' ``Conv1D``, whose weight is ``[inputs, outputs]``."""
    # By name: transformers is heavy, and whoever holds such a module has it loaded already.
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def is_linear(module: object) -> bool:
    """Whether a module computes its weight times its input plus its bias, and nothing else, in either orientation.

    A subclass of `nn.Linear` counts if it keeps its forward, or if its own gives the same on two rows (Falcon's); one
    that quantises or adds something does not.
    """
    if type(module) is nn.Linear or is_transposed(module):
        return True
    if not isinstance(module, nn.Linear):
        return False
    if type(module).forward is nn.Linear.forward:
        return module.weight.is_floating_point()
    weight = module.weight
    if not weight.is_floating_point() or weight.is_meta or module.training:
        return False
    rows = torch.linspace(-1, 1, 2 * module.in_features).view(2, -1).to(weight)
    try:
        with torch.inference_mode():
            found = module(rows)
            expected = torch.nn.functional.linear(rows, weight, module.bias)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
    close = 1e-5 if weight.dtype in (torch.float32, torch.float64) else 1e-2
    return isinstance(found, Tensor) and torch.allclose(found, expected, rtol=close, atol=close * float(expected.abs().max()))


def output_size(module: nn.Module | Part) -> int:
    """Length of the output (or only) channel dimension of a module or part that a group may touch."""
    if is_part(module):
        return module.size
    if is_transposed(module):
        return module.nf
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, Experts):
        return module.num_experts
    heads = head_count(module)
    return module.out_channels if heads is None else heads


def input_size(module: nn.Module | Part) -> int:
    """Length of the input channel dimension of a module or part that a group may touch."""
    if is_part(module):
        return module.size
    if is_transposed(module):
        return module.weight.shape[0]
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, Experts):
        return module.num_experts
    heads = head_count(module)
    return module.in_channels if heads is None else heads


def is_upsampling(module: object) -> bool:
    """Whether a module is a transposed convolution, whose weight is ``[inputs, outputs, height, width]``."""
    return isinstance(module, nn.ConvTranspose2d)


def reads_features(module: object) -> bool:
    """Whether a module is a linear layer, of either orientation: its features lie along the input's last dimension."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def inputs_first(module: object) -> bool:
    """Whether a layer's weight has its inputs in front: a transposed convolution, a linear layer of GPT-2."""
    return is_upsampling(module) or is_transposed(module)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a module that has one.

    Raises:
        TypeError: If it has none.
    """
    if not isinstance(module.weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight.")
    return module.weight


def bias_of(module: nn.Module) -> Tensor | None:
    """A layer's bias, or None where it has none."""
    return module.bias if isinstance(module.bias, Tensor) else None


def matrices(module: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Every module inside one whose weight is a matrix: its path, itself, and that weight."""
    for path, inner in module.named_modules():
        weight = getattr(inner, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            yield path, inner, weight


def reading_weight(module: nn.Module) -> Tensor:
    """A consumer's weight as the matrix that its input rows meet, ``[numbers written, features]``.

    A transposed convolution reads each pixel by itself and writes a patch of k·k pixels for every output; that patches
    overlap is left aside.
    """
    weight = weight_of(module).detach()
    return weight.flatten(1).T if inputs_first(module) else weight.flatten(1)


def write_reading_weight_(module: nn.Module, weight: Tensor) -> None:
    """Put such a matrix, ``[numbers written, features]``, in the place of a consumer's weight."""
    own = weight_of(module)
    with torch.no_grad():
        own.copy_((weight.T if inputs_first(module) else weight).reshape(own.shape))


def taps_of(module: nn.Module) -> int:
    """Features per input channel of a conv or linear layer: k·k, or 1."""
    return 1 if inputs_first(module) else weight_of(module)[0, 0].numel()


def output_weights(module: nn.Module | Part) -> Tensor | None:
    """Weights by output (or head), ``[outputs, weights]``; None where there are none."""
    if not isinstance(module, nn.Module) or not has_weight(module):
        return None
    if head_count(module) is not None:
        return head_weights(module)
    weight = weight_of(module).detach()
    return (weight.transpose(0, 1) if inputs_first(module) else weight).flatten(1)


def has_weight(module: nn.Module) -> bool:
    """Whether a consumer can be scored and compensated; the shortcut map has nothing to score."""
    return not isinstance(module, ChannelPadShortcut)


class Layout:
    """Which dense positions and components are still alive, and where they are now.

    Args:
        model: The dense network.
        groups: Its groups.
    """

    def __init__(self, model: nn.Module, groups: Iterable[ComponentGroup]) -> None:
        groups = tuple(groups)
        self._components = {group.name: torch.arange(group.components) for group in groups}
        self._outputs = {n: torch.arange(output_size(part_of(model, n))) for g in groups for n in g.modules}
        self._inputs = {n: torch.arange(input_size(part_of(model, n))) for g in groups for n in g.modules}

    def alive(self, group: ComponentGroup) -> Tensor:
        """Dense numbers of the group's living components, ``[alive]`` int64 sorted."""
        return self._components[group.name]

    def alive_outputs(self, module: str) -> Tensor | None:
        """Dense output positions that a module still has, ``[alive]`` int64 sorted; None for one in no group."""
        return self._outputs.get(module)

    def alive_inputs(self, module: str) -> Tensor:
        """Dense input positions that a module of some group still has, ``[alive]`` int64 sorted."""
        return self._inputs[module]

    def outputs(self, slot: Slot, components: Tensor) -> Tensor:
        """Present output positions of the given dense components, ``[components, entries]``.

        Entries that another group has taken from every component (features of a head, heads of a feature) are left out.
        """
        present, dense = self._outputs[slot.module], slot.index[components]
        alive = torch.isin(dense, present)
        return torch.searchsorted(present, dense[alive]).view(len(components), -1)

    def inputs(self, slot: Slot, components: Tensor) -> Tensor:
        """Present input positions of the given dense components, ``[components, entries]``."""
        return torch.searchsorted(self._inputs[slot.module], slot.index[components])

    def input_order(self, slot: Slot, components: Tensor) -> Tensor:
        """All present input positions, component-major: those of `components` first, then the rest in order."""
        first = self.inputs(slot, components).flatten()
        return torch.cat([first, complement(first, self._inputs[slot.module].numel())])

    def keep_(self, group: ComponentGroup, kept: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Let only `kept` (positions among the living components) live on.

        Returns:
            Kept output positions and kept input positions by module name, in the coordinates before this call: what a
            `ModuleEdit` needs. Followers appear under outputs only.
        """
        alive = self._components[group.name]
        gone = alive[complement(kept, alive.numel())]
        kept_outputs = self._drop_(self._outputs, (*group.producers, *group.followers), gone)
        kept_inputs = self._drop_(self._inputs, group.consumers, gone)
        self._components[group.name] = alive[kept]
        return kept_outputs, kept_inputs

    @staticmethod
    def _drop_(positions: dict[str, Tensor], slots: Sequence[Slot], gone: Tensor) -> dict[str, Tensor]:
        dropped: dict[str, Tensor] = {}
        for slot in slots:
            dead = torch.isin(positions[slot.module], slot.index[gone].flatten())
            dropped[slot.module] = dropped.get(slot.module, torch.zeros_like(dead)) | dead
        kept = {}
        for module, dead in dropped.items():
            kept[module] = (~dead).nonzero().flatten()
            positions[module] = positions[module][kept[module]]
        return kept
