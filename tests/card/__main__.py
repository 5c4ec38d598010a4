"""The command line on a pretended card: ``python -m tests.card prune model=… runtime=gpu``.

The environment variable PRETEND_MEMORY is its size in bytes (80e9), and what it saw goes to the file that
PRETEND_REPORT names.
"""

import os
import sys
from pathlib import Path

from modhifi_cli.cli import main
from tests.card import pretend

with pretend.card(memory=float(os.environ.get("PRETEND_MEMORY", 80e9))) as seen:
    try:
        code = main(sys.argv[1:])
    finally:
        if "PRETEND_REPORT" in os.environ:
            Path(os.environ["PRETEND_REPORT"]).write_text(seen.report(), encoding="utf-8")
sys.exit(code)
