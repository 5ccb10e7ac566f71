"""Tests of a run in two processes: as in one, killed, resumed, refused."""

import json
import os
import shutil
import signal

import chex
import jax
import jax_processes
import numpy as np
import pytest

from dynconv_jax.training import loop, workdir
from dynconv_jax.training import state as state_lib

pytestmark = pytest.mark.slow

_TRAIN = """
import json, os, pathlib, signal, time
from absl import logging
folder, flags, changes, ends, at, how = args
from dynconv_jax.training import loop
from dynconv_jax.training.config import Config
from dynconv_jax.data.batches import TrainBatches
logging.set_verbosity(logging.INFO)
folder = pathlib.Path(folder.replace('NUMBER', number))
config = Config.from_flags(flags).replace(**json.loads(changes).get(number, {}))
following = TrainBatches.__next__

def ending(self):
  if number in ends and self.step == int(at):
    while how == 'SIGKILL' and not (folder / 'checkpoints/7').exists():
      time.sleep(0.1)
    os.kill(os.getpid(), signal.Signals[how])
  return following(self)

TrainBatches.__next__ = ending
try:
  loop.train(config, folder)
except loop.Interrupted as interrupted:
  print(interrupted, file=sys.stderr)
  sys.exit(128 + interrupted.signal)
"""


def _train(folder, config, changes=(), ends='', at=0, how='SIGKILL', devices=1):
  """Returns (status, stderr) for each process."""
  changes = json.dumps(dict(changes))
  return jax_processes.run(
    _TRAIN, folder, config.to_flags(), changes, ends, at, how, devices=devices
  )


def _assert_close(folder, expected):
  """Compares the rows and weights of two runs, up to rounding."""
  rows, others = map(workdir.read_metrics, (folder, expected))
  assert len(rows) == len(others) == 4
  for row, other in zip(rows, others, strict=True):
    row.pop('seconds'), other.pop('seconds')
    chex.assert_trees_all_equal_structs(row, other)
    for name, value in row.items():
      if isinstance(value, float):
        np.testing.assert_allclose(value, other[name], 1e-3, 1e-4, err_msg=name)
      elif not isinstance(value, dict):
        assert value == other[name]
  weights = [
    jax.tree.map(np.asarray, state_lib.split(workdir.load_run(f).model)[1:])
    for f in (folder, expected)
  ]
  chex.assert_trees_all_close(*weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('killed', [0, 1])
def test_killed_and_resumed(config, finished, tmp_path, killed):
  folder = tmp_path / 'run'
  ended = _train(folder, config, ends=str(killed), at=10)
  assert ended[killed][0] == -signal.SIGKILL
  status, error = ended[1 - killed]
  # If process 0 ends, JAX may report it first.
  ours = f'process {1 - killed} lost another process of the run'
  assert (status, ours in error) == (1, True) or (
    not killed and status == -signal.SIGABRT and 'another task died' in error
  ), error
  assert workdir.read_metrics(folder)[-1]['step'] == 7
  if killed:  # Resumed in one process, and in two with sharded weights.
    alone = shutil.copytree(folder, tmp_path / 'alone')
    loop.train(config, alone)
    _assert_close(alone, finished)
    ended = _train(folder, config.replace(fsdp=2))
    assert [status for status, _ in ended] == [0, 0], ended
    assert all(f'resumed {folder} at step 7' in text for _, text in ended)
    _assert_close(folder, finished)


def test_a_signal_to_one_process_ends_all_at_one_step(config, tmp_path):
  ended = _train(tmp_path, config, ends='1', at=3, how='SIGTERM', devices=2)
  for status, text in ended:
    assert status == 128 + signal.SIGTERM, text
    assert 'SIGTERM: saved step 4 of 14' in text
  assert os.listdir(tmp_path / 'checkpoints') == ['4']
  ended = _train(tmp_path, config, devices=2)
  assert [status for status, _ in ended] == [0, 0], ended
  assert len(workdir.read_metrics(tmp_path)) == 4


def test_refusals(config, tmp_path):
  """Each process reports the error; none waits for another."""
  folders = tmp_path / 'own' / 'NUMBER'
  (_, first), (_, second) = _train(folders, config)
  assert 'process 1 failed; see its own error' in first
  assert 'need a workdir on a shared file system' in second
  (_, first), (_, second) = _train(
    tmp_path / 'other', config, {'1': {'learning_rate': 0.5}}
  )
  for text in (first, second):
    assert 'those of process 1 differ from those of process 0' in text
  (_, first), (_, second) = _train(
    tmp_path / 'six', config.replace(batch_size=9)
  )
  for text in (first, second):
    assert 'batch_size must be divisible by the 2 devices; got 9' in text
