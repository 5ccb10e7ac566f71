#!/usr/bin/env bash
# The recipe of DynConv, each time without one part of it, on scenes.
source "$(dirname "$0")/common.sh"

train food101_6_lite0_scenes $scenes
# NAME RECIPE [flags]
ablation() {
  sweep food101_6_lite0_scenes_inherited ablation --dropped_blocks=$late \
    --grid=method=dynconv --grid=budget=0.22 --grid=seed=0,1 --recipe="$2" \
    --workdir="${scenes}_ablation_$1" "${@:3}"
}
ablation all all
ablation init 'no dense start' --grid=init_from= \
  --pretrained=pypi:efficientnet-lite0
ablation distill 'no distillation' --grid=distill_from=
ablation warmup 'no falling target' --grid=budget_warmup=0
ablation bias 'no open bias' --grid=mask_bias=
ablation noise 'noise until the end' --grid=gumbel_noise_until=1
ablation norm 'no standardized inputs' --grid=mask_norm=false
ablation rate 'no higher bias rate' --grid=learning_rate_factors=

runs=$results/ablation/predictions/dynconv_budget0.22
table ablation 'all of it' "
  all of it=${runs}_seed*
  no dense start=${runs}_init_from*
  no distillation=${runs}_distill*
  no falling target=${runs}_budget_warmup*
  no open bias=${runs}_mask_bias*
  noise until the end=${runs}_gumbel*
  no standardized inputs=${runs}_mask_norm*
  no higher rate for mask biases=${runs}_learning*"
