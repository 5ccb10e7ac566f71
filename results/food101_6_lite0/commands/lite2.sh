#!/usr/bin/env bash
# EfficientNet-Lite2 with one mask, on scenes. Run one_mask.sh first.
source "$(dirname "$0")/common.sh"

train food101_6_lite0_scenes $lite2 --model=efficientnet_lite2 \
  --pretrained=pypi:efficientnet-lite2
# NAME FLAGFILE [flags]
from_dense() {
  sweep "$2" lite2 --model=efficientnet_lite2 --init_from=$lite2 \
    --distill_from=$lite2 --workdir="${lite2}_$1_sweep" "${@:3}"
}
from_dense one_unit food101_6_lite0_scenes_inherited --dropped_blocks=$late2 \
  --mask_units=blocks.1.1 --grid=method=dynconv --grid=budget=0.2 \
  --grid=seed=0,1,2 --recipe='one mask'
from_dense drop food101_6_lite0_scenes_from_dense --grid=method=drop \
  --grid=dropped_blocks=$late2 --grid=seed=0

runs=$results/lite2/predictions
equal=$results/equal_macs/predictions
table lite2 'Lite2, one mask, seven blocks dropped, budget 0.2' "
  Lite2, one mask, seven blocks dropped, budget 0.2=$runs/dynconv_*
  Lite2, seven blocks dropped=$runs/drop_*
  Lite0, one mask, five blocks dropped, budget 0.2=$equal/dynconv_budget0.2_seed*
  Lite0, nine blocks dropped=$equal/drop_dropped*
  Lite0, five blocks dropped, 160 pixels=$equal/drop_seed*
  Lite0, five blocks dropped=$results/fast_gates/predictions/drop_*
  Lite0, dense=$equal/dense_image_size192*"
figure lite2 equal_macs fast_gates lite2
