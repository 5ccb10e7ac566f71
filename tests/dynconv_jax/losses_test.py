"""Tests of the losses against plain arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dynconv_jax import losses
from dynconv_jax.masks import ExecutionMask, MaskedLayer


def _mask(hard, dilated, *macs):
  hard, dilated = (jnp.array(m, jnp.float32) for m in (hard, dilated))
  layers = tuple(
    MaskedLayer(f'layer1.0.conv{i}', m, level=int(i == 0))
    for i, m in enumerate(macs)
  )
  return ExecutionMask(maps=(hard, dilated), name='layer1.0', layers=layers)


def _masks():
  """Two images, two blocks: on average 35 of 60 and 4 of 40 MACs per image."""
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

# cos(pi / 2 * progress / 0.33) ** 2, computed by hand.
OPENING = {0: 1.0, 0.1: 0.7900285, 0.33: 0.0, 1: 0.0}


class BudgetBoundsTest(parameterized.TestCase):
  @parameterized.product(progress=tuple(OPENING), budget=(0.0, 0.3, 0.5, 1.0))
  def test_by_hand(self, progress, budget):
    q = OPENING[progress]
    lower, upper = losses.budget_bounds(budget, progress)
    self.assertAlmostEqual(float(lower), q * budget, places=6)
    self.assertAlmostEqual(float(upper), 1 - q * (1 - budget), places=6)

  def test_open_later(self):
    # Half of the way to 0.8 is cos(pi / 4) ** 2 = 0.5.
    lower, upper = losses.budget_bounds(0.4, 0.4, until=0.8)
    self.assertAlmostEqual(float(lower), 0.2, places=6)
    self.assertAlmostEqual(float(upper), 0.7, places=6)
    lower, upper = losses.budget_bounds(0.4, 1.0, until=1000)
    self.assertAlmostEqual(float(lower), 0.4, places=5)
    self.assertAlmostEqual(float(upper), 0.4, places=5)

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
    # Budget 0.5. At the start: 0.11^2 + (0.08333^2 + 0.4^2) / 2. At 0.1, q =
    # 0.79003: only the first block is within [0.39501, 0.60499], so 0.11^2 +
    # (0.39501 - 0.1)^2 / 2. Once open: 0.11^2.
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
    # A position of `hard` adds its MACs over 200 to the network's fraction, and
    # its MACs over the block's dense MACs to the block's fraction.
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


def _decisions(actions, scores=None):
  """Returns masks of 2x2 and 1x2 positions for float[2, N] actions, scores."""
  masks = []
  for i, size in enumerate(((2, 2), (1, 2))):
    wide = lambda v, s=size: jnp.broadcast_to(  # noqa: E731
      jnp.asarray(v, jnp.float32)[:, None, None], (len(v), *s)
    )
    hard = wide(actions[i])
    score = None if scores is None else wide(scores[i])
    masks.append(ExecutionMask((hard,), f'layer{i + 1}.0', (), i, score))
  return masks


class SkipPenaltyTest(absltest.TestCase):
  def test_by_hand(self):
    masks = _decisions([[1, 0, 0, 1], [1, 1, 0, 1]])
    self.assertAlmostEqual(float(losses.skip_penalty(masks)), (0.5 + 0.75) / 2)
    # A block counts as one, whatever its map: 1/2 over 4 images of 4 positions.
    grads = jax.grad(losses.skip_penalty)(masks)
    np.testing.assert_allclose(grads[0].hard, np.full((4, 2, 2), 1 / 32))
    np.testing.assert_allclose(grads[1].hard, np.full((4, 1, 2), 1 / 16))

  def test_no_masks(self):
    with self.assertRaisesRegex(ValueError, 'at least one mask; got none'):
      losses.skip_penalty([])


class ReinforceTest(parameterized.TestCase):
  def test_rewards_by_hand(self):
    actions = jnp.array([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    rewards = losses.skip_rewards(actions, jnp.array([2.0, 0.5]), 0.3)
    # A skipped block earns 0.1, for its own gate and those before it.
    np.testing.assert_allclose(
      rewards, [[-1.9, -0.2], [-1.9, -0.3], [-2.0, -0.4]], rtol=1e-6
    )

  def test_loss_by_hand(self):
    masks = _decisions([[1, 0], [0, 1]], [[0.8, 0.7], [0.4, 0.9]])
    # Rewards: -2 + 0.1 for both gates of the first image; -1 + 0.1 for the
    # first and -1 for the second gate of the second image.
    expected = -(np.log(0.8) + np.log(0.6)) * -1.9 / 2
    expected += -(np.log(0.3) * -0.9 + np.log(0.9) * -1.0) / 2
    loss = losses.reinforce_loss(masks, jnp.array([2.0, 1.0]), 0.2)
    self.assertAlmostEqual(float(loss), expected, places=6)

  def test_certain_actions_have_a_finite_gradient(self):
    masks = _decisions([[1, 0], [1, 1]], [[1, 0], [1, 0.5]])
    grads = jax.grad(losses.reinforce_loss)(masks, jnp.ones(2), 0.1)
    for grad in grads:
      self.assertTrue(np.all(np.isfinite(grad.score)))

  def test_the_reward_has_no_gradient(self):
    masks = _decisions([[1, 0], [0, 1]], [[0.8, 0.7], [0.4, 0.9]])
    grad = jax.grad(losses.reinforce_loss, 1)(masks, jnp.ones(2), 0.2)
    self.assertFalse(np.any(grad))

  @parameterized.parameters(0.0, 0.5)
  def test_expected_gradient_is_that_of_the_expected_reward(self, alpha):
    # Two gates, the second of which reads the first's action.
    x = np.array([0.3, -1.2, 0.7])
    errors = np.random.default_rng(0).uniform(0, 2, (2, 2, 3))
    theta = np.array([0.8, -0.5, 1.1, 0.2])

    def scores(theta, x, action, sigmoid):
      w1, w2, v, b = theta
      return sigmoid(w1 * x + b), sigmoid(w2 * x + v * action)

    def expected_reward(theta):
      total = 0.0
      for n in range(3):
        for a1, a2 in np.ndindex(2, 2):
          p1, p2 = scores(theta, x[n], a1, lambda z: 1 / (1 + np.exp(-z)))
          p = (p1 if a1 else 1 - p1) * (p2 if a2 else 1 - p2)
          total += p * (-errors[a1, a2, n] + alpha / 2 * (2 - a1 - a2)) / 3
      return total

    def loss(theta, n, a1, a2):
      s1, s2 = scores(theta, x[n], a1, jax.nn.sigmoid)
      masks = _decisions([[a1], [a2]], [s1[None], s2[None]])
      return losses.reinforce_loss(masks, errors[a1, a2, n : n + 1], alpha)

    expected = np.zeros(4)
    for n in range(3):
      for a1, a2 in np.ndindex(2, 2):
        p1, p2 = scores(theta, x[n], a1, lambda z: 1 / (1 + np.exp(-z)))
        p = (p1 if a1 else 1 - p1) * (p2 if a2 else 1 - p2)
        gradient = jax.grad(loss)(jnp.asarray(theta, jnp.float32), n, a1, a2)
        expected += p * np.asarray(gradient, np.float64) / 3
    numerical = [
      (expected_reward(theta + e) - expected_reward(theta - e)) / 2e-5
      for e in 1e-5 * np.eye(4)
    ]
    self.assertGreater(np.abs(numerical).min(), 1e-3)
    np.testing.assert_allclose(-expected, numerical, rtol=1e-4)

  def test_masks_without_probabilities(self):
    for masks, message in (
      ([], 'got none'),
      (_decisions([[1], [0]]), r"got \['layer1.0', 'layer2.0'\]"),
    ):
      with self.assertRaisesRegex(ValueError, f'REINFORCE needs .*{message}'):
        losses.reinforce_loss(masks, jnp.ones(1), 0.1)


class TargetRateLossTest(parameterized.TestCase):
  def test_by_hand(self):
    # Rates 3/4 and 1/2 of four images against targets 0.5 and 0.6.
    masks = _decisions([[1, 0, 1, 1], [1, 1, 0, 0]])
    loss = losses.target_rate_loss(masks, (0.5, 0.6))
    self.assertAlmostEqual(float(loss), (0.25**2 + 0.1**2) / 2, places=6)
    # -2 (target - rate) / 2 blocks, over four images of 4 or 2 positions.
    grads = jax.grad(losses.target_rate_loss)(masks, (0.5, 0.6))
    np.testing.assert_allclose(
      grads[0].hard, np.full((4, 2, 2), 0.25 / 16), rtol=1e-5
    )
    np.testing.assert_allclose(
      grads[1].hard, np.full((4, 1, 2), -0.1 / 8), rtol=1e-5
    )

  @parameterized.parameters((0, ()), (2, (0.5,)), (1, (0.5, 0.5)))
  def test_numbers_that_differ(self, num_masks, rates):
    masks = _decisions([[1, 0], [1, 1]])[:num_masks]
    with self.assertRaisesRegex(
      ValueError,
      'target_rates must have one rate per gated block, and at least one; got '
      f'{len(rates)} for {num_masks} masks',
    ):
      losses.target_rate_loss(masks, rates)


class PonderCostTest(absltest.TestCase):
  def _mask(self, name, hard, score):
    hard, score = (jnp.array([[v]], jnp.float32) for v in (hard, score))
    return ExecutionMask((hard,), name, (), int(name[5]), score)

  def test_by_hand(self):
    # Four positions of three units: halting at 1, 2, 3 and 3; then two of two.
    masks = [
      self._mask('layer1.1', [0, 1, 1, 1], [0.995, 0.2, 0.3, 0.1]),
      self._mask('layer1.2', [0, 0, 1, 1], [0.5, 0.9, 0.4, 0.25]),
      self._mask('layer3.1', [0, 1], [1.0, 0.6]),
    ]
    # Units and remainders: 1 + 1, 2 + 0.8, 3 + 0.3, 3 + 0.65; 1 + 1, 2 + 0.4.
    expected = (2 + 2.8 + 3.3 + 3.65) / 4 + (2 + 2.4) / 2
    self.assertAlmostEqual(float(losses.ponder_cost(masks)), expected, places=5)
    # A score that does not halt reduces the remainder; the others do nothing.
    grads = jax.grad(
      lambda scores: losses.ponder_cost(
        [m.replace(score=s) for m, s in zip(masks, scores, strict=True)]
      )
    )([mask.score for mask in masks])
    np.testing.assert_allclose(grads[0][0, 0], [0, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(grads[1][0, 0], [0, 0, -0.25, -0.25])
    np.testing.assert_allclose(grads[2][0, 0], [0, -0.5])

  def test_no_scores(self):
    with self.assertRaisesRegex(ValueError, 'halting scores; got none'):
      losses.ponder_cost([])
    scored = self._mask('layer1.1', [1], [0.5])
    with self.assertRaisesRegex(ValueError, r"got \['layer1.2'\]"):
      losses.ponder_cost([scored, scored.replace(name='layer1.2', score=None)])


if __name__ == '__main__':
  absltest.main()
