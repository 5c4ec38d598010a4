"""Who listens to a function's progress: a bar of tqdm by default, in terminals and notebooks; a function; or nobody."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from modhifi_cli.console import Work
from modhifi_cli.errors import ConfigError
from modhifi_cli.records import Progress

Listener = Callable[[Progress], None]
_SECONDS = 0.2  # between two drawings of a bar


def nobody(step: Progress) -> None:
    """Listens to nothing."""


@contextlib.contextmanager
def listening(progress: Listener | bool | None, what: str) -> Iterator[Listener]:
    """The listener of one call; a bar is gone at its end.

    Args:
        progress: None or True for a bar, where somebody can see it; False for silence; or a function.
        what: Is done: ``pruning``.

    Raises:
        ConfigError: If it is something else.
    """
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise ConfigError(f"progress: expected None for a bar, False for none, or a function; got {progress!r:.60}.")
    if callable(progress) and not isinstance(progress, bool):
        yield progress
        return
    bar = None if progress is False else _bar(what)
    if bar is None:
        yield nobody
        return
    work, drawn = Work(), 0.0

    def show(step: Progress) -> None:
        nonlocal drawn
        told = work.update(step)
        if time.monotonic() - drawn >= _SECONDS:
            drawn = time.monotonic()
            bar.n = round(100 * work.share)
            bar.set_description_str(f"{what}: {told}" if told else what)

    try:
        yield show
    finally:
        bar.close()


def _bar(what: str) -> Any:
    """A bar, or None where nobody would see it: in a log every step would be a line of its own."""
    from tqdm.auto import tqdm
    from tqdm.std import tqdm as plain

    in_a_notebook = tqdm.display is not plain.display
    if not in_a_notebook and not sys.stderr.isatty():
        return None
    return tqdm(total=100, desc=what, leave=False, bar_format="{desc} {bar:20} {elapsed}")
