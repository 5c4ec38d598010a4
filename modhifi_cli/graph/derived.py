"""Subclasses of libraries' classes that are made while a network is looked at, under the libraries' own names.

Nobody can import such a class by its name, so its modules are pickled and copied by what made it: a function of this
package, the class that it was made of and whatever else the function was given.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

_RECIPE = "_made_by"


def derived(kind: type[nn.Module], *above: type, by: Callable, given: tuple = (), **own: Any) -> type[nn.Module]:
    """A subclass of a module's class with its name.

    Args:
        kind: The class.
        above: Classes whose methods come before its own.
        by: The function at the top of a file of this package that makes the subclass of `kind` and `given`.
        given: Its further arguments, which can be pickled.
        own: Attributes and methods of the subclass.
    """
    plain = {"__module__": kind.__module__, "__reduce_ex__": _reduced, _RECIPE: (by, kind, *given)}
    return type(kind.__name__, (*above, kind), plain | own)


def _reduced(module: nn.Module, protocol: int) -> tuple:
    return _empty, (_written(type(module)),), module.__dict__


def _written(kind: type) -> type | tuple:
    recipe = vars(kind).get(_RECIPE)
    return kind if recipe is None else (recipe[0], _written(recipe[1]), *recipe[2:])


def _empty(written: tuple) -> nn.Module:
    kind = _made(written)
    return kind.__new__(kind)


def _made(written: type | tuple) -> Any:
    if isinstance(written, type):
        return written
    by, kind, *given = written
    return by(_made(kind), *given)
