"""Parallel execution of jobs in child processes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# Seconds between polls of the children.
_INTERVAL = 0.1


@dataclasses.dataclass(frozen=True)
class Job:
  """A sequence of commands to run one after the other.

  Attributes:
    commands: function that returns an iterator over the commands. It is
      advanced when the previous command has succeeded. The return value of a
      generator is the job's result. The job fails if a command fails or if the
      iterator raises OSError or ValueError. Must be picklable, because it is
      called where the commands run.
    log: file that the output of all commands is appended to.
    needs: names of jobs that must have succeeded before.
    finish: function that is called with the result by the process that started
      the jobs. OSError and ValueError fail the job.
  """

  commands: Callable[[], Iterator[Sequence[str]]]
  log: pathlib.Path
  needs: tuple[str, ...] = ()
  finish: Callable[[Any], None] = lambda result: None

  def lacks(self, ended: Mapping[str, str]) -> str:
    """Returns an error if a needed job has failed, or else ''.

    Args:
      ended: errors of the jobs that have ended, by name; '' for success.
    """
    failed = ', '.join(need for need in self.needs if ended.get(need))
    return failed and f'needs {failed}, which failed'


# The error of jobs that need each other.
CYCLE = 'needs a run that needs this one'


def step(
  steps: Iterator[Sequence[str]],
) -> tuple[Sequence[str] | None, Any]:
  """Returns (next command of a job, None), or (None, result) at its end.

  Args:
    steps: iterator from `Job.commands`.
  """
  try:
    return next(steps), None
  except StopIteration as end:
    return None, end.value


class Interrupted(Exception):
  """A signal ended the jobs.

  Attributes:
    signal: the signal number.
  """

  def __init__(self, received: signal.Signals):
    super().__init__(received.name)
    self.signal = int(received)


def run_jobs(
  jobs: Mapping[str, Job],
  parallel: int,
  watch: Callable[[Sequence[str], Mapping[str, str]], None],
  pass_fds: Sequence[int] = (),
) -> dict[str, str]:
  """Runs jobs in order, several at a time, each on its share of the cores.

  SIGINT, SIGTERM, and SIGHUP are forwarded to the children, and no more jobs
  are started.

  Args:
    jobs: jobs by name.
    parallel: maximum number of jobs that run at the same time.
    watch: function that is called continually with the names of the running
      jobs and the errors of the ended jobs (see Returns).
    pass_fds: file descriptors that the children keep open.

  Returns:
    The error of each job by name, in order of their ends; '' for success.

  Raises:
    Interrupted: a signal was received. All children have ended.
  """
  shares = core_shares(parallel)
  free, waiting = list(range(parallel)), dict(jobs)
  steps = {name: job.commands() for name, job in jobs.items()}
  running: dict[str, tuple[Child, int]] = {}
  ended: dict[str, str] = {}
  stopped = None

  def advance(name, slot):
    """Starts the next command of a job, or ends it."""
    error = ''
    try:
      command, result = step(steps[name])
      if command is None:
        jobs[name].finish(result)
      else:
        share = shares[slot] if parallel > 1 else None
        environment = dict(os.environ)
        if parallel > 1:  # By default, each would take most of a GPU's memory.
          environment.setdefault(
            'XLA_PYTHON_CLIENT_MEM_FRACTION', f'{0.9 / parallel:.3f}'
          )
        child = Child(command, jobs[name].log, share, environment, pass_fds)
        running[name] = child, slot
        return
    except (OSError, ValueError) as failure:
      error = str(failure)
    ended[name] = error
    free.append(slot)

  with signals() as received:
    try:
      while running or (waiting and not stopped):
        while received:
          stopped = received.pop(0)
          for child, _ in running.values():
            child.send(stopped)
        before = len(ended)
        for name in list(waiting):
          needs = [need for need in jobs[name].needs if need in jobs]
          if error := jobs[name].lacks(ended):
            del waiting[name]
            ended[name] = error
          elif free and not stopped and all(need in ended for need in needs):
            del waiting[name]
            advance(name, free.pop(0))
        for name, (child, slot) in list(running.items()):
          if child.running():
            continue
          del running[name]
          if error := child.error():
            free.append(slot)
            # Jobs ended by a signal have not failed. They can resume.
            if not stopped:
              ended[name] = error
          elif stopped:
            free.append(slot)
          else:
            advance(name, slot)
        if waiting and not running and len(ended) == before and not stopped:
          ended |= dict.fromkeys(waiting, CYCLE)
          waiting.clear()
        watch(list(running), ended)
        if running and not received:
          time.sleep(_INTERVAL)
    finally:
      for child, _ in running.values():
        child.end()
  if stopped:
    raise Interrupted(stopped)
  return ended


class Child:
  """A process whose output is appended to a file."""

  def __init__(
    self,
    command: Sequence[str],
    log: pathlib.Path,
    cores: Sequence[int] | None,
    environment: Mapping[str, str],
    pass_fds: Sequence[int] = (),
    *,
    session: bool = True,
  ):
    """Starts the process.

    Args:
      command: the command to run.
      log: file to append the output to.
      cores: cores to run on; None: those of the parent.
      environment: all environment variables.
      pass_fds: file descriptors that the process keeps open.
      session: whether to start a new session, so that Ctrl-C does not reach the
        process directly.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('ab') as file:
      file.write(f'\n$ {shlex.join(command)}\n'.encode())
      file.flush()
      self._log, self._start = log, file.tell()
      self._process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=session,
        pass_fds=pass_fds,
      )
    # Set before the process starts threads, which inherit the affinity.
    if cores and hasattr(os, 'sched_setaffinity'):
      with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(self._process.pid, cores)

  def running(self) -> bool:
    return self._process.poll() is None

  def send(self, number: int) -> None:
    self._process.send_signal(number)

  def end(self) -> None:
    self._process.terminate()
    self._process.wait()

  def error(self) -> str:
    """Returns '' for success, or else an error from the last output line."""
    code = self._process.returncode
    if code == 0:
      return ''
    with self._log.open('rb') as file:
      file.seek(self._start)
      lines = file.read().decode(errors='replace').split('\n')
    line = next((line.strip() for line in lines[::-1] if line.strip()), '')
    if code > 0:
      return line or f'ended with status {code}'
    ended = f'ended by {signal.Signals(-code).name}'
    return f'{ended}, after: {line}' if line else ended


def core_shares(parallel: int) -> list[list[int]]:
  """Returns the cores of each process.

  Processes do not share cores unless there are more processes than cores.

  Args:
    parallel: number of processes, at least 1.
  """
  if not hasattr(os, 'sched_getaffinity'):
    return [[] for _ in range(parallel)]
  cores = sorted(os.sched_getaffinity(0))
  if parallel >= len(cores):
    return [[cores[i % len(cores)]] for i in range(parallel)]
  ends = [i * len(cores) // parallel for i in range(parallel + 1)]
  return [cores[a:b] for a, b in zip(ends, ends[1:], strict=False)]


@contextlib.contextmanager
def signals() -> Iterator[list[signal.Signals]]:
  """Yields a list that collects the termination signals received."""
  received: list[signal.Signals] = []
  old = {
    kind: signal.signal(
      kind, lambda number, _: received.append(signal.Signals(number))
    )
    for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    # nohup makes the process ignore SIGHUP.
    if (kind, signal.getsignal(kind)) != (signal.SIGHUP, signal.SIG_IGN)
  }
  try:
    yield received
  finally:
    for kind, handler in old.items():
      signal.signal(kind, handler)
