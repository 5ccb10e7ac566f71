"""Tests of the script for runs on a GPU."""

import json
import sys
from types import SimpleNamespace
from unittest import mock

import pytest

from benchmarks import gpu_steps


@pytest.fixture
def run(program, tmp_path):
  def call(*arguments):
    output = f'--output={tmp_path}'
    printed = program('benchmarks.gpu_run', '--dry_run', output, *arguments)
    return json.loads(printed.splitlines()[-1])

  return call


def make_steps(**commands):
  return lambda dry_run: {
    name: gpu_steps.Step(minutes, ('timeit', '-n1', '-r1', code))
    for name, (minutes, code) in commands.items()
  }


def test_steps_are_done_once_and_failures_are_noted(run, tmp_path):
  fails = make_steps(good=(1, 'print([1])'), bad=(1, '1/0'), late=(90, ''))
  with mock.patch.object(gpu_steps, 'steps', fails):
    found = run()['steps']
  assert set(found) == {'good', 'bad'}
  assert found['good']['ok'] and found['good']['result'] == [1]
  assert not found['bad']['ok']
  assert found['bad']['failure'] == 'exited with code 1'
  assert 'ZeroDivisionError' in (tmp_path / 'gpu_run.log').read_text()
  assert json.loads((tmp_path / 'gpu_run.json').read_text())['steps'] == found
  # Finished steps are kept; failed or unfinished ones run now.
  again = make_steps(good=(1, '1/0'), bad=(1, ''), late=(1, 'print([2])'))
  with mock.patch.object(gpu_steps, 'steps', again):
    found = run()['steps']
    assert found['good']['result'] == [1] and found['bad']['ok']
    assert found['late']['result'] == [2]
    assert not run('--steps=good')['steps']['good']['ok']


@pytest.mark.parametrize('own', (None, '/own'))
def test_steps_share_compiled_programs(own, tmp_path, monkeypatch):
  name = 'JAX_COMPILATION_CACHE_DIR'
  monkeypatch.delenv(name)
  if own:
    monkeypatch.setenv(name, own)
  code = f'import json, os; print(json.dumps([os.environ["{name}"]]))'
  step = gpu_steps.Step(1, ('timeit', '-n1', '-r1', code))
  found = gpu_steps.run_step(step, tmp_path / 'gpu_run.log')
  assert found['result'] == [own or str(tmp_path / 'compiled')]


def test_errors(run, tmp_path):
  with pytest.raises(ValueError, match="unknown step 'all'"):
    run('--steps=all')
  found = {'dry_run': False, 'card': 'none', 'steps': {}}
  (tmp_path / 'gpu_run.json').write_text(json.dumps(found))
  with pytest.raises(ValueError, match='has dry_run False; got True'):
    run()


def test_kernels_on_streams_are_taken_in_order():
  def event(name, start):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=7)

  def plane(name, *lines):
    return SimpleNamespace(
      name=name, lines=[SimpleNamespace(name=n, events=e) for n, e in lines]
    )

  data = SimpleNamespace(
    planes=[
      plane('/host:CPU', ('Stream #1', [event('host', 0)])),
      plane(
        '/device:GPU:0',
        ('Stream #2(Compute)', [event('second', 2)]),
        ('Stream #1(Compute)', [event('first', 1)]),
        ('XLA Ops', [event('fusion', 0)]),
      ),
    ]
  )
  found = [name for name, *_ in gpu_steps.gpu_events(data)]
  assert found == ['first', 'second']


@pytest.mark.slow
def test_a_dry_run_does_every_step(tmp_path):
  import subprocess

  command = [sys.executable, '-m', 'benchmarks.gpu_run', '--dry_run']
  done = subprocess.run(
    [*command, f'--output={tmp_path}'], capture_output=True, text=True
  )
  assert not done.returncode, done.stderr
  found = json.loads((tmp_path / 'gpu_run.json').read_text())['steps']
  assert set(found) == set(gpu_steps.steps(True))
  assert all(step['ok'] for step in found.values()), found
  assert found['times_1']['result']['sparse_launched_ms'] > 0
  assert len(found['graphs']['result']['milliseconds']) == 20
