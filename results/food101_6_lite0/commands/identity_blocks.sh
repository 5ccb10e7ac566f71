#!/usr/bin/env bash
# A mask unit per identity block, and dense networks, on scenes. Predictions of
# these runs were not kept, so tables and figures need DIR.
source "$(dirname "$0")/common.sh"

train food101_6_lite0_scenes $scenes

# NAME TABLE [flags]
from_dense() {
  sweep food101_6_lite0_scenes_from_dense "$2" \
    --workdir="${scenes}${1:+_$1}_sweep" "${@:3}"
}
from_dense '' . --grid=method=dynconv,dense \
  --grid=dense:image_size=160,152,192,128 --grid=budget=0.4,0.25,0.2 \
  --grid="dynconv:$bias_rate" --grid=seed=0,1,2
from_dense '' . --grid=method=drop --grid=dropped_blocks=$late \
  --grid=seed=0,1,2
from_dense '' . --grid=method=drop --grid=dropped_blocks=$nine \
  --grid=seed=0,1,2
from_dense drop160 dropped_160px --grid=method=drop --dropped_blocks=$late \
  --image_size=160 --grid=seed=0,1,2 --recipe='5 dropped, 160 px'
from_dense '' first_attempts --grid=method=convnet_aig --grid=budget=0.4 \
  --grid=seed=0
from_dense skipnet first_attempts --grid=method=skipnet \
  --grid=skip_weight=0.8 --grid=seed=0
from_dense sact other_methods --grid=method=sact --grid=ponder_weight=0.1 \
  --grid=seed=0

# NAME TABLE [flags]
inherited() {
  sweep food101_6_lite0_scenes_inherited "$2" --grid=method=dynconv \
    --workdir="${scenes}_$1_sweep" "${@:3}"
}
inherited inherited inherited --recipe='inherited masks' --grid=budget=0.3 \
  --grid=seed=0,1,2
inherited inherited inherited --recipe='inherited masks' --grid=budget=0.4 \
  --grid=seed=0
inherited inherited_drop inherited_dropped --dropped_blocks=$late \
  --recipe='inherited masks, 5 dropped' --grid=budget=0.3,0.22 \
  --grid=seed=0,1,2
inherited inherited_drop inherited_dropped --dropped_blocks=$late \
  --recipe='inherited masks, 5 dropped' --grid=budget=0.15 --grid=seed=0
# Stopped after an epoch.
inherited drop_bounds workdir/results_scenes_drop_bounds \
  --dropped_blocks=$late --block_bounds_until=1000 --grid=budget=0.3 \
  --grid=seed=0 --recipe='inherited masks, 5 dropped, bounds'

[[ -n $food101 ]] || exit 0
runs=${scenes}_sweep
dropped=${scenes}_inherited_drop_sweep
table scenes 'inherited masks, five blocks dropped, budget 0.22' "
  inherited masks, five blocks dropped, budget 0.22=$dropped/dynconv_budget0.22_seed*
  inherited masks, five blocks dropped, budget 0.15=$dropped/dynconv_budget0.15_seed*
  inherited masks, five blocks dropped, budget 0.3=$dropped/dynconv_budget0.3_seed*
  inherited masks, budget 0.3=${scenes}_inherited_sweep/dynconv_budget0.3_seed*
  inherited masks, budget 0.4=${scenes}_inherited_sweep/dynconv_budget0.4_seed*
  identity blocks, budget 0.4=$runs/dynconv_budget0.4_seed*
  identity blocks, budget 0.25=$runs/dynconv_budget0.25_seed*
  identity blocks, budget 0.2=$runs/dynconv_budget0.2_seed*
  ConvNet-AIG, budget 0.4=$runs/convnet_aig_budget0.4_seed*
  SkipNet, weight 0.8=${scenes}_skipnet_sweep/skipnet*
  SACT, weight 0.1=${scenes}_sact_sweep/sact*
  nine blocks dropped=$runs/drop_*1.1*
  five blocks dropped, 160 pixels=${scenes}_drop160_sweep/drop_seed*
  five blocks dropped=$runs/drop_dropped_blocks-blocks.4*
  dense, 192 pixels=$runs/dense_image_size192_seed*
  dense, 160 pixels=$runs/dense_image_size160_seed*
  dense, 152 pixels=$runs/dense_image_size152_seed*
  dense, 128 pixels=$runs/dense_image_size128_seed*"
compare "$dropped/dynconv_budget0.22_seed*" "$runs/dense_image_size128_seed*" \
  --gains=$results/gains.csv --bins=4
compare "${scenes}_inherited_sweep/dynconv_budget0.3_seed*" "$runs/drop_*1.1*"
run plot --gains=$results/gains.csv --output=$results/gains.png
figure accuracy_against_macs . inherited inherited_dropped dropped_160px \
  other_methods first_attempts
