"""What a `_target_` may name, whether its arguments fit, and calling it.

A group of settings takes callables of one role: a room of this package (or a file of one) and the shape that the role's
Protocol asks for. So a `data` group reaches sources alone, `scoring` scores alone, and nothing reaches a verb, a file
room, a private name or something that a file merely imported, whoever wrote the YAML. A callable of the user's own is
named ``package.module:name``, and only the command line or a call can name it.

Every `_target_`'s arguments are bound to its signature at the start: under `_partial_` a misspelt argument would
otherwise fail only after the statistics were gathered.
"""

import functools
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, is_dataclass
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
    "tasks.audit.Membership": "auditing.attacks.Membership",
    "tasks.audit": "auditing.plan",
    "tasks.relearn": "auditing.attacks",
    "tasks.verdict": "auditing.verdict",
    "tasks.studies": "studies",
    "audit": "auditing",
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
    "data": ("making", "found", "packed"), "evaluation_data": ("found", "packed"), "sources": ("making",), "target": ("measured", "stopwatch"),
}  # fmt: skip


@dataclass(frozen=True)
class Role:
    """What the callables of a group are.

    Attributes:
        what: In words, for messages.
        rooms: Rooms, or single files of rooms, that hold them.
        name: The name that functions of this role bear; None takes classes alone, ``"*"`` any function too.
        methods: What a class of this role has.
        plain: Whether it has to be a dataclass: a record of settings, whose making does nothing.
    """

    what: str
    rooms: tuple[str, ...]
    name: str | None = None
    methods: tuple[str, ...] = ()
    plain: bool = False

    def fits(self, found: Any) -> bool:
        """Whether a callable has the shape of this role."""
        if inspect.isclass(found):
            has_all = all(any(method in vars(base) for base in found.__mro__) for method in self.methods)
            return self.name in (None, "*") and has_all and (is_dataclass(found) or not self.plain)
        return inspect.isfunction(found) and self.name in ("*", found.__name__)

    def holds(self, module: str) -> bool:
        """Whether a module lies in the rooms of this role."""
        return any(f"{module}.".startswith(f"{PACKAGE}{room}.") for room in self.rooms)


_SOURCE = Role("a source of data", ("data",), name="load")
_ROLES: Mapping[str, Role] = {
    "model": Role("a loader of networks", ("models", "files.earlier_run"), name="load"),
    "data": _SOURCE,
    "evaluation_data": _SOURCE,
    "sources": _SOURCE,
    "evaluation": Role("a measurement", ("evaluation",), name="measure"),
    "scoring": Role("a score", ("numerics.scoring",), methods=("__call__",)),
    "selection": Role("a selection", ("numerics.selection",), methods=("__call__",)),
    "compensation": Role("a compensation", ("numerics.compensation",), methods=("__call__",)),
    "allocation": Role("an allocation", ("numerics.allocation",), methods=("__call__",)),
    "schedule": Role("a schedule", ("numerics.schedule",), name="*"),
    "method": Role("a way to forget", ("unlearning",), methods=("fit",)),
    "study": Role("a study", ("studies",), methods=("cells", "compute", "conclude")),
    "audit": Role("a part of an audit", ("auditing",), plain=True),
    "outside": Role("an outside pruner", ("rivals",), name="*"),
    "export": Role("an export", ("files.exports",), methods=("__call__",)),
    "tracker": Role("a tracker", ("files.trackers",), methods=("write",)),
}
# What an argument may be declared as, in words; what is declared otherwise checks itself.
_KINDS: Mapping[Any, str] = {str: "a name or text", int: "a whole number", float: "a number", bool: "true or false",
                             types.NoneType: "null"}  # fmt: skip
# Groups without a line above hold settings of the engine.
_SETTINGS = Role("a dataclass of settings", ("numerics", "engine", "unlearning", "auditing"), plain=True)


def build(node: Mapping[str, Any], *, allow: Collection[str] = (), **given: Any) -> Any:
    """The object or function that a node's `_target_` names, with the node's keys as arguments.

    Args:
        node: A plain mapping with ``_target_`` and perhaps ``_partial_: true``.
        allow: Names ``package.module:name`` of the user's own code that the node may name.
        given: Further arguments.

    Returns:
        The target's result, or with ``_partial_`` a function that still takes the arguments given later.

    Raises:
        ConfigError: If the target is none that any group of settings may name.
    """
    target = _located(str(node["_target_"]), "_target_", None, allow)
    arguments = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")} | given
    return functools.partial(target, **arguments) if node.get("_partial_") else target(**arguments)


