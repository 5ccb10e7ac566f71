"""Tests of the program that writes StableHLO."""

import numpy as np
import pytest
from jax import export

from dynconv_jax.training import workdir

pytest.importorskip('flatbuffers', reason='pip install dynconv_jax[stablehlo]')


def test_a_trained_network_leaves_its_workdir(program, dynconv_run, tmp_path):
  path = tmp_path / 'new' / 'network.stablehlo'
  run = workdir.load_run(dynconv_run)
  printed = program(
    'export_stablehlo',
    f'--workdir={dynconv_run}',
    f'--output={path}',
    '--platforms=cpu,tpu',
  )
  assert printed.startswith(f'wrote {path}, step {run.step}, normalization')
  network = export.deserialize(bytearray(path.read_bytes()))
  assert network.platforms == ('cpu', 'tpu')
  images = np.random.default_rng(0).normal(size=(5, 24, 24, 3))
  expected, masks = run.model(images.astype(np.float32))
  logits, density = network.call(images.astype(np.float32))
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * scale)
  np.testing.assert_allclose(
    density, np.stack([mask.density() for mask in masks], 1), rtol=1e-6
  )


def test_errors(program, dynconv_run, tmp_path):
  with pytest.raises(ValueError, match='unknown arguments: more'):
    program(
      'export_stablehlo', 'more', f'--workdir={dynconv_run}', '--output=x'
    )
  with pytest.raises(ValueError, match="unknown platform 'gpu'"):
    program(
      'export_stablehlo',
      f'--workdir={dynconv_run}',
      f'--output={tmp_path / "x"}',
      '--platforms=gpu',
    )
  with pytest.raises(FileNotFoundError, match=str(tmp_path)):
    program('export_stablehlo', f'--workdir={tmp_path}', '--output=x')
