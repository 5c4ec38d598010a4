"""Settings: YAML files and `key=value` overrides become plain, checked values. The only file that knows Hydra.

Everything that can be known to be wrong before any work is found here: unknown keys and choices, missing values, wrong
types and ranges, and every `_target_`, whose arguments are bound to its signature at the start (under `_partial_` a
misspelt argument would otherwise fail only after the statistics were gathered). Hydra is imported inside functions so
that help answers at once.
"""

import copy
import functools
import importlib
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modhifi_cli.errors import ConfigError, is_number, is_whole, nearest

PACKAGE = "modhifi_cli."

# Where rooms, files and classes of earlier versions are now; saved runs name what made them by the old places.
_MOVED: Mapping[str, str] = {
    "tasks.outside": "rivals.torch_pruning",
    "tasks.prune_decoder": "engine.prune_decoder",
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
        "done", "latency",
    ),
}  # fmt: skip

# Arguments that the run gives to those that take them, and that no YAML may set.
_GIVEN_IF_TAKEN: Mapping[str, tuple[str, ...]] = {"data": ("making",), "sources": ("making",)}

_OF_A_ROW = ("name", "title")  # keys of a compared source that are no setting of it
_SEARCHED = None  # in place of a share that the run shall find
# Verbs that make calibration data where none are given.
_MAKES_DATA = ("prune", "unlearn", "compare", "study", "synthesize")
_TARGETS = ("params", "flops", "components", "latency", "max_drop")
_SPARSITY = 0.4  # where nothing is said and a share is wanted
# What people may write for the choice of a group, by verb: `modhifi study name=existence`.
_SPELLINGS: Mapping[str, Mapping[str, str]] = {"study": {"name": "study"}}

