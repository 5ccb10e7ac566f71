"""The Triton backend with gathered products in Gluon, for Hopper GPUs.

Takes the place of `convolve` for wide layers in bfloat16, where the products of
Triton stay far from the speed of tensor cores. No GPU has run it, so it is not
taken by 'auto'. `python -m benchmarks.gpu_gluon` compares and times them.
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

# What ptxas fits into a multiprocessor without spills; the first one is used.
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
  """As 'triton', but for wide convolutions."""

  name = 'gluon'

  def prefers(self, dtype, platform):
    return False

  def pack(self, block):
    return super().pack(block).replace(convolve=convolve_gathered)


def fits(layer: FoldedConv, tiles: dict[str, int]) -> bool:
  """Returns whether the kernel computes a convolution.

  Args:
    layer: folded.
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
  """Returns what `triton.convolve` does, by Gluon where that fits.

  Args:
    table: a map, or the listed rows of one.
    shape: of the map.
    read: positions.
    written: positions.
    layer: folded.
    lookup: whether the table holds listed rows.
    tiles: sizes.
  """
  # The kernel looks up the rows of a 3x3, and reads the map for a 1x1.
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
