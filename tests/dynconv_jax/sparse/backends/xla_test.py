"""Tests of compacted positions against loops over the map."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dynconv_jax.branch import Conv
from dynconv_jax.sparse.backends.xla import (
  chunk_sizes,
  find_positions,
  for_chunks,
  padded_size,
  take_or_zero,
  windows,
)


class PositionsTest(chex.TestCase):
  @parameterized.parameters(0.0, 0.02, 0.5, 0.97, 1.0)
  def test_positions_are_those_of_a_loop(self, density):
    mask = np.random.default_rng(0).random((2, 5, 7)) < density
    found = jax.jit(find_positions, static_argnums=1)(
      jnp.asarray(mask, jnp.float32), 3
    )
    indices, rows = [], []
    for flat, active in enumerate(mask.reshape(-1)):
      rows.append(len(indices) if active else mask.size)
      if active:
        indices.append(flat)
    self.assertEqual(found.count, len(indices))
    chex.assert_shape(found.indices, (mask.size + 3,))
    np.testing.assert_array_equal(found.indices[: len(indices)], indices)
    np.testing.assert_array_equal(found.indices[len(indices) :], mask.size)
    np.testing.assert_array_equal(found.rows, rows)

  @parameterized.product(
    shape=((1, 1), (4, 6), (5, 7)),
    strides=(1, 2),
    size=(1, 3, 5),
    padding=('symmetric', 'same'),
  )
  def test_windows_are_those_of_a_loop(self, shape, strides, size, padding):
    height, width = shape
    conv = Conv('c', 'n', 1, 1, size, strides, padding=padding)
    top, left = conv.pads(height)[0], conv.pads(width)[0]
    rng = np.random.default_rng(0)
    rows = rng.permutation(2 * height * width).reshape(2, height, width)
    missing = 999
    reads = windows(conv, jnp.asarray(rows, jnp.int32), missing)
    h, w = -(-height // strides), -(-width // strides)
    self.assertEqual(reads.shape, (h, w))
    expected = np.full((2, h, w, size, size), missing)
    for n, i, j, a, b in np.ndindex(expected.shape):
      y, x = i * strides + a - top, j * strides + b - left
      if 0 <= y < height and 0 <= x < width:
        expected[n, i, j, a, b] = rows[n, y, x]
    np.testing.assert_array_equal(
      reads.rows(jnp.arange(2 * h * w)), expected.reshape(-1, size**2)
    )

  def test_what_is_missing_is_zero_and_not_a_neighbour(self):
    table = jnp.full((3, 2), jnp.nan).at[1].set(1.0)
    taken = take_or_zero(table, jnp.array([1, 3, 7]))
    np.testing.assert_array_equal(taken, [[1, 1], [0, 0], [0, 0]])


class ChunksTest(chex.TestCase):
  def test_a_buffer_holds_a_chunk_that_never_runs(self):
    self.assertEqual(padded_size(3, (32, 8)), 32)
    self.assertEqual(padded_size(60, (32, 8)), 67)

  @parameterized.parameters((16, (16,)), (3136, (1024, 128)), (196, (64, 16)))
  def test_chunk_sizes_decrease(self, size, expected):
    self.assertEqual(chunk_sizes(size), expected)

  @parameterized.product(
    count=(0, 1, 5, 8, 23, 32), sizes=((8,), (8, 3), (5, 1))
  )
  def test_chunks_cover_every_row_once(self, count, sizes):
    capacity = padded_size(32, sizes)

    @jax.jit
    def run(count):
      def body(start, size, carry):
        visits, order = carry
        at = start + jnp.arange(size)
        return visits.at[at].add(1), order + 1

      init = jnp.zeros(capacity, jnp.int32), 0
      return for_chunks(count, sizes, body, init)

    visits, num_chunks = run(jnp.int32(count))
    self.assertTrue((visits[:count] == 1).all())
    # Only the last chunk extends beyond the count.
    self.assertLess(visits[count:].sum(), sizes[-1])
    large, rest = divmod(count, sizes[0])
    self.assertEqual(num_chunks, large + -(-rest // sizes[-1]))


if __name__ == '__main__':
  absltest.main()
