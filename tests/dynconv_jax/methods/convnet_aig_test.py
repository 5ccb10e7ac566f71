"""Tests of ConvNet-AIG's gate and of networks that use it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from dynconv_jax import losses
from dynconv_jax.macs import count_macs
from dynconv_jax.methods.convnet_aig import LayerGate, target_rates
from dynconv_jax.methods.gumbel import binary_gumbel
from dynconv_jax.models.create import create_model


def _gate(features=5, seed=0):
  return LayerGate(features, rngs=nnx.Rngs(seed))


def _images(*shape, seed=1):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _randomize(gate, seed=0):
  """Sets all parameters and statistics to nontrivial values."""
  rng = np.random.default_rng(seed)
  for path, value in nnx.to_flat_state(nnx.state(gate)):
    if path[-1] in ('scale', 'var'):
      value[...] = jnp.asarray(rng.uniform(0.5, 1.5, value.shape), jnp.float32)
    else:
      value[...] = jnp.asarray(rng.normal(0, 0.5, value.shape), jnp.float32)


def _numpy_logits(gate, x, training):
  """Returns (skip, execute) for each image, in float64."""

  def array(variable):
    return np.asarray(variable[...], np.float64)

  hidden = np.float64(x).mean((1, 2)) @ array(gate.fc1.kernel)[0, 0]
  hidden += array(gate.fc1.bias)
  norm = gate.fc1bn
  mean, var = array(norm.mean), array(norm.var)
  if training:
    mean, var = hidden.mean(0), hidden.var(0)
  hidden = (hidden - mean) / np.sqrt(var + 1e-5)
  hidden = np.maximum(hidden * array(norm.scale) + array(norm.bias), 0)
  return hidden @ array(gate.fc2.kernel)[0, 0] + array(gate.fc2.bias)


class LayerGateTest(parameterized.TestCase):
  def test_the_likelier_outcome_against_numpy(self):
    gate = _gate()
    _randomize(gate)
    x = _images(40, 3, 4, 5)
    skip, execute = _numpy_logits(gate, x, training=False).T
    self.assertGreater(np.abs(execute - skip).min(), 1e-3)
    self.assertBetween((execute > skip).mean(), 0.2, 0.8)
    view = nnx.view(gate, deterministic=True, use_running_average=True)
    decision, carry = view(x)
    self.assertIsNone(carry)
    self.assertIsNone(decision.score)
    self.assertEqual(decision.hard.dtype, jnp.float32)
    chex.assert_shape(decision.hard, (40, 1, 1))
    np.testing.assert_array_equal(decision.hard[:, 0, 0], execute > skip)

  def test_sampling_is_the_binary_gumbel_of_the_difference(self):
    gate = _gate()
    _randomize(gate)
    x = _images(40, 3, 4, 5)
    skip, execute = _numpy_logits(gate, x, training=True).T
    decision, _ = gate(x, rngs=nnx.Rngs(gumbel=3))
    sampled = binary_gumbel(
      jnp.asarray(execute - skip, jnp.float32)[:, None, None],
      nnx.Rngs(gumbel=3)['gumbel'](),
    )
    np.testing.assert_array_equal(decision.hard, sampled)
    self.assertTrue(np.any(decision.hard[:, 0, 0] != (execute > skip)))
    # Without noise, no key is needed.
    quiet, _ = gate(x, gumbel_noise=False)
    np.testing.assert_array_equal(quiet.hard[:, 0, 0], execute > skip)

  def test_five_in_six_are_open_at_the_start(self):
    gate = _gate(64)
    x = np.abs(_images(5000, 1, 1, 64))
    hard = gate(x, rngs=nnx.Rngs(gumbel=0))[0].hard
    # The odds of (0.1, 2): 1 / (1 + exp(-1.9)) = 0.870; sampling is off by less
    # than 1 % (three standard deviations: 0.014).
    self.assertAlmostEqual(float(hard.mean()), 0.870, delta=0.015)
    view = nnx.view(gate, deterministic=True, use_running_average=True)
    self.assertTrue(np.all(view(x)[0].hard == 1))

  def test_gradients_reach_every_parameter(self):
    gate = _gate()
    _randomize(gate)
    x = _images(16, 3, 4, 5)

    def grads(view):
      graphdef, params, rest = nnx.split(view, nnx.Param, ...)
      rest = nnx.as_pure(rest)

      def open_images(params):
        gate = nnx.merge(graphdef, params, rest)
        weights = jnp.arange(16.0)[:, None, None]
        return jnp.sum(weights * gate(x, rngs=nnx.Rngs(gumbel=1))[0].hard)

      return dict(nnx.to_flat_state(jax.grad(open_images)(nnx.as_pure(params))))

    for path, gradient in grads(
      nnx.view(gate, use_running_average=True)
    ).items():
      self.assertGreater(np.abs(gradient).max(), 1e-3, path)
    for path, gradient in grads(gate).items():
      # Batch statistics remove a bias before them.
      if path == ('fc1', 'bias'):
        np.testing.assert_allclose(gradient, 0, atol=1e-4)
      else:
        self.assertGreater(np.abs(gradient).max(), 1e-3, path)

  def test_without_a_key(self):
    with self.assertRaisesRegex(
      ValueError, r'needs rngs=nnx.Rngs\(gumbel=key\); got None'
    ):
      _gate()(_images(2, 3, 3, 5))


class TargetRatesTest(parameterized.TestCase):
  def test_lists(self):
    self.assertEqual(target_rates('uniform', 0.7, 4), (0.7,) * 4)
    # For stages of 3, 4, 6 and 3 blocks.
    self.assertEqual(
      target_rates('resnet50', 0.4, 16),
      (1.0, 1.0, 0.8)
      + (1.0, 0.4, 0.4, 0.4)
      + (1.0, 0.4, 0.4, 0.4, 0.4, 0.4)
      + (1.0, 0.7, 1.0),
    )
    rates = target_rates('resnet101', 0.3, 33)
    self.assertEqual((rates.count(1.0), rates.count(0.3)), (8, 25))
    self.assertEqual(rates[:8], (1.0,) * 8)

  def test_errors(self):
    with self.assertRaisesRegex(
      ValueError, "uniform, resnet50, resnet101; got 'resnet152'"
    ):
      target_rates('resnet152', 0.5, 50)
    with self.assertRaisesRegex(
      ValueError, r'one rate per block \(33\); got 16 from resnet50'
    ):
      target_rates('resnet50', 0.5, 33)


def _model(rates=(0.5, 0.5, 0.5), method='convnet_aig', **kwargs):
  return create_model(
    'cifar_resnet8',
    method=method,
    num_classes=5,
    width_multiplier=0.25,
    target_rates=rates,
    rngs=nnx.Rngs(0),
    **kwargs,
  )


def _view(model, **kwargs):
  kwargs = {'deterministic': True, 'use_running_average': True} | kwargs
  return nnx.view(model, **kwargs)


def _set_bias(model, value):
  """Makes every gate execute (positive value) or skip (negative value)."""
  for block in model.blocks:
    if block.masker is not None:
      block.masker.fc2.bias[...] = jnp.array([0.0, value])


class NetworkTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    chex.clear_trace_counter()

  @parameterized.parameters(True, False)
  def test_open_gates_are_the_dense_network(self, training):
    model, dense = _model(), _model(method='dense')
    theirs = dict(nnx.to_flat_state(nnx.state(model)))
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(dense))]
    nnx.update(
      dense, nnx.from_flat_state([(path, theirs[path]) for path in paths])
    )
    _set_bias(model, 1e9)
    if not training:
      model, dense = _view(model), _view(dense)
    # Operation by operation: XLA would fuse the two networks differently.
    logits, masks = model(_images(2, 8, 8, 3), rngs=nnx.Rngs(gumbel=0))
    np.testing.assert_array_equal(logits, dense(_images(2, 8, 8, 3))[0])
    self.assertLen(masks, 3)
    self.assertTrue(all(np.all(mask.hard == 1) for mask in masks))

  def test_closed_gates_are_the_shortcuts(self):
    model = _model()
    _set_bias(model, -1e9)
    model = _view(model)
    images = _images(2, 8, 8, 3)
    logits, masks = model(images)
    x = model.stem(images)
    for block in model.blocks:
      x = nnx.relu(block.shortcut(x))
    np.testing.assert_array_equal(logits, model.head(x))
    for mask in masks:
      self.assertFalse(np.any(mask.hard) or np.any(mask.dilated))

  def test_a_block_whose_target_is_1_has_no_gate(self):
    model = _model((0.5, 1.0, 0.5))
    _set_bias(model, -1e9)
    model = _view(model)
    images = _images(2, 8, 8, 3)
    logits, masks = model(images)
    self.assertEqual([mask.name for mask in masks], ['layer1.0', 'layer3.0'])
    x = model.stem(images)
    for i, block in enumerate(model.blocks):
      shortcut = block.shortcut(x)
      x = nnx.relu(shortcut + block.run_branch(x) if i == 1 else shortcut)
    np.testing.assert_array_equal(logits, model.head(x))

  def test_masks_are_whole_images_and_are_counted(self):
    model = _model()
    for i, block in enumerate(model.blocks):
      _randomize(block.masker, seed=10 + i)
    model = _view(model)
    images = _images(8, 8, 6, 3) * np.geomspace(0.1, 9, 8)[:, None, None, None]
    _, masks = model(images)
    opened = np.stack([np.asarray(mask.hard)[:, 0, 0] for mask in masks], -1)
    self.assertBetween(opened.mean(), 0.2, 0.8)
    for mask, column in zip(masks, opened.T, strict=True):
      for array in (mask.hard, mask.dilated):
        np.testing.assert_array_equal(
          array, np.broadcast_to(column[:, None, None], array.shape)
        )
    # For the blocks: 8 x 6 positions with 4 channels, then half the size and
    # twice the channels.
    blocks = [9 * (4 * 4 + 4 * 4) * 48, 9 * (4 * 8 + 8 * 8) * 12]
    blocks.append(9 * (8 * 16 + 16 * 16) * 4)
    image = jax.ShapeDtypeStruct((1, 8, 6, 3), jnp.float32)
    report = count_macs(model, image, convention='conv')
    np.testing.assert_allclose(
      report.executed(masks), report.total - sum(blocks) + opened @ blocks
    )

  def test_sampling_in_evaluation(self):
    model = _model()
    for i, block in enumerate(model.blocks):
      _randomize(block.masker, seed=10 + i)
    images = _images(30, 8, 8, 3)
    stochastic = _view(model, deterministic=False)
    before = jax.tree.map(jnp.copy, nnx.state(model))

    def hard(view, key):
      _, masks = view(images, rngs=nnx.Rngs(gumbel=key))
      return np.stack([np.asarray(mask.hard)[:, 0, 0] for mask in masks])

    first = hard(stochastic, 0)
    np.testing.assert_array_equal(first, hard(stochastic, 0))
    self.assertTrue(np.any(first != hard(stochastic, 1)))
    view = _view(model)
    np.testing.assert_array_equal(hard(view, 0), hard(view, 1))
    # Neither changes a statistic.
    chex.assert_trees_all_equal(nnx.state(model), before)

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_gradients_reach_every_gate_in_one_trace(self, dtype):
    model = _model(dtype=dtype)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    rest = nnx.as_pure(rest)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def grads(params, key, images):
      def objective(params):
        model = nnx.merge(graphdef, params, rest)
        logits, masks = model(images, rngs=nnx.Rngs(gumbel=key))
        chex.assert_type([logits, *(mask.hard for mask in masks)], jnp.float32)
        return losses.target_rate_loss(masks, (0.2, 0.4, 0.6))

      return jax.grad(objective)(nnx.as_pure(params))

    for seed in range(3):
      given = grads(params, jax.random.key(seed), _images(9, 8, 8, 3))
      gates = {
        path: gradient
        for path, gradient in nnx.to_flat_state(given)
        if 'masker' in path and path[-2:] != ('fc1', 'bias')
      }
      self.assertLen(gates, 3 * 5)
      for path, gradient in gates.items():
        self.assertTrue(np.all(np.isfinite(gradient)), path)
        self.assertGreater(np.abs(gradient).max(), 0, path)

  @parameterized.parameters(
    ((0.5, 0.5), r'must have one rate per block \(3\); got 2'),
    ((1.0, 1.0, 1.0), 'convnet_aig needs .* target rate below 1.*got 1 for'),
  )
  def test_errors(self, rates, message):
    with self.assertRaisesRegex(ValueError, message):
      _model(rates)


if __name__ == '__main__':
  absltest.main()
