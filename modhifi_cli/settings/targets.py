"""What a `_target_` may name, whether its arguments fit, and calling it.

Every `_target_`'s arguments are bound to its signature at the start: under `_partial_` a misspelt argument would
otherwise fail only after the statistics were gathered.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from modhifi_cli.errors import ConfigError, nearest, need_packages
from modhifi_cli.settings.yamls import config_directory

PACKAGE = "modhifi_cli."
# Where rooms, files and classes of earlier versions are now; saved runs name what made them by the old places.
_MOVED: Mapping[str, str] = {
    "tasks.outside": "rivals.torch_pruning",
    "tasks.prune_decoder": "engine.token_walk",
    "tasks.gathering": "engine.gathering",
    "tasks.forgetting.ContrastU": "unlearning.contrast.ContrastU",
    "tasks.forgetting.DisCEditU": "unlearning.discedit_u.DisCEditU",
    "tasks.forgetting.ModHiFiU": "unlearning.modhifi_u.ModHiFiU",
    "tasks.collapse": "unlearning.collapse",
    "tasks.audit.Membership": "audit.attacks.Membership",
    "tasks.audit": "audit.plan",
    "tasks.relearn": "audit.attacks",
    "tasks.verdict": "audit.verdict",
    "tasks.studies": "studies",
    "exports.to_onnx": "files.exports.onnx.Onnx",
    "exports.to_torch_export": "files.exports.torch_export.TorchExport",
    "files.exports.to_onnx": "files.exports.onnx.Onnx",
    "files.exports.to_torch_export": "files.exports.torch_export.TorchExport",
}

# Settings that were tried and are gone, by what they were of, with the value that left them off.
_GONE: Mapping[str, Mapping[str, Any]] = {"numerics.selection.Greedy": {"swaps": 0}}

# Arguments that are not settings: they come into being during the run and are passed when a `_partial_` is called.
_GIVEN_LATER: Mapping[str, tuple[str, ...]] = {
    "data": ("preprocess", "labelled"),
    "evaluation_data": ("preprocess", "labelled"),
    "sources": ("preprocess", "labelled"),
    "evaluation": (
        "models", "evaluation_data", "calibration_data", "example", "device", "batch_size", "progress",
    ),
    "schedule": ("sparsity",),
    "outside": (
        "model", "calibration", "sparsity", "target", "batchnorm", "exclude", "round_to", "batch_size", "device",
        "done",
    ),
}  # fmt: skip
# Arguments that the run gives to those that take them, and that no YAML may set.
_GIVEN_IF_TAKEN: Mapping[str, tuple[str, ...]] = {
    "data": ("making",), "sources": ("making",), "target": ("measured", "stopwatch"),
}  # fmt: skip


def build(node: Mapping[str, Any], **given: Any) -> Any:
    """The object or function that a node's `_target_` names, with the node's keys as arguments.

    Args:
        node: A plain mapping with ``_target_`` and perhaps ``_partial_: true``.
        given: Further arguments.

    Returns:
        The target's result, or with ``_partial_`` a function that still takes the arguments given later.
    """
    target = locate(str(node["_target_"]), "")
    arguments = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")} | given
    return functools.partial(target, **arguments) if node.get("_partial_") else target(**arguments)


def check_targets(plain: Any, path: str = "") -> None:
    """Every `_target_` lies in this package, exists, and takes the arguments that the YAML gives it."""
    if isinstance(plain, list):
        for index, value in enumerate(plain):
            check_targets(value, f"{path}[{index}]")
    if not isinstance(plain, Mapping):
        return
    for key, value in plain.items():
        check_targets(value, f"{path}.{key}" if path else str(key))
    if "_target_" not in plain:
        return
    target = locate(str(plain["_target_"]), path)
    arguments = {key for key in plain if key not in ("_target_", "_partial_")}
    group = re.split(r"[.\[]", path)[0]
    always = _GIVEN_LATER.get(group, ()) if plain.get("_partial_") else ()
    later = (*always, *_GIVEN_IF_TAKEN.get(group, ()))
    parameters = inspect.signature(target).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in sorted(arguments):
        if name not in parameters or name in later:
            known = [known for known in parameters if known not in later]
            raise ConfigError(f"{path} has no key '{name}': {nearest(name, known)}")
    for name in always:
        if name not in parameters:
            raise ConfigError(f"{path}: {plain['_target_']} does not take '{name}', which every {path} is given.")
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        if required and name not in arguments and name not in later:
            raise ConfigError(f"{path}.{name} must be given, e.g. {path}.{name}=VALUE.")


def locate(name: str, path: str) -> Callable[..., Any]:
    """The function or class that a `_target_` names; only targets of this package are accepted."""
    where = f"{path}._target_" if path else "_target_"
    if not name.startswith(PACKAGE):
        raise ConfigError(f"{where} must lie under {PACKAGE[:-1]}; got '{name}'.")
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not str(error.name or "").startswith(PACKAGE[:-1]):
            raise  # a missing library is not a misspelt target
        raise ConfigError(f"{where} names '{name}', which does not exist.") from error
    if not callable(found):
        raise ConfigError(f"{where} names '{name}', which cannot be called.")
    need_packages(path or name, *getattr(module, "PACKAGES", ()))
    return found


def at_present(node: Any) -> Any:
    """The same settings with every `_target_` of an earlier version by its present name."""
    if isinstance(node, list):
        return [at_present(one) for one in node]
    if not isinstance(node, Mapping):
        return node
    plain = {key: at_present(value) for key, value in node.items()}
    target = plain.get("target")
    if isinstance(target, dict) and "name" in target and "_target_" not in target:
        plain["target"] = _price_at_present(target)
    name = plain.get("_target_")
    if isinstance(name, str) and name.startswith(PACKAGE):
        old = next((place for place in _MOVED if f"{name}.".startswith(f"{PACKAGE}{place}.")), None)
        if old is not None:
            plain["_target_"] = f"{PACKAGE}{_MOVED[old]}{name.removeprefix(PACKAGE + old)}"
    # A setting that is gone and was left off asks for nothing; another value of it is refused as unknown.
    off = _GONE.get(str(plain.get("_target_")).removeprefix(PACKAGE), {})
    return {key: value for key, value in plain.items() if key not in off or value != off[key]}


def _price_at_present(target: dict[str, Any]) -> dict[str, Any]:
    """What a run counts, of a version that named it by a word: the class that the choice of that name names today."""
    file = config_directory() / "target" / f"{target['name']}.yaml"
    found = re.search(r"^_target_: (\S+)$", file.read_text(encoding="utf-8"), re.M) if file.is_file() else None
    return target if found is None else {"_target_": found[1], **{k: v for k, v in target.items() if k != "name"}}
