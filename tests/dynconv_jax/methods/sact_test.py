"""Tests of halting against the paper's algorithm, position by position."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx
from halting_algorithm import randomize, run_stage

from dynconv_jax import losses
from dynconv_jax.masks import ExecutionMask
from dynconv_jax.methods.sact import HaltingUnit


class _Known(HaltingUnit):
  """Reads the halting score from the first channel of a state."""

  def score(self, x):
    x = x.astype(jnp.float32)[..., 0]
    return x[:, :1, :1] if self.per_image else x


def _unit(features=5, spatial=True, kind=HaltingUnit, seed=0):
  return kind(features, spatial=spatial, rngs=nnx.Rngs(seed))


def _run(unit, states):
  """Returns the decisions of all but the first unit, and the stage's output."""
  carry, decisions = None, []
  for state in states[:-1]:
    decision, carry = unit(jnp.asarray(state), carry)
    decisions.append(decision)
  output, carry = unit.end_stage(jnp.asarray(states[-1]), carry)
  assert carry is None
  return decisions, output


def _masks(decisions, stage='layer1'):
  return [
    ExecutionMask((d.hard,), f'{stage}.{i}', (), stage, d.score)
    for i, d in enumerate(decisions, start=1)
  ]


def _states(scores, features=3):
  """Returns states that contain their scores, shape [L, N, h, w, features]."""
  scores = np.asarray(scores, np.float32)
  shape = (len(scores) + 1, *scores.shape[1:], features)
  states = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  states[:-1, ..., 0] = scores
  return states


class HaltingTest(parameterized.TestCase):
  @parameterized.named_parameters(
    # scores of units 1 to 3; weights of the four states; masks of 2 to 4; R.
    ('at_the_first', (0.995, 0.3, 0.2), (1, 0, 0, 0), (0, 0, 0), 1.0),
    ('at_the_second', (0.3, 0.7, 0.2), (0.3, 0.7, 0, 0), (1, 0, 0), 0.7),
    ('passes_1', (0.6, 0.9, 0.0), (0.6, 0.4, 0, 0), (1, 0, 0), 0.4),
    ('within_epsilon', (0.5, 0.4905, 0.1), (0.5, 0.5, 0, 0), (1, 0, 0), 0.5),
    ('not_within', (0.5, 0.48, 0.1), (0.5, 0.48, 0.02, 0), (1, 1, 0), 0.02),
    ('at_the_last', (0.1, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4), (1, 1, 1), 0.4),
    ('never_before', (0, 0, 0), (0, 0, 0, 1), (1, 1, 1), 1.0),
  )
  def test_by_hand(self, scores, weights, masks, remainder):
    states = _states(np.reshape(scores, (3, 1, 1, 1)))
    for spatial in (True, False):
      decisions, output = _run(_unit(3, spatial, _Known), states)
      expected = sum(w * s for w, s in zip(weights, states, strict=True))
      np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
      self.assertEqual([float(d.hard[0, 0, 0]) for d in decisions], [*masks])
      np.testing.assert_allclose(
        [float(d.score[0, 0, 0]) for d in decisions], scores, rtol=1e-6
      )
      # N units, the first of them without a gate, and the remainder.
      np.testing.assert_allclose(
        losses.ponder_cost(_masks(decisions)), 1 + sum(masks) + remainder
      )

  @parameterized.parameters(2, 3, 6)
  def test_mixed_positions_against_the_algorithm(self, num_units):
    scores = np.random.default_rng(1).beta(0.5, 1, (num_units - 1, 2, 5, 4))
    scores[:, :, 0] = 1
    states = _states(scores)
    output, units, remainders = run_stage(states, states[:-1, ..., 0])
    self.assertLen(np.unique(units), num_units)
    decisions, given = _run(_unit(3, True, _Known), states)
    np.testing.assert_allclose(given, output, rtol=1e-4, atol=1e-5)
    for number, decision in enumerate(decisions, start=2):
      self.assertEqual(decision.hard.dtype, jnp.float32)
      np.testing.assert_array_equal(decision.hard, units >= number)
    np.testing.assert_allclose(
      losses.ponder_cost(_masks(decisions)),
      np.mean(units + remainders),
      rtol=1e-5,
    )

  def test_images_halt_as_a_whole(self):
    scores = np.random.default_rng(1).beta(0.5, 1, (3, 8, 1, 1))
    states = _states(np.broadcast_to(scores, (3, 8, 2, 3)))
    output, units, _ = run_stage(states, states[:-1, ..., 0])
    self.assertGreater(len(np.unique(units)), 2)
    unit = _unit(3, False, _Known)
    self.assertTrue(unit.per_image)
    decisions, given = _run(unit, states)
    np.testing.assert_allclose(given, output, rtol=1e-4, atol=1e-5)
    for number, decision in enumerate(decisions, start=2):
      chex.assert_shape(decision, (8, 1, 1))
      np.testing.assert_array_equal(decision.hard, units[:, :1, :1] >= number)

  def test_gradient_by_hand(self):
    # One position halts at unit 2 of 3, the other at unit 3. The decisions are
    # constants, so d output / d h_l = x_l - x_N for l < N, and the derivative
    # of the ponder cost is -1; for h_N it is 0.
    states = _states([[[[0.3, 0.2]]], [[[0.8, 0.3]]]])

    def objective(scores):
      x = jnp.asarray(states).at[:-1, ..., 0].set(scores)
      # The first channel, which contains the score, is not part of the output.
      decisions, output = _run(_unit(3, True, _Known), x)
      cost = losses.ponder_cost(_masks(decisions)) * 2  # two positions
      return jnp.sum(output[..., 1]) + 10 * cost

    grads = jax.grad(objective)(jnp.asarray(states[:-1, ..., 0]))
    x = states[:, 0, 0, :, 1]
    expected = [
      [x[0, 0] - x[1, 0] - 10, x[0, 1] - x[2, 1] - 10],
      [0, x[1, 1] - x[2, 1] - 10],
    ]
    np.testing.assert_allclose(grads[:, 0, 0], expected, rtol=1e-5)

  def test_bfloat16_states(self):
    # 20 states of weight 0.045: bfloat16 sums would be off by several percent.
    scores = np.full((20, 1, 1, 1), 0.045)
    states = jnp.asarray(_states(scores), jnp.bfloat16)
    decisions, output = _run(_unit(3, True, _Known), states)
    self.assertEqual(output.dtype, jnp.bfloat16)
    for decision in decisions:
      chex.assert_type(decision, jnp.float32)
    states = np.asarray(states, np.float32)
    expected, _, _ = run_stage(states, states[:-1, ..., 0])
    np.testing.assert_allclose(
      np.asarray(output, np.float32), expected, rtol=2**-8, atol=1e-3
    )


