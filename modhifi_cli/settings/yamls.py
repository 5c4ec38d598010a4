"""The folder of YAML files: which verbs and groups there are, and what each file says about itself.

Read as text, so that help answers at once; what the values come to is composed in `compose`.
"""

import functools
import re
from pathlib import Path


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


# Verbs that work on networks for images alone, and what in a choice's `_target_` says that it is for text.
_IMAGES_ALONE = ("unlearn", "audit", "synthesize")
_OF_TEXT = re.compile(
    r"^_target_: modhifi_cli\.(models\.hf|data\.(text|generated)|evaluation\.(token_perplexity|generation|lm_eval)"
    r"|files\.exports\.gguf)\.",
    re.M,
)


@functools.cache
def choices(verb: str) -> dict[str, tuple[str, ...]]:
    """`groups` with those choices alone that a verb reads: a preset or experiment is for the verbs of its examples."""
    found: dict[str, tuple[str, ...]] = {}
    for group, names in groups().items():
        own = []
        for name in names:
            path = config_directory() / group / f"{name}.yaml"
            if group in ("preset", "experiment"):
                verbs_of = {re.sub(r"^(\w+=\S+ )*modhifi ", "", command).split()[0] for command in header(path)[1]}
                fits = verb in verbs_of or verb == "compare" and "prune" in verbs_of
            else:
                fits = verb not in _IMAGES_ALONE or not _OF_TEXT.search(path.read_text(encoding="utf-8"))
            own += [name] if fits else []
        found[group] = tuple(own)
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


def read_verb(path: Path) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
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


def inherited(verb: str) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """As `read_verb`, with what the YAMLs add that a verb's defaults name (``- base``); the verb's own come first."""
    path = config_directory() / f"{verb}.yaml"
    own, chosen = read_verb(path)
    for parent in re.findall(r"^  - (\w+)$", path.read_text(encoding="utf-8"), re.M):
        if parent != "_self_":
            theirs, their_choices = inherited(parent)
            own, chosen = own | {k: v for k, v in theirs.items() if k not in own}, their_choices | chosen
    return own, chosen


@functools.cache
def top_level_keys(verb: str) -> frozenset[str]:
    """First words of the keys that a verb reads."""
    own, chosen = inherited(verb)
    return frozenset(key.split(".")[0] for key in [*own, *chosen])
