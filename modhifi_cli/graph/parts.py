"""What follows channels without being a module: a bare parameter across them, and a size that the code holds.

A layer scale, a bias that a block adds by itself or a temperature lies in a tensor that a module owns directly; a
forward that splits a tensor into fixed sizes keeps these sizes in attributes. Both are cut with the channels. They
are named like modules, by the path from the network: ``stages.0.blocks.1.ls1.gamma``, ``blocks.3.mixer.sizes.0``.
"""

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from modhifi_cli.errors import is_whole

if TYPE_CHECKING:
    from typing_extensions import TypeIs

_CUT = "_cut_parts"  # where a module remembers which of its own parts were cut


@dataclass(frozen=True)
class BareTensor:
    """A parameter or buffer that its module uses by itself, with one dimension longer than one, or a matrix by its rows.

    Attributes:
        owner: Module that holds it.
        leaf: Its name there.
    """

    owner: nn.Module
    leaf: str

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now."""
        return getattr(self.owner, self.leaf)

    @property
    def size(self) -> int:
        """Its number of channels: of a matrix its rows."""
        return self.tensor.shape[wide_dim(self.tensor) or 0] if self.tensor.dim() else 1

    @property
    def parameters(self) -> int:
        """Number of its parameters: none where it is a buffer."""
        return self.tensor.numel() if isinstance(self.tensor, nn.Parameter) else 0

    def keep_(self, kept: Tensor) -> None:
        """Let only the given channels stay, ``[kept]`` int64 sorted."""
        old = self.tensor
        dim = wide_dim(old)
        new = old.detach().index_select(dim if dim is not None else 0, kept.to(old.device)).contiguous()
        if isinstance(old, nn.Parameter):
            setattr(self.owner, self.leaf, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            self.owner._buffers[self.leaf] = new
            # What is left of it is no longer what its module makes anew, so it must be saved.
            self.owner._non_persistent_buffers_set.discard(self.leaf)
        _remember_(self.owner, self.leaf)


@dataclass(frozen=True)
class Size:
    """A number of channels that a module keeps as an integer, by itself or in a list or tuple.

    Attributes:
        owner: Module that holds it.
        leaf: Attribute name, with the place in it where that is a sequence: ``"split_sizes.2"``.
    """

    owner: nn.Module
    leaf: str

    parameters = 0

    @property
    def size(self) -> int:
        """The number as it is now."""
        name, _, place = self.leaf.partition(".")
        value = getattr(self.owner, name)
        return value[int(place)] if place else value

    def keep_(self, kept: Tensor) -> None:
        """Say that only so many channels are left."""
        name, _, place = self.leaf.partition(".")
        value = kept.numel()
        if place:
            old = getattr(self.owner, name)
            value = type(old)(kept.numel() if number == int(place) else each for number, each in enumerate(old))
        setattr(self.owner, name, value)
        _remember_(self.owner, self.leaf)


Part = BareTensor | Size


def wide_dim(tensor: Tensor) -> int | None:
    """The only dimension of a tensor that is longer than one, or None."""
    wide = [dim for dim, size in enumerate(tensor.shape) if size > 1]
    return wide[0] if len(wide) == 1 else None


def part_of(model: nn.Module, name: str) -> nn.Module | Part:
    """The module of a name, or the bare tensor or size that the name means.

    Raises:
        AttributeError: If the network has nothing of this name.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        module, rest = model, name.split(".")
    while rest and rest[0] in module._modules and module._modules[rest[0]] is not None:
        module, rest = module._modules[rest[0]], rest[1:]
    if not rest:
        return module
    leaf = ".".join(rest)
    value = getattr(module, rest[0])
    if isinstance(value, Tensor) and len(rest) == 1:
        return BareTensor(module, leaf)
    if len(rest) == 2 and isinstance(value, list | tuple) and rest[1].isdecimal() and int(rest[1]) < len(value):
        value = value[int(rest[1])]
    elif len(rest) > 1:
        raise AttributeError(f"{type(module).__name__} has no part '{leaf}'")
    if isinstance(value, bool) or not isinstance(value, int):
        raise AttributeError(f"{type(module).__name__} has no tensor and no number of channels '{leaf}'")
    return Size(module, leaf)


def is_part(thing: object) -> "TypeIs[Part]":
    """Whether what `part_of` found is no module."""
    return isinstance(thing, BareTensor | Size)


def cut_parts(model: nn.Module) -> Iterator[tuple[str, Part]]:
    """Name and part of everything besides modules that was cut in a network."""
    for name, module in model.named_modules():
        for leaf in module.__dict__.get(_CUT, ()):
            full = f"{name}.{leaf}" if name else leaf
            part = part_of(model, full)
            assert not isinstance(part, nn.Module)
            yield full, part


def _remember_(owner: nn.Module, leaf: str) -> None:
    known = owner.__dict__.get(_CUT, ())
    if leaf not in known:
        owner.__dict__[_CUT] = (*known, leaf)


def size_names(module: nn.Module, sizes: tuple[int, ...]) -> tuple[tuple[str | int, ...], ...] | None:
    """Attributes of a module that say the given sizes of a split, in this order, or None where none say them.

    An attribute that holds all of them comes first; otherwise the forward's own text is asked for a split into as many
    parts whose sizes are attributes, or a difference of two.

    Returns:
        For each size the leaf of a `Size`; for a difference two, what is taken from and what is taken away; a number where
        the forward says that itself.
    """
    for name, value in vars(module).items():
        if isinstance(value, list | tuple) and tuple(value) == sizes and not name.startswith("_"):
            return tuple((f"{name}.{place}",) for place in range(len(sizes)))
    for terms in _written_splits(type(module)):
        if len(terms) == len(sizes):
            known = [[name if isinstance(name, int) else getattr(module, name, None) for name in names] for names in terms]
            if all(isinstance(value, int) for values in known for value in values):
                if tuple(values[0] - sum(values[1:]) for values in known) == sizes:
                    return terms
    return None


@functools.cache
def _written_splits(kind: type[nn.Module]) -> tuple[tuple[tuple[str | int, ...], ...], ...]:
    """The splits into listed attributes of ``self`` that the methods of a class write down."""
    found = []
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for method in vars(owner).values():
            if not isinstance(method, types.FunctionType):
                continue
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
            except (OSError, TypeError, SyntaxError):
                continue
            for call in ast.walk(tree):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "split":
                    for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
                        if isinstance(argument, ast.List | ast.Tuple):
                            terms = tuple(_attributes_of(element) for element in argument.elts)
                            if all(terms) and any(isinstance(names[0], str) for names in terms):
                                found.append(terms)
    return tuple(found)


def _attributes_of(node: ast.AST) -> tuple[str | int, ...]:
    """The name of ``self.name``, two of ``self.one - self.other``, a number itself, none of anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return (node.value,)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        left, right = _attributes_of(node.left), _attributes_of(node.right)
        return (*left, *right) if len(left) == len(right) == 1 else ()
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return (node.attr,)
    return ()


def integers(module: nn.Module) -> dict[str, int]:
    """Integers that a module keeps under names of its own."""
    held = vars(module).items()
    return {n: v for n, v in held if is_whole(v) and not n.startswith("_")}

