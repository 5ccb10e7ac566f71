"""Several JAX processes that work as one: start, shares, agreement.

What is said of all processes is collective: each of them must call it, in the
same order. With one process it costs nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pathlib
import re
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dynconv_jax.files import locked, write_atomic

# Seconds until a file that process 0 wrote is seen by all.
_VISIBLE = 10.0
# Seconds that process 0 outlives an error.
_GRACE = 5.0
# Arrays of fewer elements are not worth an all-gather of their own.
_SMALLEST_SHARDED = 1024

# What errors of JAX say when another process does not answer.
_LOST = re.compile(
  'Gloo|NCCL|ncclR|Connection|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|'
  '[Hh]eartbeat|[Bb]arrier'
)
_failed = False


def start(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  cluster: str | None = None,
  timeout: int = 300,
) -> bool:
  """Connects this process with the others; to be called before JAX is used.

  A run that fails in one process ends in all: an error ends a process without
  waiting for the others, which then lose their connection to it.

  Args:
    coordinator_address: host:port of process 0.
    num_processes: of the run.
    process_id: of this one, from 0.
    cluster: finds the three in the environment of a cluster: 'auto', or 'slurm'
      or another `cluster_detection_method` of `jax.distributed.initialize`.
    timeout: seconds that the processes wait for each other. A process that
      waits in vain says so and exits with status 1.

  Returns:
    Whether there are several processes, or might be.

  Raises:
    ValueError: an argument is missing or out of range, or there is no cluster.
    OSError: process 0 cannot listen at its address.
  """
  given = dict(
    coordinator_address=coordinator_address,
    num_processes=num_processes,
    process_id=process_id,
  )
  _check(given, cluster, timeout)
  if not cluster and (num_processes or 1) == 1:
    return False
  if coordinator_address and process_id == 0:
    _check_port(coordinator_address)
  method = {None: 'deactivate', 'auto': None}.get(cluster, cluster)
  watch = threading.Timer(timeout, _give_up, [given, timeout])
  watch.daemon = True
  watch.start()
  try:
    jax.distributed.initialize(
      **given,
      cluster_detection_method=method,
      initialization_timeout=timeout + 60,  # The watch is first.
    )
  except ValueError as error:
    raise ValueError(f'no cluster is found by {cluster}: {error}') from error
  except RuntimeError as error:
    reason = str(error).splitlines()[0]
    raise OSError(
      f'cannot start at {coordinator_address}: {reason}; is the port in use?'
    ) from error
  finally:
    watch.cancel()
  # Runs before JAX's own, which waits for the other processes.
  atexit.register(_leave)
  return True


def _check(given: dict[str, Any], cluster: str | None, timeout: int) -> None:
  missing = [name for name, value in given.items() if value is None]
  address, count, number = given.values()
  if not cluster and 0 < len(missing) < len(given):
    raise ValueError(
      'several processes need coordinator_address, num_processes, and '
      f'process_id; {" and ".join(missing)} not given'
    )
  if address is not None and not re.fullmatch(r'\S+:\d{1,5}', address):
    raise ValueError(f'coordinator_address must be host:port; got {address!r}')
  if count is not None and count < 1:
    raise ValueError(f'num_processes must be >= 1; got {count}')
  if number is not None and not 0 <= number < (count or number + 1):
    upper = 'num_processes' if count is None else count
    raise ValueError(f'process_id must be in [0, {upper}); got {number}')
  if timeout < 1:
    raise ValueError(f'the timeout must be >= 1 second; got {timeout}')


def _check_port(address: str) -> None:
  """Raises OSError where jaxlib might end the process by a signal."""
  dualstack = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dualstack else socket.AF_INET
  port = int(address.rsplit(':', 1)[1])
  try:
    socket.create_server(
      ('', port), family=family, dualstack_ipv6=dualstack
    ).close()
  except (OSError, OverflowError) as error:
    raise OSError(f'cannot start at {address}: {error}') from error


def _give_up(given: dict[str, Any], timeout: int) -> None:
  """Ends a process that waits in vain; JAX's way out is pages long."""
  address, count, number = given.values()
  if number == 0:
    text = f'not all {count} processes reached {address}'
  else:
    text = f'process {number} found no coordinator at {address}'
  logging.error(
    '%s within %d s: are all started, with the address of process 0, and is '
    'its port open?',
    text if address else 'the processes of the cluster did not meet',
    timeout,
  )
  os._exit(1)


