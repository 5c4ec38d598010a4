#!/usr/bin/env bash
# Makes a virtual environment, installs the project with what its tests need, and runs the tests. Words after the
# script's name go to pytest. Tests marked `real` read the folder that MODHIFI_TEST_DATA names (../shared/data).
#   bash scripts/test.sh
#   bash scripts/test.sh -m real
#   bash scripts/test.sh -m card
#   bash scripts/test.sh tests/test_cli.py -k sparsity
set -euo pipefail
EXTRAS="${EXTRAS:-all,test}" source "$(dirname "$0")/environment.sh"

# One process per core with one thread each: tiny matrices are slower on many threads.
export OMP_NUM_THREADS=1
exec "$venv/bin/python" -m pytest -n auto --dist loadfile "$@"
