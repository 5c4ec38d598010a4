"""What settings may say that came with a folder instead of from the command line.

A run's ``config.yaml`` makes the dense network and its data again. Whoever wrote the folder must not thereby run code,
fetch anything, or have a file opened or written elsewhere on the reader's machine.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from modhifi_cli.errors import ConfigError
from modhifi_cli.settings.targets import check_targets

CODE_KEYS = ("factory", "function", "example", "forward")  # whose values name code that would run
_DEEPEST = 16


def refuse_reaching(plain: Mapping[str, Any], keys: Sequence[str], *, made_here: bool, trust: bool) -> None:
    """Refuse settings of a folder that lead out of it.

    Args:
        plain: Settings of the folder.
        keys: Those of them that are about to be used, such as ``("model", "data")``.
        made_here: Whether this user wrote them on this machine; then they may name files.
        trust: Whether the user said ``model.trust=true``; then they may name files and code.

    Raises:
        ConfigError: About the first that a folder may not say.
    """
    for key in keys:
        node = plain.get(key)
        if node is None:
            continue
        check_targets(node, key, allow=_named_code(node) if trust else ())
        for path, value in _leaves(node, key, 0):
            name = path.rpartition(".")[2]
            if name == "trust_remote_code" and value:
                raise ConfigError(
                    f"{path} never comes from a folder: it would run code from the hub; build that network yourself."
                )
            if name in CODE_KEYS and value and not trust:
                raise ConfigError(
                    f"{path}: the folder names code of your own, {value!r:.100}, which would run here; if you know it, say "
                    "model.trust=true."
                )
            if not made_here and not trust and _leads_out(name, value):
                raise ConfigError(
                    f"{path}: the folder was not made by you on this machine, and its settings name {value!r:.100} outside "
                    "it; give that setting on the command line, or model.trust=true if you know the folder."
                )


def _named_code(node: Any) -> set[str]:
    return {value for path, value in _leaves(node, "", 0) if path.endswith("_target_") and isinstance(value, str)}


def _leaves(node: Any, path: str, depth: int) -> list[tuple[str, Any]]:
    if depth > _DEEPEST:
        raise ConfigError(f"{path[:80]}…: settings are nested too deep.")
    if isinstance(node, Mapping):
        return [leaf for key, value in node.items() for leaf in _leaves(value, f"{path}.{key}", depth + 1)]
    if isinstance(node, list):
        return [leaf for number, value in enumerate(node) for leaf in _leaves(value, f"{path}[{number}]", depth + 1)]
    return [(path, node)]


def _leads_out(name: str, value: Any) -> bool:
    """A path, a place on the hub, or a word that happens to name a file here. `_target_` was looked at already."""
    if not isinstance(value, str) or name in ("_target_", "title"):
        return False
    return any(mark in value for mark in "/\\~:") or value.startswith(".") or os.path.lexists(value)
