"""Jobs on a Ray cluster: one task each, which Ray places, retries, and orders.

All nodes share the file system: a job that starts again after its node was lost
finds what it has saved.
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

# Seconds between looks at the tasks; until a cluster answers; until one that
# does not is lost (after 60, Ray ends this process); until what was told to end
# has saved.
_INTERVAL, _ANSWER, _LOST, _GRACE = 1.0, 5.0, 30.0, 120.0


class JobError(Exception):
  """A job failed; Ray hands it to the jobs that need this one, too."""


@dataclasses.dataclass(frozen=True)
class Cluster:
  """A Ray cluster that this process is connected with.

  Attributes:
    address: host:port of its head.
    cpus: of a job.
    gpus: of a job; may be a fraction.
    retries: how often a job starts again after its node was lost.
    node: a node that has them, as in `ray.nodes()`.
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
    """Runs jobs as `processes.run_jobs` does.

    Args:
      jobs: by name.
      watch: as there.
      alone: whether each has a whole node to itself, the same one as long as it
        lives.

    Returns:
      By name, in order of the end: '' or, of a job that failed, why.

    Raises:
      Interrupted: a signal came; all jobs have ended.
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
            tasks.clear()  # There is nobody to cancel them.
            raise ConnectionError(
              f'the Ray cluster at {self.address} is lost: {error}; what is '
              'trained is saved, and the same command goes on from there'
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
    """Returns the tasks by name, without jobs that wait for each other."""
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
    """Returns the options of the tasks, as `ray.remote` has them."""
    if not alone:
      return {
        'num_cpus': self.cpus,
        'num_gpus': self.gpus,
        'max_retries': self.retries,
        'scheduling_strategy': 'SPREAD',
      }
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    has = self.node['Resources']
    return {
      'num_cpus': has.get('CPU', 0),
      'num_gpus': has.get('GPU', 0),
      'max_retries': self.retries,
      'scheduling_strategy': NodeAffinitySchedulingStrategy(
        self.node['NodeID'], soft=True
      ),
    }


@contextlib.contextmanager
def connected(
  address: str, *, cpus: float, gpus: float, retries: int
) -> Iterator[Cluster]:
  """Connects with a cluster while the block runs.

  Args:
    address: host:port of its head, or 'auto': RAY_ADDRESS, else the cluster
      that this machine belongs to.
    cpus: of a job.
    gpus: of a job.
    retries: how often a job starts again after its node was lost.

  Raises:
    MissingError: Ray is not installed.
    ConnectionError: no cluster answers there.
    ValueError: the address is of another form, or no node has what a job
      needs, or none can have it.
  """
  extras.require('ray', 'ray')
  if not re.fullmatch(r'auto|[^\s/]+:\d{1,5}', address):
    raise ValueError(f"ray_address must be 'auto' or host:port; got {address}")
  if gpus > 1 and gpus % 1:
    raise ValueError(f'ray_gpus above 1 must be whole; got {gpus:g}')
  import ray

  address = _resolve(address)
  # Ray would try for minutes.
  if error := _unanswered(address):
    raise ConnectionError(f'no Ray cluster at {address}: {error}')
  try:
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
  # Ray ends the process of a head that does not answer.
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

  found = services.canonicalize_bootstrap_address(address)
  if found is None:
    raise ConnectionError(
      'no Ray cluster is found from here: give --ray_address=HOST:PORT, or '
      'make this machine a node of it with `ray start`'
    )
  return found


def _unanswered(address: str) -> str:
  """Returns '', or why there is no connection to an address."""
  host, _, port = address.rpartition(':')
  try:
    socket.create_connection((host.strip('[]'), int(port)), _ANSWER).close()
  except (OSError, OverflowError) as error:
    return str(error)
  return ''


def _fitting(
  nodes: Sequence[Mapping[str, Any]], cpus: float, gpus: float
) -> Mapping[str, Any]:
  """Returns the first node that has enough; raises ValueError without one."""
  alive = [node for node in nodes if node['Alive']]
  for node in alive:
    has = node['Resources']
    if has.get('CPU', 0) >= cpus and has.get('GPU', 0) >= gpus:
      return node
  kinds = Counter(
    f'{n["Resources"].get("CPU", 0):g} CPUs and '
    f'{n["Resources"].get("GPU", 0):g} GPUs'
    for n in alive
  )
  has = ', '.join(f'{count} x {kind}' for kind, count in kinds.items())
  raise ValueError(
    f'no node of the Ray cluster has the {cpus:g} CPUs and {gpus:g} GPUs of a '
    f'run; it has {has or "no nodes"}'
  )


def _share(options: Mapping[str, Any]) -> dict[str, str]:
  """Returns the variables that hold a program to its share of a node."""
  share = {'NPROC': str(max(1, int(options['num_cpus'])))}  # XLA's threads.
  if 0 < options['num_gpus'] < 1:  # Else each takes most of its memory at once.
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
  """Runs a job in a worker of Ray, once what it needs has ended well."""
  del needed
  try:
    os.chdir(folder)  # What paths of flags are relative to.
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
        while child.running():  # A call that waits does not see a cancellation.
          time.sleep(0.1)
      finally:
        if child.running():
          child.end()
      if error := child.error():
        raise JobError(error)
  except (OSError, ValueError) as error:
    raise JobError(str(error)) from None


def _wait_until_free(log: pathlib.Path) -> None:
  """Waits for programs in a workdir: a node that is lost may still train."""
  told = False
  while True:
    try:
      with locked(log.parent, 'a sweep'):
        return
    except BlockingIOError as error:
      if not told:
        with log.open('a') as file:
          file.write(f'\nwaits: {error}\n')
      told = True
      time.sleep(1)


def _end(job: processes.Job, task: Any, ended: Mapping[str, str]) -> str:
  """Finishes a job whose task has ended; returns '' or its error."""
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
