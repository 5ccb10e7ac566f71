"""Tests of batches that are shared by devices."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from dynconv_jax.sparse.devices import make_mesh


@pytest.mark.slow
def test_in_a_process_of_two_devices():
  flag = '--xla_force_host_platform_device_count=2'
  tests = pathlib.Path(__file__).with_name('two_devices.py')
  done = subprocess.run(
    [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', tests],
    env={**os.environ, 'XLA_FLAGS': flag, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout[-4000:]
  assert re.search(r'^1[0-9] passed in', done.stdout, re.M), done.stdout


def test_one_device_is_left_as_it_is():
  assert make_mesh(None, 4) is None
  with pytest.raises(ValueError, match='images; got 0 devices'):
    make_mesh([], 4)
