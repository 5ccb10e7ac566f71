"""Multi-process training: startup, synchronization, and sharding.

Functions documented as collective must be called by every process, in the same
order. With one process they cost nothing.
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

# Maximum seconds until all processes see a file written by process 0.
_VISIBLE = 10.0
# Seconds that process 0 keeps running after an error.
_GRACE = 5.0
# Arrays with fewer elements are not worth an all-gather.
_SMALLEST_SHARDED = 1024

# Matches JAX errors that mean that another process does not respond.
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
  """Connects this process to the others. Must be called before JAX is used.

  A failure in one process ends the whole run: the failing process exits without
  waiting for the others, which then lose their connection to it.

  Args:
    coordinator_address: host:port of process 0.
    num_processes: number of processes of the run.
    process_id: index of this process, from 0.
    cluster: how to find the first three arguments in the environment of a
      cluster: 'auto', 'slurm', or another `cluster_detection_method` of
      `jax.distributed.initialize`.
    timeout: seconds that the processes wait for each other. After that, a
      process logs an error and exits with status 1.

  Returns:
    Whether several processes are connected. True whenever `cluster` is set.

  Raises:
    ValueError: an argument is missing or out of range, or there is no cluster.
    OSError: process 0 cannot listen on its address.
  """
  settings = dict(
    coordinator_address=coordinator_address,
    num_processes=num_processes,
    process_id=process_id,
  )
  _check(settings, cluster, timeout)
  if not cluster and (num_processes or 1) == 1:
    return False
  # With JAX_COORDINATOR_BIND_ADDRESS, JAX listens on that address instead.
  elsewhere = os.environ.get('JAX_COORDINATOR_BIND_ADDRESS')
  if coordinator_address and process_id == 0 and not elsewhere:
    _check_port(coordinator_address)
  method = {None: 'deactivate', 'auto': None}.get(cluster, cluster)
  watch = threading.Timer(timeout, _give_up, [settings, timeout])
  watch.daemon = True
  watch.start()
  try:
    jax.distributed.initialize(
      **settings,
      cluster_detection_method=method,
      initialization_timeout=timeout + 60,  # `watch` ends the process first.
    )
  except ValueError as error:
    raise ValueError(f'{cluster} found no cluster: {error}') from error
  except RuntimeError as error:
    reason = str(error).splitlines()[0]
    raise OSError(
      f'cannot start at {coordinator_address}: {reason}; is the port in use?'
    ) from error
  finally:
    watch.cancel()
  # Runs before JAX's own handler, which waits for the other processes.
  atexit.register(_leave)
  return True


def _check(settings: dict[str, Any], cluster: str | None, timeout: int) -> None:
  missing = [name for name, value in settings.items() if value is None]
  address, count, number = settings.values()
  if not cluster and 0 < len(missing) < len(settings):
    raise ValueError(
      'several processes need coordinator_address, num_processes, and '
      f'process_id; missing {" and ".join(missing)}'
    )
  if address is not None and not re.fullmatch(r'\S+:\d{1,5}', address):
    raise ValueError(f'coordinator_address must be host:port; got {address!r}')
  if count is not None and count < 1:
    raise ValueError(f'num_processes must be >= 1; got {count}')
  if number is not None and not 0 <= number < (count or number + 1):
    upper = 'num_processes' if count is None else count
    raise ValueError(f'process_id must be in [0, {upper}); got {number}')
  if timeout < 1:
    raise ValueError(f'timeout must be >= 1 second; got {timeout}')


def _check_port(address: str) -> None:
  """Raises OSError if a port is unavailable, which could crash jaxlib."""
  dualstack = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dualstack else socket.AF_INET
  port = int(address.rsplit(':', 1)[1])
  try:
    socket.create_server(
      ('', port), family=family, dualstack_ipv6=dualstack
    ).close()
  except (OSError, OverflowError) as error:
    raise OSError(f'cannot start at {address}: {error}') from error


def _give_up(settings: dict[str, Any], timeout: int) -> None:
  """Ends a process after a timeout, with a shorter message than JAX's."""
  address, count, number = settings.values()
  if number == 0:
    text = f'not all {count} processes connected to {address}'
  else:
    text = f'process {number} found no coordinator at {address}'
  logging.error(
    '%s within %d s; check that all processes are started with the address of '
    'process 0 and that its port is open',
    text if address else 'the processes of the cluster did not connect',
    timeout,
  )
  os._exit(1)


