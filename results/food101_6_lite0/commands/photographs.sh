#!/usr/bin/env bash
# All methods on photographs as they are.
source "$(dirname "$0")/common.sh"

train food101_6_lite0 workdir/food101_6_lite0
# NAME [flags]
from_dense() {
  sweep food101_6_lite0_from_dense photographs_methods \
    --workdir="${photographs}_$1_sweep" "${@:2}"
}
from_dense drop160 --grid=method=drop --grid=dropped_blocks=$late \
  --grid=seed=0,1,2,3
from_dense drop --grid=method=drop --dropped_blocks=$late \
  --grid=image_size=144,128 --grid=seed=0,1,2
from_dense dense160 --grid=method=dense --grid=image_size=160,128 \
  --grid=seed=0,1,2
from_dense one_mask --grid=method=dynconv --dropped_blocks=$late \
  --gated_blocks=all --inherited_masks --mask_units=blocks.1.1 \
  --grid="dynconv:$bias_rate" --grid=budget=0.3,0.45,0.6 --grid=seed=0,1,2 \
  --recipe='one mask'
from_dense identity --grid=method=dynconv --grid="dynconv:$bias_rate" \
  --grid=budget=0.5 --grid=seed=0,1,2 --recipe='identity blocks'
from_dense convnet_aig "${convnet_aig[@]}"
from_dense skipnet "${skipnet[@]}"
from_dense sact "${sact[@]}"
from_dense act "${act[@]}"

# Earlier runs; predictions were not kept.
sweep food101_6_lite0_from_dense photographs_inherited_dropped \
  --dropped_blocks=$late --gated_blocks=all --inherited_masks "--$bias_rate" \
  --grid=method=dynconv --grid=budget=0.3,0.42 --grid=seed=0 \
  --recipe='inherited masks, 5 dropped' \
  --workdir=${photographs}_inherited_drop_sweep

runs=$results/photographs_methods/predictions
table photographs_methods 'five blocks dropped' "
  five blocks dropped=$runs/drop_dropped*
  dense=$runs/dense_image_size160_*
  dense, 128 pixels=$runs/dense_image_size128_*
  five blocks dropped, 144 pixels=$runs/drop_image_size144_*
  five blocks dropped, 128 pixels=$runs/drop_image_size128_*
  DynConv, one mask, five blocks dropped, budget 0.6=$runs/dynconv_budget0.6_*
  DynConv, one mask, five blocks dropped, budget 0.45=$runs/dynconv_budget0.45_*
  DynConv, one mask, five blocks dropped, budget 0.3=$runs/dynconv_budget0.3_*
  DynConv, identity blocks, budget 0.5=$runs/dynconv_budget0.5_*
  $(others $runs $runs)"
compare "$runs/dynconv_budget0.3_*" "$runs/drop_image_size144_*"
compare "$runs/dynconv_budget0.5_*" "$runs/drop_image_size144_*"
for other in skipnet_skip_weight0.8 convnet_aig_budget0.3 convnet_aig_budget0.2 \
  sact_ponder_weight1 dynconv_budget0.3 dense_image_size128; do
  compare "$runs/${other}_*" "$runs/drop_image_size128_*"
done
figure photographs_methods photographs_methods
