"""Blocks at active positions by kernels for a GPU, through jax-triton.

The counterpart of `native.py`. Active positions are listed, counted and
computed on the device: no count travels to the host, and nothing overflows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from dynconv_jax.gating.mask_unit import MaskUnit, Squeeze
from dynconv_jax.models.resnet import ResNet
from dynconv_jax.sparse.dense import shortcut
from dynconv_jax.sparse.fold import FoldedBlock, Layer
from dynconv_jax.sparse.native import squeeze_columns

_DTYPES = (jnp.float32, jnp.bfloat16)
_LIST_BLOCK = 1024
# Bottlenecks up to this inner width keep the rows between their last two
# convolutions in registers.
_FUSED_WIDTH = {jnp.dtype(jnp.float32): 64, jnp.dtype(jnp.bfloat16): 128}
# Outputs for which tiles of 128 x 128 keep an H100's 132 multiprocessors busy,
# twice over.
_MANY = 2 * 132 * 128 * 128


def usable(dtype: jnp.dtype) -> bool:
  """Returns whether the kernels compute in a dtype on JAX's default backend.

  Args:
    dtype: of the features.
  """
  return jax.default_backend() == 'gpu' and dtype in _DTYPES


@functools.cache
def load() -> tuple[Callable[..., Any], ModuleType]:
  """Returns `jax_triton.triton_call` and the module of the kernels.

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
  return jax_triton.triton_call, triton_kernels


def launch(kernel: str, *args: jax.Array, **options: Any) -> Any:
  """Returns the outputs of a kernel.

  Args:
    kernel: its name in `triton_kernels.py`.
    *args: its inputs.
    **options: of `jax_triton.triton_call`, the kernel's constants among them.
  """
  triton_call, kernels = load()
  return triton_call(*args, kernel=getattr(kernels, kernel), **options)


