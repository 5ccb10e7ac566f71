"""Tests of checkpoints of a small state: retention and fallback."""

import binascii
import pathlib
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest

from dynconv_jax.training import checkpoints

# orbax leaves coroutines behind if it fails to read or write.
pytestmark = [
  pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning'),
  pytest.mark.usefixtures('collected'),
]


def _state(step):
  return {'a': jnp.full((3, 2), float(step)), 'b': {'c': jnp.int32(step)}}


def _save_all(workdir, accuracies, keep=2):
  """Saves steps 10, 20, ... with these accuracies."""
  with checkpoints.open_manager(workdir, keep=keep) as manager:
    for i, accuracy in enumerate(accuracies, start=1):
      info = {'batches': {'step': 10 * i}, 'class_names': ['x', 'y']}
      checkpoints.save(manager, 10 * i, _state(10 * i), info, accuracy)
    checkpoints.wait(manager)


def _restore(workdir, **options):
  with checkpoints.open_manager(workdir, read_only=True) as manager:
    return checkpoints.restore(manager, checkpoints.like(_state(0)), **options)


def _steps(workdir):
  return sorted(
    int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit()
  )


@pytest.fixture(scope='module')
def three(tmp_path_factory):
  """A workdir of steps 20 (the best), 40 and 50, out of five."""
  workdir = tmp_path_factory.mktemp('three')
  _save_all(workdir, [0.1, 0.9, 0.3, 0.4, 0.5])
  return workdir


def test_the_latest_and_the_best_are_kept(three):
  assert _steps(three) == [20, 40, 50]
  with checkpoints.open_manager(three, read_only=True) as manager:
    assert checkpoints.best_step(manager) == 20
    assert checkpoints.read_info(manager)['class_names'] == ['x', 'y']


@pytest.mark.parametrize(('best', 'expected'), [(True, 20), (False, 50)])
def test_restores_the_best_or_the_latest(three, best, expected):
  state, info, step = _restore(three, best=best)
  assert step == expected
  assert info['batches'] == {'step': expected}
  np.testing.assert_array_equal(state['a'], np.full((3, 2), expected))
  assert state['b']['c'] == expected


def test_saves_without_an_accuracy(tmp_path):
  # For example one requested by a signal; it is no candidate for the best.
  _save_all(tmp_path, [0.2, None, None, None])
  assert _steps(tmp_path) == [10, 30, 40]
  assert _restore(tmp_path, best=True)[2] == 10
  assert _restore(tmp_path)[2] == 40


def _truncate(folder: pathlib.Path):
  for path in folder.rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _garble(folder: pathlib.Path):
  for path in folder.rglob('*'):
    if path.is_file():
      path.write_bytes(bytes(b ^ 0x5A for b in path.read_bytes()))


def _empty(folder: pathlib.Path):
  for path in folder.rglob('*'):
    if path.is_file():
      path.write_bytes(b'')


def _remove(folder: pathlib.Path):
  shutil.rmtree(folder)


@pytest.mark.parametrize('part', ['state', 'info', 'metrics', '.'])
@pytest.mark.parametrize('damage', [_truncate, _garble, _empty, _remove])
def test_a_damaged_newest_checkpoint(three, tmp_path, damage, part):
  workdir = tmp_path / 'copy'
  shutil.copytree(three, workdir)
  damage(workdir / 'checkpoints' / '50' / part)
  if part == 'metrics' or (part == '.' and damage is _remove):
    # Damages nothing that is restored, or nothing that is needed.
    assert _restore(workdir)[2] == (50 if part == 'metrics' else 40)
    return
  case = absltest.TestCase()
  with case.assertLogs(level='WARNING') as logs:
    state, info, step = _restore(workdir)
  assert step == 40
  np.testing.assert_array_equal(state['a'], np.full((3, 2), 40))
  assert info['batches'] == {'step': 40}
  text = '\n'.join(logs.output)
  assert 'cannot read the checkpoint of step 50' in text
  assert 'fell back to the checkpoint of step 40' in text


