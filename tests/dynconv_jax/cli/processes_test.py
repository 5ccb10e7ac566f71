"""Tests of jobs that run small shell commands."""

import os
import signal
import sys
import threading
import time

import pytest

from dynconv_jax.cli import processes


def _shell(*lines):
  return lambda: iter([['sh', '-c', line] for line in lines])


def _run(folder, commands, parallel=1, needs=None, watch=None):
  jobs = {
    name: processes.Job(
      _shell(*lines), folder / name / 'log', (needs or {}).get(name, ())
    )
    for name, lines in commands.items()
  }
  return processes.run_jobs(
    jobs, parallel, watch or (lambda running, ended: None)
  )


def test_commands_follow_each_other_and_their_output_is_kept(tmp_path):
  ended = _run(
    tmp_path,
    {'a': ['echo one; echo two >&2', 'echo three'], 'b': ['echo four']},
  )
  assert ended == {'a': '', 'b': ''}
  lines = (tmp_path / 'a' / 'log').read_text().split('\n')
  assert [line for line in lines if line and line[0] != '$'] == [
    'one',
    'two',
    'three',
  ]
  # A later session is appended.
  _run(tmp_path, {'b': ['echo five']})
  assert 'four\n\n$ sh -c' in (tmp_path / 'b' / 'log').read_text()


def test_a_failure_is_its_last_line_and_ends_its_own_job_only(tmp_path):
  ended = _run(
    tmp_path,
    {
      'said': ['echo first; echo error: what is wrong >&2; echo; exit 3', 'ls'],
      'silent': ['exit 4'],
      'killed': ['echo before; kill -9 $$'],
      'well': ['true'],
      'follows': ['true'],
    },
    needs={'follows': ('said', 'elsewhere')},
  )
  assert ended == {
    'said': 'error: what is wrong',
    'silent': 'ended with status 4',
    'killed': 'ended by SIGKILL, after: before',
    'well': '',
    'follows': 'needs said, which failed',
  }
  # Not the output of an earlier session.
  again = _run(tmp_path, {'said': ['exit 5']})
  assert again == {'said': 'ended with status 5'}


def test_errors_between_commands_are_failures_of_the_job(tmp_path):
  def commands():
    yield ['true']
    raise OSError('disk is full')

  jobs = {
    'bad': processes.Job(commands, tmp_path / 'bad'),
    'none': processes.Job(
      lambda: iter([['/no/such/program']]), tmp_path / 'none'
    ),
    'good': processes.Job(_shell('true'), tmp_path / 'good'),
  }
  ended = processes.run_jobs(jobs, 1, lambda running, ended: None)
  assert ended['bad'] == 'disk is full'
  assert "'/no/such/program'" in ended['none']
  assert ended['good'] == ''


def test_so_many_at_a_time_in_order_and_after_what_they_need(tmp_path):
  order = tmp_path / 'order'
  seen = []
  ended = _run(
    tmp_path,
    {
      'late': [f'echo late >> {order}'],
      'a': [f'sleep 0.3; echo a >> {order}'],
      'b': [f'sleep 0.3; echo b >> {order}'],
      'c': [f'echo c >> {order}'],
    },
    parallel=2,
    needs={'late': ('b',)},
    watch=lambda running, ended: seen.append(set(running)),
  )
  assert not any(ended.values())
  assert max(map(len, seen)) == 2
  assert {'a', 'b'} in seen
  lines = order.read_text().split()
  assert sorted(lines) == ['a', 'b', 'c', 'late']
  assert lines.index('late') > lines.index('b')


def test_runs_that_wait_for_each_other_fail(tmp_path):
  ended = _run(
    tmp_path,
    {'a': ['true'], 'b': ['true'], 'c': ['true']},
    needs={'a': ('b',), 'b': ('a',)},
  )
  assert ended['c'] == ''
  assert ended['a'] == ended['b'] == 'needs a run that needs this one'


def test_a_signal_is_passed_on_once_and_nothing_more_is_started(tmp_path):
  command = (
    f'trap "echo saved; exit 143" TERM; touch {tmp_path}/up; '
    'while true; do sleep 0.05; done'
  )

  def stop():
    while not (tmp_path / 'up').exists():
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

  handler = signal.getsignal(signal.SIGTERM)
  thread = threading.Thread(target=stop)
  thread.start()
  with pytest.raises(processes.Interrupted, match='SIGTERM') as interrupted:
    _run(tmp_path, {'a': [command, 'echo second'], 'b': ['echo other']})
  thread.join()
  assert interrupted.value.signal == signal.SIGTERM
  assert signal.getsignal(signal.SIGTERM) == handler
  log = (tmp_path / 'a' / 'log').read_text()
  assert log.endswith('saved\n')
  assert log.count('\nsaved\n') == 1
  assert not (tmp_path / 'b').exists()


def test_children_do_not_outlive_an_error_here(tmp_path):
  class BugError(Exception):
    pass

  def watch(running, ended):
    if (tmp_path / 'up').exists():
      raise BugError

  command = f'echo $$ > {tmp_path}/pid; touch {tmp_path}/up; sleep 60'
  with pytest.raises(BugError):
    _run(tmp_path, {'a': [command]}, watch=watch)
  with pytest.raises(ProcessLookupError):
    os.kill(int((tmp_path / 'pid').read_text()), 0)


def test_shares_of_the_cores(monkeypatch):
  monkeypatch.setattr(
    os, 'sched_getaffinity', lambda pid: {8, 1, 2, 3, 4, 5, 7}, raising=False
  )
  assert processes.core_shares(1) == [[1, 2, 3, 4, 5, 7, 8]]
  assert processes.core_shares(3) == [[1, 2], [3, 4], [5, 7, 8]]
  # more than cores, so they wait for each other
  assert processes.core_shares(9) == [[c] for c in (1, 2, 3, 4, 5, 7, 8, 1, 2)]
  monkeypatch.delattr(os, 'sched_getaffinity')
  assert processes.core_shares(2) == [[], []]


@pytest.mark.skipif(
  not hasattr(os, 'sched_setaffinity') or len(os.sched_getaffinity(0)) < 2,
  reason='needs two cores that can be chosen',
)
def test_parallel_processes_have_cores_of_their_own(tmp_path):
  code = 'import os, time; time.sleep(.5); print(os.sched_getaffinity(0))'
  jobs = {
    name: processes.Job(
      lambda: iter([[sys.executable, '-S', '-c', code]]), tmp_path / name
    )
    for name in 'ab'
  }
  processes.run_jobs(jobs, 2, lambda running, ended: None)
  first, second = (
    eval((tmp_path / name).read_text().splitlines()[-1]) for name in 'ab'
  )
  assert not first & second
  assert first | second == os.sched_getaffinity(0)
