"""Tests of the cost model and of the masks that it measures with."""

import chex
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dynconv_jax.sparse import native as native_lib
from dynconv_jax.sparse.cost import calibrate, choose_plan, clustered_masks
from dynconv_jax.sparse.fold import fold_block
from dynconv_jax.sparse.plan import BlockPlan, chunk_sizes

DENSE = BlockPlan('dense')
IM2COL = BlockPlan('dense', im2col=True)
SMALL = BlockPlan('chunks', (64, 8))
LARGE = BlockPlan('chunks', (256, 32))


class CostTest(chex.TestCase):
  def test_the_limit_is_where_the_lines_cross(self):
    # 1 + 10 load against 8: they cross at 0.7.
    times = {DENSE: [9.0, np.inf], IM2COL: [8.0, np.inf], SMALL: [3.0, 7.0]}
    plan = choose_plan(times, (0.2, 0.6), [0.2, 0.6], density=0.5)
    self.assertEqual(plan.form, 'chunks')
    self.assertEqual(plan.sizes, (64, 8))
    self.assertTrue(plan.im2col)
    self.assertAlmostEqual(plan.limit, 0.7)

  @parameterized.parameters((0.2, SMALL), (0.6, LARGE), (1.0, LARGE))
  def test_the_fastest_at_the_expected_density_is_taken(self, density, best):
    times = {DENSE: [9.0, np.inf], SMALL: [2.0, 8.0], LARGE: [3.0, 5.0]}
    plan = choose_plan(times, (0.2, 0.6), [0.2, 0.6], density)
    self.assertEqual(plan.sizes, best.sizes)

  def test_what_is_never_slower_has_no_limit(self):
    times = {DENSE: [9.0, np.inf], SMALL: [2.0, 4.0]}
    self.assertEqual(choose_plan(times, (0.2, 0.6), [0.2, 0.6], 0.5).limit, 1.0)

  def test_what_never_pays_is_dense(self):
    times = {DENSE: [1.0, np.inf], SMALL: [2.0, 4.0]}
    self.assertEqual(choose_plan(times, (0.2, 0.6), [0.2, 0.6], 0.5), DENSE)

  @parameterized.parameters((0.6, 'triton'), (0.8, 'dense'))
  def test_kernels_for_a_gpu_have_no_limit(self, density, form):
    # As above, they cross at 0.7.
    times = {DENSE: [8.0, np.inf], BlockPlan('triton'): [3.0, 7.0]}
    plan = choose_plan(times, (0.2, 0.6), [0.2, 0.6], density)
    self.assertEqual(plan, BlockPlan(form))
    self.assertFalse(plan.may_overflow)

  @parameterized.parameters(
    (16, 4, (16,)), (3136, 4, (1024, 128)), (196, 4, (64, 16))
  )
  def test_chunk_sizes_decrease(self, size, parts, expected):
    self.assertEqual(chunk_sizes(size, parts), expected)

  @parameterized.parameters(0.01, 0.3, 0.5, 1.0)
  def test_clustered_masks_have_the_density(self, density):
    shape = (2, 20, 30)
    masks = clustered_masks(np.random.default_rng(0), shape, density)
    chex.assert_shape(masks, shape)
    self.assertEqual(masks.dtype, np.float32)
    self.assertEqual(set(np.unique(masks)) - {0.0, 1.0}, set())
    for mask in masks:
      self.assertEqual(mask.sum(), max(1, round(density * 600)))

  def test_clustered_masks_are_clustered(self):
    """Neighbours agree more often than those of independent positions."""
    mask = clustered_masks(np.random.default_rng(0), (4, 56, 56), 0.5)
    agree = (mask[:, 1:] == mask[:, :-1]).mean()
    self.assertGreater(agree, 0.85)

  def test_per_image_masks_are_constant_over_an_image(self):
    masks = clustered_masks(np.random.default_rng(0), (4, 2, 3), 0.5, True)
    self.assertEqual(masks.mean((1, 2)).tolist(), [1, 1, 0, 0])


def test_a_block_is_measured(make_network, native):
  model = make_network('bottleneck', 'dynconv')
  block = fold_block(model.blocks[1], jnp.float32)
  plan = calibrate(
    native_lib.pack(block) if native else block,
    (1, 6, 5, 32),
    jnp.float32,
    per_image=False,
    density=0.5,
    native=native,
  )
  sparse = ('native',) if native else ('chunks', 'buckets')
  assert plan.form in ('dense', *sparse)
  assert 0 < plan.limit <= 1


if __name__ == '__main__':
  absltest.main()


def test_masks_of_patches_are_those_of_fewer_positions():
  mask = clustered_masks(np.random.default_rng(0), (2, 7, 10), 0.3, side=4)
  patches = clustered_masks(np.random.default_rng(0), (2, 2, 3), 0.3)
  assert mask.shape == (2, 7, 10)
  for i in range(7):
    for j in range(10):
      np.testing.assert_array_equal(mask[:, i, j], patches[:, i // 4, j // 4])
