"""`python -m modhifi_cli` is `modhifi`."""

import sys

from modhifi_cli.cli import main

if __name__ == "__main__":
    sys.exit(main())