def _normalized(x, norm):
  mean, var, scale, bias = (
    np.asarray(v[...], np.float64)
    for v in (norm.mean, norm.var, norm.scale, norm.bias)
  )
  return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


class ScoreTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_against_loops(self, spatial):
    unit = _unit(5, spatial)
    randomize(unit)
    unit = nnx.view(unit, use_running_average=True)
    x = np.random.default_rng(1).normal(size=(2, 4, 3, 5)).astype(np.float32)
    pooled = _normalized(np.float64(x).mean((1, 2)), unit.global_norm)
    squeezed = pooled @ np.asarray(unit.global_fc.kernel[...], np.float64)
    logits = np.zeros((2, 4, 3)) + squeezed[:, None]
    if spatial:
      kernel = np.asarray(unit.local_conv.kernel[...], np.float64)[..., 0]
      padded = np.pad(
        _normalized(np.float64(x), unit.local_norm),
        ((0, 0), (1, 1), (1, 1), (0, 0)),
      )
      for n, i, j in np.ndindex(2, 4, 3):
        logits[n, i, j] += (padded[n, i : i + 3, j : j + 3] * kernel).sum()
    layer = unit.local_conv if spatial else unit.global_fc
    logits += float(layer.bias[0])
    expected = 1 / (1 + np.exp(-logits))
    if not spatial:
      expected = expected[:, :1, :1]
    np.testing.assert_allclose(unit.score(x), expected, rtol=1e-5)
    self.assertEqual(unit(x)[0].score.shape, expected.shape)

  @parameterized.parameters(True, False)
  def test_opens_at_minus_three(self, spatial):
    unit = _unit(400, spatial)
    x = np.random.default_rng(0).normal(size=(64, 3, 3, 400)).astype('f4')
    score = np.asarray(unit.score(x))
    logits = np.log(score / (1 - score))
    self.assertAlmostEqual(logits.mean(), -3, delta=0.5)
    # Weights of gain 2 on normalized features: a variance of 2 per branch.
    self.assertBetween(logits.std(), 1, 2.5)
    self.assertLess((score > 0.99).mean(), 0.01)

  def test_without_its_convolution_sact_is_act(self):
    spatial, whole = _unit(5, True), _unit(5, False, seed=1)
    randomize(spatial)
    nnx.update(whole.global_norm, nnx.state(spatial.global_norm))
    whole.global_fc.kernel[...] = spatial.global_fc.kernel[...]
    spatial.local_conv.kernel[...] = jnp.zeros((3, 3, 5, 1))
    whole.global_fc.bias[...] = spatial.local_conv.bias[...]
    states = np.random.default_rng(1).normal(size=(4, 8, 3, 2, 5)).astype('f4')
    local, output = _run(spatial, states)
    expected, expected_output = _run(whole, states)
    np.testing.assert_array_equal(output, expected_output)
    chex.assert_trees_all_equal(
      local,
      jax.tree.map(lambda v: jnp.broadcast_to(v, (8, 3, 2)), expected),
    )

  def test_nothing_is_sampled(self):
    unit = _unit()
    x = np.random.default_rng(1).normal(size=(2, 4, 4, 5)).astype('f4')
    chex.assert_trees_all_equal(
      unit(x)[0],
      unit(x, rngs=nnx.Rngs(gumbel=0), temperature=5.0)[0],
      nnx.view(unit, deterministic=True)(x)[0],
    )


if __name__ == '__main__':
  absltest.main()
