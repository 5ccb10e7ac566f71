"""Kernels of this package for training on a CPU; see kernels/."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dynconv_jax import native

_SOURCE = pathlib.Path(__file__).parent / 'kernels' / 'training.cc'
_NAMES = (
  'depthwise',
  'depthwise_input_gradient',
  'depthwise_kernel_gradient',
  'batch_norm',
  'batch_norm_gradient',
)


def choose(fast: Callable, plain: Callable, *args: jax.Array) -> Any:
  """Returns what one of two functions returns: on a CPU the fast one.

  Args:
    fast: calls kernels.
    plain: the same by XLA, for other platforms, other dtypes than float32, and
      where kernels are not compiled.
    *args: of both.
  """
  if any(a.dtype != jnp.float32 for a in args) or _library() is None:
    return plain(*args)
  return lax.platform_dependent(*args, cpu=fast, default=plain)


def call(
  name: str,
  shapes: Sequence[tuple[int, ...]],
  *args: jax.Array,
  **attributes: Any,
) -> list[jax.Array]:
  """Returns the results of a kernel.

  Args:
    name: of the kernel.
    shapes: of its results, all float32.
    *args: float32 arrays.
    **attributes: NumPy scalars.
  """
  results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  target = _library().targets[name]
  return jax.ffi.ffi_call(target, results, vmap_method='sequential')(
    *args, **attributes
  )


@functools.cache
def _library() -> native.Library | None:
  """Compiles the kernels, if it is a CPU that JAX computes on."""
  if jax.default_backend() != 'cpu':
    return None
  return native.register(_SOURCE, _NAMES)