# Keys that hold one number or name, with what they must be. Keys of a `_target_` are the business of its function.
_NUMBERS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "sparsity": (
        "a number with 0 <= sparsity < 1 (none with target=max_drop)",
        lambda v: v is _SEARCHED or (_is_number(v) and 0 <= v < 1),
    ),
    "target.name": ("params, flops, components, latency or max_drop", lambda v: v in _TARGETS),
    "target.value": ("points of agreement, above 0 and below 100", lambda v: _is_number(v) and 0 < v < 100),
    "target.of": ("params, flops or latency", lambda v: v in ("params", "flops", "latency")),
    "target.trials": ("a whole number from 2", lambda v: is_whole(v) and v >= 2),
    "target.held_out": ("a share with 0 < held_out <= 0.5", lambda v: _is_number(v) and 0 < v <= 0.5),
    "target.batch_size": ("a whole number from 1, or null", lambda v: v is None or (is_whole(v) and v >= 1)),
    "target.rounds": ("a whole number from 1", lambda v: is_whole(v) and v >= 1),
    "target.max_seconds": ("a number above 0", lambda v: _is_number(v) and v > 0),
    "target.table": ("a latency_table.json, or null", lambda v: v is None or (isinstance(v, str) and v != "")),
    "round_to": ("a whole number from 1", lambda v: is_whole(v) and v >= 1),
    "tolerance": ("a number above 0", lambda v: _is_number(v) and v > 0),
    "components": (
        "mlp, attention or both, such as [mlp,attention]",
        lambda v: isinstance(v, list) and len(v) > 0 and set(v) <= {"mlp", "attention"},
    ),
    "batchnorm": ("reestimate or stored", lambda v: v in ("reestimate", "stored")),
    "classifier": ("keep, refit or auto", lambda v: v in ("keep", "refit", "auto")),
    "exclude": ("a list of module names, such as [layer4,fc]", lambda v: _is_names(v)),
    "runtime.device": (
        "cpu, cuda or cuda:N", lambda v: isinstance(v, str) and re.fullmatch(r"cpu|cuda(:\d+)?", v) is not None,
    ),
    "runtime.dtype": ("float32 or float64", lambda v: v in ("float32", "float64")),
    "runtime.threads": ("a whole number from 1, or null", lambda v: v is None or (is_whole(v) and v >= 1)),
    "runtime.batch_size": ("a whole number from 1", lambda v: is_whole(v) and v >= 1),
    "runtime.seed": ("a whole number from 0", lambda v: is_whole(v) and v >= 0),
    "console.style": ("rich, plain or json", lambda v: v in ("rich", "plain", "json")),
    "data.labels": ("auto, given or model", lambda v: v in ("auto", "given", "model")),
    "schedule.iterations": ("a whole number from 1", lambda v: is_whole(v) and v >= 1),
    "methods": ("a list of presets, such as [paper,magnitude_batchnorm]", lambda v: _is_names(v) and len(v) > 0),
    "budgets": (
        "a list of shares with 0 <= budget < 1, such as [0.2,0.4]",
        lambda v: isinstance(v, list) and len(v) > 0 and all(_is_number(share) and 0 <= share < 1 for share in v),
    ),
    "seeds": (
        "a list of whole numbers from 0, such as [0,1,2]",
        lambda v: isinstance(v, list) and len(v) > 0 and all(is_whole(seed) and seed >= 0 for seed in v),
    ),
    "forget_class": (
        "a number or name of a class, or a list of them, such as [3,5]",
        lambda v: all(is_whole(one) or isinstance(one, str) for one in (v if isinstance(v, list) else [v])),
    ),
    "layers": (
        "auto, 'last N', or a list of layers such as [layer3]",
        lambda v: isinstance(v, str) and v != "" or _is_names(v) and len(v) > 0,
    ),
    "forget_target": ("a share from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
    "retain_drop": ("a share from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
    "minutes": ("a number of minutes above 0, or null", lambda v: v is None or (_is_number(v) and v > 0)),
    "check_data": ("true or false", lambda v: isinstance(v, bool)),
    "form": ("array or folder", lambda v: v in ("array", "folder")),
    "cache": ("use, show or clean", lambda v: v in ("use", "show", "clean")),
    "output_dir": ("a folder", lambda v: isinstance(v, str) and v != ""),
    "audit.reference": (
        "a weights file or a run folder, or null", lambda v: v is None or (isinstance(v, str) and v != ""),
    ),
    "library": ("torchvision or timm", lambda v: isinstance(v, str) and v != ""),
    "pattern": ("a name with * and ?, or a list of such names", lambda v: _is_pattern(v)),
    "again": ("a name with * and ?, a list of such names, or null", lambda v: v is None or _is_pattern(v)),
    "one_per_file": ("true or false", lambda v: isinstance(v, bool)),
    "onnx": ("true or false", lambda v: isinstance(v, bool)),
    "share": ("a share above 0 and below 1", lambda v: _is_number(v) and 0 < v < 1),
    "jobs": ("a whole number from 1, or auto", lambda v: v == "auto" or (is_whole(v) and v >= 1)),
    "memory": ("gigabytes, above 0", lambda v: _is_number(v) and v > 0),
    "timeout": ("seconds, above 0", lambda v: _is_number(v) and v > 0),
    "run": ("a run folder, or null", lambda v: v is None or (isinstance(v, str) and v != "")),
    "runs": ("a list of run folders, such as [DIR1,DIR2]", lambda v: _is_names(v)),
    "resume": ("the folder of an interrupted run, or null", lambda v: v is None or (isinstance(v, str) and v != "")),
}  # fmt: skip


def config_directory() -> Path:
    """Folder with the YAMLs: inside the installed package, or at the top of a source tree."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def verbs() -> tuple[str, ...]:
    """Verbs that have a YAML of their own, sorted. `list` needs none."""
    return tuple(sorted(path.stem for path in config_directory().glob("*.yaml") if path.stem != "base"))


def groups() -> dict[str, tuple[str, ...]]:
    """Config groups and their choices, both sorted; read from the folders alone."""
    root = config_directory()
    found: dict[str, tuple[str, ...]] = {}
    for folder in sorted(path for path in root.rglob("*") if path.is_dir()):
        choices = tuple(sorted(path.stem for path in folder.glob("*.yaml")))
        if choices:
            found[folder.relative_to(root).as_posix()] = choices
    return found


def header(path: Path) -> tuple[str, list[str]]:
    """What a YAML says about itself in its leading comment: the description, and the example commands."""
    description, commands = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line[1:].strip()
        if re.match(r"(\w+=\S+ )*modhifi ", text):
            commands.append(text)
        elif not text.startswith("@package"):
            description.append(text)
    return " ".join(description), commands


def verb_help(verb: str) -> str:
    """Text for `modhifi VERB --help`: what it does, examples, keys with their meaning and the groups with choices."""
    path = config_directory() / f"{verb}.yaml"
    description, commands = header(path)
    lines = [f"modhifi {verb} [key=value ...]", "", description, ""]
    if commands:
        lines += ["Examples:", *(f"  {command}" for command in commands), ""]
    own, chosen = _inherited(verb)
    if own:
        lines.append("Keys (default, meaning):")
        lines += [f"  {key}={value}".ljust(26) + f"  {meaning}" for key, (value, meaning) in own.items()]
        lines.append("")
    known = groups()
    lines.append("Groups (default; choices; the keys of a choice are set as group.key=value):")
    for group, default in chosen.items():
        lines.append(f"  {group}={default}".ljust(26) + "  " + ", ".join(known.get(group, ())))
    lines += [
        "",
        f"modhifi {verb} --cfg job [key=value ...]  shows every key that would be used;  modhifi list  the choices;",
        "-m runs every combination of values given with commas; + before a key adds one that the YAML does not have.",
    ]
    return "\n".join(lines)


def main_help() -> str:
    """Text for `modhifi --help`."""
    lines = [
        "modhifi VERB [key=value ...]",
        "",
        "Makes a trained network smaller and faster from unlabelled images alone.",
        "",
        "Verbs (modhifi VERB --help teaches its keys):",
    ]
    for verb in verbs():
        lines.append(f"  {verb:<10}" + header(config_directory() / f"{verb}.yaml")[0])
    lines.append(f"  {'list':<10}Show the choices of every config group, or of one: modhifi list group=model")
    lines += ["", "Start with:  modhifi prune"]
    lines.append("Then:        modhifi prune model=resnet50 data=folder data.path=IMAGES")
    return "\n".join(lines)


def for_network(verb: str, overrides: Sequence[str]) -> list[str]:
    """Overrides in which presets mean what they are for the network at hand.

    A preset NAME whose file NAME_language.yaml lies beside it is that file for a language model: the same recipe says
    other steps there (the paper scores neurons otherwise than channels).

    Args:
        verb: Name of a verb.
        overrides: `key=value` strings.

    Returns:
        The same with ``preset=NAME`` replaced, if all networks named read text.
    """
    words = list(overrides)
    named = [word.partition("=")[2] for word in words if word.startswith("model=")]
    if verb != "prune" or not named or not all(_reads_text(name) for name in named[-1].split(",")):
        return words
    if not any(word.startswith("preset=") for word in words):
        default = re.search(r"^  - preset: (\w+)", (config_directory() / "prune.yaml").read_text("utf-8"), re.M)
        if default and _of_language(default[1]) != default[1]:
            words.append(f"preset={default[1]}")
    chosen = ((word, word.partition("=")) for word in words)
    return [
        f"preset={','.join(_of_language(name) for name in value.split(','))}" if key == "preset" else word
        for word, (key, _, value) in chosen
    ]


def _of_language(preset: str) -> str:
    own = f"{preset}_language"
    return own if (config_directory() / "preset" / f"{own}.yaml").is_file() else preset


def _reads_text(model: str) -> bool:
    path = config_directory() / "model" / f"{model}.yaml"
    return path.is_file() and "_target_: modhifi_cli.models.hf." in path.read_text(encoding="utf-8")


def compose(verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Checked plain settings of a verb, without running anything.

    Args:
        verb: Name of a YAML in the config folder.
        overrides: `key=value` strings in Hydra's grammar.

    Returns:
        Nested plain values, as `settings` returns them.

    Raises:
        ConfigError: If anything is unknown, missing, of the wrong type or out of range.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    overrides = for_network(verb, overrides)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3", job_name="modhifi"):
        try:
            composed = hydra.compose(verb, spelled(verb, overrides), return_hydra_config=True)
        except Exception as error:
            raise explain(error, verb, overrides) from error
        HydraConfig.instance().set_config(composed)
        from omegaconf import open_dict

        with open_dict(composed):
            del composed["hydra"]
        return settings(verb, composed)


def steps(verb: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """As `compose`, for whoever calls from Python: a Hydra application around the caller is left as it was.

    Args:
        verb: Name of a verb.
        overrides: `key=value` strings, such as ``preset=paper``.

    Raises:
        ConfigError: If anything is unknown, of the wrong type or out of range.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    around = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    try:
        return compose(verb, overrides)
    finally:  # asked for again: Hydra has put another object in the place of the first
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = around


def spelled(verb: str, overrides: Sequence[str], *, for_people: bool = False) -> list[str]:
    """Overrides with the group's own name where the verb has another for people (or the other way round)."""
    known = _SPELLINGS.get(verb, {})
    known = {ours: theirs for theirs, ours in known.items()} if for_people else known
    parts = [word.partition("=") for word in overrides]
    return [f"{known.get(key, key)}{equals}{value}" for key, equals, value in parts]


def run_hydra(verb: str, overrides: Sequence[str], job: Callable[[Any], None]) -> None:
    """Give the rest of the command line to Hydra, which composes the settings and calls `job` with them.

    Args:
        verb: Name of the verb's YAML.
        overrides: Everything after the verb: overrides and Hydra's own flags (``-m``, ``--cfg job``, ``--info``).
        job: A function of a module (a parallel launcher pickles it), called once per job with Hydra's config object.

    Raises:
        ConfigError: Instead of Hydra's own errors.
    """
    import os
    import sys

    import hydra

    overrides = for_network(verb, overrides)
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["modhifi", *spelled(verb, overrides)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints a text of its own and exits 1 before we can explain
    try:
        hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=verb)(job)()
    except Exception as error:
        if not _is_hydra_error(error):
            raise
        raise explain(error, verb, overrides) from error
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def job_facts() -> dict[str, Any]:
    """Where a job stands, from Hydra: ``verb``, ``overrides`` (its own), ``sweep`` (the sweep's folder or None),
    ``swept`` (those of its overrides in which it differs from other jobs), ``number`` in the sweep, ``parallel``
    (whether jobs run side by side)."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    known = HydraConfig.get()
    sweeping = known.mode == RunMode.MULTIRUN
    return {
        "verb": known.job.config_name,
        "overrides": [text for text in known.overrides.task],
        "sweep": str(known.sweep.dir) if sweeping else None,
        "swept": _swept(known) if sweeping else [],
        "number": int(known.job.num) if sweeping else 0,
        "parallel": sweeping and known.runtime.choices.get("hydra/launcher", "basic") != "basic",
    }


def _swept(known: Any) -> list[str]:
    """The overrides of a sweep's job that the sweep does not give all its jobs: a range, a list, an experiment's."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    own = list(known.overrides.task)
    written = Path(known.sweep.dir) / "multirun.yaml"
    if not written.is_file():  # written by the sweeper before the first job; the name is only less telling without it
        return []
    asked = OverridesParser.create().parse_overrides(list(OmegaConf.load(written).hydra.overrides.task))
    fixed = {override.get_key_element() for override in asked if not override.is_sweep_override()}
    return [word for word in own if word.partition("=")[0] not in fixed]


def settings(verb: str, composed: Any) -> dict[str, Any]:
    """Plain, checked values from a composed config.

    Args:
        verb: The verb, for messages and the keys it knows.
        composed: Hydra's config object of the job.

    Returns:
        Nested dictionaries, lists, strings, numbers and None. A group that was left out (``evaluation=[]``) is an empty
        dictionary; `evaluation_data` is None where there is none.

    Raises:
        ConfigError: One sentence about the first thing that is wrong.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"modhifi {verb}: {', '.join(missing)} must be given, e.g. {_example(missing[0])}.")
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"modhifi {verb}: {_first_line(error)}") from error
    assert isinstance(plain, dict)
    known = _top_level_keys(verb)
    for key in list(plain):
        if key not in known and _of_an_experiment(key):
            del plain[key]  # what an experiment says to another verb, as methods= to compare
        elif key not in known:
            raise ConfigError(f"modhifi {verb} has no key '{key}': {nearest(key, known)}")
    for key, (default, _) in _read_verb(config_directory() / f"{verb}.yaml")[0].items():
        if default == "???" and _select(plain, key) is None:
            raise ConfigError(f"modhifi {verb}: {key} must be given, e.g. {_example(key)}.")
    for absent in ("evaluation", "export"):
        if absent in known:
            plain[absent] = plain.get(absent) or {}
    for key in ("preset", "experiment"):
        plain.pop(key, None)
    if "evaluation_data" in known:
        plain.setdefault("evaluation_data", None)  # evaluation_data=none leaves nothing behind
    if "audit" in known:
        plain["audit"] = plain.get("audit") or None  # audit=none leaves an empty mapping
    _resolve_auto_data(plain, makes_data=verb in _MAKES_DATA)
    _resolve_mixed_data(plain)
    _resolve_compared_sources(plain)
    _resolve_sparsity(plain)
    for key, (expected, fits) in _NUMBERS.items():
        value = _select(plain, key)
        if value is not _ABSENT and not fits(value):
            raise ConfigError(f"{key} must be {expected}; got {value!r}.")
    _check_targets(plain)
    return plain


def build(node: Mapping[str, Any], **given: Any) -> Any:
    """The object or function that a node's `_target_` names, with the node's keys as arguments.

    Args:
        node: A plain mapping with ``_target_`` and perhaps ``_partial_: true``.
        given: Further arguments.

    Returns:
        The target's result, or with ``_partial_`` a function that still takes the arguments given later.
    """
    target = _locate(str(node["_target_"]), "")
    arguments = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")} | given
    return functools.partial(target, **arguments) if node.get("_partial_") else target(**arguments)


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings in which two runs differ, as ``"sparsity (0.4 here, 0.5 there)"``, sorted by key.

    A whole choice that one side has not made is named once, without its keys.
    """
    found: list[str] = []
    for key in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(key, _ABSENT), theirs.get(key, _ABSENT)
        if here == there or key == "_partial_":
            continue
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            found += differences(here, there, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key} ({_told(here)} here, {_told(there)} there)")
    return found


def to_yaml(plain: Mapping[str, Any]) -> str:
    """Plain settings as YAML text."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dict(plain)))


def from_yaml(text: str) -> dict[str, Any]:
    """Plain settings from YAML text.

    Raises:
        ConfigError: If the text is no YAML mapping.
    """
    from omegaconf import OmegaConf

    try:
        plain = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:
        raise ConfigError(f"not a readable YAML mapping: {_first_line(error)}") from error
    if not isinstance(plain, dict):
        raise ConfigError("not a YAML mapping.")
    return _at_present(plain)


def _at_present(node: Any) -> Any:
    """The same settings with every `_target_` of an earlier version by its present name."""
    if isinstance(node, list):
        return [_at_present(one) for one in node]
    if not isinstance(node, Mapping):
        return node
    plain = {key: _at_present(value) for key, value in node.items()}
    name = plain.get("_target_")
    if isinstance(name, str) and name.startswith(PACKAGE):
        old = next((place for place in _MOVED if f"{name}.".startswith(f"{PACKAGE}{place}.")), None)
        if old is not None:
            plain["_target_"] = f"{PACKAGE}{_MOVED[old]}{name.removeprefix(PACKAGE + old)}"
    return plain


def spell(key: str, value: Any) -> str:
    """A setting as a word of the command line, ``data.path="my images"``, in Hydra's grammar."""

    def told(value: Any) -> str:
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{name}: {told(one)}" for name, one in value.items()) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(told(one) for one in value) + "]"
        if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9_./:-]+", value):
            return json.dumps(value, ensure_ascii=False)
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    return f"{key}={told(value)}"


