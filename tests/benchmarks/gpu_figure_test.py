"""Tests of the script that trains the networks of the figure for a GPU."""

import os
import pathlib
import subprocess

_SCRIPT = pathlib.Path(__file__).parents[2] / 'benchmarks/gpu_figure.sh'
# Replaces Python: logs the folder of the results. One sweep fails.
_FAKE = """#!/bin/sh
for argument; do
  case $argument in --results=*) echo "${{argument##*/}}" >> {0};; esac
done
case "$*" in *results/width_0.71*) exit 1;; esac
"""


def test_a_failed_sweep_is_reported_and_ends_no_other(tmp_path):
  log, python = tmp_path / 'calls', tmp_path / 'python'
  python.write_text(_FAKE.format(log))
  python.chmod(0o755)
  ended = subprocess.run(
    ['bash', _SCRIPT, tmp_path / 'out', '--food101_dir=/food-101'],
    env=os.environ | {'PYTHON': str(python)},
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 1
  assert not ended.stderr
  assert sorted(log.read_text().split()) == [
    *('from_dense', 'from_dense', 'from_scratch', 'narrow_from_scratch'),
    *('width_0.5', 'width_0.71'),
  ]
