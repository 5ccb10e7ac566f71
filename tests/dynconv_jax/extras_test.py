"""Tests that errors name the extra that installs a missing package."""

import subprocess
import sys

import pytest

from dynconv_jax import extras


def test_what_is_missing_is_named_at_once():
  extras.require('train', 'json', 'csv')
  with pytest.raises(
    ImportError,
    match=r'no_such_a, no_such_b not installed: run pip install'
    r" 'dynconv-jax\[train\]'",
  ):
    extras.require('train', 'json', 'no_such_a', 'no_such_b')


@pytest.mark.parametrize(
  'module,missing',
  [
    ('dynconv_jax.data.decode', 'PIL'),
    ('dynconv_jax.training.loop', 'tensorboardX'),
    ('dynconv_jax.plotting.style', 'matplotlib'),
    ('dynconv_jax.interop.files', 'safetensors'),
  ],
)
def test_packages_say_which_extra_they_need(module, missing):
  run = subprocess.run(
    [
      sys.executable,
      '-c',
      'import importlib.util as util, sys\n'
      'find = util.find_spec\n'
      f'util.find_spec = lambda name: None if name == {missing!r} else'
      ' find(name)\n'
      f'import {module}',
    ],
    capture_output=True,
    text=True,
  )
  last = run.stderr.splitlines()[-1]
  assert missing in last and "pip install 'dynconv-jax[train]'" in last


def test_the_core_needs_nothing_of_an_extra():
  """The core counts, creates and executes networks."""
  run = subprocess.run(
    [
      sys.executable,
      '-c',
      'import sys\n'
      'from dynconv_jax import create_model, losses, sparse\n'
      'from dynconv_jax.cli import count_macs\n'
      'stack = "array_record chex dm_pix grain matplotlib PIL requests'
      ' safetensors tensorboardX tensorflow_datasets tqdm torch onnx"\n'
      'print([name for name in stack.split() if name in sys.modules])',
    ],
    check=True,
    capture_output=True,
    text=True,
  )
  assert run.stdout.strip() == '[]'
