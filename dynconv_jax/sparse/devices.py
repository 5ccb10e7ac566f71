"""Shares of a batch on several devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = 'batch'  # The mesh axis: reductions over it are over the whole batch.
SPLIT = PartitionSpec(AXIS)
REPLICATED = PartitionSpec()


def make_mesh(
  devices: Sequence[jax.Device] | None, num_images: int
) -> Mesh | None:
  """Returns the devices that share a batch as a mesh; None: JAX's default.

  XLA runs many operations on one core of a CPU, so devices with a share each
  are quicker on several cores than one with the whole batch.

  Args:
    devices: which; None: all local ones of a CPU where they divide the batch.
    num_images: N, of the batch.

  Raises:
    ValueError: the batch cannot be divided by the devices given.
  """
  if devices is None:
    devices = jax.local_devices()
    one = jax.default_backend() != 'cpu' or num_images % len(devices)
    if one or len(devices) == 1:
      return None
  elif not devices or num_images % len(devices):
    raise ValueError(
      f'devices must be a number that divides a batch of {num_images} images; '
      f'got {len(devices)} devices'
    )
  return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def num_shares(mesh: Mesh | None) -> int:
  """Returns into how many shares a batch is divided."""
  return 1 if mesh is None else mesh.size


def put(tree: Any, mesh: Mesh | None, spec: PartitionSpec) -> Any:
  """Returns a tree on the devices of a mesh.

  Args:
    tree: of arrays.
    mesh: of `make_mesh`.
    spec: SPLIT by the first axis, or REPLICATED.
  """
  return (
    tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, spec))
  )


def on_shares(
  function: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
  """Returns a function that each device calls with its share of a batch.

  Args:
    function: of arrays.
    mesh: of `make_mesh`; None: the function itself.
    in_specs: SPLIT or REPLICATED for each argument.
    out_specs: likewise for what it returns.
  """
  if mesh is None:
    return function
  # Loops start from constants: their carries differ by device later only.
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=False,
  )
