"""Tests that a network from the zoo equals the original."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from dynconv_jax import interop
from dynconv_jax.interop import zoo
from dynconv_jax.training import loop, workdir
from dynconv_jax.training.published import load_published, save_published


@pytest.fixture
def run(dynconv_run, tmp_path):
  """A copy of a trained run, with an evaluation."""
  folder = tmp_path / 'run'
  shutil.copytree(dynconv_run, folder)
  evaluation = {
    'step': 3,
    'accuracy': 0.5,
    'accuracy_low': 0.25,
    'accuracy_high': 0.75,
    'num_examples': 20,
    'gmacs_mean': 0.125,
    'gmacs_p50': 0.12,
    'gmacs_p95': 0.13,
    'gmacs_dense': 0.25,
    'executed_fraction': 0.4,
  }
  (folder / 'evaluation_test.json').write_text(json.dumps(evaluation))
  return folder


@pytest.fixture
def packed(program, run, tmp_path, monkeypatch):
  """The folder of a packed network, which is in the index as zoo:small."""
  folder, index = tmp_path / 'zoo', tmp_path / 'index.json'
  printed = program(
    'export_zoo',
    f'--workdir={run}',
    '--name=small',
    f'--output_dir={folder}',
    f'--index={index}',
  )
  assert printed.startswith(f'wrote {folder / "small.safetensors"} (')
  known = json.loads(index.read_text())
  monkeypatch.setattr(zoo, 'entries', lambda: known)
  monkeypatch.setenv(zoo.VARIABLE, str(folder))
  return folder


def test_packed_and_loaded_by_name(packed, run, dynconv_run):
  path = packed / 'small.safetensors'
  entry = zoo.entry('zoo:small')
  assert entry['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
  assert (entry['accuracy'], entry['gmacs']) == (0.5, 0.125)
  assert entry['flags']['method'] == 'dynconv'
  assert entry['url'] is None
  # It contains no path of this machine.
  header = interop.read_metadata(path)
  assert str(dynconv_run.parent.parent) not in json.dumps(header)
  assert 'data_dir' not in json.loads(header['flags'])
  trained = workdir.load_run(dynconv_run)
  for source in ('zoo:small', str(path)):
    loaded = load_published(source)
    for name in ('class_names', 'step', 'resize_ratio', 'normalization'):
      assert getattr(loaded, name) == getattr(trained, name), name
    assert loaded.network == trained.network
    images = np.random.default_rng(0).normal(size=(3, 24, 24, 3))
    images = images.astype(np.float32)
    (logits, masks), (expected, expected_masks) = (
      r.model(images) for r in (loaded, trained)
    )
    np.testing.assert_array_equal(logits, expected)
    for mask, other in zip(masks, expected_masks, strict=True):
      np.testing.assert_array_equal(mask.hard, other.hard)


def test_the_same_network_is_the_same_file(program, packed, run, tmp_path):
  again = tmp_path / 'again'
  program(
    'export_zoo',
    f'--workdir={run}',
    '--name=small',
    f'--output_dir={again}',
    f'--index={tmp_path / "index.json"}',
    '--url=https://example.org/small.safetensors',
  )
  for name in ('small.safetensors', 'small.md'):
    assert (again / name).read_bytes() == (packed / name).read_bytes()
  url = json.loads((tmp_path / 'index.json').read_text())['small']['url']
  assert url == 'https://example.org/small.safetensors'


def test_training_starts_from_it(packed, run, tmp_path):
  config = workdir.read_config(run)
  folder = tmp_path / 'next'
  config = config.replace(
    pretrained='zoo:small', learning_rate=1e-9, momentum=0.0, weight_decay=0.0
  )
  loop.train(config, folder)
  before = interop.read_state_dict(packed / 'small.safetensors')
  after = interop.to_torch_state_dict(workdir.load_run(folder).model)
  for name in ('conv1.weight', 'layer1.0.masker.maskconv.conv.weight'):
    np.testing.assert_allclose(after[name], before[name], atol=1e-6)


def test_the_card(packed):
  card = (packed / 'small.md').read_text()
  assert card.startswith('---\nlibrary_name: dynconv_jax\n')
  entry = zoo.entry('zoo:small')
  for row in (
    '| Network | `cifar_resnet8`, dynconv gates |',
    '| Options | defaults |',
    '| Accuracy | 0.500 (95 % interval 0.250 to 0.750) |',
    '| GMACs per image | 0.1250 on average, 0.1200 median, 0.1300 95th',
    '| GMACs without gates | 0.2500 |',
    '| Executed fraction | 0.400 |',
    f'| SHA-256 | `{entry["sha256"]}` |',
    '--pretrained=zoo:small',
    '\n--budget=0.5\n',
  ):
    assert row in card
  assert str(packed.parent) not in card


@pytest.mark.parametrize(
  ('change', 'more', 'message'),
  [
    ('none', '--name=Small one', 'name must consist of lowercase letters'),
    ('unlink', '--name=small', 'evaluation_test.json: run dynconv evaluate'),
    ('step', '--name=small', 'best checkpoint is of step 3, but .* step 2'),
    ('linear', '--name=small', 'has --convention=conv.linear. Evaluate again'),
  ],
)
def test_errors_leave_nothing(program, run, tmp_path, change, more, message):
  path = run / 'evaluation_test.json'
  if change == 'unlink':
    path.unlink()
  elif change == 'step':
    path.write_text(path.read_text().replace('"step": 3', '"step": 2'))
  elif change == 'linear':
    evaluation = json.loads(path.read_text()) | {'convention': 'conv+linear'}
    path.write_text(json.dumps(evaluation))
  index = tmp_path / 'index.json'
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    program(
      'export_zoo',
      f'--workdir={run}',
      f'--output_dir={tmp_path / "zoo"}',
      f'--index={index}',
      more,
    )
  assert not (tmp_path / 'zoo').exists()
  assert not index.exists()


def test_a_run_from_before_an_option(run, tmp_path):
  """The run's flags lack the normalization, but the file contains it."""
  flags = run / 'flags.txt'
  lines = flags.read_text().splitlines()
  kept = [line for line in lines if not line.startswith('--normalization=')]
  assert len(kept) == len(lines) - 1
  flags.write_text('\n'.join(kept) + '\n')
  old, path = workdir.load_run(run), tmp_path / 'old.safetensors'
  save_published(path, old, run)
  loaded = load_published(str(path))
  assert loaded.normalization == old.normalization == 'imagenet'
  assert interop.source_normalization(str(path)) == 'imagenet'
