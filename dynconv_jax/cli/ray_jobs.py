"""Jobs on a Ray cluster, each as one task that Ray schedules and retries.

All nodes must share a file system, so that a job that restarts after the loss
of its node can resume from its files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pathlib
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dynconv_jax import extras
from dynconv_jax.cli import processes
from dynconv_jax.files import locked

# Seconds between polls of the tasks, to wait for a cluster to answer, until a
# cluster that does not answer is lost (after 60 s, Ray ends this process), and
# for canceled tasks to save.
_INTERVAL, _ANSWER, _LOST, _GRACE = 1.0, 5.0, 30.0, 120.0


class JobError(Exception):
  """A job failed. Ray also raises this error in jobs that need it."""


@dataclasses.dataclass(frozen=True)
class Cluster:
  """A Ray cluster that this process is connected to.

  Attributes:
    address: host:port of the head node.
    cpus: number of CPUs of a job.
    gpus: number of GPUs of a job; may be a fraction.
    retries: how often a job restarts after its node was lost.
    node: a node with enough CPUs and GPUs, as in `ray.nodes()`.
  """

  address: str
  cpus: float
  gpus: float
  retries: int
  node: Mapping[str, Any]

  def run_jobs(
    self,
    jobs: Mapping[str, processes.Job],
    watch: Callable[[Sequence[str], Mapping[str, str]], None],
    *,
    alone: bool = False,
  ) -> dict[str, str]:
    """Runs jobs like `processes.run_jobs`.

    Args:
      jobs: jobs by name.
      watch: as in `processes.run_jobs`.
      alone: whether each job needs a whole node to itself. All jobs then use
        the same node as long as it is alive.

    Returns:
      The error of each job by name, in order of their ends; '' for success.

    Raises:
      Interrupted: a signal was received. All jobs have ended.
      ConnectionError: the cluster is lost.
    """
    import ray

    before = {name: _size(job.log) for name, job in jobs.items()}
    tasks = self._submit(jobs, alone)
    cycle = [name for name in jobs if name not in tasks]
    ended = dict.fromkeys(cycle, processes.CYCLE)
    answered = time.monotonic()
    with processes.signals() as received:
      try:
        while tasks and not received:
          done, _ = ray.wait(list(tasks.values()), timeout=_INTERVAL)
          for name in [n for n, task in tasks.items() if task in done]:
            ended[name] = _end(jobs[name], tasks.pop(name), ended)
          watch([n for n in tasks if _size(jobs[n].log) > before[n]], ended)
          error = _unanswered(self.address)
          if not error:
            answered = time.monotonic()
          elif time.monotonic() - answered > _LOST:
            tasks.clear()  # They cannot be canceled anymore.
            raise ConnectionError(
              f'the Ray cluster at {self.address} is lost: {error}; progress '
              'is saved, and the same command resumes'
            )
      finally:
        left = list(tasks.values())
        for task in left:
          ray.cancel(task)
        if left:
          ray.wait(left, num_returns=len(left), timeout=_GRACE)
    if received:
      raise processes.Interrupted(received[0])
    return ended

  def _submit(
    self, jobs: Mapping[str, processes.Job], alone: bool
  ) -> dict[str, Any]:
    """Submits jobs and returns the tasks by name.

    Jobs that need each other in a cycle are not submitted.
    """
    import ray

    options = self._options(alone)
    attempt, share = ray.remote(**options)(_attempt), _share(options)
    tasks, waiting = {}, dict(jobs)
    while ready := [
      name
      for name, job in waiting.items()
      if all(need in tasks for need in job.needs if need in jobs)
    ]:
      for name in ready:
        job = waiting.pop(name)
        needed = [tasks[need] for need in job.needs if need in jobs]
        tasks[name] = attempt.options(name=name).remote(
          job.commands, job.log, os.getcwd(), share, *needed
        )
    return tasks

  def _options(self, alone: bool) -> dict[str, Any]:
    """Returns the options of the tasks for `ray.remote`."""
    if not alone:
      return {
        'num_cpus': self.cpus,
        'num_gpus': self.gpus,
        'max_retries': self.retries,
        'scheduling_strategy': 'SPREAD',
      }
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    resources = self.node['Resources']
    return {
      'num_cpus': resources.get('CPU', 0),
      'num_gpus': resources.get('GPU', 0),
      'max_retries': self.retries,
      'scheduling_strategy': NodeAffinitySchedulingStrategy(
        self.node['NodeID'], soft=True
      ),
    }


@contextlib.contextmanager
def connected(
  address: str, *, cpus: float, gpus: float, retries: int
) -> Iterator[Cluster]:
  """Connects to a cluster for the duration of the context.

  Args:
    address: host:port of the head node, or 'auto' for RAY_ADDRESS or else the
      cluster that this machine belongs to.
    cpus: number of CPUs of a job.
    gpus: number of GPUs of a job.
    retries: how often a job restarts after its node was lost.

  Raises:
    MissingError: Ray is not installed.
    ConnectionError: no cluster answers at the address.
    ValueError: the address or the number of GPUs is invalid, or no node has
      enough CPUs and GPUs.
  """
  extras.require('ray', 'ray')
  if not re.fullmatch(r'auto|[^\s/]+:\d{1,5}', address):
    raise ValueError(f"ray_address must be 'auto' or host:port; got {address}")
  if gpus > 1 and gpus % 1:
    raise ValueError(f'ray_gpus above 1 must be an integer; got {gpus:g}')
  import ray

  address = _resolve(address)
  # Check first, because Ray would retry for minutes.
  if error := _unanswered(address):
    raise ConnectionError(f'no Ray cluster at {address}: {error}')
  try:
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
  # Ray raises SystemExit if the head node does not answer.
  except (OSError, RuntimeError, SystemExit) as error:
    raise ConnectionError(f'no Ray cluster at {address}: {error}') from error
  try:
    node = _fitting(ray.nodes(), cpus, gpus)
    yield Cluster(address, cpus, gpus, retries, node)
  finally:
    ray.shutdown()


def _resolve(address: str) -> str:
  """Returns the address as host:port."""
  from ray._private import services

  resolved = services.canonicalize_bootstrap_address(address)
  if resolved is None:
    raise ConnectionError(
      'no Ray cluster found: set --ray_address=HOST:PORT, or add this machine '
      'to the cluster with `ray start`'
    )
  return resolved


def _unanswered(address: str) -> str:
  """Returns an error if there is no connection to an address, or else ''."""
  host, _, port = address.rpartition(':')
  try:
    socket.create_connection((host.strip('[]'), int(port)), _ANSWER).close()
  except (OSError, OverflowError) as error:
    return str(error)
  return ''


def _fitting(
  nodes: Sequence[Mapping[str, Any]], cpus: float, gpus: float
) -> Mapping[str, Any]:
  """Returns the first live node with enough CPUs and GPUs.

  Raises:
    ValueError: there is no such node.
  """
  alive = [node for node in nodes if node['Alive']]
  for node in alive:
    resources = node['Resources']
    if resources.get('CPU', 0) >= cpus and resources.get('GPU', 0) >= gpus:
      return node
  kinds = Counter(
    f'{n["Resources"].get("CPU", 0):g} CPUs and '
    f'{n["Resources"].get("GPU", 0):g} GPUs'
    for n in alive
  )
  available = ', '.join(f'{count} x {kind}' for kind, count in kinds.items())
  raise ValueError(
    f'no node of the Ray cluster has the {cpus:g} CPUs and {gpus:g} GPUs of a '
    f'run; it has {available or "no nodes"}'
  )


def _share(options: Mapping[str, Any]) -> dict[str, str]:
  """Returns environment variables that limit a program to its resources."""
  share = {'NPROC': str(max(1, int(options['num_cpus'])))}  # XLA's threads.
  if 0 < options['num_gpus'] < 1:  # By default, each would take most memory.
    fraction = 0.9 * options['num_gpus']
    share['XLA_PYTHON_CLIENT_MEM_FRACTION'] = f'{fraction:.3f}'
  return share


def _attempt(
  commands: Callable[[], Iterator[Sequence[str]]],
  log: pathlib.Path,
  folder: str,
  share: Mapping[str, str],
  *needed: Any,
) -> Any:
  """Runs a job in a Ray worker, after the jobs that it needs."""
  del needed
  try:
    os.chdir(folder)  # For relative paths in flags.
    _wait_until_free(log)
    steps = commands()
    while True:
      command, result = processes.step(steps)
      if command is None:
        return result
      child = processes.Child(
        command, log, None, {**share, **os.environ}, session=False
      )
      try:
        while child.running():  # A blocking wait would ignore cancellation.
          time.sleep(0.1)
      finally:
        if child.running():
          child.end()
      if error := child.error():
        raise JobError(error)
  except (OSError, ValueError) as error:
    raise JobError(str(error)) from None


def _wait_until_free(log: pathlib.Path) -> None:
  """Waits until no program uses the workdir. A lost node may still train."""
  logged = False
  while True:
    try:
      with locked(log.parent, 'a sweep'):
        return
    except BlockingIOError as error:
      if not logged:
        with log.open('a') as file:
          file.write(f'\nwaiting: {error}\n')
      logged = True
      time.sleep(1)


def _end(job: processes.Job, task: Any, ended: Mapping[str, str]) -> str:
  """Finishes a job whose task has ended and returns its error or ''."""
  import ray

  try:
    job.finish(ray.get(task))
  except ray.exceptions.RayError as error:
    cause = getattr(error, 'cause', error)
    text = next(iter(str(cause).strip().splitlines()), '')
    if not isinstance(cause, JobError):
      text = f'{type(cause).__name__}: {text}'
    return job.lacks(ended) or text
  except (OSError, ValueError) as error:
    return str(error)
  return ''


def _size(file: pathlib.Path) -> int:
  return file.stat().st_size if file.exists() else 0
