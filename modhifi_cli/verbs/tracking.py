"""The tracker of a run, where its settings name one: opened before the work, written when the run is whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modhifi_cli.console import Console
from modhifi_cli.errors import DataError
from modhifi_cli.files import artifacts
from modhifi_cli.records import Results
from modhifi_cli.settings import config


def foresee(settings: Mapping[str, Any]) -> None:
    """Refuse, before any work, a tracker whose package is missing.

    Raises:
        ConfigError: If it is.
    """
    if settings.get("tracker"):
        config.build(settings["tracker"])


def track(settings: Mapping[str, Any], facts: Mapping[str, Any], run: Path, console: Console) -> None:
    """Hand a finished run to its tracker; a tracker that fails costs a warning and not the run."""
    if not settings.get("tracker"):
        return
    given = (word.partition("=") for word in facts["overrides"])
    words = {key: value for key, _, value in given if key and "/" not in value}
    try:
        place = config.build(settings["tracker"]).write(run, Results.read(artifacts.read_results(run)), words)
    except DataError as error:
        console.warning(str(error))
        return
    console.note(f"tracked in {place}")