def check_targets(plain: Any, path: str = "", *, allow: Collection[str] = ()) -> None:
    """Every `_target_` names a callable of its group's role, and takes the arguments that the YAML gives it.

    Args:
        plain: Settings, or a part of them.
        path: Where that part stands.
        allow: Names ``package.module:name`` of the user's own code that may be named.

    Raises:
        ConfigError: About the first that does not.
    """
    if isinstance(plain, list):
        for index, value in enumerate(plain):
            check_targets(value, f"{path}[{index}]", allow=allow)
    if not isinstance(plain, Mapping):
        return
    for key, value in plain.items():
        check_targets(value, f"{path}.{key}" if path else str(key), allow=allow)
    if "_target_" not in plain:
        return
    group = re.split(r"[.\[]", path)[0]
    role = _SOURCE if group in _ROLES and _ROLES[group] is _SOURCE else _ROLES.get(group, _SETTINGS)
    target = _located(str(plain["_target_"]), f"{path}._target_" if path else "_target_", role, allow)
    always = _GIVEN_LATER.get(group, ()) if plain.get("_partial_") else ()
    _check_arguments(plain, path, target, always, (*always, *_GIVEN_IF_TAKEN.get(group, ())))


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
    choice = str(target["name"])
    if re.fullmatch(r"\w+", choice) is None:  # a folder's word must not become a path
        return target
    file = config_directory() / "target" / f"{choice}.yaml"
    found = re.search(r"^_target_: (\S+)$", file.read_text(encoding="utf-8"), re.M) if file.is_file() else None
    return target if found is None else {"_target_": found[1], **{k: v for k, v in target.items() if k != "name"}}


def _check_arguments(
    plain: Mapping[str, Any], path: str, target: Callable[..., Any], always: tuple[str, ...], later: tuple[str, ...]
) -> None:
    arguments = {key for key in plain if key not in ("_target_", "_partial_")}
    parameters = inspect.signature(target).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in sorted(arguments, key=str):
        if name not in parameters or name in later:
            known = [known for known in parameters if known not in later]
            raise ConfigError(f"{path} has no key '{name}': {nearest(str(name), known)}")
    for name in always:
        if name not in parameters:
            raise ConfigError(f"{path}: {plain['_target_']} does not take '{name}', which every {path} is given.")
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
        if required and name not in arguments and name not in later:
            raise ConfigError(f"{path}.{name} must be given, e.g. {path}.{name}=VALUE.")
    hints = _hints(target)
    for name in sorted(arguments & hints.keys()):
        _check_kind(f"{path}.{name}", plain[name], hints[name])


@functools.cache
def _hints(target: Callable[..., Any]) -> Mapping[str, Any]:
    """Annotations of a function's or a class's arguments; none where they cannot be read."""
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):
        return {}


def _check_kind(key: str, value: Any, hint: Any) -> None:
    """Refuse a value of another kind than its argument's: a list for a number, a truth value for a name.

    Only arguments that are declared as plain words, numbers or truth values are looked at.
    """
    kinds = set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else {hint}
    if not kinds <= _KINDS.keys():
        return
    found = type(value)
    if found in kinds or found is int and float in kinds:
        return
    told = [_KINDS[kind] for kind in _KINDS if kind in kinds]
    raise ConfigError(f"{key} must be {' or '.join(told)}; got {value!r:.60}.")


def _located(name: str, where: str, role: Role | None, allow: Collection[str]) -> Callable[..., Any]:
    """The function or class that a `_target_` names, if its role may be named there."""
    if ":" in name:
        return _own(name, where, role, allow)
    roles = (role,) if role is not None else (*_ROLES.values(), _SETTINGS)
    if not name.startswith(PACKAGE):
        raise ConfigError(
            f"{where} must lie under {PACKAGE[:-1]}, or be code of your own named package.module:name; got '{name}'."
        )
    module_name, _, attribute = name.rpartition(".")
    here = [one for one in roles if one.holds(module_name)]
    if not here or any(part.startswith("_") for part in name.split(".")):
        raise ConfigError(f"{where} must name {_wanted(roles)}; got '{name}'.")
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not str(error.name or "").startswith(PACKAGE[:-1]):
            raise  # a missing library is not a misspelt target
        raise ConfigError(f"{where} names '{name}', which does not exist.") from error
    if not callable(found):
        raise ConfigError(f"{where} names '{name}', which cannot be called.")
    # What a file merely imported is not its own: `data.folder.Path` would be a way to anywhere.
    if getattr(found, "__module__", None) != module_name or not any(one.fits(found) for one in here):
        raise ConfigError(f"{where} must name {_wanted(roles)}; got '{name}'.")
    need_packages(where.removesuffix("._target_"), *getattr(module, "PACKAGES", ()))
    return found


def _wanted(roles: Collection[Role]) -> str:
    if len(roles) != 1:
        return f"something that settings may name ({', '.join(sorted({role.what for role in roles}))})"
    (role,) = roles
    return f"{role.what} of {' or '.join(PACKAGE + room for room in role.rooms)}"


def _own(name: str, where: str, role: Role | None, allow: Collection[str]) -> Callable[..., Any]:
    if name not in allow:
        raise ConfigError(
            f"{where} names code of your own, '{name}', which runs only if the command line names it: "
            f"{where}={name}, or model.trust=true where a run folder names it."
        )
    from modhifi_cli.models.module import exactly

    found = exactly(name)
    if role is not None and inspect.isclass(found) and not role.fits(found) and role.name in (None, "*"):
        raise ConfigError(f"{where} must name {role.what} with {', '.join(role.methods)}; got '{name}'.")
    return found
