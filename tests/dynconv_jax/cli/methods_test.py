"""Tests that each method's flag file learns classes and where to compute."""

import json
import pathlib

import pytest

from dynconv_jax.cli import config_flags

_FLAGS = pathlib.Path(config_flags.__file__).parent / 'flags'


@pytest.mark.slow
@pytest.mark.parametrize(
  ('method', 'accuracy', 'least', 'most'),
  [
    ('convnet_aig', 0.5, 0.5, 0.9),
    ('sact', 0.9, 0.75, 0.97),
    ('act', 0.55, 0.05, 0.5),
  ],
)
def test_half_as_wide_on_spots(
  program, trained, tmp_path, method, accuracy, least, most
):
  """Chance is 1 / 6; the bounds are for the executed fraction."""
  folder = tmp_path / method
  printed = program(
    'train',
    f'--flagfile={_FLAGS / f"spots_{method}.flags"}',
    f'--workdir={folder}',
    f'--data_dir={trained / "data"}',
    '--width_multiplier=0.5',
  )
  assert f'cifar_resnet14 {method}, step 504' in printed
  assert ('(budget 0.5)' in printed) == (method == 'convnet_aig')
  lines = program('evaluate', f'--workdir={folder}', '--split=test')
  summary = json.loads(lines.splitlines()[-1])
  assert summary['accuracy'] > accuracy
  assert least < summary['executed_fraction'] < most
  assert summary['gmacs_mean'] < summary['gmacs_dense']
  assert ('budget' in summary) == (method == 'convnet_aig')
  # Only SACT distinguishes positions: it ponders on the object.
  more = summary['object_recall'] - summary['background_density']
  assert more > 0.05 if method == 'sact' else abs(more) < 1e-6