def _leave() -> None:
  if _failed:
    if is_main():  # JAX ends the others when this one does: let them speak.
      time.sleep(_GRACE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextlib.contextmanager
def ending_together(passing: type[BaseException]) -> Iterator[None]:
  """Says that another process has ended; an error of this one ends all.

  Args:
    passing: what all processes raise together.

  Raises:
    ConnectionError: another process has ended.
  """
  global _failed
  try:
    yield
  except passing:
    raise
  except BaseException as error:
    _failed = jax.process_count() > 1
    if not is_lost(error):
      raise
    # Threads that save wait for it, too, and Python for them.
    end = threading.Timer(2 * _GRACE, os._exit, [1])
    end.daemon = True
    end.start()
    raise ConnectionError(
      f'process {jax.process_index()} lost another process of the run, which '
      f'ended or failed ({str(error).splitlines()[0][:200]}). Checkpoints '
      'stay: the same commands go on from the last'
    ) from error


def is_lost(error: BaseException) -> bool:
  """Returns whether an error means that another process has ended."""
  return (
    jax.process_count() > 1
    and isinstance(error, jax.errors.JaxRuntimeError)
    and _LOST.search(str(error)) is not None
  )


def is_main() -> bool:
  """Returns whether this is process 0, which writes what the run writes."""
  return jax.process_index() == 0


def gather(value: int) -> np.ndarray:
  """Returns int[processes]: a value in [0, 2**32) of each process."""
  if jax.process_count() == 1:
    return np.asarray([value])
  return multihost_utils.process_allgather(np.uint32(value)).reshape(-1)


def wait() -> None:
  """Returns once all processes are here."""
  gather(0)


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Raises in all processes what is raised in one; collective at its end.

  Raises:
    OSError: only other processes have an error.
  """
  error = None
  try:
    yield
  except Exception as failure:  # noqa: BLE001
    error = failure
  failed = np.flatnonzero(gather(error is not None))
  if error is not None:
    raise error
  if failed.size:
    names = ', '.join(map(str, failed))
    raise OSError(f'process {names} failed; its own error says why')


def check_same(text: str) -> None:
  """Raises ValueError where a text is not that of process 0."""
  sums = gather(_crc(text))
  if differing := np.flatnonzero(sums != sums[0]).tolist():
    raise ValueError(
      'all processes of a run need the same options; those of process '
      f'{", ".join(map(str, differing))} differ from those of process 0'
    )


def _crc(text: str) -> int:
  return zlib.crc32(text.encode())


@contextlib.contextmanager
def held(folder: pathlib.Path, work: str) -> Iterator[None]:
  """Holds a folder, which all processes share, by a lock of process 0.

  Args:
    folder: is made.
    work: what is done there; others are told.

  Raises:
    OSError: the folder is in use, or processes have folders of their own by
      this name, or another process says so.
  """
  with contextlib.ExitStack() as stack:
    token, path = f'{os.getpid()}.{time.time_ns()}', folder / '.processes'
    with together():
      if is_main():
        stack.enter_context(locked(folder, work))
        if jax.process_count() > 1:
          write_atomic(path, token)
          stack.callback(path.unlink, missing_ok=True)
    wanted, until = gather(_crc(token))[0], time.monotonic() + _VISIBLE
    with together():
      while not is_main() and not (
        path.exists() and _crc(path.read_text()) == wanted
      ):
        if time.monotonic() > until:
          raise OSError(
            f'process {jax.process_index()} does not see what process 0 writes '
            f'to {folder}: several processes need a workdir on a file system '
            'that they share'
          )
        time.sleep(0.1)
    yield


def make_mesh(fsdp: int = 1) -> Mesh:
  """Returns the mesh of all devices, with the axes 'data' and 'fsdp'.

  A batch is split along both, weights at most along the second.

  Args:
    fsdp: devices that share one copy of the weights; divides their number.
  """
  devices = jax.devices()
  return jax.make_mesh(
    (len(devices) // fsdp, fsdp),
    ('data', 'fsdp'),
    axis_types=(AxisType.Auto,) * 2,
    devices=devices,
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first dimension is the batch's."""
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(
  sharding: jax.sharding.Sharding | None,
) -> jax.sharding.Sharding | None:
  """Returns the sharding of arrays that are whole on each device of a batch's.

  Args:
    sharding: of the batch; None: the default device.
  """
  if isinstance(sharding, NamedSharding):
    return NamedSharding(sharding.mesh, PartitionSpec())
  return sharding


def weight_shardings(tree: Any, mesh: Mesh) -> Any:
  """Returns where the arrays of a tree go: a share to each device of 'fsdp'.

  The longest dimension that can be split evenly is split. Arrays of fewer than
  1,024 elements, and all others, are whole on each device.

  Args:
    tree: of arrays, such as a training state.
    mesh: of `make_mesh`.
  """
  parts = mesh.shape['fsdp']

  def sharding(array):
    even = [i for i, n in enumerate(array.shape) if n % parts == 0]
    if parts == 1 or array.size < _SMALLEST_SHARDED or not even:
      return NamedSharding(mesh, PartitionSpec())
    axis = max(even, key=lambda i: array.shape[i])
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, 'fsdp'))

  return jax.tree.map(sharding, tree)


