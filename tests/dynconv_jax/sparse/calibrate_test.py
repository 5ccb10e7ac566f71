"""Tests of the choice between sparse and dense, and of clustered masks."""

from unittest import mock

import chex
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dynconv_jax.sparse import BlockPlan
from dynconv_jax.sparse.backend import get_backend
from dynconv_jax.sparse.backends.triton import TritonBackend
from dynconv_jax.sparse.calibrate import (
  calibrate,
  choose_plan,
  clustered_masks,
)

XLA = BlockPlan(get_backend('xla'))


def choose(dense, sparse, expected=0.5, plan=XLA):
  return choose_plan(plan, dense, sparse, (0.2, 0.6), expected)


class CalibrateTest(chex.TestCase):
  def test_the_limit_is_where_the_lines_cross(self):
    # 1 + 10 load against 8: they cross at 0.7.
    plan = choose(8.0, (3.0, 7.0))
    self.assertEqual(plan.backend.name, 'xla')
    self.assertAlmostEqual(plan.limit, 0.7)

  def test_what_is_never_slower_has_no_limit(self):
    self.assertEqual(choose(9.0, (2.0, 4.0)).limit, 1.0)

  def test_what_never_pays_is_dense(self):
    self.assertEqual(choose(1.0, (2.0, 4.0)).backend.name, 'dense')

  @parameterized.parameters((0.6, 'triton'), (0.8, 'dense'))
  def test_without_a_way_back_there_is_no_limit(self, expected, name):
    # As above, they cross at 0.7.
    plan = choose(8.0, (3.0, 7.0), expected, BlockPlan(TritonBackend()))
    self.assertEqual((plan.backend.name, plan.limit), (name, 1.0))

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
    """Neighbors agree more often than for independent positions."""
    mask = clustered_masks(np.random.default_rng(0), (4, 56, 56), 0.5)
    agree = (mask[:, 1:] == mask[:, :-1]).mean()
    self.assertGreater(agree, 0.85)

  def test_per_image_masks_are_constant_over_an_image(self):
    masks = clustered_masks(np.random.default_rng(0), (4, 2, 3), 0.5, True)
    self.assertEqual(masks.mean((1, 2)).tolist(), [1, 1, 0, 0])


@pytest.mark.parametrize('per_image', (False, True))
def test_a_block_is_measured(make_network, per_image):
  block = make_network('bottleneck', 'dynconv').blocks[1]
  plan = calibrate(block, XLA, (1, 6, 5, 32), per_image=per_image, density=0.5)
  assert plan.backend.name in ('dense', 'xla')
  assert 0 < plan.limit <= 1


@pytest.mark.parametrize(
  'given,expected',
  (
    # At density 0.6, a mask and its surroundings cost more than 0.6 of the
    # MACs.
    ({'density': 0.6}, lambda load: 0.6 < load < 1),
    ({'density': 1.0}, lambda load: load == 1),
    ({'density': 0.6, 'budget': 0.3}, lambda load: load == 0.3),
  ),
)
def test_a_budget_is_the_load_to_expect(make_network, given, expected):
  block = make_network('bottleneck', 'dynconv').blocks[1]
  name = 'dynconv_jax.sparse.calibrate.choose_plan'
  with mock.patch(name) as chosen:
    calibrate(block, XLA, (1, 9, 9, 32), per_image=False, **given)
  *_, load = chosen.call_args.args
  assert expected(load)


def test_masks_of_patches_are_those_of_fewer_positions():
  mask = clustered_masks(np.random.default_rng(0), (2, 7, 10), 0.3, side=4)
  patches = clustered_masks(np.random.default_rng(0), (2, 2, 3), 0.3)
  assert mask.shape == (2, 7, 10)
  for i in range(7):
    for j in range(10):
      np.testing.assert_array_equal(mask[:, i, j], patches[:, i // 4, j // 4])


if __name__ == '__main__':
  absltest.main()
