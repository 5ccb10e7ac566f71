"""Tests of the binary Gumbel-softmax and its straight-through gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from dynconv_jax.methods.gumbel import Gumbel, binary_gumbel, straight_through

LOGITS = (-2.0, -0.5, 0.0, 0.3, 4.0)


def _slope(x: float, temperature: float) -> float:
  """Returns the derivative of 1 / (1 + exp(-x / T)) with respect to x."""
  soft = 1 / (1 + math.exp(-x / temperature))
  return soft * (1 - soft) / temperature


def _value_and_slope(logits, key, temperature, noise):
  value, pull = jax.vjp(
    lambda x: binary_gumbel(x, key, temperature, noise), logits
  )
  return value, pull(jnp.ones_like(value))[0]


class StraightThroughTest(absltest.TestCase):
  def test_value_of_hard_gradient_of_soft(self):
    def function(x):
      return straight_through(jnp.round(3 * x), x**2)

    value, slope = jax.value_and_grad(function)(jnp.float32(0.7))
    self.assertEqual(value, 2.0)
    self.assertAlmostEqual(float(slope), 1.4, places=6)

  def test_values_are_exact(self):
    soft = jax.random.uniform(jax.random.key(0), (10_000,))
    hard = (soft > 0.5).astype(jnp.float32)
    np.testing.assert_array_equal(jax.jit(straight_through)(hard, soft), hard)


class BinaryGumbelTest(parameterized.TestCase):
  @parameterized.parameters(0.5, 1.0, 5.0)
  def test_without_noise(self, temperature):
    value, slope = _value_and_slope(jnp.array(LOGITS), None, temperature, False)
    np.testing.assert_array_equal(value, [0, 0, 1, 1, 1])
    np.testing.assert_allclose(
      slope, [_slope(x, temperature) for x in LOGITS], rtol=1e-5, atol=1e-6
    )
    self.assertEqual(value.dtype, jnp.float32)

  def test_hand_computed_slopes(self):
    # sigmoid' is 1/4 at 0 and 2/9 at ln 2, where the sigmoid is 2/3.
    logits = jnp.array([0.0, 2 * math.log(2), -2 * math.log(2)])
    value, slope = _value_and_slope(logits, None, 2.0, False)
    np.testing.assert_array_equal(value, [1, 1, 0])
    np.testing.assert_allclose(slope, [1 / 8, 1 / 9, 1 / 9], rtol=1e-6)

  @parameterized.parameters(1.0, 2.5)
  def test_with_noise_of_the_same_key(self, temperature):
    key = jax.random.key(3)
    value, slope = _value_and_slope(jnp.array(LOGITS), key, temperature, True)
    first, second = (
      np.asarray(jax.random.gumbel(k, (5,))) for k in jax.random.split(key)
    )
    noisy = [x + a - b for x, a, b in zip(LOGITS, first, second, strict=True)]
    np.testing.assert_array_equal(value, [float(x >= 0) for x in noisy])
    np.testing.assert_allclose(
      slope, [_slope(x, temperature) for x in noisy], rtol=1e-5, atol=1e-6
    )

  def test_noise_is_logistic(self):
    # Recovers the noise from value and slope: the slope is s (1 - s), and the
    # value tells on which side of 1/2 the sigmoid s lies.
    shift = 0.4
    value, slope = _value_and_slope(
      jnp.full((40_000,), shift), jax.random.key(0), 1.0, True
    )
    slope = np.asarray(slope, np.float64)
    smaller = slope / (0.5 + np.sqrt(np.maximum(0.25 - slope, 0)))
    size = np.log((1 - smaller) / smaller)
    noise = np.where(value == 1, size, -size) - shift
    self.assertAlmostEqual(noise.mean(), 0, delta=0.04)
    self.assertAlmostEqual(noise.var(), math.pi**2 / 3, delta=0.1)
    # 1.63 / sqrt(n) is the 1 % critical value; the seed is fixed.
    distance = stats.kstest(noise, 'logistic').statistic
    self.assertLess(distance, 1.63 / 40_000**0.5)

  @parameterized.parameters(-1.0, 0.0, 2.0)
  def test_share_of_ones_is_the_sigmoid(self, logit):
    value = binary_gumbel(jnp.full((40_000,), logit), jax.random.key(1))
    expected = 1 / (1 + math.exp(-logit))
    self.assertAlmostEqual(float(value.mean()), expected, delta=0.01)

  def test_temperature_does_not_change_the_values(self):
    logits = jax.random.normal(jax.random.key(4), (1000,))
    key = jax.random.key(5)
    np.testing.assert_array_equal(
      binary_gumbel(logits, key, 0.3), binary_gumbel(logits, key, 5.0)
    )

  def test_traced_flag_equals_the_constant(self):
    logits = jax.random.normal(jax.random.key(4), (1000,))
    key = jax.random.key(5)
    traced = jax.jit(_value_and_slope)
    for noise in (True, False):
      expected = _value_and_slope(logits, key, 2.0, noise)
      given = traced(logits, key, 2.0, jnp.array(noise))
      np.testing.assert_array_equal(given[0], expected[0])
      np.testing.assert_allclose(given[1], expected[1], rtol=1e-6)

  def test_keys_decide_the_noise(self):
    logits = jnp.zeros((1000,))
    one, same, other = (
      binary_gumbel(logits, jax.random.key(k)) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    # Two independent fair coins differ in half of the positions.
    self.assertBetween(int(jnp.sum(one != other)), 400, 600)


class AnnealTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, 5.0), (29, 5.0), (30, 2.5), (59, 2.5), (60, 1.0), (100, 1.0)
  )
  def test_temperature_of_the_imagenet_recipe(self, epoch, temperature):
    options = Gumbel(
      gumbel_temperatures=(5.0, 2.5, 1.0), gumbel_milestones=(0.3, 0.6)
    )
    # Progress, computed as in the training step.
    progress = jnp.int32(epoch * 7) / (100 * 7)
    value, _ = options.anneal(progress)
    self.assertEqual((value.shape, value.dtype), ((), jnp.float32))
    self.assertEqual(value, temperature)

  @parameterized.parameters((0, True), (79, True), (80, False), (100, False))
  def test_noise_ends(self, epoch, noise):
    progress = jnp.int32(epoch * 7) / (100 * 7)
    _, value = Gumbel(gumbel_noise_until=0.8).anneal(progress)
    self.assertEqual(value, noise)

  def test_under_jit(self):
    options = Gumbel(
      gumbel_temperatures=(4.0, 2.0),
      gumbel_milestones=(0.5,),
      gumbel_noise_until=0.25,
    )
    traced = jax.jit(options.anneal)
    for progress, expected in ((0.0, (4, True)), (0.3, (4, False))):
      self.assertEqual(traced(progress), expected)
    self.assertEqual(traced(0.5), (2, False))


if __name__ == '__main__':
  absltest.main()
