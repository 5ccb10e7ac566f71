"""Blocks at active positions by kernels for a GPU, through jax-triton.

The counterpart of `native.py`. Active positions are listed, counted and
computed on the device: no count travels to the host, and nothing overflows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dynconv_jax.sparse.dense import shortcut
from dynconv_jax.sparse.fold import FoldedBlock, Layer

DTYPES = (jnp.float32, jnp.bfloat16)
_LIST_BLOCK = 1024
# Bottlenecks up to this inner width keep the rows between their last two
# convolutions in registers.
_FUSED_WIDTH = {4: 64, 2: 128}  # By bytes of a value.
# Outputs for which tiles of 128 x 128 keep an H100's 132 multiprocessors busy.
_WAVE = 2 * 132 * 128 * 128


def usable(dtype: jnp.dtype) -> bool:
  """Returns whether the kernels compute in a dtype on JAX's default backend.

  Args:
    dtype: of the features.
  """
  return jax.default_backend() == 'gpu' and dtype in DTYPES


def launch(kernel: str, *args: jax.Array, **options: Any) -> Any:
  """Returns the outputs of a kernel.

  Args:
    kernel: its name in `triton_kernels.py`.
    *args: its inputs.
    **options: of `jax_triton.triton_call`: out_shape, grid, constants, ...

  Raises:
    ImportError: jax-triton is not installed, or JAX has no GPU support.
  """
  try:
    import jax_triton

    from dynconv_jax.sparse import triton_kernels
  except ImportError as error:
    raise ImportError(
      f'kernels for a GPU need jax-triton ({error}):'
      " pip install 'dynconv-jax[gpu]' installs it"
    ) from error
  return jax_triton.triton_call(
    *args, kernel=getattr(triton_kernels, kernel), **options
  )


class Positions(NamedTuple):
  """The active positions of a map.

  Attributes:
    indices: int32[size], the flat positions of the active ones; the order is
      not determined. Undefined from `count` on.
    rows: int32[size], the place of each active position in that list; -1 where
      the map is inactive.
    count: int32[1], how many there are.
  """

  indices: jax.Array
  rows: jax.Array
  count: jax.Array


def list_positions(mask: jax.Array) -> Positions:
  """Returns the active positions of a mask.

  Args:
    mask: float32[N, h, w], active where it is not 0.
  """
  shapes = ((mask.size,), (mask.size,), (1,))
  return Positions(
    *launch(
      'list_positions',
      mask,
      out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes],
      grid=-(-mask.size // _LIST_BLOCK),
      zeroed_outputs=(2,),
      SIZE=mask.size,
      BLOCK=_LIST_BLOCK,
    )
  )


def run_triton(
  block: FoldedBlock, x: jax.Array, hard: jax.Array, dilated: jax.Array
) -> jax.Array:
  """Returns a block's output, the branch computed at active positions only.

  Positions outside of the mask are not touched where the shortcut is the
  identity, whose values are rectified already.

  Args:
    block: the folded block.
    x: float32 or bfloat16[N, H, W, in_features], rectified.
    hard: float32[N, h, w] of {0, 1}, where the branch is executed.
    dilated: float32[N, ...] of {0, 1}, where its first convolution is.

  Returns:
    float[N, h, w, features], in the dtype of x.
  """
  first, second, third = block.first, block.second, block.third
  needed, active = list_positions(dilated), list_positions(hard)
  base = shortcut(block, x)
  if block.projection is not None:
    base = jnp.where(hard[..., None] != 0, base, jax.nn.relu(base))
  y = _convolve(x, x.shape, needed, needed, first, lookup=False)
  y_shape = (*dilated.shape, first.bias.size)
  if third is None:
    return _convolve_add(y, y_shape, needed, active, second, base)
  if second.bias.size <= _FUSED_WIDTH[x.dtype.itemsize]:
    return _convolve_matmul_add(y, y_shape, needed, active, second, third, base)
  z = _convolve(y, y_shape, needed, active, second, lookup=True)
  return _convolve_add(z, y_shape, needed, active, third, base)


def _convolve(table, shape, read, written, layer, lookup):
  """float[positions, features]: relu(convolution) in the order of a list."""
  size, features = written.indices.size, layer.bias.size
  tiles = _tiles(size, layer, table.dtype)
  return launch(
    'convolve',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, layer.bias),
    out_shape=jax.ShapeDtypeStruct((size, features), table.dtype),
    grid=_cdiv(size, tiles['BLOCK_ROWS'])
    * _cdiv(features, tiles['BLOCK_FEATURES']),
    LOOKUP=lookup,
    TAPS=layer.size,
    **_geometry(shape, layer),
    **tiles,
  )


def _convolve_add(table, shape, read, written, layer, base):
  """relu(base + convolution) at the positions of a list, written in place."""
  size, features = written.indices.size, layer.bias.size
  tiles = _tiles(size, layer, table.dtype)
  return launch(
    'convolve_add',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, layer.bias, base),
    out_shape=jax.ShapeDtypeStruct(base.shape, base.dtype),
    input_output_aliases={6: 0},
    grid=_cdiv(size, tiles['BLOCK_ROWS'])
    * _cdiv(features, tiles['BLOCK_FEATURES']),
    TAPS=layer.size,
    **_geometry(shape, layer),
    **tiles,
  )


def _convolve_matmul_add(table, shape, read, written, layer, last, base):
  """relu(base + last(relu(layer))) at the positions of a list, in place."""
  size = written.indices.size
  tiles = _tiles(size, layer, table.dtype)
  inner = tiles['BLOCK_FEATURES']
  return launch(
    'convolve_matmul_add',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, layer.bias, last.kernel, last.bias, base),
    out_shape=jax.ShapeDtypeStruct(base.shape, base.dtype),
    input_output_aliases={8: 0},
    grid=_cdiv(size, tiles['BLOCK_ROWS']),
    BLOCK_INNER=inner,
    **_geometry(shape, layer),
    **{**tiles, 'FEATURES': last.bias.size},
  )


def _geometry(shape, layer):
  """How a convolution reads a map of (N, H, W, ...)."""
  return {'STRIDES': layer.strides, 'HEIGHT': shape[1], 'WIDTH': shape[2]}


def _tiles(rows: int, layer: Layer, dtype: jnp.dtype) -> dict[str, int]:
  """Tile sizes of a product of up to that many rows."""
  depth, features = layer.kernel.shape[2:]
  single = dtype == jnp.float32
  block_features = min(_power(features), 64 if single else 128)
  block_rows = 64 if single or rows * features < _WAVE else 128
  return {
    'DEPTH': depth,
    'FEATURES': features,
    'BLOCK_ROWS': block_rows,
    'BLOCK_FEATURES': block_features,
    'BLOCK_DEPTH': min(_power(depth), 32 if single else 64),
    'num_warps': 8 if block_rows * block_features == 128 * 128 else 4,
    'num_stages': 2 if single else 4,
  }


def _cdiv(a, b):
  return -(-a // b)


def _power(n):
  """The next power of two that a tensor core's tile can have."""
  return max(16, 1 << (n - 1).bit_length())
