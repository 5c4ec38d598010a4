#!/usr/bin/env bash
# ruff and mypy as CI runs them, with the versions that pyproject.toml pins.
#   bash scripts/lint.sh
set -euo pipefail
EXTRAS=all,lint source "$(dirname "$0")/environment.sh"
"$venv/bin/ruff" check .
"$venv/bin/python" scripts/check_types.py
