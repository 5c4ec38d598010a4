#!/usr/bin/env bash
# Healing on ResNet-20, CIFAR-10: half and 65 % of FLOPs with 10,000 unlabelled training images, and with inverted ones.
# SAMPLES, EPOCHS, TESTS and RUNTIME (gpu) change the numbers; a run takes two minutes of a card, up to an hour of one core.
#   MODHIFI_TEST_DATA=../shared/data bash scripts/reproduce_healing.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
data="${MODHIFI_TEST_DATA:-../shared/data}"
common=(
  model=resnet20_cifar "model.weights=$data/weights/cifar10_resnet20.safetensors" target=flops round_to=1 healing=distill
  "runtime=${RUNTIME:-cpu}" evaluation_data=arrays "evaluation_data.path=$data/cifar10/test.npz"
  "evaluation_data.num_samples=${TESTS:-3000}" 'evaluation=[top1,agreement,size]'
)
for share in 0.5 0.65; do
  "$venv/bin/modhifi" prune "${common[@]}" "sparsity=$share" data=arrays "data.path=$data/cifar10/train_10000.npz" \
    "data.num_samples=${SAMPLES:-10000}" "healing.epochs=${EPOCHS:-28}" healing.lr=3e-3 healing.batchnorm=batches
  "$venv/bin/modhifi" prune "${common[@]}" "sparsity=$share" data=inversion "healing.epochs=${EPOCHS:-14}"
done
