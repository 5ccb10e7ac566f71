#!/usr/bin/env bash
# One mask for the network, and dense networks of equal MACs, on scenes.
source "$(dirname "$0")/common.sh"

train food101_6_lite0_scenes $scenes

inherited() {
  sweep food101_6_lite0_scenes_inherited "$1" --grid=method=dynconv "${@:2}"
}
one_mask() {
  inherited equal_macs --dropped_blocks=$late --mask_units=blocks.1.1 \
    --recipe='one mask' --workdir=${scenes}_one_unit_sweep "$@"
}
one_mask --grid=budget=0.2 --grid=seed=0,1,2,3
one_mask --grid=budget=0.15,0.3 --grid=seed=0,1,2

# Dense networks.
dense() {
  sweep food101_6_lite0_scenes_from_dense equal_macs \
    --workdir="${scenes}_$1_sweep" "${@:2}"
}
dense drop144 --grid=method=drop --dropped_blocks=$late \
  --grid=image_size=144 --grid=seed=0,1,2
dense drop160 --grid=method=drop --dropped_blocks=$late --image_size=160 \
  --grid=seed=0
dense drop9_176 --grid=method=drop --dropped_blocks=$nine \
  --grid=image_size=176 --grid=seed=0
dense drop9 --grid=method=drop --grid=dropped_blocks=$nine --grid=seed=0,1,2
dense dense192 --grid=method=dense --grid=image_size=192 --grid=seed=0,1,2
sweep food101_6_lite0_scenes_from_dense fast_gates --grid=method=drop \
  --grid=dropped_blocks=$late --grid=seed=0,1,2,3 \
  --workdir=${scenes}_drop_sweep

# Remedies that were tried before one mask, with a mask unit per identity block.
inherited ablation --dropped_blocks=$late --grid=budget=0.22 --grid=seed=0 \
  --recipe=all --workdir=${scenes}_ablation_all
inherited remedies --dropped_blocks=$late --grid=budget=0.22 \
  --grid=gumbel_noise_until=1 --grid=seed=1 --recipe='noise until the end' \
  --workdir=${scenes}_ablation_noise
inherited remedies --dropped_blocks=$late --grid=budget=0.22 \
  --grid=sparsity_weight=30 --grid=seed=0 \
  --recipe='inherited masks, 5 dropped, sparsity weight 30' \
  --workdir=${scenes}_weight_sweep
inherited remedies --dropped_blocks=$late --grid=mask_norm=false \
  --grid=budget=0.2 --grid=seed=0 \
  --recipe='inherited masks, 5 dropped, no standardized inputs' \
  --workdir=${scenes}_nonorm_sweep
inherited remedies --dropped_blocks=blocks.2.1,$late \
  --grid=gumbel_noise_until=1 --grid=budget=0.25 --grid=seed=0 \
  --recipe='inherited masks, 6 dropped, noise until the end' \
  --workdir=${scenes}_drop6_sweep

equal=$results/equal_macs/predictions
remedies=$results/remedies/predictions
table one_mask 'one mask, five blocks dropped, budget 0.2' "
  one mask, five blocks dropped, budget 0.2=$equal/dynconv_budget0.2_seed*
  the same, budget 0.15=$equal/dynconv_budget0.15_seed*
  the same, budget 0.3=$equal/dynconv_budget0.3_seed*
  inherited masks, five blocks dropped, budget 0.22=$results/ablation/predictions/dynconv_budget0.22_seed0.csv.gz
  the same, noise until the end=$remedies/dynconv_budget0.22_gumbel_noise_until1_seed*
  the same, sparsity weight 30=$remedies/*sparsity_weight30*
  the same, no standardized inputs, budget 0.2=$remedies/*mask_norm*
  the same, six blocks dropped, noise until the end, budget 0.25=$remedies/dynconv_gumbel*
  five blocks dropped, 144 pixels=$equal/drop_image_size144*
  nine blocks dropped, 176 pixels=$equal/drop_image_size176*
  five blocks dropped, 160 pixels=$equal/drop_seed*
  nine blocks dropped=$equal/drop_dropped*
  five blocks dropped=$results/fast_gates/predictions/drop_*
  dense, 192 pixels=$equal/dense_image_size192*"
for against in drop_image_size144 dense_image_size192; do
  compare "$equal/dynconv_budget0.2_seed*" "$equal/$against*"
done
compare "$equal/dynconv_budget0.2_seed[012]*" "$equal/dense_image_size192_seed0*"
compare "$equal/dynconv_budget0.2_seed3*" "$equal/dense_image_size192_seed[12]*"
figure one_mask equal_macs
