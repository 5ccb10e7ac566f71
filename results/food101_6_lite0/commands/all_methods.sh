#!/usr/bin/env bash
# All methods on scenes. Run one_mask.sh first.
source "$(dirname "$0")/common.sh"

# NAME TABLE METHOD [flags]
gated() {
  sweep food101_6_lite0_scenes_from_dense "$2" --grid=method="$3" \
    --grid=seed=0,1 --workdir="${scenes}_$1_sweep" "${@:4}"
}
gated skipnet20 fast_gates skipnet --grid=skip_weight=0.1,0.2,0.8 \
  --grid='skipnet:learning_rate_factors=*.masker.*:20' --recipe='gates x20'
gated convnet_aig20 fast_gates convnet_aig --grid=budget=0.2,0.3,0.4 \
  --grid='convnet_aig:learning_rate_factors=*.masker.fc2.bias:20' \
  --recipe='gates x20'
gated sact other_methods sact --grid=ponder_weight=0.1,0.3,1
gated act other_methods act --grid=ponder_weight=0.1,0.3,1

fast=$results/fast_gates/predictions
other=$results/other_methods/predictions
equal=$results/equal_macs/predictions
table other_methods 'five blocks dropped' "
  five blocks dropped=$fast/drop_*
  ConvNet-AIG, budget 0.4=$fast/convnet_aig_budget0.4_*
  ConvNet-AIG, budget 0.3=$fast/convnet_aig_budget0.3_*
  ConvNet-AIG, budget 0.2=$fast/convnet_aig_budget0.2_*
  SkipNet, weight 0.1=$fast/skipnet_skip_weight0.1_*
  SkipNet, weight 0.2=$fast/skipnet_skip_weight0.2_*
  SkipNet, weight 0.8=$fast/skipnet_skip_weight0.8_*
  SACT, weight 0.1=$other/sact_ponder_weight0.1_*
  SACT, weight 0.3=$other/sact_ponder_weight0.3_*
  SACT, weight 1=$other/sact_ponder_weight1_*
  ACT, weight 0.1=$other/act_ponder_weight0.1_*
  ACT, weight 0.3=$other/act_ponder_weight0.3_*
  ACT, weight 1=$other/act_ponder_weight1_*
  nine blocks dropped=$equal/drop_dropped*
  five blocks dropped, 160 pixels=$equal/drop_seed*
  DynConv, one mask, five blocks dropped, budget 0.2=$equal/dynconv_budget0.2_seed*"
for other in convnet_aig_budget0.3 skipnet_skip_weight0.8; do
  compare "$fast/${other}_*" "$equal/drop_dropped*"
done
figure methods fast_gates other_methods first_attempts equal_macs
