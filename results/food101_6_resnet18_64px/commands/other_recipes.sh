#!/usr/bin/env bash
# A dense start with distillation, and dense networks on all training images.
source "$(dirname "$0")/../../common.sh"

train food101_6_dense_start workdir/food101_6_dense_start
train food101_6_distilled workdir/food/distilled_0.5 --budget=0.5
evaluate workdir/food/distilled_0.5 from_scratch.csv \
  --recipe='dense start, distilled'

all_images() {
  train food101_6_resnet18_64px "workdir/food/$1" --method=dense \
    --train_split=train --validation_split=none --cache_size=128 "${@:2}"
  evaluate "workdir/food/$1" dense_variants.csv
}
all_images dense_4500
all_images dense_4500_decay_all --decay_all --warmup_epochs=0
