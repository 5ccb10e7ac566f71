#!/usr/bin/env bash
# The figure of ResNet-50 at 224 pixels on six classes of Food-101, for a GPU:
#
#   benchmarks/gpu_figure.sh OUT --food101_dir=DIR [flags of a training run]
#
# Dense networks of three widths from scratch, then all methods from them, in
# order of importance. The same command resumes. Tables, flags, and predictions
# are in OUT/results, workdirs in OUT/runs. DIR is absolute, or relative to the
# repository. LANES gated runs train at a time (default: 3) beside one or two
# dense ones, so that some compile while others compute. A dry run on a CPU, with
# two steps per run and drawn images:
#
#   benchmarks/gpu_figure.sh OUT --dataset=spots --classes= --spots_train=8 \
#     --spots_test=4 --spots_size=64 --image_size=64 --cache_size=64 \
#     --batch_size=4 --epochs=1 --warmup_epochs=0 --model=resnet18
set -euo pipefail
out=$(realpath -m "$1")
cd "$(dirname "$0")/.."
shift
flags=("$@")
# Runs share compiled programs, and do not reserve GPU memory.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/cache}
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# NAME FLAGFILE: a sweep with workdir OUT/runs/NAME and table OUT/results/NAME.
sweep() {
  local name=$1 base=$2
  shift 2
  "${PYTHON:-.venv/bin/python}" -m experiments.sweep --checkpoint=latest \
    --flagfile="experiments/flags/$base.flags" "${flags[@]}" \
    --latency_batch_size=0 --checkpoint_every_epochs=20 --keep_checkpoints=1 \
    --log_every_steps=100 --workdir="$out/runs/$name" \
    --results="$out/results/$name" "$@"
}
base=food101_6_resnet50_224px
start=$out/runs/from_scratch
sweep from_scratch $base --grid=method=dense --grid=seed=0 &
started=$!
# Other runs would disturb XLA, which times kernels when it compiles.
while kill -0 $started 2>/dev/null &&
  ! grep -qs 'step [0-9]*/' "$start"/*/sweep.log; do
  sleep 1
done
narrow() {
  local failed=0
  sweep narrow_from_scratch $base --parallel=2 --grid=method=dense \
    --grid=width_multiplier=0.71,0.5 --grid=seed=0 || failed=1
  for width in 0.71 0.5; do
    sweep "width_$width" ${base}_from_dense --grid=method=dense \
      --grid=width_multiplier=$width --grid=seed=0 \
      --init_from="$out/runs/narrow_from_scratch/dense_width_multiplier${width}_seed0" \
      || failed=1
  done
  return $failed
}
gated() {
  sweep from_dense ${base}_from_dense --parallel="${LANES:-3}" \
    --init_from="$start/dense_seed0" "$@" --grid=convnet_aig:budget=0.3,0.5 \
    --grid=skip_weight=0.3,0.6 --grid=skipnet:budget_warmup=0.6 \
    --grid=ponder_weight=0.05,0.2
}
# One failed run does not end the others.
narrow &
narrowed=$!
wait $started || { wait $narrowed; exit 1; }
failed=0
gated --grid=method=dense,dynconv,skipnet,convnet_aig,sact,act \
  --grid=budget=0.5,0.3,0.7 --grid=seed=0 --grid=dense:seed=0,1,2 \
  --grid=dynconv:seed=0,1,2 || failed=1
gated --grid=method=skipnet,convnet_aig,sact,act --grid=seed=1 || failed=1
wait $narrowed || failed=1
exit $failed