class Positions(NamedTuple):
  """The active positions of a map.

  Attributes:
    indices: int32[size], the flat positions of the active ones, in any order;
      undefined from `count` on.
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
      zeroed_outputs=(2,),
      grid=_cdiv(mask.size, _LIST_BLOCK),
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
  second, third = block.second, block.third
  needed, active = list_positions(dilated), list_positions(hard)
  y = _convolve(x, x.shape, needed, needed, block.first, lookup=False)
  base = shortcut(block, x)
  if block.projection is not None:
    base = jnp.where(hard[..., None] != 0, base, jax.nn.relu(base))
  if third is None:
    return _convolve_add(y, dilated.shape, needed, active, second, base)
  if second.bias.size <= _FUSED_WIDTH[x.dtype]:
    return _convolve_matmul_add(
      y, dilated.shape, needed, active, second, third, base
    )
  z = _convolve(y, dilated.shape, needed, active, second, lookup=True)
  return _convolve_add(z, hard.shape, active, active, third, base)


def _convolve(table, shape, read, written, layer, *, lookup):
  """relu(convolution), float[positions, features] in the order of a list."""
  tiles = _tiles(written, layer, table.dtype, lookup)
  return launch(
    'convolve',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, layer.bias),
    out_shape=jax.ShapeDtypeStruct(
      (written.indices.size, layer.bias.size), table.dtype
    ),
    grid=_grid(written, layer, tiles),
    LOOKUP=lookup,
    TAPS=layer.size,
    FEATURES=layer.bias.size,
    **_geometry(shape, layer),
    **tiles,
  )


def _convolve_add(table, shape, read, written, layer, base):
  """relu(base + convolution) at the positions of a list, written in place."""
  tiles = _tiles(written, layer, table.dtype, lookup=layer.size > 1)
  return launch(
    'convolve_add',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, layer.bias, base),
    out_shape=jax.ShapeDtypeStruct(base.shape, base.dtype),
    input_output_aliases={6: 0},
    grid=_grid(written, layer, tiles),
    TAPS=layer.size,
    FEATURES=layer.bias.size,
    **_geometry(shape, layer),
    **tiles,
  )


def _convolve_matmul_add(table, shape, read, written, layer, last, base):
  """relu(base + last(relu(convolution))) likewise, for small inner widths."""
  tiles = _tiles(written, layer, table.dtype, lookup=True)
  inner = tiles.pop('BLOCK_FEATURES')
  if table.dtype == jnp.float32:
    tiles |= {'BLOCK_DEPTH': 16, 'num_warps': 8}  # Else registers spill.
  return launch(
    'convolve_matmul_add',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, layer.bias, last.kernel, last.bias, base),
    out_shape=jax.ShapeDtypeStruct(base.shape, base.dtype),
    input_output_aliases={8: 0},
    grid=_cdiv(written.indices.size, tiles['BLOCK_ROWS']),
    FEATURES=last.bias.size,
    BLOCK_INNER=inner,
    BLOCK_FEATURES=64,
    **_geometry(shape, layer),
    **tiles,
  )


def _geometry(shape: tuple[int, ...], layer: Layer) -> dict[str, int]:
  """How a convolution reads a map of (N, H, W, ...)."""
  return {
    'STRIDES': layer.strides,
    'HEIGHT': shape[1],
    'WIDTH': shape[2],
    'DEPTH': layer.kernel.shape[2],
  }


def _tiles(
  written: Positions, layer: Layer, dtype: jnp.dtype, lookup: bool
) -> dict[str, int]:
  """Tile sizes of a product whose rows are positions.

  Three pairs of tiles in bfloat16 are on their way, in 96 KiB of shared memory:
  two programs fit on a multiprocessor. A row that is looked up first takes two
  more stages.
  """
  depth, features = layer.kernel.shape[2:]
  if dtype == jnp.float32:  # No tensor cores.
    return {
      'BLOCK_ROWS': 64,
      'BLOCK_FEATURES': min(_power(features), 64),
      'BLOCK_DEPTH': min(_power(depth), 32),
      'num_warps': 4,
      'num_stages': 2,
    }
  many = written.indices.size * features >= _MANY
  return {
    'BLOCK_ROWS': 128 if many else 64,
    'BLOCK_FEATURES': min(_power(features), 128),
    'BLOCK_DEPTH': min(_power(depth), 64),
    'num_warps': 8 if many else 4,
    'num_stages': 5 if lookup else 3,
  }


def _grid(written, layer, tiles):
  """Programs for all positions, those of the same rows one after the other."""
  rows = _cdiv(written.indices.size, tiles['BLOCK_ROWS'])
  return rows * _cdiv(layer.bias.size, tiles['BLOCK_FEATURES'])


def _cdiv(a: int, b: int) -> int:
  return -(-a // b)


def _power(n: int) -> int:
  """The power of two from n up that is a side of a tile, 16 at least."""
  return max(16, 1 << (n - 1).bit_length())


def with_column_gates(model: ResNet) -> ResNet:
  """Returns a copy of a network whose mask units read their input once.

  Args:
    model: in evaluation.
  """
  model = nnx.clone(model)
  for block in model.blocks:
    if isinstance(block.masker, MaskUnit):
      block.masker.maskconv = ColumnSqueeze(block.masker.maskconv)
  return model


class ColumnSqueeze(nnx.Module):
  """Computes what a mask unit's `Squeeze` does by one matrix product.

  Its columns are the taps of the convolution, and the map whose average is
  taken. Decisions are made of float32 numbers: for features in bfloat16 each
  column is the sum of three in bfloat16, which hold all of its bits.

  Args:
    squeeze: gives the weights.
  """

  def __init__(self, squeeze: Squeeze):
    self.size, self.strides, matrix, self.bias = squeeze_columns(squeeze)
    parts = []
    for _ in range(3):
      parts.append((matrix - sum(parts)).astype(jnp.bfloat16))
      parts[-1] = parts[-1].astype(np.float32)
    self.matrix = nnx.Param(jnp.asarray(matrix))
    self.parts = nnx.Param(jnp.asarray(np.hstack(parts), jnp.bfloat16))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns float32[N, h, w]: logits of a float[N, H, W, C] input."""
    matrix = self.parts if x.dtype == jnp.bfloat16 else self.matrix
    terms = jnp.matmul(
      x,
      matrix[...],
      precision=lax.Precision.HIGHEST,
      preferred_element_type=jnp.float32,
    )
    terms = terms.reshape(*x.shape[:3], -1, self.size**2 + 1).sum(3)
    logits = self.bias + jnp.mean(terms[..., -1], (1, 2), keepdims=True)
    s, pad = self.strides, self.size // 2
    h, w = (-(-n // s) for n in x.shape[1:3])
    terms = jnp.pad(terms, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    for tap in range(self.size**2):
      i, j = divmod(tap, self.size)
      rows = slice(i, i + (h - 1) * s + 1, s)
      columns = slice(j, j + (w - 1) * s + 1, s)
      logits += terms[:, rows, columns, tap]
    return logits
