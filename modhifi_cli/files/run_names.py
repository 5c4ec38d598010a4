"""Runs by short names: ``last``, ``last-1``, or the beginning of a folder's name that no other run shares."""

import re
from collections.abc import Sequence
from pathlib import Path

from modhifi_cli.errors import DataError

INCOMPLETE = ".incomplete"  # here, since this file answers at once and run_folder.py imports torch


def named_run(given: str, outputs: Path, *, key: str = "run") -> str:
    """The folder that a name stands for.

    Args:
        given: A folder (which wins), ``last``, ``last-N``, or the beginning of a run's folder name.
        outputs: Where runs are made, ``outputs/VERB/MODEL/RUN``.
        key: The setting, for messages.

    Returns:
        The folder; what looks like a path is given back as it is, for the reader to say what is wrong with it.

    Raises:
        DataError: If no run, or more than one, is named so.
    """
    path = Path(given)
    if path.exists() or path.with_name(path.name + INCOMPLETE).exists() or "/" in given or given in ("", "."):
        return given
    found = runs(outputs)
    counted = re.fullmatch(r"last(?:-(\d+))?", given)
    if counted:
        back = int(counted[1] or 0)
        whole = _with_networks(found)
        if back >= len(whole):
            have = "there is no finished run"
            if whole:
                have = f"there are {len(whole)} finished runs" if len(whole) > 1 else "there is one finished run"
            raise DataError(f"{key}={given}: {have} with a network under {outputs}; give a folder (modhifi runs).")
        return str(whole[-1 - back])
    fitting = [run for run in found if run.name.startswith(given)]
    if len(fitting) == 1:
        return str(fitting[0])
    if not fitting:
        near = ", ".join(run.name for run in reversed(found[-3:])) or "none yet"
        raise DataError(
            f"{key}={given}: no such folder, and no run under {outputs} begins so (the newest: {near}); give its folder "
            "or last (modhifi runs lists them)."
        )
    named = ", ".join(run.name for run in fitting[:3]) + (", …" if len(fitting) > 3 else "")
    raise DataError(f"{key}={given}: {len(fitting)} runs begin so ({named}); give more of the name, or the folder.")


def named_words(words: Sequence[str]) -> list[tuple[str, str | list[str]] | str]:
    """Words of a command line, those that name runs as (key, folder or folders), the others as they are.

    Where both ``run`` and ``runs`` are given nothing is looked up: the verb refuses the two together, whatever they name.
    """
    given = {key for key, _, value in (word.partition("=") for word in words) if value not in ("", "null", "[]")}
    if {"run", "runs"} <= given:
        return list(words)
    outputs = Path(next((word[11:].strip("'\"") for word in words if word.startswith("output_dir=")), "outputs"))
    found: list[tuple[str, str | list[str]] | str] = []
    for word in words:
        key, _, value = word.partition("=")
        value = value.strip("'\"")
        if key in ("run", "model.run") and value and value != "null" and "," not in value:
            found.append((key, named_run(value, outputs, key=key)))
        elif key == "runs" and re.fullmatch(r"\[[^\[\]]+\]", value):
            each = [one.strip().strip("'\"") for one in value[1:-1].split(",")]
            found.append((key, [named_run(one, outputs, key=key) for one in each]))
        else:
            found.append(word)
    return found


def runs(outputs: Path) -> list[Path]:
    """Folders of runs under ``outputs/VERB/MODEL``, finished or interrupted, oldest first: their names begin with the time."""
    folders = [path for path in outputs.glob("*/*/*") if re.match(r"\d{8}-\d{6}", path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: path.name)


def short_names(found: Sequence[Path]) -> dict[Path, str]:
    """What each finished run with a network is called for short, ``last``, ``last-1`` and so on; `found` as of `runs`."""
    whole = _with_networks(found)
    return {place: "last" if not back else f"last-{back}" for back, place in enumerate(reversed(whole))}


def _with_networks(found: Sequence[Path]) -> list[Path]:
    return [run for run in found if (run / "model").is_dir() and not run.name.endswith(INCOMPLETE)]
