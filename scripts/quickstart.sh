#!/usr/bin/env bash
# From nothing to a first pruned network: makes a virtual environment, installs the project, prunes the embedded
# digits network. Words after the script's name go to `modhifi prune`.
#   bash scripts/quickstart.sh
#   bash scripts/quickstart.sh sparsity=0.6 compensation=none
set -euo pipefail
source "$(dirname "$0")/environment.sh"

"$venv/bin/modhifi" prune "$@"
echo
echo "Next: $venv/bin/modhifi --help"
