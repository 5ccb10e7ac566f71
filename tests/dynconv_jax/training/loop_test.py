"""Tests of whole runs on a few images: interrupted, damaged, full disks."""

import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import warnings
from unittest import mock

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl.testing import absltest
from flax import nnx
from PIL import Image

from dynconv_jax.data import spots
from dynconv_jax.data.decode import CorruptImageError
from dynconv_jax.files import locked
from dynconv_jax.models.resnet import ARCHITECTURES
from dynconv_jax.training import (
  checkpoints,
  initialization,
  loop,
  records,
  workdir,
)
from dynconv_jax.training.state import CHECKED

# orbax leaves coroutines behind if it fails to read or write.
pytestmark = [
  pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning'),
  pytest.mark.usefixtures('collected'),
]


def _steps(folder: pathlib.Path) -> list[int]:
  return sorted(
    int(p.name) for p in (folder / 'checkpoints').iterdir() if p.name.isdigit()
  )


def _saved(folder: pathlib.Path, step: int):
  """Returns the full contents of a checkpoint, read without our own code."""
  path = folder / 'checkpoints' / str(step)
  with ocp.PyTreeCheckpointer() as reader, warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Sharding info not provided')
    state = reader.restore(path / 'state')
  info = json.loads((path / 'info' / 'metadata').read_text())
  state['key'] = np.asarray(jax.random.key_data(state['key']))
  return jax.tree.map(np.asarray, state), info


def _assert_same_run(folder, expected, step=14):
  state, info = _saved(folder, step)
  expected_state, expected_info = _saved(expected, step)
  assert {'params', 'model_state', 'opt_state', 'ema'} <= set(state)
  chex.assert_trees_all_equal(state, expected_state)
  assert _untimed(info) == _untimed(expected_info)
  rows, expected_rows = map(workdir.read_metrics, (folder, expected))
  assert [*map(_untimed, rows)] == [*map(_untimed, expected_rows)]


def _untimed(values):
  values = {name: v for name, v in values.items() if name != 'seconds'}
  if 'checksums' in values:  # The info contains elapsed seconds.
    values['checksums'] = {**values['checksums'], 'info': ''}
  return values


def _interrupt_at(step, number=signal.SIGTERM):
  """Returns a patch that sends a signal while a step is being reported."""
  update = records.Progress.update

  def interrupted(self, shown, metrics):
    update(self, shown, metrics)
    if shown == step - 1:
      os.kill(os.getpid(), number)

  return mock.patch.object(records.Progress, 'update', interrupted)


def _contents(folder):
  return {
    str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
    for p in sorted(folder.rglob('*'))
    if p.is_file()
  }


def test_the_summary_and_what_lies_in_the_workdir(config, finished):
  rows = workdir.read_metrics(finished)
  assert [(r['split'], r['step'], r['epoch']) for r in rows] == [
    ('train', 7, 1),
    ('validation', 7, 1),
    ('train', 14, 2),
    ('validation', 14, 2),
  ]
  assert rows[0]['budget'] == config.method.options.budget
  # Cosine over 14 steps, at the steps with index 6 and 13.
  for row, step in ((rows[0], 6), (rows[2], 13)):
    expected = (
      config.optimization.learning_rate * (1 + np.cos(np.pi * step / 14)) / 2
    )
    np.testing.assert_allclose(row['learning_rate'], expected, rtol=1e-5)
  assert rows[1]['num_examples'] == 6
  assert _steps(finished) == [7, 14]
  assert workdir.read_config(finished) == config.replace(
    normalization='imagenet'
  )
  # A finished run has nothing left to do, and reports the same.
  summary = loop.train(config, finished)
  assert summary['step'] == 14
  assert summary['train'] == rows[2]
  assert summary['validation'] == rows[3]
  accuracies = {7: rows[1]['accuracy'], 14: rows[3]['accuracy']}
  assert summary['best_accuracy'] == max(accuracies.values())
  assert accuracies[summary['best_step']] == summary['best_accuracy']
  assert workdir.read_metrics(finished) == rows


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('frozen', 'layer9'),
    ('learning_rate_factors', 'layer9:2'),
    ('learning_rate_factors', 'layer9:0'),
  ],
)
def test_a_pattern_without_a_match_is_an_error_before_decoding(
  config, tmp_path, name, value
):
  config = config.replace(**{name: (value,)})
  with (
    mock.patch.object(loop.inputs, 'train_batches') as decoding,
    pytest.raises(ValueError, match=f'matches {name}: layer9'),
  ):
    loop.train(config, tmp_path / 'run')
  decoding.assert_not_called()


