"""Tests of metrics and events, read back, and of progress reporting."""

import io
import json
import struct
import sys
import types
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from PIL import Image
from tensorboardX.proto import event_pb2

from dynconv_jax.data.augment import normalize
from dynconv_jax.masks import ExecutionMask
from dynconv_jax.training import records, workdir
from dynconv_jax.training.config import Config

_ROWS = [
  {'step': 7, 'epoch': 1, 'split': 'train', 'loss': 1.5, 'accuracy': 0.25},
  {
    'step': 7,
    'epoch': 1,
    'split': 'validation',
    'accuracy': 0.5,
    'num_examples': 6,
    'block_density': {'layer1.0': 0.75, 'layer2.0': 0.125},
  },
]


def _events(folder):
  """Returns the events of a run, parsed by the definition of the file format.

  A record is a length, its checksum, the data, and their checksum.
  """
  events = []
  for path in sorted((folder / 'tensorboard').iterdir()):
    file = io.BytesIO(path.read_bytes())
    while header := file.read(12):
      data = file.read(struct.unpack('<Q', header[:8])[0])
      assert len(file.read(4)) == 4
      events.append(event_pb2.Event.FromString(data))
  return events


def _values(folder):
  return {
    (value.tag, event.step): value
    for event in _events(folder)
    for value in event.summary.value
  }


def test_rows_are_in_the_file_and_in_the_events(tmp_path):
  with records.Records(tmp_path, 0) as record:
    for row in _ROWS:
      record.write(row)
    # On disk immediately, for anyone watching.
    assert workdir.read_metrics(tmp_path) == _ROWS
    values = {k: v.simple_value for k, v in _values(tmp_path).items()}
  assert values == {
    ('train/loss', 7): 1.5,
    ('train/accuracy', 7): 0.25,
    ('validation/accuracy', 7): 0.5,
    ('block_density/layer1.0', 7): 0.75,
    ('block_density/layer2.0', 7): 0.125,
  }


def test_masks_are_shown_beside_the_images(tmp_path):
  pixels = np.zeros((2, 4, 4, 3), np.uint8)
  pixels[1] = 200
  hard = np.zeros((2, 2, 2), np.float32)
  hard[0, 0, 1] = 1
  full = jnp.ones((2, 4, 4))
  masks = [
    ExecutionMask((jnp.asarray(hard),), 'a'),
    ExecutionMask((full,), 'b'),
  ]
  with records.Records(tmp_path, 0) as record:
    record.show_masks(7, normalize(jnp.asarray(pixels)), masks)
    record.show_masks(8, normalize(jnp.asarray(pixels)), [])
    other = normalize(jnp.asarray(pixels), 'inception')
    record.show_masks(9, other, masks, 'inception')
  shown = _values(tmp_path)
  assert list(shown) == [('masks', 7), ('masks', 9)]
  assert shown['masks', 7].image == shown['masks', 9].image
  image = np.array(
    Image.open(io.BytesIO(shown['masks', 7].image.encoded_image_string))
  )
  cost = np.full((2, 4, 4), 127)  # one block of two
  cost[0, :2, 2:] = 255
  expected = np.concatenate(
    [pixels, np.repeat(cost[..., None], 3, -1)], axis=2
  ).reshape(8, 8, 3)
  np.testing.assert_allclose(image, expected, atol=1)


def test_a_resumed_run_drops_what_it_does_again(tmp_path):
  path = tmp_path / workdir.METRICS_FILE
  rows = [{'step': step, 'split': 'train'} for step in (7, 14, 21)]
  path.write_text(
    ''.join(json.dumps(row) + '\n' for row in rows) + '{"step": 2'
  )
  with absltest.TestCase().assertLogs(level='WARNING') as logs:
    assert workdir.read_metrics(tmp_path) == rows
  assert logs.output[0].endswith(': 1')
  with records.Records(tmp_path, 14) as record:
    record.write({'step': 21, 'split': 'train', 'loss': 2.0})
  assert path.read_text().splitlines() == [
    '{"step": 7, "split": "train"}',
    '{"step": 14, "split": "train"}',
    '{"step": 21, "split": "train", "loss": 2.0}',
  ]
  assert [p.name for p in tmp_path.glob('*.partial')] == []
  starts = [e.step for e in _events(tmp_path) if e.HasField('session_log')]
  assert starts == [15]  # TensorBoard purges from there on


def test_no_row_holds_what_json_has_not(tmp_path):
  with (
    records.Records(tmp_path, 0) as record,
    pytest.raises(ValueError, match='not JSON compliant'),
  ):
    record.write({**_ROWS[0], 'loss': float('nan')})
  assert workdir.read_metrics(tmp_path) == []


class _FakeWandB(types.ModuleType):
  """Records calls, in place of the package's run."""

  class Error(Exception):
    pass

  def __init__(self):
    super().__init__('wandb')
    self.init = mock.Mock(side_effect=self._start)
    self.runs = []

  def Image(self, array):
    return 'image', array.shape

  def _start(self, **kwargs):
    if kwargs['project'] == 'denied':
      raise self.Error('no API key')
    self.runs.append(mock.Mock(**{'log.side_effect': lambda row: None}))
    return self.runs[-1]


