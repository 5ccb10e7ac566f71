"""Tests of learning rates and optimizers."""

import math
import unittest

import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from dynconv_jax.training import schedules
from dynconv_jax.training.config import OptimizationConfig

try:
  import torch
except ImportError:
  torch = None


def _rates(config, steps_per_epoch, steps):
  schedule = schedules.learning_rate(config, steps_per_epoch)
  return [float(schedule(step)) for step in steps]


class LearningRateTest(absltest.TestCase):
  def test_cosine(self):
    config = OptimizationConfig(learning_rate=0.2, epochs=4)
    # Half a cosine over 40 steps: cos of 0, 60, 90, 120 and 180 degrees.
    rates = _rates(config, 10, (0, 40 // 3 + 0, 20, 40, 50))
    self.assertAlmostEqual(
      rates.pop(1), 0.1 * (1 + math.cos(math.pi * 13 / 40)), places=6
    )
    np.testing.assert_allclose(rates, [0.2, 0.1, 0, 0], atol=1e-7)

  def test_cosine_after_warmup(self):
    config = OptimizationConfig(learning_rate=0.2, epochs=5, warmup_epochs=1.0)
    rates = _rates(config, 10, (0, 1, 5, 10, 30, 50))
    # Up by a tenth per step, then half a cosine over the other 40 steps.
    np.testing.assert_allclose(rates, [0, 0.02, 0.1, 0.2, 0.1, 0], atol=1e-7)

  def test_warmup_of_part_of_an_epoch(self):
    config = OptimizationConfig(learning_rate=0.2, epochs=5, warmup_epochs=0.5)
    rates = _rates(config, 8, (0, 1, 2, 3, 4))
    np.testing.assert_allclose(rates, [0, 0.05, 0.1, 0.15, 0.2], atol=1e-7)

  def test_step(self):
    config = OptimizationConfig(
      learning_rate=0.5,
      epochs=10,
      schedule='step',
      milestones=(0.3, 0.75),
      step_decay=0.2,
    )
    rates = _rates(config, 4, (0, 11, 12, 29, 30, 39))
    np.testing.assert_allclose(
      rates, [0.5, 0.5, 0.1, 0.1, 0.02, 0.02], rtol=1e-6
    )

  def test_step_after_warmup(self):
    config = OptimizationConfig(
      learning_rate=0.5,
      epochs=10,
      schedule='step',
      milestones=(0.5,),
      warmup_epochs=2.0,
    )
    # The milestone is a fraction of the whole training, including warmup.
    rates = _rates(config, 4, (0, 4, 8, 19, 20))
    np.testing.assert_allclose(rates, [0, 0.25, 0.5, 0.5, 0.05], rtol=1e-6)

  def test_milestones_that_fall_on_one_step_both_count(self):
    config = OptimizationConfig(
      learning_rate=1.0, epochs=1, schedule='step', milestones=(0.5, 0.52)
    )
    np.testing.assert_allclose(
      _rates(config, 10, (4, 5)), [1.0, 0.01], rtol=1e-6
    )

  def test_milestone_within_the_warmup(self):
    config = OptimizationConfig(
      learning_rate=1.0,
      epochs=10,
      schedule='step',
      milestones=(0.1,),
      warmup_epochs=2.0,
    )
    np.testing.assert_allclose(
      _rates(config, 10, (10, 20)), [0.5, 0.1], rtol=1e-6
    )


def _params():
  return {
    'kernel': jnp.array([[1.0, -2.0], [0.5, 3.0]]),
    'bias': jnp.array([1.0, -1.0]),
  }


def _grads():
  return {
    'kernel': jnp.array([[3.0, 0.0], [0.0, 4.0]]),
    'bias': jnp.array([12.0, 0.0]),
  }


def _steps(config, number, rate=0.1):
  """Returns the parameters after steps with the same gradients."""
  tx = schedules.optimizer(config, optax.constant_schedule(rate))
  params = _params()
  state = tx.init(params)
  for _ in range(number):
    updates, state = tx.update(_grads(), state, params)
    params = optax.apply_updates(params, updates)
  return params


class OptimizerTest(parameterized.TestCase):
  def test_decay_spares_vectors(self):
    params = _steps(OptimizationConfig(weight_decay=0.5), 1)
    # p - 0.1 (g + 0.5 p), and p - 0.1 g for the bias.
    np.testing.assert_allclose(
      params['kernel'], [[0.65, -1.9], [0.475, 2.45]], rtol=1e-6
    )
    np.testing.assert_allclose(params['bias'], [-0.2, -1.0], rtol=1e-6)

  def test_decay_all(self):
    params = _steps(OptimizationConfig(weight_decay=0.5, decay_all=True), 1)
    np.testing.assert_allclose(params['bias'], [-0.25, -0.95], rtol=1e-6)

  def test_momentum(self):
    params = _steps(OptimizationConfig(weight_decay=0.0, momentum=0.5), 3)
    # The bias moves by 0.1 * 12 * (1 + 1.5 + 1.75).
    np.testing.assert_allclose(params['bias'], [1 - 5.1, -1], rtol=1e-6)

  def test_clipping_to_the_global_norm(self):
    # The norm of all gradients is sqrt(9 + 16 + 144) = 13.
    clipped = _steps(OptimizationConfig(weight_decay=0.0, gradient_clip=6.5), 1)
    np.testing.assert_allclose(clipped['bias'], [1 - 0.6, -1], rtol=1e-6)
    np.testing.assert_allclose(
      clipped['kernel'], [[0.85, -2], [0.5, 2.8]], rtol=1e-6
    )
    kept = _steps(OptimizationConfig(weight_decay=0.0, gradient_clip=14.0), 1)
    np.testing.assert_allclose(kept['bias'], [1 - 1.2, -1], rtol=1e-6)

  def test_decay_is_not_clipped(self):
    params = _steps(OptimizationConfig(weight_decay=0.5, gradient_clip=6.5), 1)
    np.testing.assert_allclose(
      params['kernel'], [[0.8, -1.9], [0.475, 2.65]], rtol=1e-6
    )

  @unittest.skipIf(torch is None, 'PyTorch is not installed')
  @parameterized.parameters('sgd', 'adamw')
  def test_equals_torch(self, name):
    config = OptimizationConfig(
      optimizer=name, weight_decay=0.3, gradient_clip=6.5
    )
    params = {k: torch.tensor(np.asarray(v)) for k, v in _params().items()}
    groups = [
      {'params': [params['kernel']], 'weight_decay': 0.3},
      {'params': [params['bias']], 'weight_decay': 0.0},
    ]
    if name == 'sgd':
      reference = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    else:
      reference = torch.optim.AdamW(groups, lr=0.1)
    for _ in range(5):
      for key, grad in _grads().items():
        params[key].grad = torch.tensor(np.asarray(grad))
      torch.nn.utils.clip_grad_norm_(params.values(), 6.5)
      reference.step()
    ours = _steps(config, 5)
    for key, value in params.items():
      np.testing.assert_allclose(ours[key], value.numpy(), rtol=1e-5, atol=1e-6)


if __name__ == '__main__':
  absltest.main()