@pytest.mark.parametrize('reverse', [False, True])
def test_a_start_from_other_classes_has_a_warning(
  config, finished, tmp_path, reverse
):
  names = spots.CLASS_NAMES[::-1] if reverse else spots.CLASS_NAMES
  config = config.replace(init_from=str(finished), classes=names)
  with (
    mock.patch.object(loop.inputs, 'train_batches', side_effect=KeyError),
    mock.patch.object(loop.logging, 'warning') as warning,
    pytest.raises(KeyError),
  ):
    loop.train(config, tmp_path / 'run')
  calls = [call.args for call in warning.call_args_list]
  found = [args[1:] for args in calls if args[0].startswith('init_from')]
  expected = (str(finished), ', '.join(spots.CLASS_NAMES), ', '.join(names))
  assert found == ([expected] if reverse else [])


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='Windows')
def test_hanging_up_saves_unless_it_is_ignored():
  old = signal.getsignal(signal.SIGHUP)
  try:
    for before, expected in (
      (signal.SIG_DFL, [signal.SIGHUP]),
      (signal.SIG_IGN, []),  # as under nohup
    ):
      signal.signal(signal.SIGHUP, before)
      with loop._signals() as received:
        os.kill(os.getpid(), signal.SIGHUP)
      assert received == expected
      assert signal.getsignal(signal.SIGHUP) == before
  finally:
    signal.signal(signal.SIGHUP, old)


def test_interrupted_twice_equals_uninterrupted(config, finished, tmp_path):
  handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  with (
    _interrupt_at(4),
    pytest.raises(
      loop.Interrupted,
      match=r'SIGTERM: saved step 4 of 14 in .*; the same command resumes',
    ) as interrupted,
  ):
    loop.train(config, tmp_path)
  assert interrupted.value.signal == signal.SIGTERM
  assert _steps(tmp_path) == [4]
  assert workdir.read_metrics(tmp_path) == []
  # At the end of an epoch, which is evaluated and is a candidate for the best.
  with (
    _interrupt_at(7, signal.SIGINT),
    pytest.raises(
      loop.Interrupted, match='SIGINT: saved step 7'
    ) as interrupted,
  ):
    loop.train(config, tmp_path)
  assert interrupted.value.signal == signal.SIGINT
  assert [r['step'] for r in workdir.read_metrics(tmp_path)] == [7, 7]
  # As if it had been killed after it wrote more.
  with (tmp_path / workdir.METRICS_FILE).open('a') as file:
    file.write('{"step": 9, "split": "train"}\n{"step": 9, "spl')
  # Paths and reporting options may differ.
  other = config.replace(keep_checkpoints=3, log_every_steps=5)
  loop.train(other, tmp_path)
  _assert_same_run(tmp_path, finished)
  assert workdir.read_config(tmp_path) == other.replace(
    normalization='imagenet'
  )
  assert handlers == [
    signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)
  ]


def test_with_more_epochs_a_run_goes_on_from_its_step(config, tmp_path):
  # A rate that does not depend on the total, as if it had always been so long.
  config = config.replace(method='dense', schedule='step', milestones=())
  loop.train(config.replace(epochs=1), tmp_path / 'parts')
  loop.train(config.replace(epochs=2), tmp_path / 'parts')
  loop.train(config.replace(epochs=2), tmp_path / 'whole')
  _assert_same_run(tmp_path / 'parts', tmp_path / 'whole')
  with pytest.raises(ValueError, match='epochs must be at least 2'):
    loop.train(config.replace(epochs=1), tmp_path / 'parts')


def test_schedules_are_those_of_the_new_total(config, finished, tmp_path):
  shutil.copytree(finished, tmp_path / 'run')
  loop.train(config.replace(epochs=3), tmp_path / 'run')
  rows = workdir.read_metrics(tmp_path / 'run')
  assert rows[:4] == workdir.read_metrics(finished)
  # Cosine over 21 steps, at the step with index 20.
  expected = config.optimization.learning_rate * (
    (1 + np.cos(np.pi * 20 / 21)) / 2
  )
  np.testing.assert_allclose(rows[4]['learning_rate'], expected, rtol=1e-5)
  assert (rows[4]['step'], rows[4]['epoch']) == (21, 3)


