#!/usr/bin/env bash
# The paper's studies on ResNet-20, ResNet-56 (CIFAR-10) and a small Llama: 512 calibration images, 1,000 test images.
# Finished cells are kept, so a stopped script goes on when it is started again. SAMPLES and TESTS change the numbers.
#   MODHIFI_TEST_DATA=../shared/data bash scripts/reproduce_studies.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
data="${MODHIFI_TEST_DATA:-../shared/data}"
study() { "$venv/bin/modhifi" study "$@"; }

for model in resnet20 resnet56; do
  common=(
    "model=${model}_cifar" "model.weights=$data/weights/cifar10_$model.safetensors"
    data=arrays "data.path=$data/cifar10/train_10000.npz" "data.num_samples=${SAMPLES:-512}"
    evaluation_data=arrays "evaluation_data.path=$data/cifar10/test.npz" "evaluation_data.num_samples=${TESTS:-1000}"
  )
  study name=counterfactual "${common[@]}" 'seeds=[0,1,2]'
  study name=noise "${common[@]}" 'seeds=[0,1,2]'
  study name=robustness "${common[@]}" 'seeds=[0,1,2]' \
    "study.sources=[$data/cifar10/diffusion_unconditional336.npz,$data/cifar10/diffusion_conditional160.npz]"
  study name=lipschitz "${common[@]}"
  study name=existence "${common[@]}"
  study name=ablation "${common[@]}" 'seeds=[0,1,2]'
done
text=(
  model=hf "model.path=$data/weights/stories260k" data=text "data.path=$data/text/tinystories_sample.txt"
  'data.separator="<|endoftext|>"' data.layout=documents data.sequences=64 data.length=256
)
for name in counterfactual noise robustness lipschitz existence; do
  study "name=$name" "${text[@]}"
done
