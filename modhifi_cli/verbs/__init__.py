"""The verbs, from plain settings to files and tables: each reads in one screen and leaves the work to the rooms above.

A run is a folder (`artifacts`), a voice (`console`) and a sequence of records (`tasks`). Nothing here computes.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modhifi_cli.console import Console, open_console
from modhifi_cli.engine.memory import reset_peaks
from modhifi_cli.errors import EndedElsewhere, ModHiFiError, is_out_of_memory
from modhifi_cli.verbs import cards, pieces


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
    try:
        with cards.own_card(settings, facts) as settings, _in_one_sentence(settings, console):
            pieces.set_precision(settings)
            reset_peaks()
            verb_of = getattr(importlib.import_module(f"modhifi_cli.verbs.{verb}"), verb)
            return verb_of(settings, facts, console, folder)
    finally:
        cards.part()
        console.close()


@contextlib.contextmanager
def _in_one_sentence(settings: Mapping[str, Any], console: Console) -> Iterator[None]:
    """Whatever the user can mend is told once: also a full memory, and the end of another process of the run."""
    try:
        yield
    except EndedElsewhere:
        raise
    except ModHiFiError as error:
        told = " ".join(str(error).split())
        cards.leave_word(told)
        console.error(told)
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            full = pieces.memory_full(settings, error)
            cards.leave_word(str(full))
            console.error(str(full))
            raise full from None
        ended = cards.ended_elsewhere(error)
        if ended is None:
            raise
        raise ended from None
