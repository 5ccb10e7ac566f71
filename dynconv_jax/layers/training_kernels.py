"""Custom kernels for training on a CPU; see kernels/."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from dynconv_jax import native

_SOURCE = pathlib.Path(__file__).parent / 'kernels' / 'training.cc'
_NAMES = (
  'depthwise',
  'depthwise_input_gradient',
  'depthwise_kernel_gradient',
  'moments',
  'batch_norm_sums',
)


def choose(fast: Callable, plain: Callable, *args: jax.Array) -> Any:
  """Returns the result of `fast` on a CPU, and of `plain` otherwise.

  Args:
    fast: computes the result with custom kernels.
    plain: computes the result with XLA; used on other platforms, for dtypes
      other than float32, and if the kernels failed to compile.
    *args: arguments of both functions.
  """
  if any(a.dtype != jnp.float32 for a in args) or _library() is None:
    return plain(*args)
  return lax.platform_dependent(*args, cpu=fast, default=plain)


def call(
  name: str,
  shapes: Sequence[tuple[int, ...]],
  *args: jax.Array,
  rule: str,
  combine: Callable[[list[jax.Array], Any], list[jax.Array]] | None = None,
  **attributes: Any,
) -> list[jax.Array]:
  """Returns the results of a kernel.

  A batch that is sharded over devices is processed in place. Under `vmap`, the
  kernel is called sequentially.

  Args:
    name: name of the kernel.
    shapes: shapes of the results, all float32.
    *args: float32 arrays.
    rule: dimensions of arguments and results as letters, such as
      'nhwc,ijc->npqc'; n is the batch dimension.
    combine: (results of a device's shard, axis name) -> results of the whole
      batch; needed if results have no batch dimension.
    **attributes: NumPy scalars.
  """
  before, after = (part.split(',') for part in rule.split('->'))
  target = _library().targets[name]

  def run(*args):
    # A shard of the batch yields the same shard of the results.
    results = [
      jax.ShapeDtypeStruct(
        tuple(
          args[0].shape[0] if letter == 'n' else size
          for letter, size in zip(letters, shape, strict=True)
        ),
        jnp.float32,
      )
      for letters, shape in zip(after, shapes, strict=True)
    ]
    return jax.ffi.ffi_call(target, results)(*args, **attributes)

  if jax.device_count() == 1:
    return sequential_vmap(run)(*args)

  def partition(mesh, arguments, results):
    del results
    spec = arguments[0].sharding.spec
    axis = spec[0] if spec else None

    def shardings(terms):
      return [
        NamedSharding(mesh, PartitionSpec(axis if 'n' in letters else None))
        for letters in terms
      ]

    def lower(*args):
      outputs = run(*args)
      return combine(outputs, axis) if combine and axis else outputs

    return mesh, lower, shardings(after), tuple(shardings(before))

  partitioned = custom_partitioning(run)
  partitioned.def_partition(
    partition,
    sharding_rule=' -> '.join(
      ', '.join(' '.join(letters) for letters in terms)
      for terms in (before, after)
    ),
  )
  return sequential_vmap(partitioned)(*args)


@functools.cache
def _library() -> native.Library | None:
  """Compiles the kernels; returns None if JAX does not run on a CPU."""
  if jax.default_backend() != 'cpu':
    return None
  return native.register(_SOURCE, _NAMES)
