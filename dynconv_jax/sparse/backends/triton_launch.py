"""Launches the kernels for a GPU, through jax-triton."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax


def generation() -> int:
  """Returns the number before the point of the GPU's compute capability.

  8 is an A100's, 9 an H100's, which is assumed where there is no such GPU.
  """
  capability = getattr(jax.local_devices()[0], 'compute_capability', '')
  return int(capability.split('.')[0]) if '.' in capability else 9


@functools.cache
def load() -> tuple[Callable[..., Any], Mapping[str, Any]]:
  """Returns `jax_triton.triton_call` and the kernels by their names.

  Raises:
    ImportError: jax-triton is not installed, or JAX has no GPU support.
  """
  try:
    import jax_triton

    from dynconv_jax.sparse.backends import triton_kernels, triton_mask_kernels
  except ImportError as error:
    raise ImportError(
      f'kernels for a GPU need jax-triton ({error}):'
      " pip install 'dynconv-jax[gpu]' installs it"
    ) from error
  return jax_triton.triton_call, vars(triton_kernels) | vars(
    triton_mask_kernels
  )


def launch(kernel: str, *args: jax.Array, **options: Any) -> Any:
  """Returns the outputs of a kernel.

  Args:
    kernel: its name in `triton_kernels.py` or `triton_mask_kernels.py`.
    *args: its inputs.
    **options: of `jax_triton.triton_call`, the kernel's constants among them.
  """
  triton_call, kernels = load()
  return triton_call(*args, kernel=kernels[kernel], **options)


def cdiv(a: int, b: int) -> int:
  """Returns a / b, rounded up."""
  return -(-a // b)


def ceil_power(n: int) -> int:
  """Returns the smallest power of two that is not below n."""
  return 1 << (n - 1).bit_length()


def tile_side(n: int) -> int:
  """Returns the power of two from n up that a tile's side is, at least 16."""
  return max(16, ceil_power(n))
