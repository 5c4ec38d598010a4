"""Settings as text: words of the command line, folder names, YAML, and in what two runs' settings differ."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from modhifi_cli.errors import ConfigError, first_line
from modhifi_cli.settings.targets import at_present
from modhifi_cli.settings.yamls import config_directory, read_verb

ABSENT = object()
# What people may write for the choice of a group, by verb: `modhifi study name=existence`.
_SPELLINGS: Mapping[str, Mapping[str, str]] = {"study": {"name": "study"}}
_PLACEHOLDERS: Mapping[str, str] = {"run": "DIR", "forget_class": "3", "path": "PATH", "weights": "FILE", "name": "NAME"}


def spelled(verb: str, overrides: Sequence[str], *, for_people: bool = False) -> list[str]:
    """Overrides with the group's own name where the verb has another for people (or the other way round)."""
    known = _SPELLINGS.get(verb, {})
    known = {ours: theirs for theirs, ours in known.items()} if for_people else known
    parts = [word.partition("=") for word in overrides]
    if not for_people:
        parts = _one_word_for_samples(parts)
    return [f"{known.get(key, key)}{equals}{value}" for key, equals, value in parts]


def _one_word_for_samples(parts: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """``num_samples`` counts samples of every kind: of a source of text it is what its file calls sequences."""
    chosen = {key: value for key, _, value in parts}
    found = []
    for key, equals, value in parts:
        group, _, leaf = key.partition(".")
        path = config_directory() / group / f"{chosen.get(group)}.yaml"
        if leaf == "num_samples" and group in ("data", "evaluation_data") and path.is_file():
            own = read_verb(path)[0]
            key = f"{group}.sequences" if "sequences" in own and "num_samples" not in own else key
        found.append((key, equals, value))
    return found


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


def as_plain_words(overrides: Iterable[str]) -> set[str]:
    """The values of overrides without quotes, each by itself where several are given: what was said, to compare with."""
    values = (word.partition("=")[2] for word in overrides)
    return {one.strip().strip("'\"") for value in values for one in (value, *re.split(r"[,\[\]{}]|: ", value))}


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


def example(key: str) -> str:
    """A key with a word for its value, ``data.path=PATH``."""
    return f"{key}={_PLACEHOLDERS.get(key.rpartition('.')[2], 'VALUE')}"


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings in which two runs differ, as ``"sparsity (0.4 here, 0.5 there)"``, sorted by key.

    A whole choice that one side has not made is named once, without its keys.
    """
    found: list[str] = []
    for key in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(key, ABSENT), theirs.get(key, ABSENT)
        if here == there or key == "_partial_":
            continue
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            found += differences(here, there, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key} ({_told(here)} here, {_told(there)} there)")
    return found


def _told(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    return "given" if isinstance(value, Mapping) else repr(value)


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

    from modhifi_cli.settings.heard import refuse_aliases

    refuse_aliases(text, "settings")
    try:
        plain = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:
        raise ConfigError(f"not a readable YAML mapping: {first_line(error)}") from error
    if not isinstance(plain, dict):
        raise ConfigError("not a YAML mapping.")
    return at_present(plain)


def select(plain: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key, or `ABSENT`."""
    value: Any = plain
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return ABSENT
        value = value[part]
    return value


def flatten(plain: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted keys with their values."""
    for key, value in plain.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

