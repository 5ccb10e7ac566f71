"""Processes that take turns being timed.

The thread pools of two frameworks in one process spoil each other's times by an
order of magnitude, so each has a process of its own; all but one wait.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Worker:
  """A process that runs one function, when it is asked to.

  Args:
    module: whose main program calls `serve` when it is given `arguments`.
    arguments: its command line.
  """

  def __init__(self, module: str, arguments: Sequence[str]):
    self._process = subprocess.Popen(
      [sys.executable, '-m', module, *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def ask(self, **request: Any) -> Any:
    """Returns the reply to a request.

    Args:
      **request: fit for JSON.

    Raises:
      OSError: the process has ended; its error is on stderr.
    """
    try:
      self._process.stdin.write(json.dumps(request) + '\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass
    line = self._process.stdout.readline()
    if not line:
      raise OSError('a timed process ended early; its error is above')
    return json.loads(line)

  def stop(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.communicate()  # Closes the pipes too.


def serve(answer: Callable[[Mapping[str, Any]], Any]) -> None:
  """Answers the requests that come in, until there are no more.

  Args:
    answer: returns the reply, fit for JSON, to a request.
  """
  for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)


def seconds(step: Callable[[], None], steps: int) -> list[float]:
  """Returns how long each of some calls took, seconds.

  Args:
    step: returns when its work is done.
    steps: calls.
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
  """Returns the median time of each, milliseconds, taken in turns.

  Args:
    timed: by names; each returns the seconds of some calls.
    rounds: turns of each.
  """
  times: dict[str, list[float]] = {name: [] for name in timed}
  for _ in range(rounds):
    for name, run in timed.items():
      times[name] += run()
  return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}
