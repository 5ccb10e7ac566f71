#!/usr/bin/env bash
# All methods from dense weights, narrower dense networks, and a second seed.
source "$(dirname "$0")/../../common.sh"

# The dense start, and DynConv from scratch.
from_scratch() {
  train food101_6_resnet18_64px "workdir/food/$1" --method="$2" --budget="$3"
  evaluate "workdir/food/$1" from_scratch.csv --recipe='from scratch'
}
from_scratch dense dense 0.5
for budget in 0.3 0.5 0.7; do
  from_scratch dynconv_$budget dynconv $budget
done

gated() {
  sweep food101_6_resnet18_64px_from_dense . --parallel=2 \
    --grid=method="$1" --grid=budget=0.3,0.5,0.7 "${@:2}"
}
narrower() {
  sweep food101_6_resnet18_64px . --parallel=2 --epochs=36 \
    --grid=method=dense --grid=width_multiplier=0.55,0.71 "$@"
}
# The first seed was run without latencies, and again with them when the machine
# was free.
gated dense,dynconv,convnet_aig,skipnet,sact,act \
  --grid=skip_weight=0.3,0.6,1.2 --grid=skipnet:budget_warmup=0.6 \
  --grid=sact:ponder_weight=0.01,0.05,0.2 \
  --grid=act:ponder_weight=0.02,0.1,0.2 --grid=seed=0 --latency_batch_size=1
narrower --grid=seed=0 --latency_batch_size=1
gated dense,dynconv --grid=seed=1
narrower --grid=seed=1
gated dense,dynconv --grid=distill_from=workdir/food/dense \
  --grid=seed=0 --recipe=distilled
run plot --results=$results/results.csv
