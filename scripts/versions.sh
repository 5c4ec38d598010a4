#!/usr/bin/env bash
# Tests the fast part of the suite on the lowest or on the newest versions that pyproject.toml allows, in a virtual
# environment of its own. Words after the first go to pytest instead of that part.
#   bash scripts/versions.sh lowest
#   bash scripts/versions.sh newest
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
    lowest) export MODHIFI_CONSTRAINTS=constraints/lowest.txt ;;
    newest) export MODHIFI_CONSTRAINTS=none ;;
    *) echo "usage: bash scripts/versions.sh lowest|newest [PYTEST WORDS]; got '${1:-}'." >&2; exit 2 ;;
esac
export MODHIFI_VENV="${MODHIFI_VENV:-$PWD/.venv-$1}"
shift

# What breaks when a library changes: tracing and counting, networks of timm and transformers, Hydra, exports, a run.
part=(
    tests/test_api.py tests/test_cli.py tests/settings tests/numerics/test_moments.py tests/graph/test_attention.py
    tests/graph/test_decoder.py tests/models/test_hf.py tests/engine/test_prune.py tests/engine/test_prune_decoder.py
    tests/files
)
[ "$#" -gt 0 ] && part=("$@")
EXTRAS=language,onnx,openvino,launchers,search,rivals,test exec bash scripts/test.sh -q "${part[@]}"
