"""Tests of the program that writes ONNX models."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dynconv_jax.training import workdir

onnx = pytest.importorskip('onnx', reason='pip install dynconv_jax[onnx]')
onnxruntime = pytest.importorskip(
  'onnxruntime', reason='pip install dynconv_jax[onnx]'
)


@pytest.mark.parametrize('form', ['sparse', 'dense'])
def test_a_trained_network_leaves_its_workdir(
  program, dynconv_run, tmp_path, form
):
  path = tmp_path / 'new' / 'network.onnx'
  run = workdir.load_run(dynconv_run)
  printed = program(
    'export_onnx',
    f'--workdir={dynconv_run}',
    f'--output={path}',
    f'--form={form}',
  )
  assert printed == f'wrote {path}, step {run.step}\n'
  assert [file.name for file in path.parent.iterdir()] == ['network.onnx']
  images = np.random.default_rng(0).normal(size=(5, 24, 24, 3))
  images = images.astype(np.float32)
  expected, masks = run.model(images)
  logits, density = onnxruntime.InferenceSession(path).run(
    None, {'images': images}
  )
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * scale)
  np.testing.assert_allclose(
    density, np.stack([mask.density() for mask in masks], 1), rtol=1e-6
  )
  properties = {p.key: p.value for p in onnx.load(path).metadata_props}
  assert properties['method'] == 'dynconv'
  assert json.loads(properties['class_names']) == list(run.class_names)
  assert json.loads(properties['mean']) == [0.485, 0.456, 0.406]


def test_the_model_says_how_its_images_are_normalized(
  program, dynconv_run, tmp_path
):
  folder, path = tmp_path / 'run', tmp_path / 'network.onnx'
  shutil.copytree(dynconv_run, folder)
  config = workdir.read_config(folder).replace(normalization='inception')
  workdir.write_flags(folder, config)
  program('export_onnx', f'--workdir={folder}', f'--output={path}')
  properties = {p.key: p.value for p in onnx.load(path).metadata_props}
  assert json.loads(properties['mean']) == [127 / 255] * 3
  assert json.loads(properties['std']) == [128 / 255] * 3


def test_errors(program, dynconv_run, tmp_path):
  with pytest.raises(ValueError, match='must end in .onnx; got .*model.pb'):
    program('export_onnx', f'--workdir={dynconv_run}', '--output=model.pb')
  with pytest.raises(ValueError, match='unknown arguments: more'):
    program(
      'export_onnx', 'more', f'--workdir={dynconv_run}', '--output=x.onnx'
    )
  with pytest.raises(FileNotFoundError, match=str(tmp_path)):
    program('export_onnx', f'--workdir={tmp_path}', '--output=x.onnx')


def test_without_onnx_there_is_one_line():
  code = (
    "import sys; sys.modules['onnx'] = None; "
    'from dynconv_jax.cli import command; '
    "command.run('export_onnx', ['--workdir=x', '--output=x.onnx'])"
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and "'dynconv-jax[onnx]'" in line
