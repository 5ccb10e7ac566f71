"""XLA backend: runs any gated block at active positions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dynconv_jax.branch import Conv
from dynconv_jax.layers import ACTIVATIONS
from dynconv_jax.masks import ExecutionMask
from dynconv_jax.sparse.backend import Backend
from dynconv_jax.sparse.backends.dense import (
  DenseConv,
  activate,
  matmul,
  run_dense,
  shortcut,
)
from dynconv_jax.sparse.fold import FoldedBlock, FoldedConv

Carry = TypeVar('Carry')


class XlaBackend(Backend):
  """Gathers the rows of active positions and computes them in chunks.

  XLA's shapes are static but the number of rows is not, so a loop runs a
  dynamic number of fixed-size chunks. There is no capacity that could overflow.
  """

  name = 'xla'

  def supports(self, branch, dtype, platform):
    return True

  def pack(self, block):
    return block

  def run(self, packed, x, mask):
    if mask is None:
      return run_dense(packed, x)
    return run_chunks(packed, x, mask)

  def convolution(self, conv):
    return DenseConv(conv)


def run_chunks(
  block: FoldedBlock,
  x: jax.Array,
  mask: ExecutionMask,
  *,
  sizes: Sequence[int] | None = None,
) -> jax.Array:
  """Returns a block's output, computing active rows in chunks.

  Args:
    block: the folded block.
    x: float[N, H, W, in_features].
    mask: where to execute the branch.
    sizes: rows per chunk, decreasing, see `for_chunks`; None for `chunk_sizes`.

  Returns:
    float[N, h, w, features], in the dtype of x.
  """
  sizes = sizes or chunk_sizes(mask.hard.size)
  branch, dtype = block.branch, x.dtype
  found = [find_positions(m, sizes[0]) for m in mask.maps]
  # The input as rows, and the row of each position.
  table = x.reshape(-1, x.shape[-1])
  rows = jnp.arange(len(table), dtype=jnp.int32).reshape(x.shape[:3])
  act = ACTIVATIONS[branch.activation]
  raw = shortcut(block, x)
  hard = mask.hard
  if isinstance(raw, float):
    raw = jnp.zeros((*hard.shape, branch.features), dtype)
  flat = raw.reshape(-1, branch.features)

  pairs = zip(branch.levels, block.convs, strict=True)
  for level, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
    convs = [conv for _, conv in group]
    positions = found[level]
    reads = windows(convs[0].conv, rows, len(table))

    def compute(indices, convs=convs, reads=reads, table=table):
      y = table
      for i, conv in enumerate(convs):
        y = _convolve_rows(y, conv, reads if i == 0 else None, indices)
        y = activate(y, conv)
        y = y.astype(dtype) if conv is not block.convs[-1] else y
      return y

    if level:
      capacity = padded_size(positions.rows.size, sizes)

      def store(start, size, y, positions=positions, compute=compute):
        indices = lax.dynamic_slice(positions.indices, (start,), (size,))
        indices = jnp.minimum(indices, positions.rows.size - 1)
        return lax.dynamic_update_slice_in_dim(y, compute(indices), start, 0)

      y = jnp.zeros((capacity, convs[-1].conv.features), dtype)
      table = for_chunks(positions.count, sizes, store, y)
      # Inactive positions get a row that is out of range of the padded table.
      rows = positions.rows.reshape(mask.maps[level].shape)
      rows = jnp.where(mask.maps[level] != 0, rows, capacity)
    else:
      base = flat if branch.stays else act(flat)

      def add(start, size, out, positions=positions, compute=compute):
        indices = lax.dynamic_slice(positions.indices, (start,), (size,))
        inside = jnp.minimum(indices, hard.size - 1)
        # Each row is written once, so the current value is the shortcut.
        added = take(out if branch.stays else flat, inside) + compute(inside)
        return out.at[indices].set(
          act(added).astype(out.dtype),
          mode='drop',
          unique_indices=True,
          indices_are_sorted=True,
        )

      out = for_chunks(positions.count, sizes, add, base)
  return out.reshape(*hard.shape, branch.features)


def _convolve_rows(
  table: jax.Array,
  layer: FoldedConv,
  reads: Windows | None,
  indices: jax.Array,
) -> jax.Array:
  """Returns a convolution at K output positions, float32[K, features].

  Args:
    table: float[rows, in_features].
    layer: the convolution.
    reads: the rows that windows read; None if each row is a window.
    indices: int32[K], flat output positions; all in range.
  """
  conv = layer.conv
  if reads is None:
    return (
      matmul(table, layer.matrix, layer.bias)
      if conv.groups == 1
      else (_grouped(table[:, None], layer))
    )
  windows = take_or_zero(table, reads.rows(indices))  # [K, k * k, in_features]
  if conv.groups == 1:
    columns = windows.reshape(indices.shape[0], -1)
    return matmul(columns, layer.matrix, layer.bias)
  return _grouped(windows, layer)


def _grouped(windows: jax.Array, layer: FoldedConv) -> jax.Array:
  conv, taps = layer.conv, windows.shape[1]
  depth = conv.in_features // conv.groups
  windows = windows.reshape(-1, taps, conv.groups, depth)
  kernel = layer.kernel.reshape(taps, depth, conv.groups, -1)
  y = jnp.einsum(
    'ktgd,tdgf->kgf',
    windows,
    kernel,
    preferred_element_type=layer.bias.dtype,
  )
  return y.reshape(len(y), -1) + layer.bias


def chunk_sizes(size: int) -> tuple[int, ...]:
  """Returns one or two chunk sizes; the second is for the remainder.

  Args:
    size: number of positions of the map, over all images.
  """
  large = min(1024, max(16, 1 << (size // 4).bit_length()))
  return tuple(sorted({large, max(16, large // 8)}, reverse=True))


def for_chunks(
  count: jax.Array,
  sizes: Sequence[int],
  body: Callable[[jax.Array, int, Carry], Carry],
  init: Carry,
) -> Carry:
  """Runs a body over [0, count) in a dynamic number of chunks.

  Runs as many chunks of the first size as fit, then of the next. The last chunk
  may extend past `count` by less than the last size.

  Args:
    count: int32[], number of rows.
    sizes: chunk sizes, decreasing.
    body: (start, size, carry) -> new carry; start is traced.
    init: the initial carry.

  Returns:
    The final carry.
  """
  start, carry = jnp.int32(0), init
  for size in sizes:
    rest = count - start
    if size == sizes[-1]:
      rest = rest + size - 1

    def step(i, carry, start=start, size=size):
      return body(start + i * size, size, carry)

    trips = rest // size
    carry = jax.lax.fori_loop(0, trips, step, carry)
    start = start + trips * size
  return carry


def padded_size(limit: int, sizes: Sequence[int]) -> int:
  """Returns the number of rows of a buffer for chunks over up to `limit` rows.

  A chunk of the first size must fit even if it never runs.

  Args:
    limit: the maximum count.
    sizes: chunk sizes, decreasing.
  """
  return max(limit + sizes[-1] - 1, sizes[0])


class Positions(NamedTuple):
  """The active positions of a map, numbered in row-major order.

  Attributes:
    count: int32[], number of active positions.
    indices: int32[size + padding], flat active positions in order; the
      out-of-range value `size` from `count` on.
    rows: int32[size], number of each active position; the out-of-range value
      `size` if inactive.
  """

  count: jax.Array
  indices: jax.Array
  rows: jax.Array


def find_positions(mask: jax.Array, padding: int = 0) -> Positions:
  """Returns the active positions of a mask.

  Args:
    mask: float or bool[...]; nonzero values are active.
    padding: number of out-of-range entries to append to `indices`, so that a
      slice of that length can start at any active position.
  """
  active = mask.reshape(-1) != 0
  size = active.size
  rank = jnp.cumsum(active, dtype=jnp.int32)
  rows = jnp.where(active, rank - 1, size)
  # All inactive positions write to one extra slot. On a CPU, this is faster
  # than a binary search of the cumulative sum.
  slots = jnp.where(active, rows, size + padding)
  indices = jnp.full(size + padding + 1, size, jnp.int32)
  indices = indices.at[slots].set(
    jnp.arange(size, dtype=jnp.int32), mode='promise_in_bounds'
  )
  return Positions(rank[-1], indices[:-1], rows)


class Windows(NamedTuple):
  """The rows that the windows of a convolution read; see `windows`.

  Attributes:
    table: int32[N * H' * W'], row of each position of the padded map; an
      out-of-range value if it has none.
    shape: (h, w) of the output.
    padded: (H', W') of the padded map.
    conv: the convolution.
  """

  table: jax.Array
  shape: tuple[int, int]
  padded: tuple[int, int]
  conv: Conv

  def rows(self, indices: jax.Array) -> jax.Array:
    """Returns the rows in the window of each output, int32[K, k * k].

    Args:
      indices: int32[K], flat output positions in [0, N * h * w).
    """
    (h, w), (rows, columns) = self.shape, self.padded
    s, k = self.conv.strides, self.conv.kernel_size
    image, position = indices // (h * w), indices % (h * w)
    corner = image * rows + position // w * s
    corner = corner * columns + position % w * s
    offsets = np.add.outer(np.arange(k) * columns, np.arange(k)).reshape(-1)
    return take(self.table, corner[:, None] + offsets.astype(np.int32))


def windows(conv: Conv, rows: jax.Array, missing: int) -> Windows:
  """Returns the rows that the windows of a convolution read.

  Args:
    conv: the convolution.
    rows: int32[N, H, W], row of each input position.
    missing: out-of-range value for positions outside the image.
  """
  size = rows.shape[1:]
  table = jnp.pad(
    rows, ((0, 0), *(conv.pads(n) for n in size)), constant_values=missing
  )
  return Windows(
    table.reshape(-1),
    tuple(conv.output_size(n) for n in size),
    table.shape[1:],
    conv,
  )


def take(table: jax.Array, indices: jax.Array) -> jax.Array:
  """Returns table[indices]; all indices must be in range."""
  return table.at[indices].get(mode='promise_in_bounds')


def take_or_zero(table: jax.Array, indices: jax.Array) -> jax.Array:
  """Returns table[indices], with zeros for out-of-range indices."""
  return table.at[indices].get(mode='fill', fill_value=0)