def test_seconds_are_of_all_sessions(config, tmp_path):
  # A clock that advances by one second per reading.
  clock = mock.Mock(monotonic=mock.Mock(side_effect=itertools.count()))
  with mock.patch.object(loop, 'time', clock):
    with _interrupt_at(7), pytest.raises(loop.Interrupted):
      loop.train(config, tmp_path)
    loop.train(config, tmp_path)
  # Each session reads it at the beginning, for the row, and for the checkpoint.
  rows = workdir.read_metrics(tmp_path)
  assert [row['seconds'] for row in rows] == [1, 1, 2 + 1, 2 + 1]
  assert [_saved(tmp_path, step)[1]['seconds'] for step in (7, 14)] == [2, 4]


def test_images_decoded_each_time_resume_as_well(config, tmp_path):
  config = config.replace(cache='none', color_jitter=0.3)
  loop.train(config, tmp_path / 'whole')
  with _interrupt_at(9), pytest.raises(loop.Interrupted, match='step 9 of 14'):
    loop.train(config, tmp_path / 'parts')
  loop.train(config, tmp_path / 'parts')
  _assert_same_run(tmp_path / 'parts', tmp_path / 'whole')


def test_another_configuration_is_refused(config, finished):
  before = _contents(finished)
  other = config.replace(budget=0.25, batch_size=16, keep_checkpoints=7)
  with pytest.raises(ValueError, match='a different configuration') as error:
    loop.train(other, finished)
  assert 'budget: 0.25, not 0.5; batch_size: 16, not 8' in str(error.value)
  assert 'keep_checkpoints' not in str(error.value)
  assert _contents(finished) == before


