#!/usr/bin/env bash
# Latency on two cores, and accuracy against it. With DIR: times the networks of
# the other files of this folder, which must have been trained. The JSON files
# of the results are workdir/latency/NAME/benchmark.json. Needs
# pip install -e '.[benchmark]'.
source "$(dirname "$0")/common.sh"

# RUN NAME: times a run's network.
benchmark() {
  [[ -z $food101 ]] || run benchmark --split=test --checkpoint=latest \
    --batch_size=1,8 --mode=sparse --workdir="$1" --output="workdir/latency/$2"
}
dropped=drop_dropped_blocks-${late//,/-}
# AVX2
benchmark ${scenes}_one_unit_sweep/dynconv_budget0.2_seed0 one_mask_seed0
benchmark ${scenes}_drop_sweep/${dropped}_seed0 five_dropped_avx2_seed0
benchmark ${scenes}_skipnet20_sweep/skipnet_skip_weight0.2_seed0 \
  skipnet_skip_weight0.2_seed0
for budget in 0.3 0.4; do
  benchmark ${scenes}_convnet_aig20_sweep/convnet_aig_budget${budget}_seed0 \
    convnet_aig_budget${budget}_seed0
done
for method in act sact; do
  benchmark ${scenes}_${method}_sweep/${method}_ponder_weight0.3_seed0 \
    ${method}_ponder_weight0.3_seed0
done
# AVX-512
benchmark ${scenes}_one_unit_sweep/dynconv_budget0.2_seed3 one_mask_avx512_seed3
benchmark ${scenes}_drop_sweep/${dropped}_seed3 five_dropped_avx512_seed3
benchmark ${lite2}_one_unit_sweep/dynconv_budget0.2_seed0 lite2_one_mask_seed0
benchmark ${scenes}_inherited_drop_sweep/dynconv_budget0.22_seed0 \
  inherited_dropped_0.22_seed0
benchmark ${scenes}_sweep/${dropped}_seed0 five_dropped_seed0

latency=()
for name in one_mask five_dropped_avx2 convnet_aig_budget0.3 \
  convnet_aig_budget0.4 skipnet_skip_weight0.2 sact_ponder_weight0.3 \
  act_ponder_weight0.3; do
  latency+=("$results/latency_${name}_seed0.json")
done
for size in 1 8; do
  run plot --x=latency_ratio_batch_$size --series=recipe \
    --results=$results/equal_macs/results.csv,$results/fast_gates/results.csv,$results/other_methods/results.csv \
    --latency="$(IFS=,; echo "${latency[*]}")" \
    --output=$results/latency_batch_$size.png
done
