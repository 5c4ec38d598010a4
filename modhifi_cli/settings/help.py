"""The text of `modhifi --help` and of `modhifi VERB --help`, made from the YAML files alone."""

from modhifi_cli.settings.yamls import (
    config_directory,
    groups,
    header,
    inherited,
    verbs,
)


def verb_help(verb: str) -> str:
    """Text for `modhifi VERB --help`: what it does, examples, keys with their meaning and the groups with choices."""
    path = config_directory() / f"{verb}.yaml"
    description, commands = header(path)
    lines = [f"modhifi {verb} [key=value ...]", "", description, ""]
    if commands:
        lines += ["Examples:", *(f"  {command}" for command in commands), ""]
    own, chosen = inherited(verb)
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
