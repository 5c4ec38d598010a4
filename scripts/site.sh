#!/usr/bin/env bash
# Builds the documentation as a site that reads from a folder without a network, and refuses dead links.
#   bash scripts/site.sh [FOLDER]     (default: site/)
set -euo pipefail
folder="$(realpath -m "${1:-site}")"
EXTRAS=docs source "$(dirname "$0")/environment.sh"
"$venv/bin/python" scripts/make_settings.py --check
"$venv/bin/mkdocs" build --quiet --strict --site-dir "$folder"
echo "$folder/index.html"
