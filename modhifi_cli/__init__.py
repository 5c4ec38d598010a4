"""ModHiFi: structured pruning of trained networks by the fidelity of their components.

Importing the package imports nothing heavy, so that `modhifi --help` answers at once.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["load_model"]

if TYPE_CHECKING:
    from modhifi_cli.artifacts import load_model


def __getattr__(name: str) -> Any:
    """`load_model` on first use: it needs torch, which takes seconds to import."""
    if name == "load_model":
        from modhifi_cli.artifacts import load_model

        return load_model
    raise AttributeError(f"module 'modhifi_cli' has no attribute '{name}'")
