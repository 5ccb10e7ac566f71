# Sourced by the other files of this folder, which run from anywhere:
#
#   results/food101_6_lite0/commands/NAME.sh [DIR]
#
# With DIR, an unpacked Food-101: trains and evaluates what workdir/ lacks, then
# computes tables and figures. Without: computes tables and figures again from
# the predictions that are committed here, where they were kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
food101=${1:-}
results=results/food101_6_lite0
scenes=workdir/food101_6_lite0_scenes
wide=workdir/food101_6_lite0_scenes_wide
photographs=workdir/food101_6_lite0_photographs
lite2=workdir/food101_6_lite2_scenes
late=blocks.4.1,blocks.4.2,blocks.5.1,blocks.5.2,blocks.5.3
nine=blocks.1.1,blocks.2.1,blocks.3.1,blocks.3.2,$late
late2=blocks.4.1,blocks.4.2,blocks.4.3,blocks.5.1,blocks.5.2,blocks.5.3,blocks.5.4
bias_rate='learning_rate_factors=*.masker.maskconv.conv.bias:20'

# PROGRAM [flags]
run() {
  "${PYTHON:-.venv/bin/python}" -m "experiments.$1" "${@:2}"
}
# NAME WORKDIR [flags]: the network from which all other runs start.
train() {
  [[ -z $food101 ]] || run train --flagfile="experiments/flags/$1.flags" \
    --food101_dir="$food101" --workdir="$2" "${@:3}"
}
# NAME TABLE [flags]: runs from a flag file, into the table of a folder here or
# below workdir/.
sweep() {
  [[ -n $food101 ]] || return 0
  local table=$results/$2
  [[ $2 != workdir/* ]] || table=$2
  run sweep --flagfile="experiments/flags/$1.flags" \
    --food101_dir="$food101" --results="$table" --checkpoint=latest \
    --latency_batch_size=0 "${@:3}"
}
# TABLE BASELINE GROUPS: a table of differences from a group of runs.
table() {
  local groups
  groups=$(tr -s '\n' ';' <<< "$3" | sed 's/^;//; s/;$//; s/; */;/g')
  run compare --split=test --table="$results/$1.csv" --baseline="$2" \
    --groups="$groups"
}
# RUNS OTHERS [flags]: the difference of two groups.
compare() {
  run compare --split=test --runs="$1" --against="$2" "${@:3}"
}
# NAME FOLDER...: accuracy against GMACs of the tables in some folders.
figure() {
  local tables
  tables=$(printf ",$results/%s/results.csv" "${@:2}")
  run plot --results="${tables#,}" --series=recipe --output="$results/$1.png"
}
