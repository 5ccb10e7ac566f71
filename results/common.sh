# Functions for the files in commands/ of a folder of results, which run from
# anywhere:
#
#   results/FOLDER/commands/NAME.sh [DIR]
#
# With DIR, an unpacked Food-101: trains and evaluates what workdir/ lacks, then
# computes tables and figures. Without: computes tables and figures again from
# what is committed, where predictions were kept.
set -euo pipefail
food101=${1:+$(realpath "$1")}
results=results/$(basename "$(dirname "$(dirname "$(realpath "$0")")")")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python() {
  "${PYTHON:-.venv/bin/python}" "$@"
}
# PROGRAM [flags]
run() {
  python -m "experiments.$1" "${@:2}"
}
# FLAGFILE WORKDIR [flags]: trains one network.
train() {
  [[ -z $food101 ]] || run train --flagfile="experiments/flags/$1.flags" \
    --food101_dir="$food101" --workdir="$2" "${@:3}"
}
# WORKDIR TABLE [flags]: adds a row for one network to a table.
evaluate() {
  [[ -z $food101 ]] || run evaluate --split=test --checkpoint=latest \
    --workdir="$1" --results="$results/$2" "${@:3}"
}
# FLAGFILE TABLE [flags]: runs from a flag file, into the table of a folder here
# or below workdir/.
sweep() {
  [[ -n $food101 ]] || return 0
  local table=$results/$2
  [[ $2 != workdir/* ]] || table=$2
  run sweep --flagfile="experiments/flags/$1.flags" --food101_dir="$food101" \
    --checkpoint=latest --latency_batch_size=0 --results="$table" "${@:3}"
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