def slug(overrides: Iterable[str], *, leading: Collection[str] = (), limit: int = 80) -> str:
    """A folder name from overrides, always the same for the same overrides: ``model-resnet50_sparsity-0.4``.

    Those of `leading` come first, so that a name that must be cut still says what tells it from its neighbours.

    Hydra's grammar cannot take a bare ``=``, comma, bracket or space in a value, and the name will be a value
    (``verify run=DIR``), so none of them is in it. A long or altered name ends in a hash so that two do not meet.
    """
    import hashlib

    texts = sorted(overrides, key=lambda text: (text not in leading, text))
    readable = "_".join(re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-._") for text in texts) or "default"
    exact = "_".join(text.replace("=", "-", 1) for text in texts) or "default"
    if readable == exact and len(readable) <= limit:
        return readable
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8]
    if len(readable) > limit:  # cut between overrides: half a value (0.2 of 0.25) would say something else
        readable = readable[: limit + 1].rpartition("_")[0] or readable[:limit]
    return f"{readable.rstrip('-._')}_{digest}"


def explain(error: Exception, verb: str, overrides: Sequence[str]) -> Exception:
    """One sentence of ours in place of an error of Hydra or OmegaConf; other errors are returned as they are."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException

    if not _is_hydra_error(error):
        return error
    text = str(error)
    if text.startswith(_NO_CHOICE):
        return ConfigError(
            f"modhifi {verb}: a group takes the name of one of its choices (modhifi list group=NAME), not null or a number; "
            "leave it out for the default."
        )
    if isinstance(error, OverrideParseException):
        written = getattr(error, "override", "") or ""
        return ConfigError(
            f"cannot read '{written}': settings are written key=value; put quotes around values that hold spaces, "
            "commas, brackets or = , such as 'data.path=\"my images\"'."
        )
    absent = error if isinstance(error, MissingConfigException) else error.__cause__
    if isinstance(absent, MissingConfigException) and absent.missing_cfg_file:
        group, _, choice = str(absent.missing_cfg_file).rpartition("/")
        known = groups().get(group, ())
        hint = nearest(choice, known) if known else "the group is empty."
        (told,) = spelled(verb, [f"{group}={choice}"], for_people=True)
        return ConfigError(f"{told}: there is no such choice; {hint}")
    unknown = re.search(r"Could not override '([^']+)'|Could not append to config.*?'([^']+)'", text)
    if unknown:
        key = (unknown.group(1) or unknown.group(2)).split("@")[0]
        group, _, leaf = key.partition(".")
        if leaf == "path" and group in ("data", "evaluation_data"):
            return ConfigError(
                f"{key}: choose the kind of source too, e.g. {group}=folder {key}=FOLDER, or {group}=arrays."
            )
        known = _known_keys(verb, overrides)
        choice = leaf.partition(".")[0]
        if group in ("evaluation", "export") and choice in groups().get(group, ()):
            return ConfigError(
                f"{key} needs the choice {choice}, which is not made here; make it with {group}=[…,{choice}], or leave "
                "the key out."
            )
        theirs = [other for other in verbs() if other != verb and group in _top_level_keys(other)]
        if theirs and group not in _top_level_keys(verb):
            whose = " and ".join(f"modhifi {other}" for other in theirs)
            near = nearest(key, _top_level_keys(verb))
            near = f": {near}" if near.startswith("did you mean") else ""
            return ConfigError(f"modhifi {verb} has no key '{key}', which is for {whose}{near} (modhifi {verb} --help)")
        near = nearest(key, known)
        return ConfigError(f"modhifi {verb} has no key '{key}': {near} (modhifi {verb} --help)")
    if isinstance(error, HydraException) and "Ambiguous value" in text:
        return ConfigError(
            f"{_first_line(error)}: a value with commas is a sweep and needs -m, or brackets for a list."
        )
    return ConfigError(f"modhifi {verb}: {_first_line(error)}")


_ABSENT = object()
_NO_CHOICE = "Config group override must be"  # how Hydra begins to say that a group was given null or a number

_PLACEHOLDERS: Mapping[str, str] = {"run": "DIR", "forget_class": "3", "path": "PATH", "weights": "FILE", "name": "NAME"}


def _example(key: str) -> str:
    """A key with a word for its value, ``data.path=PATH``."""
    return f"{key}={_PLACEHOLDERS.get(key.rpartition('.')[2], 'VALUE')}"


def _told(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    return "given" if isinstance(value, Mapping) else repr(value)


def _is_number(value: Any) -> bool:
    return is_number(value) and value == value


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and value != "" or _is_names(value) and len(value) > 0


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_hydra_error(error: Exception) -> bool:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, ValueError) and str(error).startswith(_NO_CHOICE):
        return True
    return isinstance(error, (HydraException, OmegaConfBaseException))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _select(plain: Mapping[str, Any], key: str) -> Any:
    value: Any = plain
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _flatten(plain: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in plain.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_verb(path: Path) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Own keys of a verb's YAML (value and comment) and its groups with their defaults, read as text: fast help."""
    own: dict[str, tuple[str, str]] = {}
    chosen: dict[str, str] = {}
    section = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = re.match(r"  - (?:override )?(\w+): (.+)$", line)
        key = re.match(r"(\w+):\s*([^#]*?)\s*(?:#\s*(.*))?$", line)
        nested = re.match(r"  (\w+):\s*([^#]*?)\s*(?:#\s*(.*))?$", line)
        if section == "defaults" and entry:
            chosen[entry.group(1)] = entry.group(2)
        elif key:
            section = key.group(1)
            if key.group(2):
                own[section] = (key.group(2), key.group(3) or "")
        elif nested and section not in ("defaults", "hydra"):
            own[f"{section}.{nested.group(1)}"] = (nested.group(2), nested.group(3) or "")
    return own, chosen


