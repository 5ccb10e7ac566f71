"""Tests of exporting weights and importing them into a new workdir."""

import json

import numpy as np
import pytest

from dynconv_jax import interop
from dynconv_jax.training import loop, workdir

_MODEL = ('--model=cifar_resnet8', '--width_multiplier=0.25')
_SPOTS = ('--spots_size=24', '--spots_train=64', '--spots_test=20')


@pytest.fixture(scope='module')
def exported(program, dynconv_run, tmp_path_factory):
  path = tmp_path_factory.mktemp('exported') / 'w.safetensors'
  stdout = program(
    'export_weights', f'--workdir={dynconv_run}', f'--output={path}'
  )
  assert stdout.startswith(f'wrote {path}, step ')
  return path


def _import(program, path, folder, *more):
  return program(
    'import_weights',
    f'--from_torch={path}',
    f'--workdir={folder}',
    '--method=dynconv',
    *_MODEL,
    *more,
  )


def _assert_same(run, other):
  weights = interop.to_torch_state_dict(run.model)
  for name, array in interop.to_torch_state_dict(other.model).items():
    np.testing.assert_array_equal(array, weights[name], name)


def test_an_imported_network_is_a_run_to_other_programs(
  program, dynconv_run, exported, tmp_path
):
  folder = tmp_path / 'imported'
  data = f'--data_dir={dynconv_run.parent.parent / "data"}'
  places = ('--dataset=spots', '--image_size=24', '--crop=none', data, *_SPOTS)
  stdout = _import(program, exported, folder, *places)
  run, trained = workdir.load_run(folder), workdir.load_run(dynconv_run)
  assert stdout.split(': ')[0] == (
    f'cifar_resnet8 dynconv, {len(trained.class_names)} classes'
  )
  assert run.class_names == trained.class_names
  assert run.step == 0
  _assert_same(run, trained)
  record = json.loads((folder / 'imported.json').read_text())
  assert record == {'source': str(exported)}
  accuracies = [
    json.loads(
      program('evaluate', f'--workdir={w}', '--num_maps=0').splitlines()[-1]
    )['accuracy']
    for w in (folder, dynconv_run)
  ]
  assert accuracies[0] == accuracies[1]
  with pytest.raises(ValueError, match='contains imported weights, not a run'):
    loop.train(workdir.read_config(folder), folder)
  with pytest.raises(ValueError, match='contains a run; choose another'):
    _import(program, exported, folder, *places)


def test_moving_averages_and_numbered_classes(
  program, dynconv_run, exported, tmp_path
):
  folder = tmp_path / 'imported'
  _import(program, exported, folder, '--ema_decay=0.9')
  run = workdir.load_run(folder)
  _assert_same(run, workdir.load_run(dynconv_run))
  count = interop.num_classes(interop.read_state_dict(exported))
  assert run.class_names == tuple(map(str, range(count)))


def test_errors(program, exported, tmp_path):
  names = tmp_path / 'names.txt'
  names.write_text('only\n')
  twice = tmp_path / 'twice.txt'
  twice.write_text('a\nb\nc\nb\na\nd\n')
  for flags, message in (
    (['--num_classes=1000'], 'num_classes must be'),
    (['--pretrained=a.pth'], 'from --from_torch; do not set'),
    ([f'--class_names={names}'], r'names\.txt has 1 classes'),
    ([f'--class_names={twice}'], r'twice\.txt lists classes twice: a, b'),
    (['--method=dense'], r'unexpected: layer1\.0\.masker'),
    (['--model=cifar_resnet14'], r'missing: .*layer1\.1\.conv1'),
  ):
    with pytest.raises(ValueError, match=message):
      _import(program, exported, tmp_path / 'imported', *flags)
    assert not (tmp_path / 'imported').exists()


@pytest.mark.slow
def test_training_starts_from_a_file(
  program, dynconv_run, exported, tmp_path, caplog
):
  """Gates of another method and a classifier of another size are new."""
  weights = interop.read_state_dict(exported)
  dense = {k: v for k, v in weights.items() if 'masker' not in k}
  dense['fc.weight'] = np.ones((7, dense['fc.weight'].shape[1]), np.float32)
  dense['fc.bias'] = np.ones(7, np.float32)
  path = tmp_path / 'dense.safetensors'
  interop.write_safetensors(path, dense)
  config = workdir.read_config(dynconv_run)
  config = config.replace(
    pretrained=str(path), learning_rate=1e-12, weight_decay=0.0
  )
  with caplog.at_level('INFO'):
    loop.train(config, tmp_path / 'run')
  (line,) = [t for t in caplog.messages if t.startswith('newly initialized')]
  assert 'fc.weight' in line and 'masker' in line
  started = workdir.load_run(tmp_path / 'run').model
  trained = interop.to_torch_state_dict(started)
  fresh = interop.to_torch_state_dict(
    workdir.build_model(config, len(trained['fc.bias']))
  )
  # A resumed run does not need its initial weights.
  path.unlink()
  loop.train(config.replace(epochs=2), tmp_path / 'run')
  with pytest.raises(ValueError, match='no file .*dense.safetensors'):
    loop.train(config, tmp_path / 'new')
  assert not (tmp_path / 'new').exists()
  for name, array in trained.items():
    if name.endswith('.weight') or name.endswith('.bias'):
      same = fresh if 'masker' in name or name.startswith('fc') else dense
      np.testing.assert_allclose(array, same[name], atol=1e-6, err_msg=name)


def test_two_sources_of_weights(dynconv_run, exported, tmp_path):
  config = workdir.read_config(dynconv_run)
  config = config.replace(pretrained=str(exported), init_from=str(dynconv_run))
  with pytest.raises(
    ValueError, match='init_from and pretrained are mutually exclusive'
  ):
    loop.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
