"""ModHiFi: structured pruning of trained networks by the fidelity of their components.

Importing the package imports nothing heavy, so that `modhifi --help` answers at once.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "audit", "compare", "evaluate", "groups", "load_model", "prune", "save", "score", "synthesize", "unlearn",
]  # fmt: skip

if TYPE_CHECKING:
    from modhifi_cli.api import audit, compare, evaluate, groups, load_model, prune, save, score, synthesize, unlearn


def __getattr__(name: str) -> Any:
    """The public functions on first use: they need torch, which takes seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module 'modhifi_cli' has no attribute '{name}'")
    import importlib
    import types

    api = importlib.import_module("modhifi_cli.api")
    if isinstance(globals().get(name), types.ModuleType):  # a room of the same name that was imported meanwhile
        del globals()[name]
    return getattr(api, name)
