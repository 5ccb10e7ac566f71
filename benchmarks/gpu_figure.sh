#!/usr/bin/env bash
# The figure of ResNet-50 at 224 pixels on six classes of Food-101, for a GPU:
#
#   benchmarks/gpu_figure.sh OUT --food101_dir=DIR [flags of a training run]
#
# Sweeps in the order of their importance. Each resumes where it stopped, and
# OUT/results holds the table and the figures of what is done, OUT/runs the runs
# with their predictions. Two steps a run on a CPU, with drawn images:
#
#   benchmarks/gpu_figure.sh OUT --dataset=spots --classes= --spots_train=8 \
#     --spots_test=4 --spots_size=64 --image_size=64 --cache_size=64 \
#     --batch_size=4 --epochs=1 --warmup_epochs=0 --model=resnet18
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
shift
sweep() {
  "${PYTHON:-.venv/bin/python}" -m experiments.sweep --checkpoint=latest \
    --flagfile=experiments/flags/food101_6_resnet50_224px.flags "${flags[@]}" \
    --latency_batch_size=0 --workdir="$out/runs" --results="$out/results" "$@"
}
flags=("$@")
sweep --grid=method=dense --grid=seed=0
sweep --grid=method=dynconv --grid=budget=0.5,0.3,0.7 --grid=seed=0
sweep --grid=method=dense --grid=width_multiplier=0.71,0.5 --grid=seed=0
sweep --grid=method=skipnet --grid=skip_weight=0.5,1 --grid=skipnet:mask_bias=2 \
  --grid=skipnet:budget_warmup=0.6 --grid=seed=0
sweep --grid=method=convnet_aig --grid=budget=0.5,0.7 --grid=seed=0
sweep --grid=method=sact,act --grid=ponder_weight=0.003,0.01 --grid=seed=0
sweep --grid=method=dense,dynconv --grid=budget=0.5 --grid=seed=1,2
