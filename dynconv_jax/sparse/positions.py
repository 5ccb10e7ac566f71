"""Active positions of a mask as compact rows, and their neighbours."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Positions(NamedTuple):
  """The active positions of a map, numbered in row-major order.

  Attributes:
    count: int32[], how many there are.
    indices: int32[size + padding], the flat positions of the active ones in
      order; `size`, which is out of range, from `count` on.
    rows: int32[size], the number of each active position; the out-of-range
      number `size` where the map is inactive.
  """

  count: jax.Array
  indices: jax.Array
  rows: jax.Array


def find_positions(mask: jax.Array, padding: int = 0) -> Positions:
  """Returns the active positions of a mask.

  Args:
    mask: float or bool[...], active where it is not 0.
    padding: how many out-of-range entries follow `indices`, so that a slice of
      that length can start at any active position.
  """
  active = mask.reshape(-1) != 0
  size = active.size
  rank = jnp.cumsum(active, dtype=jnp.int32)
  rows = jnp.where(active, rank - 1, size)
  # Inactive positions all write to one slot, which is out of the list: on a
  # CPU faster than a binary search of the cumulative sum.
  slots = jnp.where(active, rows, size + padding)
  indices = jnp.full(size + padding + 1, size, jnp.int32)
  indices = indices.at[slots].set(
    jnp.arange(size, dtype=jnp.int32), mode='promise_in_bounds'
  )
  return Positions(rank[-1], indices[:-1], rows)


class Windows(NamedTuple):
  """How 3x3 windows read a map of rows, see `windows`.

  Attributes:
    table: int32[N * (H + 2) * (W + 2)], the row of each position of the map
      with a border of 1; an out-of-range number where there is none.
    shape: (h, w) of the outputs.
    padded: (H + 2, W + 2).
    strides: of the convolution.
  """

  table: jax.Array
  shape: tuple[int, int]
  padded: tuple[int, int]
  strides: int

  def rows(self, indices: jax.Array) -> jax.Array:
    """Returns int32[K, 9]: the rows under the window of each output position.

    Args:
      indices: int32[K], flat output positions in [0, N * h * w).
    """
    (h, w), (rows, columns), s = self.shape, self.padded, self.strides
    image, position = indices // (h * w), indices % (h * w)
    corner = image * rows + position // w * s
    corner = corner * columns + position % w * s
    offsets = np.add.outer(np.arange(3) * columns, np.arange(3)).reshape(9)
    return take(self.table, corner[:, None] + offsets.astype(np.int32))


def windows(rows: jax.Array, strides: int, missing: int) -> Windows:
  """Returns how the windows of a padded 3x3 convolution read a map of rows.

  Args:
    rows: int32[N, H, W], the row that holds each input position.
    strides: of the convolution.
    missing: the out-of-range number for what lies outside of the image.
  """
  _, height, width = rows.shape
  table = jnp.pad(rows, ((0, 0), (1, 1), (1, 1)), constant_values=missing)
  return Windows(
    table.reshape(-1),
    (-(-height // strides), -(-width // strides)),
    (height + 2, width + 2),
    strides,
  )


def take(table: jax.Array, indices: jax.Array) -> jax.Array:
  """Returns table[indices]; all indices are in range."""
  return table.at[indices].get(mode='promise_in_bounds')


def take_or_zero(table: jax.Array, indices: jax.Array) -> jax.Array:
  """Returns table[indices], zeros where an index is out of range."""
  return table.at[indices].get(mode='fill', fill_value=0)
