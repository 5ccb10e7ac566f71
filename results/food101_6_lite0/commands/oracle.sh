#!/usr/bin/env bash
# Masks from the object's true position, and attempts to learn them in all
# blocks. Needs DIR.
source "$(dirname "$0")/common.sh"
[[ -n $food101 ]] || exit 0

runs=${scenes}_drop_sweep
dropped=drop_dropped_blocks-${late//,/-}_seed0
sweep food101_6_lite0_scenes_from_dense fast_gates --grid=method=drop \
  --grid=dropped_blocks=$late --grid=seed=0,1,2,3 --workdir=$runs
oracle() {
  python -m benchmarks.oracle --split=test --food101_dir="$food101" \
    --workdir="$@"
}
oracle $scenes
oracle ${scenes}_sweep/$dropped
oracle $runs/$dropped --train_workdir=${scenes}_drop_oracle

# NAME BUDGET [flags]
all_blocks() {
  sweep food101_6_lite0_scenes_from_dense "workdir/results_scenes_$1" \
    --gated_blocks=all --grid=method=dynconv --grid=budget="$2" \
    --grid="dynconv:$bias_rate" --grid=seed=0 \
    --workdir="${scenes}_$1_sweep" "${@:3}"
}
all_blocks all 0.4
all_blocks all_bounds 0.45 --block_bounds_until=1000
