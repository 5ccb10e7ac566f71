"""Interleaved timing of several processes.

The thread pools of two frameworks in one process slow each other down by an
order of magnitude. Each framework therefore has its own process, and only one
process runs at a time.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Worker:
  """A process that runs a function on request.

  A process that has ended is started again by the next request.

  Args:
    module: module whose main program calls `serve`, given `arguments`.
    arguments: command-line arguments.
  """

  def __init__(self, module: str, arguments: Sequence[str]):
    self._command = [sys.executable, '-m', module, *arguments]
    self._process = self._start()

  def _start(self) -> subprocess.Popen:
    return subprocess.Popen(
      self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

  def ask(self, **request: Any) -> Any:
    """Returns the reply to a request.

    Args:
      **request: JSON-serializable values.

    Raises:
      OSError: the process has ended. The message says how and on which request.
    """
    if self._process.poll() is not None:
      self.stop()
      self._process = self._start()
    try:
      self._process.stdin.write(json.dumps(request) + '\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass
    line = self._process.stdout.readline()
    if not line:
      raise OSError(
        f'a timed process ended early, {self._ending()}; it was asked for'
        f' {json.dumps(request)}'
      )
    return json.loads(line)

  def _ending(self) -> str:
    status = self._process.wait()
    if status < 0:
      return f'killed by {signal.Signals(-status).name}'
    return f'with exit code {status} and the error above'

  def stop(self) -> None:
    """Kills the process."""
    self._process.kill()
    self._process.communicate()  # Closes the pipes too.


def serve(answer: Callable[[Mapping[str, Any]], Any]) -> None:
  """Answers requests from stdin until it is closed.

  Args:
    answer: returns the JSON-serializable reply to a request.
  """
  for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)


def seconds(step: Callable[[], None], steps: int) -> list[float]:
  """Returns the time of each call of a function, in seconds.

  Args:
    step: the function; must block until its work is done.
    steps: number of calls.
  """
  times = []
  for _ in range(steps):
    start = time.perf_counter()
    step()
    times.append(time.perf_counter() - start)
  return times


def medians(
  timed: Mapping[str, Callable[[], Sequence[float]]], rounds: int
) -> dict[str, float]:
  """Returns median times in milliseconds, from interleaved timing.

  Args:
    timed: name -> function that returns the times of some calls, in seconds.
    rounds: number of rounds.
  """
  times: dict[str, list[float]] = {name: [] for name in timed}
  for _ in range(rounds):
    for name, run in timed.items():
      times[name] += run()
  return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
