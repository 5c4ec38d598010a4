"""The verbs, from plain settings to files and tables: each reads in one screen and leaves the work to the rooms above.

A run is a folder (`artifacts`), a voice (`console`) and a sequence of records (`tasks`). Nothing here computes.
"""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modhifi_cli.console import Console, open_console
from modhifi_cli.engine.memory import reset_peaks
from modhifi_cli.errors import ModHiFiError, is_out_of_memory
from modhifi_cli.verbs import pieces


def run(verb: str, settings: Mapping[str, Any], facts: Mapping[str, Any], *, folder: Path | None = None) -> Path | None:
    """Carry out one verb.

    Args:
        verb: Name of a verb: its module here and the function in it are called so.
        settings: Checked plain settings of the verb, as `config.settings` gives them.
        facts: `config.job_facts()`: overrides and the place in a sweep.
        folder: Where a run folder shall be; None makes one under ``output_dir`` with time and overrides in its name.

    Returns:
        The run folder, or None for a verb that makes none.

    Raises:
        ModHiFiError: Whatever the user can mend.
        KeyboardInterrupt: With how to go on, if the user stopped the run.
    """
    # Of several processes of one run the first one speaks.
    silent = facts.get("parallel") or os.environ.get("RANK", "0") != "0"
    console = Console() if silent else open_console(settings["console"]["style"])
    settings = pieces.with_device(settings, facts)
    pieces.set_precision(settings)
    reset_peaks()
    try:
        verb_of = getattr(importlib.import_module(f"modhifi_cli.verbs.{verb}"), verb)
        return verb_of(settings, facts, console, folder)
    except ModHiFiError as error:
        console.error(" ".join(str(error).split()))
        raise
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        told = pieces.memory_full(settings, error)
        console.error(str(told))
        raise told from None
    finally:
        console.close()
