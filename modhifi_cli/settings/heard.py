"""Words of the command line that a verb would take and not heed, or could not do without: refused before any work."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modhifi_cli.errors import ConfigError, is_number, nearest
from modhifi_cli.settings.foreign import CODE_KEYS
from modhifi_cli.settings.words import as_plain_words
from modhifi_cli.settings.yamls import config_directory, groups, inherited, read_verb

# Groups that may be left out, by `~group` too, beside those that have a choice `none`.
_MAY_BE_ABSENT = ("evaluation", "evaluation_data", "export", "outside", "preset", "experiment")
# What of Hydra's own settings has an effect here; folders, logs and names are this project's work.
_OF_HYDRA = ("hydra/launcher", "hydra.launcher.", "hydra/sweeper", "hydra.sweeper.", "hydra.searchpath")
_LARGEST_WHOLE = 2**63
_LARGEST_YAML = 2**20  # bytes


def check_words(verb: str, words: Sequence[str]) -> None:
    """Refuse overrides that have no effect, or take away what the verb needs.

    Args:
        verb: The verb.
        words: Overrides of the command line.

    Raises:
        ConfigError: About the first.
    """
    for word in words:
        key = word.lstrip("+~").partition("=")[0].partition("@")[0]
        if key.startswith("hydra") and not key.startswith(_OF_HYDRA):
            raise ConfigError(
                f"{key} has no effect: modhifi names folders and logs itself; give output_dir=FOLDER for another place."
            )
        if word.startswith("~") and not _may_go(verb, key):
            raise ConfigError(
                f"~{key}: modhifi {verb} needs {key} and cannot do without; leave it as it is or give it another value."
            )


def _may_go(verb: str, key: str) -> bool:
    group, _, rest = key.partition(".")
    if rest.endswith("_target_"):
        return False
    if _may_be_absent(group):
        return True
    # A key of a `_target_` that has a default in the code may go; binding says if it has none.
    own, _ = inherited(verb)
    plain = any(name.startswith(f"{group}.") for name in own) or "_target_" not in _keys_of(group)
    return bool(rest) and not plain and rest not in _without_target(group)


def _without_target(group: str) -> set[str]:
    """Keys of the choices of a group that name another one, such as ``target: auto``: they are read before all else."""
    files = (read_verb(path)[0] for path in (config_directory() / group).glob("*.yaml"))
    return {name for own in files if "_target_" not in own for name in own}


def _may_be_absent(group: str) -> bool:
    nothing = config_directory() / group / "none.yaml"  # compensation=none is something: a class that does nothing
    return group in _MAY_BE_ABSENT or nothing.is_file() and "_target_:" not in nothing.read_text(encoding="utf-8")


def check_heard(verb: str, plain: Mapping[str, Any], words: Sequence[str]) -> None:
    """Refuse keys that nobody reads.

    Args:
        verb: The verb.
        plain: Its settings as they were composed, before short ones are resolved.
        words: Overrides of the command line.

    Raises:
        ConfigError: About the first.
    """
    own, chosen = inherited(verb)
    gone = next((one for one in chosen if plain.get(one) is None and one != "data" and not _may_be_absent(one)), None)
    if gone is not None:
        raise ConfigError(f"{gone} must be given: modhifi {verb} cannot do without (modhifi list group={gone}).")
    for group, node in plain.items():
        if not isinstance(node, Mapping):
            if node is not None and group in chosen and group not in ("preset", "experiment"):
                raise ConfigError(
                    f"{group}={node!r:.60} is no choice; give the name of one (modhifi list group={group}), or leave it out."
                )
            continue
        if group in ("evaluation", "export"):
            strange = next((name for name, one in node.items() if not isinstance(one, Mapping) or "_target_" not in one), None)
            if strange is not None:
                raise ConfigError(f"{group} has no choice '{strange}': {nearest(str(strange), groups().get(group, ()))}")
        elif "_target_" not in node or node.get("auto"):
            known = _keys_of(group) | {name.partition(".")[2] for name in own if name.startswith(f"{group}.")}
            strange = next((name for name in node if name not in known), None)
            if strange is not None:
                raise ConfigError(f"modhifi {verb} has no key '{group}.{strange}': {nearest(str(strange), known)}")
    if verb == "evaluate" and plain.get("run") is not None:
        vain = next((word for word in words if _of_model(word)), None)
        if vain is not None:
            raise ConfigError(f"{vain}: evaluate run=DIR measures the run's own network; leave model out, or run.")


def _of_model(word: str) -> bool:
    key = word.lstrip("+~").partition("=")[0]
    return (key == "model" or key.startswith("model.")) and key != "model.trust"


def check_numbers_fit(value: Any, path: str = "") -> None:
    """Refuse numbers beyond 64 bits, infinities and NaN anywhere.

    Raises:
        ConfigError: About the first.
    """
    if isinstance(value, Mapping):
        for key, one in value.items():
            check_numbers_fit(one, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for number, one in enumerate(value):
            check_numbers_fit(one, f"{path}[{number}]")
    elif is_number(value) and not abs(value) < _LARGEST_WHOLE:
        raise ConfigError(f"{path} must be a number below 2**63; got {value!r:.40}.")


def refuse_unsaid_code(plain: Mapping[str, Any], words: Sequence[str], *, foreign: bool, trust: bool) -> None:
    """Refuse code that only a YAML of another folder (``--config-dir``) names, and not the command line.

    Args:
        plain: Settings.
        words: Overrides of the command line.
        foreign: Whether other YAMLs than the project's take part.
        trust: Whether the command line said ``model.trust=true``.

    Raises:
        ConfigError: About the first.
    """
    if not foreign or trust:
        return
    said = as_plain_words(words)
    for path, value in _code_in(plain, ""):
        if str(value) not in said and not (value is True and any(path in word for word in words)):
            raise ConfigError(
                f"{path}={value} lets code of others run, and only a YAML of another folder says it; if you know it, say it "
                f"on the command line: {path}={value}."
            )


def _code_in(node: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        found = [
            (f"{path}.{key}" if path else str(key), value)
            for key, value in node.items()
            if value and (key in CODE_KEYS and isinstance(value, str) or key == "trust_remote_code")
        ]
        return found + [one for key, value in node.items() for one in _code_in(value, f"{path}.{key}" if path else str(key))]
    if isinstance(node, list):
        return [one for number, value in enumerate(node) for one in _code_in(value, f"{path}[{number}]")]
    return []


def check_foreign_folder(folder: str) -> None:
    """Look at the YAMLs of ``--config-dir`` before they are composed: no aliases, which can grow without end.

    Raises:
        ConfigError: If there is no such folder, or a YAML in it is too large, unreadable or has an alias.
    """
    place = Path(os.path.expanduser(folder))
    if not place.is_dir():
        raise ConfigError(f"--config-dir {folder}: no such folder.")
    for path in sorted(place.rglob("*.yaml")):
        if not path.is_file():
            raise ConfigError(f"{path}: no ordinary file.")
        if os.path.getsize(path) > _LARGEST_YAML:
            raise ConfigError(f"{path}: settings are smaller than {_LARGEST_YAML} bytes; this is no file of settings.")
        refuse_aliases(path.read_text(encoding="utf-8", errors="replace"), str(path))


def refuse_aliases(text: str, where: str) -> None:
    """Refuse YAML with aliases: a few lines of them stand for more than any memory holds.

    Raises:
        ConfigError: If there is one, or the text cannot be scanned.
    """
    if "*" not in text and len(text) < _LARGEST_YAML:
        return
    import yaml

    if len(text) > _LARGEST_YAML:
        raise ConfigError(f"{where}: settings are smaller than {_LARGEST_YAML} bytes; this is no file of settings.")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ConfigError(f"{where}: aliases (*name) are not read in settings; write the values out.")
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not readable YAML ({' '.join(str(error).split())[:200]}).") from error


def _keys_of(group: str) -> set[str]:
    found: set[str] = set()
    for path in (config_directory() / group).glob("*.yaml"):
        own, _ = read_verb(path)
        found |= {name.partition(".")[0] for name in own}
    return found
