"""Tests of the sparsity and distillation losses against plain arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dynconv_jax import losses
from dynconv_jax.gating.mask import ExecutionMask, MaskedLayer


def _mask(hard, dilated, *macs):
  hard, dilated = (jnp.array(m, jnp.float32) for m in (hard, dilated))
  layers = tuple(
    MaskedLayer(f'layer1.0.conv{i}', m, dilated=i == 0)
    for i, m in enumerate(macs)
  )
  return ExecutionMask(
    hard=hard, dilated=dilated, name='layer1.0', layers=layers
  )


def _masks():
  """Two images, two blocks: 35 of 60 and 4 of 40 MACs an image, on average."""
  return [
    # conv1: 5 MACs at (4 + 2) of 4 + 4 positions, conv2: 10 at (3 + 1).
    # Together 5 * 6 + 10 * 4 = 70 of 2 * (20 + 40) = 120.
    _mask(
      [[[1, 1], [1, 0]], [[0, 0], [0, 1]]],
      [[[1, 1], [1, 1]], [[0, 0], [1, 1]]],
      5,
      10,
    ),
    # conv1: 4 at (0 + 2) of 2 + 2, conv2: 16 at (0 + 0): 8 of 2 * 40 = 80.
    _mask([[[0, 0]], [[0, 0]]], [[[0, 0]], [[1, 1]]], 4, 16),
  ]


NETWORK = 78 / 200
BLOCKS = (70 / 120, 8 / 80)

# cos(pi / 2 * progress / 0.33) ** 2, by a pocket calculator.
OPENING = {0: 1.0, 0.1: 0.7900285, 0.33: 0.0, 1: 0.0}


class BudgetBoundsTest(parameterized.TestCase):
  @parameterized.product(progress=tuple(OPENING), budget=(0.0, 0.3, 0.5, 1.0))
  def test_by_hand(self, progress, budget):
    q = OPENING[progress]
    lower, upper = losses.budget_bounds(budget, progress)
    self.assertAlmostEqual(float(lower), q * budget, places=6)
    self.assertAlmostEqual(float(upper), 1 - q * (1 - budget), places=6)

  def test_open_steadily(self):
    lower, upper = losses.budget_bounds(0.4, jnp.linspace(0, 0.5, 30))
    self.assertLessEqual(float(jnp.max(jnp.diff(lower))), 1e-7)
    self.assertGreaterEqual(float(jnp.min(jnp.diff(upper))), -1e-7)


class ExecutedFractionsTest(absltest.TestCase):
  def test_by_hand(self):
    network, blocks = losses.executed_fractions(_masks())
    self.assertAlmostEqual(float(network), NETWORK, places=6)
    np.testing.assert_allclose(blocks, BLOCKS, rtol=1e-6)

  def test_against_loops(self):
    rng = np.random.default_rng(0)
    masks = []
    executed, dense = np.zeros(4), np.zeros(4)
    for b in range(4):
      hard, dilated = rng.integers(0, 2, (2, 3, 2 + b, 5))
      macs = [int(m) for m in rng.integers(1, 100, 3)]
      masks.append(_mask(hard, dilated, *macs))
      for n in range(3):
        for i in range(2 + b):
          for j in range(5):
            executed[b] += macs[0] * dilated[n, i, j]
            executed[b] += (macs[1] + macs[2]) * hard[n, i, j]
            dense[b] += sum(macs)
    network, blocks = losses.executed_fractions(masks)
    np.testing.assert_allclose(blocks, executed / dense, rtol=1e-6)
    self.assertAlmostEqual(
      float(network), executed.sum() / dense.sum(), places=6
    )


class SparsityLossTest(parameterized.TestCase):
  @parameterized.product(progress=tuple(OPENING), budget=(0.0, 0.3, 0.5, 1.0))
  def test_by_hand(self, progress, budget):
    q = OPENING[progress]
    upper, lower = 1 - q * (1 - budget), q * budget
    terms = 0.0
    for block in BLOCKS:
      terms += max(block - upper, 0) ** 2 + max(lower - block, 0) ** 2
    expected = (NETWORK - budget) ** 2 + terms / 2
    loss = losses.sparsity_loss(_masks(), budget=budget, progress=progress)
    self.assertAlmostEqual(float(loss), expected, places=6)
    self.assertEqual((loss.shape, loss.dtype), ((), jnp.float32))

  def test_numbers(self):
    # Budget 0.5. At the start: 0.11^2 + (0.08333^2 + 0.4^2) / 2.
    # At 0.1, q = 0.79003: within [0.39501, 0.60499] is only the first block,
    # 0.11^2 + (0.39501 - 0.1)^2 / 2. Once open: 0.11^2.
    for progress, expected in ((0, 0.0955722), (0.1, 0.0556168), (1, 0.0121)):
      loss = losses.sparsity_loss(_masks(), budget=0.5, progress=progress)
      self.assertAlmostEqual(float(loss), expected, places=6)

  @parameterized.parameters(0, 0.1, 1)
  def test_gradient_by_hand(self, progress):
    budget, q = 0.5, OPENING[progress]
    upper, lower = 1 - q * (1 - budget), q * budget
    grads = jax.grad(
      lambda masks: losses.sparsity_loss(
        masks, budget=budget, progress=progress
      )
    )(_masks())
    # A position of `hard` adds its MACs over 200 to the network's fraction,
    # over the block's dense MACs to the block's.
    for grad, fraction, macs, dense in zip(
      grads, BLOCKS, (10, 16), (120, 80), strict=True
    ):
      outside = max(fraction - upper, 0) - max(lower - fraction, 0)
      expected = 2 * (NETWORK - budget) * macs / 200
      expected += 2 * outside * macs / dense / 2
      np.testing.assert_allclose(
        grad.hard, np.full(grad.hard.shape, expected), rtol=1e-5
      )

  @parameterized.parameters(0.0, 0.37, 1.0)
  def test_full_masks_cost_the_distance_from_one(self, budget):
    ones = jax.tree.map(jnp.ones_like, _masks())
    loss = losses.sparsity_loss(ones, budget=budget, progress=1.0)
    self.assertAlmostEqual(float(loss), (1 - budget) ** 2, places=6)

  def test_traced_budget_and_progress(self):
    traced = jax.jit(
      lambda b, p: losses.sparsity_loss(_masks(), budget=b, progress=p)
    )
    self.assertAlmostEqual(
      float(traced(0.5, 0.1)),
      float(losses.sparsity_loss(_masks(), budget=0.5, progress=0.1)),
      places=6,
    )

  @parameterized.parameters(-0.1, 1.3, math.nan)
  def test_budget_out_of_range(self, budget):
    with self.assertRaisesRegex(
      ValueError, rf'budget must be in \[0, 1\]; got {budget}'
    ):
      losses.sparsity_loss(_masks(), budget=budget, progress=0.5)

  def test_no_masks(self):
    with self.assertRaisesRegex(
      ValueError, 'at least one execution mask; got none'
    ):
      losses.sparsity_loss([], budget=0.5, progress=0.5)


class DistillationLossTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.logits, self.teacher = rng.normal(0, 3, (2, 5, 4)).astype(np.float32)

  def _softmax(self, logits, temperature):
    exponentials = np.exp(logits.astype(np.float64) / temperature)
    return exponentials / exponentials.sum(-1, keepdims=True)

  def test_against_the_definition(self):
    student, teacher = (
      self._softmax(logits, 4) for logits in (self.logits, self.teacher)
    )
    divergence = (teacher * np.log(teacher / student)).sum(-1)
    loss = losses.distillation_loss(self.logits, self.teacher, 4.0)
    self.assertAlmostEqual(float(loss), 16 * divergence.mean(), places=4)

  def test_gradient_by_hand(self):
    grads = jax.grad(losses.distillation_loss, argnums=(0, 1))(
      jnp.asarray(self.logits), jnp.asarray(self.teacher), 4.0
    )
    # T^2 times softmax's (p - q) / T, over the five examples.
    difference = self._softmax(self.logits, 4) - self._softmax(self.teacher, 4)
    np.testing.assert_allclose(grads[0], 4 * difference / 5, atol=1e-6)
    np.testing.assert_array_equal(grads[1], np.zeros_like(self.teacher))

  def test_shifted_logits_are_the_same_teacher(self):
    loss = losses.distillation_loss(self.logits + 2, self.logits, 4.0)
    self.assertAlmostEqual(float(loss), 0, places=5)


if __name__ == '__main__':
  absltest.main()
