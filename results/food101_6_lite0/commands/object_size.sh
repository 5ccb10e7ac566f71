#!/usr/bin/env bash
# Gain of masks against the size of the object, from 5 to 100 % of a scene.
source "$(dirname "$0")/common.sh"

train food101_6_lite0_scenes_wide $wide
# NAME TABLE [flags]
masked() {
  sweep food101_6_lite0_scenes_inherited "$2" --object_size=43,192 \
    --cache_size=224 --init_from=$wide --distill_from=$wide \
    --dropped_blocks=$late --grid=method=dynconv --grid=seed=0,1,2 \
    --workdir="${wide}_$1_sweep" "${@:3}"
}
masked inherited_drop wide_inherited_dropped --grid=budget=0.4 \
  --recipe='inherited masks, 5 dropped'
masked one_mask wide_one_mask --mask_units=blocks.1.1 --grid=budget=0.2 \
  --recipe='one mask'
for size in 176 160; do
  sweep food101_6_lite0_scenes_wide_from_dense wide_dropped \
    --dropped_blocks=$late --recipe='5 dropped' --grid=method=drop \
    --grid=image_size=$size --grid=seed=0,1,2 --workdir=${wide}_drop_sweep
done

dropped=$results/wide_dropped/predictions/drop_image_size
one_mask="$results/wide_one_mask/predictions/dynconv_*"
compare "$results/wide_inherited_dropped/predictions/dynconv_*" \
  "${dropped}176_*" --gains=$results/gains_wide.csv --bins=5
compare "$one_mask" "${dropped}160_*" \
  --gains=$results/gains_wide_one_mask.csv --bins=5
compare "$one_mask" "${dropped}176_*"
for name in gains_wide gains_wide_one_mask; do
  run plot --gains=$results/$name.csv --output=$results/$name.png
done