def _leave() -> None:
  if _failed:
    if is_main():  # JAX ends the others with this one. Let them log errors.
      time.sleep(_GRACE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextlib.contextmanager
def ending_together(passing: type[BaseException]) -> Iterator[None]:
  """Ends all processes on an error and reports the loss of another process.

  Args:
    passing: exception type that all processes raise together, which is not
      treated as a failure.

  Raises:
    ConnectionError: another process ended.
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
    # Saving threads also wait for the lost process, and Python for them.
    end = threading.Timer(2 * _GRACE, os._exit, [1])
    end.daemon = True
    end.start()
    raise ConnectionError(
      f'process {jax.process_index()} lost another process of the run, which '
      f'ended or failed ({str(error).splitlines()[0][:200]}). The same '
      'commands resume from the last checkpoint'
    ) from error


def is_lost(error: BaseException) -> bool:
  """Returns whether an error means that another process ended."""
  return (
    jax.process_count() > 1
    and isinstance(error, jax.errors.JaxRuntimeError)
    and _LOST.search(str(error)) is not None
  )


def is_main() -> bool:
  """Returns whether this is process 0, which writes all shared files."""
  return jax.process_index() == 0


def gather(value: int) -> np.ndarray:
  """Returns each process's value as int[processes]; collective.

  Args:
    value: an integer in [0, 2**32).
  """
  if jax.process_count() == 1:
    return np.asarray([value])
  return multihost_utils.process_allgather(np.uint32(value)).reshape(-1)


def wait() -> None:
  """Waits for all processes; collective."""
  gather(0)


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Raises an error in all processes if one raises; collective on exit.

  Raises:
    OSError: only other processes raised an error.
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
    raise OSError(f'process {names} failed; see its own error message')


def check_same(text: str) -> None:
  """Raises ValueError if the text differs between processes; collective."""
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
  """Locks a folder shared by all processes; collective on entry.

  Process 0 holds the lock.

  Args:
    folder: the folder, created if necessary.
    work: description of the work, for the errors of other programs.

  Raises:
    OSError: the folder is in use, the processes do not share it, or another
      process failed.
  """
  with contextlib.ExitStack() as stack:
    token, path = f'{os.getpid()}.{time.time_ns()}', folder / '.processes'
    with together():
      if is_main():
        stack.enter_context(locked(folder, work))
        if jax.process_count() > 1:
          write_atomic(path, token)
          stack.callback(path.unlink, missing_ok=True)
    expected, until = gather(_crc(token))[0], time.monotonic() + _VISIBLE
    with together():
      while not is_main() and not (
        path.exists() and _crc(path.read_text()) == expected
      ):
        if time.monotonic() > until:
          raise OSError(
            f'process {jax.process_index()} does not see files that process 0 '
            f'writes to {folder}: several processes need a workdir on a shared '
            'file system'
          )
        time.sleep(0.1)
    yield


def make_mesh(fsdp: int = 1) -> Mesh:
  """Returns a mesh of all devices with the axes 'data' and 'fsdp'.

  Batches are sharded along both axes, weights only along 'fsdp'.

  Args:
    fsdp: number of devices that share one copy of the weights. Must divide the
      number of devices.
  """
  devices = jax.devices()
  return jax.make_mesh(
    (len(devices) // fsdp, fsdp),
    ('data', 'fsdp'),
    axis_types=(AxisType.Auto,) * 2,
    devices=devices,
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first dimension is the batch."""
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(
  sharding: jax.sharding.Sharding | None,
) -> jax.sharding.Sharding | None:
  """Returns the sharding of arrays that are replicated on a batch's devices.

  Args:
    sharding: sharding of the batch; None: the default device.
  """
  if isinstance(sharding, NamedSharding):
    return NamedSharding(sharding.mesh, PartitionSpec())
  return sharding


def weight_shardings(tree: Any, mesh: Mesh) -> Any:
  """Returns shardings that split arrays over the 'fsdp' axis.

  Each array is split along its longest evenly divisible dimension. Arrays with
  fewer than 1,024 elements or without such a dimension are replicated.

  Args:
    tree: tree of arrays, such as a training state.
    mesh: the mesh from `make_mesh`.
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
  """Returns int[rows], the rows of a batch that this process's devices store.

  Args:
    sharding: sharding of the batch; None: this process stores all rows.
    n: number of rows of the batch.
  """
  rows = np.arange(n)
  if sharding is None:
    return rows
  here = sharding.addressable_devices_indices_map((n,)).values()
  return np.unique(np.concatenate([rows[index] for index in here]))


def place(tree: Any, sharding: jax.sharding.Sharding | None) -> Any:
  """Moves process-local arrays to the devices of all processes.

  Args:
    tree: tree of NumPy arrays. For a batch, they contain the rows of `rows_of`.
    sharding: sharding of the result; None: the default device.
  """
  if sharding is None or sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)
  return jax.tree.map(
    functools.partial(jax.make_array_from_process_local_data, sharding), tree
  )


def spread(tree: Any, shardings: Any) -> Any:
  """Moves arrays that every process has in full to the devices of all.

  Args:
    tree: tree of arrays, the same in each process.
    shardings: one sharding, or a tree of shardings.
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
  """Gathers arrays so that each process has them in full; collective."""
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
