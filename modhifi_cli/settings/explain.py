"""One sentence of ours in place of the errors of Hydra and OmegaConf."""

import re
import traceback
from collections.abc import Sequence
from typing import Any

from modhifi_cli.errors import ConfigError, first_line, nearest, package_missing
from modhifi_cli.settings.words import flatten, spelled
from modhifi_cli.settings.yamls import config_directory, groups, top_level_keys, verbs

# What our own launchers and sweeper build on, by the name that plugins give it, and the package of each.
_PLUGINS = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "submitit_slurm": "hydra_plugins.hydra_submitit_launcher",
    "optuna": "hydra_plugins.hydra_optuna_sweeper",
}
_COMPOSERS = ("hydra", "omegaconf", "antlr4", "yaml")
_NAMES = re.compile(r"[^=]+=\[?[A-Za-z_][\w/,. -]*\]?")  # one name, or a list of names
_NO_CHOICE = "Config group override must be"  # how Hydra begins to say that a group was given null or a number


def explain(error: Exception, verb: str, overrides: Sequence[str]) -> Exception:
    """One sentence of ours in place of an error of Hydra or OmegaConf; other errors are returned as they are."""
    from hydra.errors import (
        HydraException,
        MissingConfigException,
        OverrideParseException,
    )
    from omegaconf.errors import OmegaConfBaseException

    if not is_hydra_error(error):
        return error
    text = str(error)
    if text.startswith(_NO_CHOICE) or not isinstance(error, (HydraException, OmegaConfBaseException)):
        return _inside_hydra(error, verb, overrides)
    if isinstance(error, OverrideParseException):
        written = getattr(error, "override", "") or ""
        return ConfigError(
            f"cannot read '{written}': settings are written key=value; put quotes around values that hold spaces, "
            "commas, brackets or = , such as 'data.path=\"my images\"'."
        )
    absent = error if isinstance(error, MissingConfigException) else error.__cause__
    if isinstance(absent, MissingConfigException) and absent.missing_cfg_file:
        group, _, choice = str(absent.missing_cfg_file).rpartition("/")
        if group in ("hydra/launcher", "hydra/sweeper") and choice in _PLUGINS:
            return package_missing(f"this {group}", _PLUGINS[choice])
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
        keys = _known_keys(verb, overrides)
        choice = leaf.partition(".")[0]
        made = any(known.startswith(f"{group}.{choice}.") for known in keys)
        if group in ("evaluation", "export") and choice in groups().get(group, ()) and not made:
            return ConfigError(
                f"{key} needs the choice {choice}, which is not made here; make it with {group}=[…,{choice}], or leave "
                "the key out."
            )
        theirs = [other for other in verbs() if other != verb and group in top_level_keys(other)]
        if theirs and group not in top_level_keys(verb):
            whose = " and ".join(f"modhifi {other}" for other in theirs)
            near = nearest(key, top_level_keys(verb))
            near = f": {near}" if near.startswith("did you mean") else ""
            return ConfigError(f"modhifi {verb} has no key '{key}', which is for {whose}{near} (modhifi {verb} --help)")
        near = nearest(key, keys)
        return ConfigError(f"modhifi {verb} has no key '{key}': {near} (modhifi {verb} --help)")
    if isinstance(error, HydraException) and "Ambiguous value" in text:
        return ConfigError(f"{first_line(error)}: a value with commas is a sweep and needs -m, or brackets for a list.")
    return ConfigError(f"modhifi {verb}: {first_line(error)}")


def is_hydra_error(error: Exception) -> bool:
    """Whether an error comes from Hydra or OmegaConf: one of their kinds, or any other that a value broke inside them."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return True
    if isinstance(error, (ImportError, OSError, MemoryError)):  # a missing launcher or a full disk is no value's doing
        return False
    passed = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    # Composing calls nothing of ours; a job is called from in there, and its errors are its own.
    ours = [at for at, name in enumerate(passed) if name.partition(".")[0] == "modhifi_cli"]
    below = passed[ours[-1] + 1 :] if ours else passed
    return bool(below) and below[0].partition(".")[0] in _COMPOSERS


def _inside_hydra(error: Exception, verb: str, overrides: Sequence[str]) -> ConfigError:
    """What to say where a value broke Hydra: the groups that were given something else than names, or all words."""
    names = groups()
    odd = [word for word in overrides if word.lstrip("+").partition("=")[0] in names and not _NAMES.fullmatch(word)]
    if odd or str(error).startswith(_NO_CHOICE):
        told = f"{', '.join(spelled(verb, odd, for_people=True))}: " if odd else ""
        return ConfigError(
            f"modhifi {verb}: {told}a group takes the name of one of its choices (modhifi list group=NAME), not null, a "
            "number or a nested list; leave it out for the default."
        )
    return ConfigError(
        f"modhifi {verb}: these settings cannot be put together ({type(error).__name__}: {first_line(error):.100}): "
        f"{' '.join(overrides):.300}; write each as key=value and leave out what is not needed."
    )


def _known_keys(verb: str, overrides: Sequence[str]) -> list[str]:
    """Every key of the verb, with the user's choices of groups as far as they compose."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    names = groups()
    spelt = spelled(verb, overrides)
    # A value with commas outside of brackets is a sweep, of which no single choice can be composed.
    choices = [text for text in spelt if text.partition("=")[0] in names and not re.search(r",(?![^\[]*\])", text)]
    for attempt in (choices, []):
        try:
            GlobalHydra.instance().clear()
            with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
                plain: Any = OmegaConf.to_container(hydra.compose(verb, attempt))
        except Exception:  # only a hint is lost
            continue
        finally:
            GlobalHydra.instance().clear()
        assert isinstance(plain, dict)
        own = [key for key, _ in flatten(plain) if not key.rpartition(".")[2].startswith("_")]
        return sorted({*own, *(str(key) for key in plain), *names})
    return sorted(top_level_keys(verb))
