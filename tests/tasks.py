"""Running the tasks that yield progress and return what they found, and programs of people who do not have this package."""

import os
import subprocess
import sys
from pathlib import Path


def returned(task):
    """What a task returns once it has run to its end."""
    while True:
        try:
            next(task)
        except StopIteration as end:
            return end.value


def stranger(program: str, *words: object, folder: Path, **environment: str) -> None:
    """Run a program in a process that cannot import this package; it must end well."""
    without = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['modhifi_cli'] = None\n{program}", *map(str, words)],
        cwd=folder, env=without | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
