"""Write docs/settings.md, the reference of all settings, from the headers and comments of configs/.

    python scripts/make_settings.py [--check]

With --check nothing is written, and the exit code is 1 where the page is not what configs/ says.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
PAGE = ROOT / "docs" / "settings.md"
_KEY = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z_][\w/]*): *(?P<value>[^#]*?) *(?:# *(?P<said>.*))?$")
_HIDDEN = ("defaults", "hydra", "_target_", "_partial_")
# Groups with many choices of one kind are a table; of the models those that take a name or a path have their keys, too.
LISTED = ("model", "preset", "experiment")
GENERAL = ("hf", "module", "timm", "torchvision")

HEAD = """# Settings

Written by `python scripts/make_settings.py` from the YAML files in `configs/`; `modhifi VERB --help` says the same shorter.
Every setting is `key=value` on the command line. A group takes the name of one of its choices (`data=folder`), and the
keys of that choice follow its name (`data.path=IMAGES`). `???` means that the key must be given.
"""


def read(path: Path) -> tuple[str, list[str], list[tuple[str, str, str]]]:
    """What a YAML file says of itself: header, example commands, and keys with value and comment, read as text."""
    lines = path.read_text(encoding="utf-8").splitlines()
    said, examples, keys = [], [], []
    while lines and lines[0].startswith("#"):
        line = lines.pop(0)[1:]
        if line.strip().startswith("@package"):
            continue
        (examples if line.startswith("   ") else said).append(line.strip())
    above: list[tuple[int, str]] = []
    for line in lines:
        found = _KEY.match(line)
        if not found:
            continue
        indent = len(found["indent"])
        above = [(depth, name) for depth, name in above if depth < indent]
        if any(name in _HIDDEN for _, name in above) or found["key"] in _HIDDEN:
            above.append((indent, found["key"]))
            continue
        name = ".".join([*(name for _, name in above), found["key"]])
        if found["value"] or found["said"]:
            keys.append((name, found["value"], found["said"] or ""))
        above.append((indent, found["key"]))
    return " ".join(said), examples, keys


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(keys: list[tuple[str, str, str]], prefix: str = "") -> list[str]:
    if not keys:
        return []
    rows = [f"| `{prefix}{name}` | {f'`{cell(value)}`' if value else ''} | {cell(said)} |" for name, value, said in keys]
    return ["| key | default | |", "|---|---|---|", *rows, ""]


def described(path: Path, title: str, prefix: str) -> list[str]:
    said, examples, keys = read(path)
    # What stands behind a command, with space before it, becomes a comment, so that a whole line can be copied.
    lines = [re.sub(r"(?<=\S) {3,}(?=\S)", "   # ", line) for line in examples]
    block = ["```", *lines, "```", ""] if lines else []
    return [title, "", said, "", *block, *table(keys, prefix)]


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    verbs = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "base")
    groups = sorted(path for path in CONFIGS.iterdir() if path.is_dir() and path.name != "hydra")
    lines += ["## Every verb", "", *table(read(CONFIGS / "base.yaml")[2])]
    for path in verbs:
        lines += described(path, f"## modhifi {path.stem}", "")
    for group in groups:
        lines += [f"## Group `{group.name}`", ""]
        choices = sorted(group.rglob("*.yaml"))
        if group.name in LISTED:
            named = [path for path in choices if path.stem not in GENERAL]
            lines += ["| choice | |", "|---|---|"]
            lines += [f"| `{group.name}={path.stem}` | {cell(read(path)[0])} |" for path in named] + [""]
            choices = [path for path in choices if path.stem in GENERAL]
        for path in choices:
            several = group.name in ("evaluation", "export")
            prefix = f"{group.name}.{path.stem}." if several else f"{group.name}."
            written = f"{group.name}=[{path.stem}]" if several else f"{group.name}={path.stem}"
            lines += described(path, f"### `{written}`", prefix)
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is what configs/ says")
    check = parser.parse_args().check
    made = page()
    if check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made:
            print("docs/settings.md is out of date; run python scripts/make_settings.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
