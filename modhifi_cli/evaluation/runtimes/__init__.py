"""Runtimes: what runs a finished network, one file each. A network becomes a program there, and a program is timed.

A file NAME.py here is the runtime ``NAME``. It has `pack`, which makes of a network what can be sent to another process,
and `load`, which makes of that a function that runs it once. Whoever measures or exports asks `runtime` for the file and
knows no runtime by name. `program` does both at once, for a network that stays where it is.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, nearest, need_packages

_NOT_RUNTIMES = ("__init__", "clocks", "process")


class NotPortable(Exception):
    """A network that cannot be sent to another process, such as one whose class nobody else can import."""


class Runtime(Protocol):
    """What a file of this room offers.

    Attributes:
        PACKAGES: Import names of packages that must be installed, of `errors.EXTRAS`.
        ON_A_CARD: Whether it can run on an accelerator.
        QUICK: Whether a program is made in well under a second, so that layers can be timed one by one.
        BLOCK: Channels that it computes together; layers of other multiples leave its fast path or waste
            a part of every vector. 1 where none do.
    """

    PACKAGES: tuple[str, ...]
    ON_A_CARD: bool
    QUICK: bool
    BLOCK: int

    def pack(self, model: nn.Module, inputs: Tensor) -> bytes:
        """What `load` needs of a network.

        Args:
            model: In evaluation mode; left as it is.
            inputs: A whole batch; a program is made for its shape.

        Raises:
            NotPortable: If this network cannot be sent.
            UnsupportedModelError: If the runtime cannot run it.
        """

    def program(self, model: nn.Module, inputs: Tensor, threads: int) -> Callable[[], object]:
        """As `load` of what `pack` gives, in this process.

        Raises:
            UnsupportedModelError: If the runtime cannot run it.
        """

    def load(self, packed: bytes, inputs: Tensor, threads: int) -> Callable[[], object]:
        """A function that runs the program once on `inputs`, which lie where it shall run.

        Raises:
            UnsupportedModelError: If the runtime cannot run it.
        """


def names() -> tuple[str, ...]:
    """All runtimes, sorted."""
    found = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return tuple(sorted(name for name in found if name not in _NOT_RUNTIMES))


def runtime(name: str, *, place: str = "runtime.serve", device_type: str = "cpu") -> Runtime:
    """The runtime of that name, ready to be used.

    Args:
        name: As in `names`.
        place: The setting that names it, for messages.
        device_type: Where the network shall run.

    Raises:
        ConfigError: If there is none, its package is not installed, or it does not run on such a device.
    """
    if name not in names():
        raise ConfigError(f"{place}: there is no runtime {name!r}; {nearest(str(name), names())}")
    found = cast(Runtime, importlib.import_module(f"{__name__}.{name}"))
    need_packages(f"{place}={name}", *found.PACKAGES)
    if device_type != "cpu" and not found.ON_A_CARD:
        raise ConfigError(f"{place}={name} is measured on a CPU only; set runtime.device=cpu, or choose eager or compile.")
    return found
