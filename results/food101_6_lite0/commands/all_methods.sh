#!/usr/bin/env bash
# All methods on scenes. Run one_mask.sh first.
source "$(dirname "$0")/common.sh"

# NAME TABLE [flags]
gated() {
  sweep food101_6_lite0_scenes_from_dense "$2" \
    --workdir="${scenes}_$1_sweep" "${@:3}"
}
gated skipnet20 fast_gates "${skipnet[@]}"
gated convnet_aig20 fast_gates "${convnet_aig[@]}"
gated sact other_methods "${sact[@]}"
gated act other_methods "${act[@]}"

fast=$results/fast_gates/predictions
other=$results/other_methods/predictions
equal=$results/equal_macs/predictions
table other_methods 'five blocks dropped' "
  five blocks dropped=$fast/drop_*
  $(others $fast $other)
  nine blocks dropped=$equal/drop_dropped*
  five blocks dropped, 160 pixels=$equal/drop_seed*
  DynConv, one mask, five blocks dropped, budget 0.2=$equal/dynconv_budget0.2_seed*"
for other in convnet_aig_budget0.3 skipnet_skip_weight0.8; do
  compare "$fast/${other}_*" "$equal/drop_dropped*"
done
figure methods fast_gates other_methods first_attempts equal_macs