def _inherited(verb: str) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """As `_read_verb`, with what the YAMLs add that a verb's defaults name (``- base``); the verb's own come first."""
    path = config_directory() / f"{verb}.yaml"
    own, chosen = _read_verb(path)
    for parent in re.findall(r"^  - (\w+)$", path.read_text(encoding="utf-8"), re.M):
        if parent != "_self_":
            theirs, their_choices = _inherited(parent)
            own, chosen = own | {k: v for k, v in theirs.items() if k not in own}, their_choices | chosen
    return own, chosen


@functools.cache
def _top_level_keys(verb: str) -> frozenset[str]:
    own, chosen = _inherited(verb)
    return frozenset(key.split(".")[0] for key in [*own, *chosen])


def _of_an_experiment(key: str) -> bool:
    from hydra.core.hydra_config import HydraConfig

    chosen = HydraConfig.get().runtime.choices.get("experiment") if HydraConfig.initialized() else None
    return chosen is not None and any(key in _top_level_keys(other) for other in verbs())


def _known_keys(verb: str, overrides: Sequence[str]) -> list[str]:
    """Every key of the verb, with the user's choices of groups as far as they compose."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    names = groups()
    spelt = spelled(verb, overrides)
    choices = [text for text in spelt if text.partition("=")[0] in names and "," not in text]
    for attempt in (choices, []):
        try:
            GlobalHydra.instance().clear()
            with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
                plain = OmegaConf.to_container(hydra.compose(verb, attempt))
        except Exception:  # only a hint is lost
            continue
        finally:
            GlobalHydra.instance().clear()
        assert isinstance(plain, dict)
        own = [key for key, _ in _flatten(plain) if not key.rpartition(".")[2].startswith("_")]
        return sorted({*own, *(str(key) for key in plain), *names})
    return sorted(_top_level_keys(verb))


def _resolve_auto_data(plain: dict[str, Any], *, makes_data: bool) -> None:
    """`data: auto` is the embedded network's own digits; a saved run's are its own; for other networks they are made.

    Afterwards a source is a mapping with a `_target_`, or None where there is none, or absent where the run knows it.
    """
    embedded = str(_select(plain, "model._target_")).startswith("modhifi_cli.models.embedded.")
    for key in ("data", "evaluation_data"):
        node = plain.get(key)
        if isinstance(node, dict) and node.pop("auto", False):
            if plain.get("run") is not None:
                del plain[key]
            elif not embedded and key == "data" and makes_data:
                count = node.get("num_samples")
                plain[key] = {
                    "_target_": "modhifi_cli.data.synthetic.load",
                    "_partial_": True,
                    "num_samples": "auto" if count is None else count,
                    **{name: node[name] for name in ("seed", "labels") if name in node},
                }
            elif not embedded:
                plain[key] = None
        elif isinstance(node, dict) and "_target_" not in node or key in plain and node is None:
            plain[key] = None


def _resolve_mixed_data(plain: dict[str, Any]) -> None:
    """Entries ``{name: CHOICE, weight: …, key: value …}`` become ``{name, weight, source: the choice's settings}``."""
    sources = _select(plain, "data.sources")
    if sources is _ABSENT:
        return
    if not isinstance(sources, list) or not sources:
        raise ConfigError(f"data.sources must be a list such as [{{name: procedural, weight: 1}}]; got {sources!r}.")
    choices = [choice for choice in groups()["data"] if choice not in ("auto", "mixed")]
    for number, entry in enumerate(sources):
        name, whole = _listed_source(entry, f"data.sources[{number}]", choices, beside=("weight",))
        sources[number] = {"name": name, "weight": entry.get("weight", 1.0), "source": whole}


def _listed_source(
    entry: Any, path: str, choices: Sequence[str], *, beside: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """Name and settings of the choice of data that an entry ``{name: CHOICE, key: value …}`` of a list names.

    Args:
        entry: The entry.
        path: Where it stands, for messages.
        choices: Names that are allowed.
        beside: Keys of the entry that are not the source's.
    """
    name = entry.get("name") if isinstance(entry, Mapping) else None
    if name not in choices:
        raise ConfigError(f"{path}.name: there is no such choice; {nearest(str(name), choices)}")
    file = config_directory() / "data" / f"{name}.yaml"
    own = {key: value for key, value in entry.items() if key not in ("name", *beside)}
    whole = from_yaml(file.read_text(encoding="utf-8")) | own
    missing = next((key for key, value in whole.items() if value == "???"), None)
    if missing is not None:
        raise ConfigError(f"{path}.{missing} must be given: {name} needs it.")
    return name, whole


def _resolve_compared_sources(plain: dict[str, Any]) -> None:
    """Entries ``{name: CHOICE, title: …, key: value …}`` of a comparison become ``{name, title, source: settings}``.

    What the comparison calibrates on where it needs any data is then the first of them.
    """
    listed = plain.get("sources")
    if listed is None:
        return
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"sources must be a list such as [{{name: folder, path: IMAGES}}]; got {listed!r}.")
    titles: set[str] = set()
    for number, entry in enumerate(listed):
        name, whole = _listed_source(entry, f"sources[{number}]", groups()["data"], beside=_OF_A_ROW)
        if "seed" in entry:
            raise ConfigError(
                f"sources[{number}].seed: a comparison draws every source with seeds=[0,1,2]; leave it out."
            )
        own = {"model": plain["model"], "data": whole}
        _resolve_auto_data(own, makes_data=True)
        _resolve_mixed_data(own)
        count = own["data"].get("num_samples")
        title = str(entry.get("title") or (name if count in (None, "auto") else f"{name} {count}"))
        if title in titles:
            raise ConfigError(f"sources[{number}]: two sources are called '{title}'; give one of them another title.")
        titles.add(title)
        words = [f"data={name}", *(spell(f"data.{key}", value) for key, value in entry.items() if key not in _OF_A_ROW)]
        listed[number] = {"title": title, "source": own["data"], "words": words}
    plain["data"] = copy.deepcopy(listed[0]["source"])


def _resolve_sparsity(plain: dict[str, Any]) -> None:
    """`sparsity: auto` is 0.4, or nothing where the share is what the run shall find; then it may not be given.

    Afterwards a share that has to be found is None.
    """
    if _select(plain, "target.name") != "max_drop":
        if plain.get("sparsity") == "auto":
            plain["sparsity"] = _SPARSITY
        elif "sparsity" in plain and plain["sparsity"] is None:
            raise ConfigError(
                f"sparsity must be given with target={_select(plain, 'target.name')}: the share that is removed, "
                "0 <= sparsity < 1; only target=max_drop finds it itself."
            )
        return
    if plain.get("sparsity") not in ("auto", None):
        raise ConfigError(
            f"sparsity={plain['sparsity']} makes no sense with target=max_drop, which finds the share itself; leave it "
            "out, or choose target=params, flops, components or latency."
        )
    plain["sparsity"] = _SEARCHED


def _check_targets(plain: Any, path: str = "") -> None:
    """Every `_target_` lies in this package, exists, and takes the arguments that the YAML gives it."""
    if isinstance(plain, list):
        for index, value in enumerate(plain):
            _check_targets(value, f"{path}[{index}]")
    if not isinstance(plain, Mapping):
        return
    for key, value in plain.items():
        _check_targets(value, f"{path}.{key}" if path else str(key))
    if "_target_" not in plain:
        return
    target = _locate(str(plain["_target_"]), path)
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


def _locate(name: str, path: str) -> Callable[..., Any]:
    """The function or class that a `_target_` names; only targets of this package are accepted."""
    where = f"{path}._target_" if path else "_target_"
    if not name.startswith(PACKAGE):
        raise ConfigError(f"{where} must lie under {PACKAGE[:-1]}; got '{name}'.")
    module_name, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not str(error.name or "").startswith(PACKAGE[:-1]):
            raise  # a missing library is not a misspelt target
        raise ConfigError(f"{where} names '{name}', which does not exist.") from error
    if not callable(found):
        raise ConfigError(f"{where} names '{name}', which cannot be called.")
    return found
