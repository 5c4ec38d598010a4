"""The text of `modhifi --help` and of `modhifi VERB --help`, made from the YAML files alone."""

import textwrap

from modhifi_cli.settings.yamls import (
    choices,
    config_directory,
    header,
    inherited,
    verbs,
)

_WIDTH = 100  # columns; what is longer goes on below, under its own beginning
_NAMES = 28


def verb_help(verb: str) -> str:
    """Text for `modhifi VERB --help`: what it does, examples, keys with their meaning and the groups with choices."""
    path = config_directory() / f"{verb}.yaml"
    description, commands = header(path)
    lines = [f"modhifi {verb} [key=value ...]", "", textwrap.fill(description, _WIDTH), ""]
    if commands:
        lines += ["Examples:", *(f"  {command}" for command in commands), ""]
    own, chosen = inherited(verb)
    if own:
        lines.append("Keys (default, meaning):")
        lines += [_entry(f"{key}={value}", meaning) for key, (value, meaning) in own.items()]
        lines.append("")
    known = choices(verb)
    lines.append("Groups (default; choices; the keys of a choice are set as group.key=value):")
    for group, default in chosen.items():
        if known.get(group):
            lines.append(_entry(f"{group}={default}", ", ".join(known[group])))
    lines += [
        "",
        f"modhifi {verb} --cfg job [key=value ...]  shows every key that would be used;  modhifi list  the choices;",
        "-m runs every combination of values given with commas; + before a key adds one that the YAML does not have.",
    ]
    return "\n".join(lines)


def _entry(name: str, text: str, names: int = _NAMES) -> str:
    """A name and what is said of it, in two columns; a name that is too long has a line of its own."""
    told = textwrap.wrap(text, _WIDTH - names, break_long_words=False, break_on_hyphens=False) or [""]
    begin = f"  {name}"
    if len(begin) > names - 2:
        return "\n".join([begin, *(" " * names + line for line in told if line)])
    return "\n".join([(begin.ljust(names) + told[0]).rstrip(), *(" " * names + line for line in told[1:])])


def main_help() -> str:
    """Text for `modhifi --help`."""
    own = [(verb, header(config_directory() / f"{verb}.yaml")[0]) for verb in verbs()]
    own.append(("list", "Show the choices of every config group, or of one: modhifi list group=model"))
    own.append(("completion", "What a shell needs to complete words: eval \"$(modhifi completion bash)\"; zsh and fish alike"))
    wide = max(len(verb) for verb, _ in own) + 4
    lines = [
        "modhifi VERB [key=value ...]",
        "",
        "Makes trained image networks and language models smaller and faster, and makes classifiers forget classes,",
        "without training: from unlabelled images, text, or no data at all.",
        "",
        "Verbs (modhifi VERB --help teaches its keys):",
        *(_entry(verb, text, wide) for verb, text in own),
        "",
        "Start with:  modhifi prune",
        "Then:        modhifi prune model=resnet50 data=folder data.path=IMAGES",
        "             modhifi runs",
    ]
    return "\n".join(lines)
