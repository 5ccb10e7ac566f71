"""Folded residual blocks at active positions only, gathered into rows."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from dynconv_jax.sparse.chunks import for_chunks, padded_size
from dynconv_jax.sparse.dense import matmul, shortcut
from dynconv_jax.sparse.fold import FoldedBlock, Layer
from dynconv_jax.sparse.positions import (
  Windows,
  find_positions,
  take,
  take_or_zero,
  windows,
)


def convolve_rows(
  table: jax.Array,
  layer: Layer,
  reads: Windows | None,
  indices: jax.Array,
  nine: bool,
) -> jax.Array:
  """Returns float32[K, features]: a convolution at K output positions.

  Args:
    table: float[rows, in_features].
    layer: 1x1, or 3x3.
    reads: of a 3x3, which rows its windows read.
    indices: int32[K], of a 1x1 the rows to read, of a 3x3 flat output
      positions; all in range.
    nine: whether a 3x3 is nine products added up, or one of gathered windows.
  """
  if reads is None:
    return matmul(take(table, indices), layer.matrix, layer.bias)
  rows = reads.rows(indices)
  if not nine:
    columns = take_or_zero(table, rows).reshape(indices.shape[0], -1)
    return matmul(columns, layer.matrix, layer.bias)
  y = layer.bias
  for tap, kernel in enumerate(
    layer.kernel.reshape(9, *layer.kernel.shape[2:])
  ):
    y = matmul(take_or_zero(table, rows[:, tap]), kernel, y)
  return y


class _Branch:
  """The steps of a block's branch at rows of positions, for both forms below.

  Args:
    block: the folded block.
    x: float[N, H, W, in_features].
    hard: where it is executed.
    dilated: where its first convolution is.
    capacity: rows of the first convolution's result.
    padding: of the lists of positions.
    nine: see `convolve_rows`.
  """

  def __init__(self, block, x, hard, dilated, capacity, padding, nine):
    self.block, self.nine, self.dtype = block, nine, x.dtype
    self.capacity = capacity
    self.x = x.reshape(-1, x.shape[-1])
    self.hard = find_positions(hard, padding)
    self.dilated = find_positions(dilated, padding)
    self.first_reads = None
    if block.first.size == 3:
      rows = jnp.arange(len(self.x), dtype=jnp.int32).reshape(x.shape[:3])
      self.first_reads = windows(rows, block.first.strides, len(self.x))
    # Out of range of the table of rows, whatever its padding.
    rows = self.dilated.rows.reshape(dilated.shape)
    rows = jnp.where(dilated != 0, rows, capacity)
    self.second_reads = windows(rows, block.second.strides, capacity)

  def first(self, indices):
    """Returns float[K, planes] at dilated positions; past the last, junk."""
    indices = jnp.minimum(indices, self.dilated.rows.size - 1)
    y = convolve_rows(
      self.x, self.block.first, self.first_reads, indices, self.nine
    )
    return jax.nn.relu(y).astype(self.dtype)

  def rest(self, y, indices):
    """Returns float32[K, features] at positions; past the last, junk."""
    indices = jnp.minimum(indices, self.hard.rows.size - 1)
    y = convolve_rows(
      y, self.block.second, self.second_reads, indices, self.nine
    )
    if self.block.third is None:
      return y
    third = self.block.third
    y = jax.nn.relu(y).astype(self.dtype)
    return matmul(y, third.matrix, third.bias)


def run_chunks(
  block: FoldedBlock,
  x: jax.Array,
  hard: jax.Array,
  dilated: jax.Array,
  *,
  sizes: Sequence[int],
  nine: bool = False,
) -> jax.Array:
  """Returns a block's output; its active rows are computed chunk by chunk.

  The number of chunks is that of the active positions: there is no capacity
  that could overflow. Positions outside of the mask are not touched where the
  shortcut is the identity, whose values are rectified already.

  Args:
    block: the folded block.
    x: float[N, H, W, in_features], rectified.
    hard: float[N, h, w] of {0, 1}, where the branch is executed.
    dilated: float[N, ...] of {0, 1}, where its first convolution is.
    sizes: rows a chunk, decreasing, see `for_chunks`.
    nine: see `convolve_rows`.

  Returns:
    float[N, h, w, features], in the dtype of x.
  """
  capacity = padded_size(dilated.size, sizes)
  steps = _Branch(block, x, hard, dilated, capacity, sizes[0], nine)

  def first(start, size, y):
    indices = lax.dynamic_slice(steps.dilated.indices, (start,), (size,))
    return lax.dynamic_update_slice(y, steps.first(indices), (start, 0))

  y = jnp.zeros((capacity, block.second.kernel.shape[2]), x.dtype)
  y = for_chunks(steps.dilated.count, sizes, first, y)
  identity = block.projection is None

  def rest(start, size, out):
    indices = lax.dynamic_slice(steps.hard.indices, (start,), (size,))
    inside = jnp.minimum(indices, hard.size - 1)
    rows = take(out, inside) + steps.rest(y, indices)
    rows = (jax.nn.relu(rows) if identity else rows).astype(out.dtype)
    return out.at[indices].set(
      rows, mode='drop', unique_indices=True, indices_are_sorted=True
    )

  base = shortcut(block, x)
  out = for_chunks(
    steps.hard.count, sizes, rest, base.reshape(-1, base.shape[-1])
  ).reshape(base.shape)
  return out if identity else jax.nn.relu(out)


def run_buckets(
  block: FoldedBlock,
  x: jax.Array,
  hard: jax.Array,
  dilated: jax.Array,
  *,
  buckets: int,
  nine: bool = False,
) -> jax.Array:
  """Returns a block's output; its active rows are computed at once.

  Of `buckets` static numbers of rows the smallest that holds them is taken, for
  the first convolution and for the others. The last holds all positions.

  Args:
    block: the folded block.
    x: float[N, H, W, in_features], rectified.
    hard: float[N, h, w] of {0, 1}, where the branch is executed.
    dilated: float[N, ...] of {0, 1}, where its first convolution is.
    buckets: into how many the positions are divided.
    nine: see `convolve_rows`.

  Returns:
    float[N, h, w, features], in the dtype of x.
  """
  capacity = dilated.size
  steps = _Branch(block, x, hard, dilated, capacity, 0, nine)

  def first(size):
    def run():
      y = steps.first(steps.dilated.indices[:size])
      return jnp.pad(y, ((0, capacity - size), (0, 0)))

    return run

  base = shortcut(block, x)
  flat = base.reshape(-1, base.shape[-1])

  def rest(size):
    def run():
      rows = steps.rest(y, steps.hard.indices[:size])
      # Each position looks its row up: faster on a CPU than to scatter them.
      added = take_or_zero(rows, steps.hard.rows)
      return jax.nn.relu(flat + added).astype(x.dtype)

    return run

  y = _switch(steps.dilated.count, dilated.size, buckets, first)
  out = _switch(steps.hard.count, hard.size, buckets, rest)
  return out.reshape(base.shape)


def _switch(count, size, buckets, make):
  """Runs the branch with the smallest capacity that holds `count` rows."""
  sizes = sorted({-(-size * k // buckets) for k in range(1, buckets + 1)})
  index = sum((count > s).astype(jnp.int32) for s in sizes[:-1])
  return lax.switch(index, [make(s) for s in sizes])