def test_no_missing_file_gives_wrong_values(three, tmp_path):
  folder = three / 'checkpoints' / '50'
  files = [p.relative_to(three) for p in folder.rglob('*') if p.is_file()]
  fell_back = 0
  for i, path in enumerate(files):
    workdir = tmp_path / str(i)
    shutil.copytree(three, workdir)
    (workdir / path).unlink()
    state, info, step = _restore(workdir)
    # Some files contain nothing that is needed.
    assert step in (40, 50), path
    np.testing.assert_array_equal(state['a'], np.full((3, 2), step))
    assert state['b']['c'] == step
    assert info['batches'] == {'step': step}
    fell_back += step == 40
  assert fell_back >= 3


def _flip(path: pathlib.Path, bit: int):
  content = bytearray(path.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


def test_no_flipped_bit_gives_wrong_values(tmp_path):
  rng = np.random.default_rng(0)
  weights = [rng.normal(size=(40, 10)).astype(np.float32) for _ in range(2)]
  like = {'a': jnp.zeros((40, 10)), 'key': jax.random.key(0)}
  original = tmp_path / 'original'
  with checkpoints.open_manager(original) as manager:
    for step, a in enumerate(weights):
      state = {'a': jnp.asarray(a), 'key': jax.random.key(step)}
      info = {'class_names': ['x', 'y'], 'batches': {'step': step}}
      checkpoints.save(manager, step, state, info, 0.25)
  newest = original / 'checkpoints' / '1'
  files = [p.relative_to(original) for p in newest.rglob('*') if p.is_file()]
  # The ones with the arrays and the one with the position in the data.
  files = [p for p in files if 'd' in p.parts[:-1] or 'info' in p.parts]
  outcomes = []
  for i in range(24):
    workdir = tmp_path / str(i)
    shutil.copytree(original, workdir)
    path = workdir / files[i % len(files)]
    _flip(path, int(rng.integers(8 * path.stat().st_size)))
    with checkpoints.open_manager(workdir, read_only=True) as manager:
      read = checkpoints.read_info(manager)
      state, info, step = checkpoints.restore(manager, checkpoints.like(like))
    np.testing.assert_array_equal(state['a'], weights[step])
    assert jnp.array_equal(
      jax.random.key_data(state['key']),
      jax.random.key_data(jax.random.key(step)),
    )
    assert info['batches'] == {'step': step}
    assert read['batches']['step'] in (0, 1)
    assert read['class_names'] == info['class_names'] == ['x', 'y']
    outcomes.append(step)
  assert outcomes.count(0) >= 4


def test_what_differs_from_its_checksum_is_named(three):
  state, info, _ = _restore(three)
  saved = {'state': state, 'info': info}
  checkpoints._verify(saved)
  # With another implementation of the same sum.
  content = np.full((3, 2), 50, np.float32).tobytes()
  assert saved['info']['checksums']['a'] == f'{binascii.crc32(content):08x}'
  saved['state']['b']['c'] = np.int32(51)
  saved['info']['batches'] = {'step': 51}
  with pytest.raises(ValueError, match='match its checksum: info, b.c$'):
    checkpoints._verify(saved)
  del saved['info']['class_names']
  with pytest.raises(ValueError, match='lacks class_names'):
    checkpoints._verify(saved)


def test_a_checkpoint_of_an_earlier_version_has_no_checksums(tmp_path):
  with mock.patch.object(checkpoints, '_checksums', return_value=None):
    _save_all(tmp_path, [0.5])
  assert _restore(tmp_path)[2] == 10


def test_a_damaged_best_falls_back_to_the_latest(three, tmp_path):
  workdir = tmp_path / 'copy'
  shutil.copytree(three, workdir)
  _truncate(workdir / 'checkpoints' / '20' / 'state')
  assert _restore(workdir, best=True)[2] == 50


def test_every_one_damaged_is_an_error_that_lists_them(three, tmp_path):
  workdir = tmp_path / 'copy'
  shutil.copytree(three, workdir)
  for step in (20, 40, 50):
    _empty(workdir / 'checkpoints' / str(step))
  with pytest.raises(checkpoints.CheckpointError) as error:
    _restore(workdir)
  for text in ('can be read', 'step 50: ', 'step 40: ', 'step 20: '):
    assert text in str(error.value)
  assert _steps(workdir) == [20, 40, 50]


def test_none_is_an_error(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(checkpoints.CheckpointError, match='no checkpoint in'):
    _restore(tmp_path)
  assert not checkpoints.exists(tmp_path)
  assert not checkpoints.exists(tmp_path / 'absent')


def test_what_could_not_be_read_comes_anew(three, tmp_path):
  workdir = tmp_path / 'copy'
  shutil.copytree(three, workdir)
  _empty(workdir / 'checkpoints' / '50' / 'state')
  with checkpoints.open_manager(workdir) as manager:
    _, info, step = checkpoints.restore(manager, checkpoints.like(_state(0)))
    assert step == 40
    # orbax would skip it, and the steps in between.
    with pytest.raises(RuntimeError, match='step 45 is not after'):
      checkpoints.save(manager, 45, _state(45), info, None)
    checkpoints.drop_after(manager, step)
    checkpoints.save(manager, 45, _state(45), info, None)
    checkpoints.save(manager, 50, _state(51), info, 0.6)
    checkpoints.wait(manager)
  state, _, step = _restore(workdir)
  assert step == 50
  np.testing.assert_array_equal(state['a'], np.full((3, 2), 51))


def test_a_half_written_checkpoint_is_none(three, tmp_path):
  workdir = tmp_path / 'copy'
  shutil.copytree(three, workdir)
  folder = workdir / 'checkpoints'
  # As a killed process leaves it.
  shutil.copytree(folder / '50', folder / '60.orbax-checkpoint-tmp')
  assert _restore(workdir)[2] == 50


def test_a_part_of_the_state_can_be_restored(three):
  with checkpoints.open_manager(three, read_only=True) as manager:
    state, _, _ = checkpoints.restore(
      manager, checkpoints.like({'b': {'c': jnp.int32(0)}})
    )
  assert list(state) == ['b']
  assert state['b']['c'] == 50


def test_a_state_of_another_shape_is_an_error(three):
  target = checkpoints.like({'a': jnp.zeros((5, 2)), 'b': {'c': jnp.int32(0)}})
  with (
    checkpoints.open_manager(three, read_only=True) as manager,
    pytest.raises(checkpoints.CheckpointError, match='step 50'),
  ):
    checkpoints.restore(manager, target)


def _other_value(folder: pathlib.Path):
  path = folder / 'metrics'
  path.write_text(path.read_text().replace('0.9', '0.1'))


def _nothing(folder: pathlib.Path):
  (folder / 'metrics').write_text('{}')


@pytest.mark.parametrize(
  'damage', [_truncate, _garble, _empty, _other_value, _nothing]
)
def test_damaged_metrics_only_cost_the_choice(three, tmp_path, damage):
  workdir = tmp_path / 'copy'
  shutil.copytree(three, workdir)
  damage(workdir / 'checkpoints' / '20' / 'metrics')
  assert _restore(workdir, best=True)[2] == 50
  with (
    absltest.TestCase().assertLogs(level='WARNING') as logs,
    checkpoints.open_manager(workdir) as manager,
  ):
    assert checkpoints.best_step(manager) == 50
    checkpoints.save(manager, 60, _state(60), {}, 0.45)
    checkpoints.wait(manager)
  assert 'removing the damaged' in logs.output[0]
  assert _steps(workdir) == [50, 60]


# Either at once, or when its threads are waited for: at the next save or the
# end.
@pytest.mark.parametrize('method', ['save', 'wait_until_finished', 'close'])
def test_a_failed_save_is_one_clear_error(three, tmp_path, method):
  workdir = tmp_path / 'copy'
  shutil.copytree(three, workdir)
  full = OSError(28, 'No space left on device')
  with (
    mock.patch.object(
      checkpoints.ocp.CheckpointManager, method, side_effect=full
    ),
    pytest.raises(
      OSError,
      match=r'cannot save .*No space left.*disk full.*Remaining .*: \[20, ',
    ),
    checkpoints.open_manager(workdir) as manager,
  ):
    checkpoints.save(manager, 60, _state(60), {}, None)
    checkpoints.wait(manager)


def test_the_first_error_is_told(tmp_path):
  full = OSError(28, 'No space left on device')
  with (
    mock.patch.object(
      checkpoints.ocp.CheckpointManager, 'close', side_effect=full
    ),
    pytest.raises(FloatingPointError, match='not finite'),
    checkpoints.open_manager(tmp_path),
  ):
    raise FloatingPointError('a loss is not finite')
