"""Triton backend with gathered products in Gluon, for Hopper GPUs.

Replaces `convolve` for wide bfloat16 layers, for which Triton's products are
far below the tensor cores' peak. This backend has not been run on a GPU, so
'auto' does not use it. `python -m benchmarks.gpu_gluon` compares and times it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dynconv_jax.sparse.backends import triton_launch
from dynconv_jax.sparse.backends.triton import (
  TritonBackend,
  convolve,
  geometry,
)
from dynconv_jax.sparse.backends.triton_launch import cdiv
from dynconv_jax.sparse.fold import FoldedConv

# Tile sizes that compile without register spills; the first is the default.
TILES = tuple(
  {
    'BLOCK_ROWS': rows,
    'BLOCK_FEATURES': features,
    'BLOCK_DEPTH': 64,
    'STAGES': stages,
    'REGISTERS': 80,
    'num_warps': warps,
  }
  for rows, features, stages, warps in (
    *((128, 128, 4, 8), (128, 256, 4, 8), (64, 128, 4, 4)),
    *((64, 256, 4, 4), (128, 128, 3, 8), (64, 128, 6, 4)),
  )
)


class GluonBackend(TritonBackend):
  """The 'triton' backend with a different kernel for wide convolutions."""

  name = 'gluon'

  def prefers(self, dtype, platform):
    return False

  def pack(self, block):
    return super().pack(block).replace(convolve=convolve_gathered)


def fits(layer: FoldedConv, tiles: dict[str, int]) -> bool:
  """Returns whether the kernel supports a convolution.

  Args:
    layer: the folded convolution.
    tiles: one of TILES.
  """
  depth, features = layer.kernel.shape[2:]
  return (
    layer.kernel.dtype == jnp.bfloat16
    and layer.conv.activation == 'relu'
    and triton_launch.generation() == 9
    and depth % tiles['BLOCK_DEPTH'] == 0
    and features % tiles['BLOCK_FEATURES'] == 0
    and depth >= 256
  )


def convolve_gathered(
  table: jax.Array,
  shape: tuple[int, ...],
  read: Any,
  written: Any,
  layer: FoldedConv,
  *,
  lookup: bool,
  tiles: dict[str, int] = TILES[0],
) -> jax.Array:
  """Returns the result of `triton.convolve`, computed by Gluon if it fits.

  Args:
    table: see `triton.convolve`.
    shape: see `triton.convolve`.
    read: see `triton.convolve`.
    written: see `triton.convolve`.
    layer: see `triton.convolve`.
    lookup: see `triton.convolve`.
    tiles: tile sizes, one of TILES.
  """
  # The kernel reads listed rows for a 3x3 and a full map for a 1x1.
  if not fits(layer, tiles) or lookup != (layer.conv.kernel_size > 1):
    return convolve(table, shape, read, written, layer, lookup=lookup)
  size, features = written.rows.size, layer.bias.size
  grid = cdiv(size, tiles['BLOCK_ROWS']) * (features // tiles['BLOCK_FEATURES'])
  return triton_launch.launch(
    'convolve_gathered',
    *(table, read.rows, written.indices, written.count),
    *(layer.kernel, layer.bias),
    out_shape=jax.ShapeDtypeStruct((size, features), table.dtype),
    grid=grid,
    REVERSED=lookup,
    TAPS=layer.conv.kernel_size,
    FEATURES=features,
    **geometry(shape, layer),
    **tiles,
  )
