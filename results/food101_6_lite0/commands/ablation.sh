#!/usr/bin/env bash
# The recipe of DynConv, each time without one part of it, on scenes.
source "$(dirname "$0")/common.sh"

train food101_6_lite0_scenes $scenes
# NAME SEEDS RECIPE [flags]
ablation() {
  sweep food101_6_lite0_scenes_inherited ablation --dropped_blocks=$late \
    --grid=method=dynconv --grid=budget=0.22 --grid=seed="$2" --recipe="$3" \
    --workdir="${scenes}_ablation_$1" "${@:4}"
}
ablation all 0,1 all
ablation init 0,1 'no dense start' --grid=init_from= \
  --pretrained=pypi:efficientnet-lite0
ablation distill 0 'no distillation' --grid=distill_from=
ablation warmup 0 'no falling target' --grid=budget_warmup=0
ablation bias 0 'no open bias' --grid=mask_bias=
ablation noise 0,1 'noise until the end' --grid=gumbel_noise_until=1
ablation norm 0 'no standardized inputs' --grid=mask_norm=false
ablation rate 0 'no higher bias rate' --grid=learning_rate_factors=

# The difference from all of it with the same seeds.
runs=$results/ablation/predictions/dynconv_budget0.22
for left_out in init_from-none gumbel_noise_until1; do
  compare "${runs}_${left_out}_seed[01]*" "${runs}_seed[01]*"
done
for left_out in distill_from-none budget_warmup0 mask_bias-none mask_norm-false \
  learning_rate_factors-none; do
  compare "${runs}_${left_out}_seed0*" "${runs}_seed0*"
done