def test_weights_and_biases_gets_the_same(tmp_path, monkeypatch):
  fake = _FakeWandB()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  folder = tmp_path / 'a run'
  folder.mkdir()
  config = Config.make(budget=0.3, wandb='gates')
  workdir.write_flags(folder, config)
  with records.Records(folder, 0, wandb='gates') as record:
    for row in _ROWS:
      record.write(row)
    masks = [ExecutionMask((jnp.ones((2, 4, 4)),), 'a')]
    record.show_masks(7, jnp.zeros((2, 4, 4, 3)), masks)
  first = fake.init.call_args.kwargs
  assert (first['project'], first['name']) == ('gates', 'a run')
  assert first['config']['budget'] == '0.3'
  logged = [call.args[0] for call in fake.runs[0].log.call_args_list]
  assert logged == [
    {'train/loss': 1.5, 'train/accuracy': 0.25, 'step': 7},
    {
      'validation/accuracy': 0.5,
      'block_density/layer1.0': 0.75,
      'block_density/layer2.0': 0.125,
      'step': 7,
    },
    {'masks': ('image', (8, 8, 3)), 'step': 7},
  ]
  fake.runs[0].finish.assert_called_once_with(exit_code=0)
  # A resumed run continues the same W&B run, which is told about failures.
  with (
    pytest.raises(FloatingPointError),
    records.Records(folder, 7, wandb='gates'),
  ):
    raise FloatingPointError
  assert fake.init.call_args.kwargs['id'] == first['id']
  assert fake.init.call_args.kwargs['resume'] == 'allow'
  fake.runs[1].finish.assert_called_once_with(exit_code=1)
  with pytest.raises(OSError, match='wandb=denied: no API key'):
    records.Records(folder, 7, wandb='denied')
  # Without a project, nothing is imported.
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with records.Records(folder, 7) as record:
    record.write({**_ROWS[0], 'step': 14})


def test_a_full_disk_is_one_error(tmp_path):
  with (
    records.Records(tmp_path, 0) as record,
    mock.patch.object(record._events, 'flush', side_effect=OSError(28, 'full')),
    pytest.raises(OSError, match='cannot write metrics to .*full.*remain'),
  ):
    record.write(_ROWS[0])


_METRICS = {'loss': 1.25, 'accuracy': 0.5, 'executed_fraction': 0.625}


@pytest.fixture
def config():
  return Config().replace(epochs=2, batch_size=8, budget=0.5)


@pytest.fixture
def clock():
  """A clock that the test sets by hand."""
  now = mock.Mock(return_value=100.0)
  with mock.patch.object(records.time, 'monotonic', now):
    yield now


def test_log_lines_where_there_is_no_terminal(config, clock):
  with mock.patch.object(sys, 'stderr', io.StringIO()):
    progress = records.Progress(config, steps_per_epoch=50, step=10)
  case = absltest.TestCase()
  clock.return_value = 110.0
  with case.assertNoLogs(level='INFO'):
    progress.update(20, _METRICS)  # too soon
  clock.return_value = 140.0
  with case.assertLogs(level='INFO') as logs:
    progress.update(30, _METRICS)  # 20 steps of 8 images in 40 s
  assert logs.records[0].getMessage() == (
    'step 30/100, 4 images/s, loss 1.250, accuracy 0.500, '
    'executed 0.625 of budget 0.5, 140 s left'
  )
  with case.assertLogs(level='INFO') as logs:
    progress.validated(1, _METRICS)
    progress.update(100, {'loss': 1.0, 'accuracy': 0.0})  # the last one
  first, last = (r.getMessage() for r in logs.records)
  assert first == (
    'epoch 1: validation accuracy 0.500, executed fraction 0.625'
  )
  assert last.startswith('step 100/100, ')
  assert 'executed' not in last
  progress.close()


def test_during_a_warm_up_the_target_of_the_step_is_shown(config, clock):
  config = config.replace(budget_warmup=0.6)
  with mock.patch.object(sys, 'stderr', io.StringIO()):
    progress = records.Progress(config, steps_per_epoch=50, step=0)
  case = absltest.TestCase()
  # Half of the warmup, from 1 to 0.5; its end; after it.
  for step, shown in ((30, '0.75'), (60, '0.5'), (90, '0.5')):
    clock.return_value += 40.0
    with case.assertLogs(level='INFO') as logs:
      progress.update(step, _METRICS)
    line = logs.records[0].getMessage()
    assert f'executed 0.625 of budget {shown}, ' in line
  progress.close()


def test_a_method_without_a_budget_shows_none(config, clock):
  config = config.replace(method='sact')
  with mock.patch.object(sys, 'stderr', io.StringIO()):
    progress = records.Progress(config, steps_per_epoch=50, step=10)
  clock.return_value = 140.0
  with absltest.TestCase().assertLogs(level='INFO') as logs:
    progress.update(30, _METRICS)
  assert (
    logs.records[0]
    .getMessage()
    .endswith('accuracy 0.500, executed 0.625, 140 s left')
  )
  progress.close()


def test_a_bar_on_a_terminal(config):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  with mock.patch.object(sys, 'stderr', terminal):
    progress = records.Progress(config, steps_per_epoch=50, step=10)
    with absltest.TestCase().assertNoLogs(level='INFO'):
      progress.update(30, _METRICS)
      progress.validated(1, _METRICS)
    assert progress._bar.n == 30
    progress.update(100, _METRICS)
    progress.close()
  shown = terminal.getvalue()
  for text in (
    '100/100',
    'images/s, loss 1.250, accuracy 0.500, executed 0.625 of budget 0.5',
    'epoch 1: validation accuracy 0.500, executed fraction 0.625',
  ):
    assert text in shown