def test_a_run_is_refused_before_there_is_any_work(
  config, tmp_path, monkeypatch
):
  monkeypatch.setattr(loop.inputs, 'open_splits', None)
  with (
    locked(tmp_path / 'held', 'training'),
    pytest.raises(
      OSError, match=rf'held is in use by process {os.getpid()} on .*training'
    ),
  ):
    loop.train(config, tmp_path / 'held')
  (tmp_path / 'file').write_text('')
  for place in (tmp_path / 'file', pathlib.Path('/proc/run')):
    with pytest.raises(OSError, match=f'cannot write to the folder {place}'):
      loop.train(config, place)
  several = config.replace(grad_accum_steps=3, fsdp=3)
  message = 'times grad_accum_steps, 3; got 8; fsdp must divide .*1; got 3'
  with pytest.raises(ValueError, match=message):
    loop.train(several, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_damaged_checkpoint_is_trained_again(config, finished, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(finished, copy)
  for path in (copy / 'checkpoints' / '14' / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(b'')
  # The previous checkpoint is loaded, and a message says so.
  with absltest.TestCase().assertLogs(level='WARNING') as logs:
    run = workdir.load_run(copy, best=False)
  assert run.step == 7
  assert 'fell back to the checkpoint of step 7' in '\n'.join(logs.output)
  with absltest.TestCase().assertLogs(level='WARNING') as logs:
    loop.train(config, copy)
  text = '\n'.join(logs.output)
  assert 'fell back to the checkpoint of step 7' in text
  assert 'deleting the damaged checkpoint of step 14' in text
  _assert_same_run(copy, finished)


def test_all_checkpoints_damaged(config, finished, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(finished, copy)
  for path in (copy / 'checkpoints').rglob('*'):
    if path.is_file():
      path.write_bytes(b'')
  for call in (
    lambda: loop.train(config, copy),
    lambda: workdir.load_run(copy),
  ):
    with pytest.raises(checkpoints.CheckpointError, match='step 14.*step 7'):
      call()


def test_a_value_that_is_not_finite_ends_the_run(config, tmp_path):
  class Spoilt(loop.inputs.TrainBatches):
    def __next__(self):
      batch = super().__next__()
      if self.step == 9:  # the ninth batch has been taken
        batch['image'] = batch['image'].at[3].set(np.nan)
      return batch

  with (
    mock.patch.object(loop.inputs, 'TrainBatches', Spoilt),
    pytest.raises(
      FloatingPointError, match='cross_entropy is not finite at step 9; the'
    ),
  ):
    loop.train(config.replace(log_every_steps=50), tmp_path)
  assert CHECKED[0] == 'cross_entropy'
  assert _steps(tmp_path) == [7]
  assert [r['step'] for r in workdir.read_metrics(tmp_path)] == [7, 7]
  run = workdir.load_run(tmp_path)
  assert run.step == 7
  chex.assert_tree_all_finite(run.model.fc.kernel[...])


def test_a_full_disk(config, tmp_path):
  folder = tmp_path / 'disk'
  folder.mkdir()
  mounted = (
    os.geteuid() == 0
    and not subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', folder],
      capture_output=True,
      check=False,
    ).returncode
  )
  if not mounted:
    pytest.skip('only root can mount a small disk')
  run, filler = folder / 'run', folder / 'filler'
  write = records.Records.write

  def filling(self, row):
    if row['step'] == 14 and not filler.exists():
      while not (run / 'checkpoints' / '7').exists():
        time.sleep(0.01)  # it is written during training
      with open(filler, 'wb', 0) as file, pytest.raises(OSError, match='space'):
        while True:
          file.write(b'x' * 512)
    write(self, row)

  try:
    # Either may be the first to run out of space: small files share a page.
    with (
      mock.patch.object(records.Records, 'write', filling),
      pytest.raises(OSError, match=r'cannot (write metrics|save a checkpoint)'),
    ):
      loop.train(config, run)
    assert _steps(run) == [7]
    assert workdir.load_run(run).step == 7
    assert workdir.read_config(run) == config.replace(normalization='imagenet')
    filler.unlink()
    loop.train(config, run)
    assert _steps(run) == [7, 14]
    assert len(workdir.read_metrics(run)) == 4
  finally:
    subprocess.run(['umount', folder], check=True)


def test_nothing_is_compiled_after_the_first_epoch(config, tmp_path):
  traced = []  # One entry per compilation, 'epoch' at the end of each epoch.
  validated = records.Records.show_masks

  def listen(event, duration, **unused):
    if event == '/jax/core/compile/backend_compile_duration':
      traced.append('compile')

  def ended(self, *args):
    validated(self, *args)
    traced.append('epoch')

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    with mock.patch.object(records.Records, 'show_masks', ended):
      loop.train(
        config.replace(epochs=3, checkpoint_every_epochs=3),
        tmp_path,
      )
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  first, second, third = (
    ' '.join(traced).split('epoch')[i].split() for i in range(3)
  )
  assert first, 'the listener hears of compilations'
  assert not second
  assert not third


@pytest.mark.slow
def test_starts_from_a_dense_run_that_also_teaches(config, tmp_path):
  dense = config.replace(method='dense', epochs=1, ema_decay=0.0)
  loop.train(dense, tmp_path / 'dense')
  before = workdir.load_run(tmp_path / 'dense')
  student = config.replace(
    init_from=str(tmp_path / 'dense'),
    distill_from=str(tmp_path / 'dense'),
    mask_bias=3.0,
    gumbel_noise_until=0.0,
    learning_rate=1e-12,
    weight_decay=0.0,
    ema_decay=0.0,
    epochs=1,
    validation_split='none',
  )
  summary = loop.train(student, tmp_path / 'student')
  after = workdir.load_run(tmp_path / 'student')
  # A zero learning rate keeps the initial weights.
  np.testing.assert_allclose(
    after.model.layer2[0].conv1.kernel[...],
    before.model.layer2[0].conv1.kernel[...],
    atol=1e-9,
  )
  np.testing.assert_allclose(
    after.model.layer1[0].masker.maskconv.conv.bias[...], [3.0], atol=1e-6
  )
  assert summary['train']['executed_fraction'] > 0.9
  assert summary['train']['distillation'] > 0
  assert 'validation' not in summary
  assert summary['best_step'] is None
  again = workdir.load_run(tmp_path / 'dense')
  chex.assert_trees_all_equal(
    *(
      jax.tree.leaves(
        jax.tree.map(np.asarray, loop.state_lib.split(r.model)[1:])
      )
      for r in (before, again)
    )
  )
  # Once started, it no longer needs the run that it started from.
  with mock.patch.object(initialization, 'initialize_from') as initialize:
    loop.train(student, tmp_path / 'student')
  initialize.assert_not_called()
  with pytest.raises(ValueError, match='was trained on the classes'):
    workdir.load_teacher(
      student,
      ('disc', 'ring'),
      jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )


def test_corrupt_images_stop_the_run_or_are_counted(config, tmp_path):
  for split, number in (('train', 20), ('test', 4)):
    for i in range(number):
      folder = tmp_path / 'pets' / split / ('cat', 'dog')[i % 2]
      folder.mkdir(parents=True, exist_ok=True)
      path = folder / f'{i}.png'
      Image.new('RGB', (20, 20), (10 * i, 0, 99)).save(path)
    path.write_bytes(path.read_bytes()[:40])  # the last of each
  config = config.replace(
    dataset='image_folder',
    image_folder_dir=str(tmp_path / 'pets'),
    train_split='train',
    validation_split='test',
    test_split='none',
    method='dense',
    ema_decay=0.0,
    epochs=1,
  )
  with pytest.raises(CorruptImageError, match='png'):
    loop.train(config, tmp_path / 'stops')
  config = config.replace(skip_corrupt=True)
  with absltest.TestCase().assertLogs(level='WARNING') as logs:
    summary = loop.train(config, tmp_path / 'skips')
  assert summary['skipped'] == 2
  assert summary['validation']['num_examples'] == 3
  assert 'skipping the corrupt image' in '\n'.join(logs.output)


def _narrow(*, width_multiplier=1.0, narrow_by=0.5, **kwargs):
  factory = ARCHITECTURES['cifar_resnet8']
  return factory(width_multiplier=narrow_by * width_multiplier, **kwargs)


def test_network_and_data_from_python_equal_those_by_name(
  config, finished, tmp_path
):
  config = config.replace(width_multiplier=0.5)
  loop.train(config, tmp_path, model=_narrow, data=spots.SOURCE)
  # Half of half the width: the same network, and the same run.
  _assert_same_run(tmp_path, finished)
  written = workdir.read_texts(tmp_path)
  assert written['model'] == f'{__name__}:_narrow'
  assert written['narrow_by'] == '0.5'
  run = workdir.load_run(tmp_path, factory=_narrow)
  chex.assert_trees_all_equal(
    nnx.as_pure(nnx.state(run.model)),
    nnx.as_pure(nnx.state(workdir.load_run(finished).model)),
  )


def test_a_run_needs_examples_to_train_on(config, tmp_path):
  config = config.replace(train_split='none')
  with pytest.raises(ValueError, match='train_split must name examples'):
    loop.train(config, tmp_path / 'run')
  assert [p.name for p in (tmp_path / 'run').iterdir()] == ['.lock']


_PARALLEL = """
import pathlib, sys
from unittest import mock
import chex, jax, numpy as np
from dynconv_jax.training import loop, workdir
from dynconv_jax.training import state as state_lib
root = pathlib.Path(sys.argv[1])
config = workdir.read_config(root / 'teacher')
config = config.replace(
  epochs=1, train_split='train[:24]', validation_split='train[24:]',
  eval_batch_size=6, distill_from=str(root / 'teacher'),
)
every = jax.devices()
assert len(every) == 4
runs = []
for n in (1, 4):
  with mock.patch.object(jax, 'devices', return_value=every[:n]):
    summary = loop.train(config, root / str(n))
  assert summary['step'] == 3
  model = workdir.load_run(root / str(n)).model
  runs.append((
    jax.tree.map(np.asarray, state_lib.split(model)[1:]),
    summary['validation']['loss'], summary['validation']['num_examples'],
  ))
chex.assert_trees_all_close(*runs, atol=1e-4, rtol=1e-4)
try:
  loop.train(config.replace(batch_size=6), root / 'six')
except ValueError as error:
  assert 'batch_size must be divisible by the 4 devices; got 6' in str(error)
else:
  raise AssertionError('a batch of 6 on 4 devices')
"""


@pytest.mark.slow
def test_four_devices_equal_one(finished, tmp_path):
  shutil.copytree(finished, tmp_path / 'teacher')
  environment = {
    **os.environ,
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
    'JAX_PLATFORMS': 'cpu',
  }
  done = subprocess.run(
    [sys.executable, '-c', _PARALLEL, str(tmp_path)],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
