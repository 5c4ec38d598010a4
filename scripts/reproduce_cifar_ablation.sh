#!/usr/bin/env bash
# The paper's ablation on ResNet-20 and ResNet-56, CIFAR-10: 90 runs and two tables (about an hour on two quiet cores).
# Stopped runs go on and finished ones are skipped when it is started again. Words after the script's name go to
# `modhifi prune`, for example hydra/launcher=per_gpu hydra.launcher.n_jobs=2 runtime.threads=1.
#   MODHIFI_TEST_DATA=../shared/data bash scripts/reproduce_cifar_ablation.sh
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS=launchers source scripts/environment.sh
export MODHIFI_TEST_DATA="${MODHIFI_TEST_DATA:-../shared/data}"

for model in resnet20 resnet56; do
  "$venv/bin/modhifi" evaluate "model=${model}_cifar" "model.weights=$MODHIFI_TEST_DATA/weights/cifar10_$model.safetensors" \
    evaluation_data=arrays "evaluation_data.path=$MODHIFI_TEST_DATA/cifar10/test.npz" 'evaluation=[top1]'
  "$venv/bin/modhifi" prune -m "experiment=cifar_ablation_$model" "$@"
done
for summary in outputs/sweeps/prune_*experiment-cifar_ablation_*/summary.csv; do
  "$venv/bin/python" scripts/ablation_table.py "$summary"
done
