"""YAML files and `key=value` overrides become plain, checked values; the only file that starts Hydra.

Everything that can be known to be wrong before any work is found here: unknown keys and choices, missing values, wrong
types and ranges. Hydra is imported inside functions so that help answers at once.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modhifi_cli.errors import ConfigError, first_line, nearest
from modhifi_cli.settings.checks import check_numbers, check_serving
from modhifi_cli.settings.explain import explain, is_hydra_error
from modhifi_cli.settings.heard import check_heard, check_numbers_fit, check_words, refuse_unsaid_code
from modhifi_cli.settings.resolve import (
    resolve_auto_data,
    resolve_compared_sources,
    resolve_mixed_data,
    resolve_sparsity,
    resolve_target,
)
from modhifi_cli.settings.targets import check_targets
from modhifi_cli.settings.words import as_plain_words, example, select, spelled
from modhifi_cli.settings.yamls import (
    config_directory,
    groups,
    read_verb,
    top_level_keys,
    verbs,
)

# Verbs that make calibration data where none are given.
_MAKES_DATA = ("prune", "unlearn", "compare", "study", "synthesize")


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
    if verb != "prune":
        return words
    named = _choices(words, "model") or [name for choice in _choices(words, "experiment") for name in _models_of(choice)]
    if not named or not all(_reads_text(name, words) for name in named):
        return words
    if not any(word.startswith("preset=") for word in words):
        default = re.search(r"^  - preset: (\w+)", (config_directory() / "prune.yaml").read_text("utf-8"), re.M)
        if default and _of_language(default[1]) != default[1]:
            words.append(f"preset={default[1]}")
    chosen = ((word, word.partition("=")) for word in words)
    return [
        "preset=" + re.sub(r"\w+", lambda name: _of_language(name[0]), value) if key == "preset" else word
        for word, (key, _, value) in chosen
    ]


def preset_names() -> tuple[str, ...]:
    """Every name that ``preset=`` takes, for one kind of network or the other."""
    listed = groups()["preset"]
    return tuple(dict.fromkeys((*listed, *(name.removesuffix("_language") for name in listed))))


def _choices(words: Sequence[str], group: str) -> list[str]:
    """The choices of a group that the last word for it names, several in a sweep."""
    said = [word.partition("=")[2] for word in words if word.startswith(f"{group}=")]
    return said[-1].split(",") if said else []


def _models_of(experiment: str) -> list[str]:
    path = config_directory() / "experiment" / f"{experiment}.yaml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return re.findall(r"^  - override /model: (\w+)", text, re.M)


def _of_language(preset: str) -> str:
    own = f"{preset}_language"
    return own if (config_directory() / "preset" / f"{own}.yaml").is_file() else preset


def _reads_text(model: str, words: Sequence[str]) -> bool:
    if model == "run":  # then the run says what its network reads
        run = next((word.partition("=")[2].strip("'\"") for word in words if word.startswith("model.run=")), "")
        said = next((path for path in Path(run).glob("**/architecture.json")), None) if run else None
        return said is not None and '"reads": "text"' in said.read_text(encoding="utf-8")
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

    check_words(verb, overrides)
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


def launcher(verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What Hydra's launcher of a sweep is set to; its ``_target_`` says which one it is.

    Args:
        verb: Of the sweep.
        overrides: All of its overrides; only those of the launcher are looked at.

    Raises:
        ConfigError: If the launcher is unknown or has no such key.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    own = [word for word in overrides if word.startswith(("hydra/launcher=", "hydra.launcher."))]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3", job_name="modhifi"):
        try:
            composed = hydra.compose(verb, own, return_hydra_config=True)
        except Exception as error:
            raise explain(error, verb, own) from error
    launcher = OmegaConf.to_container(composed.hydra.launcher, resolve=False)
    assert isinstance(launcher, dict)  # a launcher's YAML is a mapping
    return {str(key): value for key, value in launcher.items()}


def run_hydra(verb: str, overrides: Sequence[str], job: Callable[[Any], Any]) -> None:
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
    if "hydra/sweeper=search" in overrides:
        _quiet_search()
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["modhifi", *spelled(verb, overrides)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints a text of its own and exits 1 before we can explain
    try:
        hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=verb)(job)()
    except Exception as error:
        if not is_hydra_error(error):
            raise
        raise explain(error, verb, overrides) from error
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _quiet_search() -> None:
    """The library behind the search tells of every study on standard error; what it finds is told by us."""
    import importlib.util

    if importlib.util.find_spec("optuna") is not None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)


def job_facts() -> dict[str, Any]:
    """Where a job stands, from Hydra.

    ``verb``, ``overrides`` (its own), ``sweep`` (the sweep's folder or None), ``swept`` (those of its overrides in which
    it differs from other jobs), ``number`` in the sweep, ``parallel`` (whether jobs run side by side).
    """
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

    try:
        if verb == "info" and "model.weights" in OmegaConf.missing_keys(composed):
            composed.model.weights = "random"  # shapes are all that it looks at
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"modhifi {verb}: {', '.join(missing)} must be given, e.g. {example(missing[0])}.")
        plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"modhifi {verb}: {first_line(error)}") from error
    assert isinstance(plain, dict)
    words = _said()
    trust = _taken_trust_(plain)
    known = top_level_keys(verb)
    for key in list(plain):
        if key not in known and _of_an_experiment(key):
            del plain[key]  # what an experiment says to another verb, as methods= to compare
        elif key not in known:
            raise ConfigError(f"modhifi {verb} has no key '{key}': {nearest(key, known)}")
    for key in ("preset", "experiment"):
        if plain.pop(key, None):
            raise ConfigError(f"{key}: keys cannot be put into a {key}; give them to the verb itself.")
    check_heard(verb, plain, words)
    for key, (default, _) in read_verb(config_directory() / f"{verb}.yaml")[0].items():
        if default == "???" and select(plain, key) is None:
            raise ConfigError(f"modhifi {verb}: {key} must be given, e.g. {example(key)}.")
    for absent in ("evaluation", "export"):
        if absent in known:
            plain[absent] = plain.get(absent) or {}
    if "evaluation_data" in known:
        plain.setdefault("evaluation_data", None)  # evaluation_data=none leaves nothing behind
    # audit=none and the like leave an empty mapping, or what an experiment's file has put there; runs from before there
    # was any have none.
    for optional in ("audit", "healing", "tracker"):
        if not _is_made(plain.get(optional) or {}):
            plain.pop(optional, None)
    if "audit" in known:
        plain.setdefault("audit", None)
    resolve_auto_data(plain, makes_data=verb in _MAKES_DATA)
    resolve_mixed_data(plain)
    resolve_compared_sources(plain)
    if "target" in known:
        resolve_target(plain)
        resolve_sparsity(plain)
    check_numbers(plain)
    check_numbers_fit(plain)
    refuse_unsaid_code(plain, words, foreign=_foreign(), trust=trust)
    check_targets(plain, allow={word for word in as_plain_words(words) if ":" in word})
    check_serving(plain)
    if "unverified" in known:
        plain["trust"] = trust
    return plain


def _taken_trust_(plain: dict[str, Any]) -> bool:
    """What ``model.trust`` says; it is a word about a run folder and no setting of a network."""
    model = plain.get("model")
    if not isinstance(model, dict) or "trust" not in model:
        return False
    trust = model.pop("trust")
    if not isinstance(trust, bool):
        raise ConfigError(f"model.trust must be true or false; got {trust!r:.60}.")
    if not model:
        del plain["model"]
    return trust


def _is_made(group: Mapping[str, Any]) -> bool:
    """Whether a choice of an optional group was composed: it names what is built, itself or in its parts."""
    return "_target_" in group or any("_target_" in part for part in group.values() if isinstance(part, Mapping))


def _said() -> list[str]:
    """The overrides of this job."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _foreign() -> bool:
    """Whether YAMLs of another folder than the project's take part (``--config-dir``, ``hydra.searchpath``)."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return False
    sources = HydraConfig.get().runtime.config_sources
    return any(one.schema == "file" and Path(one.path) != config_directory() for one in sources)


def _of_an_experiment(key: str) -> bool:
    from hydra.core.hydra_config import HydraConfig

    chosen = HydraConfig.get().runtime.choices.get("experiment") if HydraConfig.initialized() else None
    return chosen is not None and any(key in top_level_keys(other) for other in verbs())