def rows_of(sharding: jax.sharding.Sharding | None, n: int) -> np.ndarray:
  """Returns int[rows], the rows of a batch that are on this process's devices.

  Args:
    sharding: of the batch; None: it is all here.
    n: rows of the batch.
  """
  rows = np.arange(n)
  if sharding is None:
    return rows
  here = sharding.addressable_devices_indices_map((n,)).values()
  return np.unique(np.concatenate([rows[index] for index in here]))


def place(tree: Any, sharding: jax.sharding.Sharding | None) -> Any:
  """Returns the arrays of a tree on the devices of all processes.

  Args:
    tree: of NumPy arrays: of a batch, the rows of `rows_of`.
    sharding: of the result; None: the default device.
  """
  if sharding is None or sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)
  return jax.tree.map(
    functools.partial(jax.make_array_from_process_local_data, sharding), tree
  )


def spread(tree: Any, shardings: Any) -> Any:
  """Returns arrays that each process has whole on the devices of all.

  Args:
    tree: of arrays, the same in each process.
    shardings: one, or a tree of them.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)

  def one(array, sharding):
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(one(jax.random.key_data(array), sharding))
    whole = np.asarray(array)
    return jax.make_array_from_callback(
      whole.shape, sharding, whole.__getitem__
    )

  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  return jax.tree.map(one, tree, shardings)


def fetch(tree: Any) -> Any:
  """Returns a tree whose arrays are whole in each process; collective.

  Args:
    tree: of arrays.
  """
  meshes = {
    a.sharding.mesh
    for a in jax.tree.leaves(tree)
    if isinstance(a, jax.Array) and not a.is_fully_addressable
  }
  if not meshes:
    return tree
  return jax.tree.map(np.asarray, _replicate(meshes.pop())(tree))


@functools.cache
def _replicate(mesh: Mesh):
  whole = NamedSharding(mesh, PartitionSpec())
  return jax.jit(lambda tree: tree, out_shardings=whole)
