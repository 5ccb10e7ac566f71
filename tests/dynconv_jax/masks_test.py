"""Tests of execution masks: dilation, MACs, upsampling."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dynconv_jax.masks import (
  ExecutionMask,
  MaskedLayer,
  dilate,
  resize_nearest,
)


def _inputs_read(mask, strides, shape):
  """Returns the inputs that a padded 3x3 convolution reads at the positions."""
  read = np.zeros((len(mask), *shape), np.float32)
  for n, i, j in np.argwhere(mask):
    for y in range(i * strides - 1, i * strides + 2):
      for x in range(j * strides - 1, j * strides + 2):
        if 0 <= y < shape[0] and 0 <= x < shape[1]:
          read[n, y, x] = 1
  return read


class DilateTest(parameterized.TestCase):
  def test_by_hand(self):
    mask = jnp.zeros((1, 4, 5)).at[0, 0, 0].set(1).at[0, 2, 3].set(1)
    np.testing.assert_array_equal(
      dilate(mask)[0],
      [
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1],
      ],
    )

  def test_by_hand_at_stride_2(self):
    mask = jnp.zeros((1, 3, 3)).at[0, 0, 0].set(1).at[0, 1, 2].set(1)
    np.testing.assert_array_equal(
      dilate(mask, 2)[0],
      [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
      ],
    )

  @parameterized.product(
    shape=((1, 1), (2, 3), (7, 7), (8, 9)), strides=(1, 2, 3)
  )
  def test_is_what_the_convolution_reads(self, shape, strides):
    # PyTorch's output size of a 3x3 convolution with padding 1.
    h, w = ((size - 1) // strides + 1 for size in shape)
    rng = np.random.default_rng(0)
    mask = (rng.random((4, h, w)) < 0.2).astype(np.float32)
    dilated = dilate(jnp.asarray(mask), strides)
    self.assertEqual(dilated.shape, (4, h * strides, w * strides))
    np.testing.assert_array_equal(
      dilated[:, : shape[0], : shape[1]], _inputs_read(mask, strides, shape)
    )

  @parameterized.parameters(1, 2)
  def test_empty_and_full(self, strides):
    empty, full = jnp.zeros((2, 3, 4)), jnp.ones((2, 3, 4))
    self.assertEqual(jnp.sum(dilate(empty, strides)), 0)
    # At stride 2 the windows reach from -1 to 2h - 1, so every position is
    # read.
    self.assertEqual(jnp.sum(dilate(full, strides)), 24 * strides**2)

  @parameterized.parameters(1, 2)
  def test_passes_no_gradient(self, strides):
    grad = jax.grad(lambda m: jnp.sum(dilate(m, strides)))(jnp.ones((1, 3, 3)))
    np.testing.assert_array_equal(grad, np.zeros((1, 3, 3)))


class ExecutionMaskTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    hard = jnp.array([[[1, 0], [0, 0]], [[1, 1], [0, 1]]], jnp.float32)
    self.mask = ExecutionMask(
      maps=(hard, dilate(hard, 2)),
      name='layer2.0',
      layers=(
        MaskedLayer('layer2.0.conv1', 7, level=1),
        MaskedLayer('layer2.0.conv2', 100, level=0),
        MaskedLayer('layer2.0.conv3', 1000, level=0),
      ),
    )

  def test_executed_macs(self):
    # The first image's single position reads 2x2 inputs. Of the second image's
    # 4x4 inputs, only (2, 0) and (3, 0) in the corner of column 0 are not read.
    np.testing.assert_array_equal(
      jnp.sum(self.mask.dilated, axis=(1, 2)), [4, 14]
    )
    np.testing.assert_array_equal(
      self.mask.executed_macs(), [7 * 4 + 1100 * 1, 7 * 14 + 1100 * 3]
    )

  def test_dense_macs_are_those_of_a_mask_of_ones(self):
    self.assertEqual(self.mask.dense_macs(), 7 * 16 + 1100 * 4)
    self.assertIsInstance(self.mask.dense_macs(), int)
    ones = jax.tree.map(jnp.ones_like, self.mask)
    np.testing.assert_array_equal(
      ones.executed_macs(), [self.mask.dense_macs()] * 2
    )

  def test_density(self):
    np.testing.assert_array_equal(self.mask.density(), [0.25, 0.75])

  def test_is_a_tree_of_its_two_masks(self):
    doubled = jax.tree.map(lambda a: 2 * a, self.mask)
    self.assertLen(jax.tree.leaves(self.mask), 2)
    self.assertEqual(doubled.layers, self.mask.layers)
    self.assertEqual(doubled.name, 'layer2.0')


class ResizeNearestTest(parameterized.TestCase):
  @parameterized.parameters(
    ((2, 3), (4, 6)), ((2, 3), (5, 7)), ((4, 4), (2, 3))
  )
  def test_against_a_loop(self, small, large):
    values = np.random.default_rng(0).random((2, *small))
    resized = resize_nearest(values, large)
    self.assertEqual(resized.shape, (2, *large))
    for y in range(large[0]):
      for x in range(large[1]):
        # The small pixel that contains the large pixel's center.
        i = math.floor(Fraction(2 * y + 1, 2 * large[0]) * small[0])
        j = math.floor(Fraction(2 * x + 1, 2 * large[1]) * small[1])
        np.testing.assert_array_equal(resized[:, y, x], values[:, i, j])


if __name__ == '__main__':
  absltest.main()
