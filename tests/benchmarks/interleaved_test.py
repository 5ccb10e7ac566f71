"""Tests of interleaved timing of processes."""

import sys

import pytest

from benchmarks import interleaved


def _worker(tmp_path, monkeypatch, answer):
  (tmp_path / 'timed.py').write_text(
    f'from benchmarks import interleaved\ninterleaved.serve({answer})\n'
  )
  monkeypatch.setenv('PYTHONPATH', f'{tmp_path}:{":".join(sys.path)}')
  return interleaved.Worker('timed', [])


def test_a_worker_answers_and_stops(tmp_path, monkeypatch):
  worker = _worker(tmp_path, monkeypatch, 'lambda r: [r["n"] + 1, "x"]')
  assert worker.ask(n=1) == [2, 'x']
  assert worker.ask(n=5) == [6, 'x']
  worker.stop()
  assert worker._process.poll() is not None


def test_a_worker_that_fails(tmp_path, monkeypatch):
  worker = _worker(tmp_path, monkeypatch, 'lambda r: 1 / r["n"]')
  assert worker.ask(n=2) == 0.5
  message = 'ended early, with exit code 1 and the error above; .* for {"n": 0}'
  with pytest.raises(OSError, match=message):
    worker.ask(n=0)
  # The next request starts the process again.
  assert worker.ask(n=4) == 0.25
  worker.stop()
  assert worker._process.poll() is not None


def test_a_worker_that_crashes(tmp_path, monkeypatch):
  crash = 'lambda r: __import__("os").kill(__import__("os").getpid(), 11)'
  worker = _worker(tmp_path, monkeypatch, crash)
  with pytest.raises(
    OSError, match='killed by SIGSEGV; it was asked for {"kind": "a"}'
  ):
    worker.ask(kind='a')
  worker.stop()


def test_seconds():
  calls = []
  times = interleaved.seconds(lambda: calls.append(1), 3)
  assert len(calls) == len(times) == 3 and all(t >= 0 for t in times)


def test_medians_are_of_interleaved_times():
  order = []

  def run(name, times):
    order.append(name)
    return times

  found = interleaved.medians(
    {'a': lambda: run('a', [0.001, 0.009]), 'b': lambda: run('b', [0.002])}, 2
  )
  assert found == pytest.approx({'a': 5, 'b': 2}) and order == [*'abab']
