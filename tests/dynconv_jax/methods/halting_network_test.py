"""Tests of networks that halt: SACT and ACT."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx
from halting_algorithm import randomize, run_stage

from dynconv_jax import losses
from dynconv_jax.macs import count_macs
from dynconv_jax.methods.sact import HaltingUnit
from dynconv_jax.models.blocks import BasicBlock, Bottleneck
from dynconv_jax.models.create import create_model
from dynconv_jax.models.resnet import Architecture, ResNet


def _model(method, depths=(2, 1, 3), kind=BasicBlock, dtype=jnp.float32):
  return ResNet(
    Architecture(kind, depths, 4, 'cifar'),
    num_classes=5,
    width_multiplier=1.0,
    gate=lambda site: (
      HaltingUnit(site.in_features, spatial=method == 'sact', rngs=nnx.Rngs(0))
      if site.stage_index and method != 'dense'
      else None
    ),
    dtype=dtype,
    rngs=nnx.Rngs(0),
  )


def _set_bias(model, value):
  for block in model.blocks:
    if block.masker is not None:
      unit = block.masker
      layer = unit.global_fc if unit.per_image else unit.local_conv
      layer.bias[...] = jnp.full((1,), value)


def _copy(source, target):
  """Copies weights from the same paths of the source."""
  theirs = dict(nnx.to_flat_state(nnx.state(source)))
  flat = [(path, theirs[path]) for path, _ in _flat(target)]
  nnx.update(target, nnx.from_flat_state(flat))


def _flat(model):
  return nnx.to_flat_state(nnx.state(model))


def _images(*shape):
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def _view(model):
  return nnx.view(model, deterministic=True, use_running_average=True)


_call = nnx.jit(lambda model, images, **kwargs: model(images, **kwargs))


class NetworkTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    chex.clear_trace_counter()

  @parameterized.parameters(
    # Weights for which every gate leaves some positions active.
    ('sact', BasicBlock, 0, 3.0),
    ('sact', Bottleneck, 6, 3.0),
    ('act', BasicBlock, 6, 5.0),
  )
  def test_logits_and_masks_against_the_algorithm(
    self, method, kind, seed, bias
  ):
    model = _model(method, kind=kind)
    randomize(model, seed)
    _set_bias(model, bias)
    model = _view(model)
    # Some images are paler than others; otherwise all would halt at one unit.
    images = _images(8, 6, 5, 3) * np.geomspace(0.1, 5, 8)[:, None, None, None]
    logits, masks = _call(model, images)
    self.assertEqual(
      [mask.name for mask in masks],
      ['layer1.1', 'layer3.1', 'layer3.2'],
    )
    # Runs the network block by block; a halted position copies its state.
    x, given, cost = model.stem(images), iter(masks), 0
    for stage in model.stages:
      states, scores, units = [], [], None
      for block in stage:
        y = np.asarray(block(x))
        if states:
          scores.append(np.broadcast_to(block.masker.score(x), x.shape[:3]))
          _, units, _ = run_stage([*states, y], scores)
          active = units > len(states)
          mask = next(given)
          np.testing.assert_array_equal(mask.hard, active)
          np.testing.assert_allclose(mask.score, scores[-1], atol=1e-5)
          self.assertBetween(active.mean(), 0.1, 0.9)
          y = np.where(active[..., None], y, x)
        states.append(y)
        x = jnp.asarray(y)
      if units is not None:
        x, units, remainders = run_stage(states, scores)
        cost += np.mean(units + remainders)
        x = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(logits, model.head(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses.ponder_cost(masks), cost, rtol=1e-4)

  @parameterized.product(method=('sact', 'act'), training=(True, False))
  def test_scores_of_0_are_the_dense_network(self, method, training):
    model, dense = _model(method), _model('dense')
    _copy(model, dense)
    _set_bias(model, -1e9)
    if not training:
      model, dense = _view(model), _view(dense)
    # Operation by operation: XLA would fuse the two networks differently.
    logits, masks = model(_images(3, 8, 8, 3))
    expected, _ = dense(_images(3, 8, 8, 3))
    np.testing.assert_array_equal(logits, expected)
    for mask in masks:
      self.assertTrue(np.all(mask.hard == 1) and np.all(mask.score == 0))
    # All units and the full remainder, for two stages.
    self.assertEqual(losses.ponder_cost(masks), (2 + 1) + (3 + 1))

  @parameterized.product(method=('sact', 'act'), training=(True, False))
  def test_scores_of_1_are_the_first_units(self, method, training):
    model, first = _model(method), _model('dense', (1, 1, 1))
    _copy(model, first)
    _set_bias(model, 1e9)
    if not training:
      model, first = _view(model), _view(first)
    logits, masks = model(_images(3, 8, 8, 3))
    expected, _ = first(_images(3, 8, 8, 3))
    np.testing.assert_array_equal(logits, expected)
    for mask in masks:
      self.assertFalse(np.any(mask.hard) or np.any(mask.dilated))
    # One unit and the full remainder, for two stages.
    self.assertEqual(losses.ponder_cost(masks), 2 * (1 + 1))

  def test_masks_are_nested_dilated_and_counted(self):
    model = _model('sact')
    _set_bias(model, 4.5)
    model = _view(model)
    images = _images(4, 12, 10, 3)
    _, masks = _call(model, images)
    report = count_macs(
      model,
      jax.ShapeDtypeStruct((1, 12, 10, 3), jnp.float32),
      convention='conv',
    )
    self.assertBetween(float(masks[0].hard.mean()), 0.1, 0.9)
    for earlier, later in zip(masks, masks[1:], strict=False):
      if earlier.name[:6] == later.name[:6]:
        self.assertTrue(np.all(later.hard <= earlier.hard))
    always = report.total
    masked = np.zeros(4)
    for mask in masks:
      channels = {'layer1': 4, 'layer3': 16}[mask.name[:6]]
      hard, (h, w) = np.asarray(mask.hard), mask.hard.shape[1:]
      always -= 2 * 9 * channels**2 * h * w
      for n, i, j in np.ndindex(*hard.shape):
        around = hard[n, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].max()
        self.assertEqual(mask.dilated[n, i, j], around)
        masked[n] += 9 * channels**2 * (around + hard[n, i, j])
    np.testing.assert_allclose(report.executed(masks), always + masked)
    # The convolution of the halting unit, with its bias, counts everywhere.
    self.assertEqual(
      report.by_layer['layer3.1.masker.local_conv'].macs, 3 * 3 * (9 * 16 + 1)
    )

  @parameterized.parameters('sact', 'act')
  def test_forced_masks_ask_no_gate(self, method):
    model, dense = _view(_model(method)), _view(_model('dense'))
    _copy(model, dense)
    images = _images(2, 8, 8, 3)
    ones = [jnp.ones((2, s, s)) for s in (8, 8, 4, 2, 2, 2)]
    logits, masks = model(images, masks=ones)
    np.testing.assert_array_equal(logits, dense(images)[0])
    self.assertTrue(all(mask.score is None for mask in masks))
    self.assertGreater(np.abs(logits - model(images)[0]).max(), 1e-3)

  @parameterized.product(
    method=('sact', 'act'), dtype=(jnp.float32, jnp.bfloat16)
  )
  def test_gradients_reach_every_halting_parameter(self, method, dtype):
    model = _model(method, dtype=dtype)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    rest = nnx.as_pure(rest)
    images = _images(6, 8, 8, 3)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def grads(params, weight):
      def objective(params):
        logits, masks = nnx.merge(graphdef, params, rest)(images)
        self.assertEqual(logits.dtype, jnp.float32)
        for mask in masks:
          chex.assert_type((mask.hard, mask.score), jnp.float32)
        cost = losses.ponder_cost(masks)
        return weight * cost + jnp.sum(logits[:, 0] ** 2)

      return jax.grad(objective)(nnx.as_pure(params))

    # The output must contribute to the gradient, not only the ponder cost.
    for weight in (0.0, 0.01):
      given = dict(nnx.to_flat_state(grads(params, weight)))
      units = [path for path in given if 'masker' in path]
      # Three gates, each with two norms and two layers; for ACT, one of each.
      self.assertLen(units, 3 * {'sact': 7, 'act': 4}[method])
      for path in units:
        self.assertTrue(np.all(np.isfinite(given[path])), path)
        self.assertGreater(np.abs(given[path]).max(), 0, path)


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters('sact', 'act')
  def test_no_stage_of_two_blocks(self, method):
    with self.assertRaisesRegex(
      ValueError,
      f'{method} needs a stage of two blocks or more.*; the network has one',
    ):
      create_model('cifar_resnet8', method=method, rngs=nnx.Rngs(0))


if __name__ == '__main__':
  absltest.main()
