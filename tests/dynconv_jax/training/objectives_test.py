"""Tests of the methods' loss terms, and of training steps that use them."""

from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from dynconv_jax import losses
from dynconv_jax.masks import ExecutionMask, MaskedLayer
from dynconv_jax.methods import convnet_aig, sact
from dynconv_jax.training import schedules, workdir
from dynconv_jax.training import state as state_lib
from dynconv_jax.training.config import Config


def _masks(names, stages=None, seed=0):
  """Returns random masks of 6 images, in {0, 1}, with scores."""
  rng = np.random.default_rng(seed)
  layers = (MaskedLayer('conv1', 3, level=0),)
  masks = []
  for name, stage in zip(names, stages or range(len(names)), strict=True):
    hard = jnp.asarray(rng.integers(0, 2, (6, 2, 2)), jnp.float32)
    score = jnp.asarray(rng.random((6, 2, 2)), jnp.float32)
    masks.append(ExecutionMask((hard,), name, layers, stage, score))
  return masks


def _loss(config, masks, progress):
  method = config.method
  return method.record.loss(method.options, masks, jnp.zeros(6), progress)


class GatingLossTest(parameterized.TestCase):
  def test_dynconv(self):
    masks = _masks(['layer1.0', 'layer2.0', 'layer3.0'])
    config = Config.make(budget=0.2, budget_warmup=0.5, sparsity_weight=7.0)
    weight, loss = _loss(config, masks, 0.25)
    self.assertEqual(weight, 7.0)
    # Halfway from 1 to 0.2; a block's bounds open at 1/4.
    expected = losses.sparsity_loss(masks, budget=0.6, progress=0.25)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    config = Config.make(budget=0.2, block_bounds_until=0.75)
    _, loss = _loss(config, masks, 0.25)
    earlier, later = (
      losses.sparsity_loss(masks, budget=0.2, progress=0.25, bounds_until=until)
      for until in (0.33, 0.75)
    )
    np.testing.assert_allclose(loss, later, rtol=1e-5)
    assert later > earlier + 1e-3

  def test_convnet_aig_leaves_out_blocks_without_a_gate(self):
    config = Config.make(
      method='convnet_aig',
      model='resnet50',
      target_rates='resnet50',
      budget=0.4,
      target_rate_weight=3.0,
    )
    # Its list of 16 has six ones, and 0.8 and 0.7 besides 0.4.
    masks = _masks([f'layer1.{i}' for i in range(10)])
    weight, loss = _loss(config, masks, 0.5)
    self.assertEqual(weight, 3.0)
    rates = [float(mask.hard.mean()) for mask in masks]
    targets = [0.8, *(0.4,) * 8, 0.7]
    np.testing.assert_allclose(
      loss, np.mean(np.subtract(rates, targets) ** 2), rtol=1e-5
    )

  @parameterized.parameters('sact', 'act')
  def test_halting(self, method):
    masks = _masks(['layer1.1', 'layer1.2', 'layer3.1'], [0, 0, 2])
    config = Config.make(method=method, ponder_weight=0.25)
    weight, loss = _loss(config, masks, 0.5)
    self.assertEqual(weight, 0.25)
    # Two stages have gates; each position has one unit and the remainder.
    cost = 4 + sum(np.mean(m.hard * (1 - m.score)) for m in masks)
    np.testing.assert_allclose(loss, cost, rtol=1e-5)


@pytest.mark.slow
class StepTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    chex.clear_trace_counter()

  @parameterized.parameters(
    ('convnet_aig', convnet_aig, 'target_rate_loss', 2.0),
    ('sact', sact, 'ponder_cost', 0.01),
    ('act', sact, 'ponder_cost', 0.01),
  )
  def test_steps_trace_the_loss_once(self, method, module, name, weight):
    config = Config().replace(
      method=method,
      model='cifar_resnet14',
      width_multiplier=0.25,
      epochs=1,
      learning_rate=0.1,
    )
    model = workdir.build_model(config, 4)
    tx = schedules.optimizer(
      config.optimization, schedules.learning_rate(config.optimization, 4)
    )
    state = state_lib.create_state(model, tx, config)
    step = state_lib.make_train_step(
      state_lib.split(model)[0], tx, config, steps_per_epoch=4
    )
    rng = np.random.default_rng(0)
    before = jax.tree.map(np.array, state.params)
    once = chex.assert_max_traces(getattr(module, name), n=1)
    with mock.patch.object(module, name, once):
      for _ in range(3):
        images = rng.normal(size=(8, 8, 8, 3)).astype(np.float32)
        labels = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 8)]
        state = step(state, {'image': images, 'label': labels})
    sums = {name: float(value) for name, value in state.sums.items()}
    self.assertAlmostEqual(
      sums['loss'],
      sums['cross_entropy'] + weight * sums['gating'],
      delta=1e-4,
    )
    self.assertGreater(sums['gating'], 0)
    self.assertBetween(sums['executed_fraction'], 0.3, 3)
    self.assertEqual(state.first_bad.tolist(), [-1, -1])
    # Every gate has changed.
    for i, stage in enumerate(('layer1', 'layer2', 'layer3')):
      moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()),
        before[stage][1]['masker'],
        state.params[stage][1]['masker'],
      )
      for path, distance in jax.tree.leaves_with_path(moved):
        self.assertGreater(distance, 0, f'stage {i + 1}, {path}')


if __name__ == '__main__':
  absltest.main()
