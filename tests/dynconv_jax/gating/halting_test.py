"""Tests of halting against the paper's algorithm, position by position."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from dynconv_jax import losses
from dynconv_jax.gating.halting import HaltingUnit
from dynconv_jax.gating.mask import ExecutionMask
from dynconv_jax.macs import count_macs
from dynconv_jax.models.blocks import BasicBlock, Bottleneck
from dynconv_jax.models.create import create_model
from dynconv_jax.models.layers import BatchNorm
from dynconv_jax.models.resnet import Architecture, ResNet


def _algorithm(states, scores):
  """Figurnov et al., algorithm 1, at one position.

  Args:
    states: L vectors.
    scores: L - 1 numbers, of all but the last.

  Returns:
    The output, the number of units N, the remainder R.
  """
  cumulative, remainder, output = 0.0, 1.0, 0.0
  for n, state in enumerate(states, start=1):
    score = scores[n - 1] if n < len(states) else 1.0
    cumulative += score
    if cumulative < 1 - 0.01:
      output = output + score * state
      remainder -= score
    else:
      return output + remainder * state, n, remainder


def _stage(states, scores):
  """The algorithm at every position: (output, units, remainders)."""
  states, scores = np.float64(states), np.float64(scores)
  output = np.zeros(states.shape[1:])
  units, remainders = np.zeros((2, *states.shape[1:-1]))
  for at in np.ndindex(*units.shape):
    output[at], units[at], remainders[at] = _algorithm(
      [state[at] for state in states], [score[at] for score in scores]
    )
  return output, units, remainders


class _Known(HaltingUnit):
  """Reads the halting score in a state's first channel."""

  def score(self, x):
    x = x.astype(jnp.float32)[..., 0]
    return x[:, :1, :1] if self.per_image else x


def _unit(features=5, spatial=True, kind=HaltingUnit, seed=0):
  return kind(features, spatial=spatial, norm=BatchNorm, rngs=nnx.Rngs(seed))


def _run(unit, states):
  """The decisions on all but the first unit, and the stage's output."""
  carry, decisions = None, []
  for state in states[:-1]:
    decision, carry = unit(jnp.asarray(state), carry)
    decisions.append(decision)
  output, carry = unit.end_stage(jnp.asarray(states[-1]), carry)
  assert carry is None
  return decisions, output


def _masks(decisions, stage='layer1'):
  return [
    ExecutionMask(d.hard, d.hard, f'{stage}.{i}', (), d.score)
    for i, d in enumerate(decisions, start=1)
  ]


def _states(scores, features=3):
  """States that bear their scores, shape [L, N, h, w, features]."""
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
    output, units, remainders = _stage(states, states[:-1, ..., 0])
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
    output, units, _ = _stage(states, states[:-1, ..., 0])
    self.assertGreater(len(np.unique(units)), 2)
    unit = _unit(3, False, _Known)
    self.assertTrue(unit.per_image)
    decisions, given = _run(unit, states)
    np.testing.assert_allclose(given, output, rtol=1e-4, atol=1e-5)
    for number, decision in enumerate(decisions, start=2):
      chex.assert_shape(decision, (8, 1, 1))
      np.testing.assert_array_equal(decision.hard, units[:, :1, :1] >= number)

  def test_gradient_by_hand(self):
    # One position halts at unit 2 of 3, the other at unit 3. The decisions
    # are constants, so d output / d h_l = x_l - x_N for l < N, and the ponder
    # cost's is -1; that of h_N is 0.
    states = _states([[[[0.3, 0.2]]], [[[0.8, 0.3]]]])

    def objective(scores):
      x = jnp.asarray(states).at[:-1, ..., 0].set(scores)
      # The first channel, which holds the score, is not part of the output.
      decisions, output = _run(_unit(3, True, _Known), x)
      cost = losses.ponder_cost(_masks(decisions)) * 2  # Of two positions.
      return jnp.sum(output[..., 1]) + 10 * cost

    grads = jax.grad(objective)(jnp.asarray(states[:-1, ..., 0]))
    x = states[:, 0, 0, :, 1]
    expected = [
      [x[0, 0] - x[1, 0] - 10, x[0, 1] - x[2, 1] - 10],
      [0, x[1, 1] - x[2, 1] - 10],
    ]
    np.testing.assert_allclose(grads[:, 0, 0], expected, rtol=1e-5)

  def test_bfloat16_states(self):
    # 20 states of weight 0.045: bfloat16 sums would be off by per cents.
    scores = np.full((20, 1, 1, 1), 0.045)
    states = jnp.asarray(_states(scores), jnp.bfloat16)
    decisions, output = _run(_unit(3, True, _Known), states)
    self.assertEqual(output.dtype, jnp.bfloat16)
    for decision in decisions:
      chex.assert_type(decision, jnp.float32)
    states = np.asarray(states, np.float32)
    expected, _, _ = _stage(states, states[:-1, ..., 0])
    np.testing.assert_allclose(
      np.asarray(output, np.float32), expected, rtol=2**-8, atol=1e-3
    )


def _normalized(x, norm):
  mean, var, scale, bias = (
    np.asarray(v[...], np.float64)
    for v in (norm.mean, norm.var, norm.scale, norm.bias)
  )
  return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def _randomize(module, seed=0):
  """Gives all parameters and statistics values that are not trivial."""
  rng = np.random.default_rng(seed)
  for path, value in nnx.to_flat_state(nnx.state(module)):
    if path[-1] in ('scale', 'var'):
      value[...] = jnp.asarray(rng.uniform(0.5, 1.5, value.shape), jnp.float32)
    elif path[-1] in ('mean', 'bias'):
      value[...] = jnp.asarray(rng.normal(0, 0.3, value.shape), jnp.float32)
    elif path[-2] in ('local_conv', 'global_fc'):
      value[...] = jnp.asarray(rng.normal(0, 1, value.shape), jnp.float32)


class ScoreTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_against_loops(self, spatial):
    unit = _unit(5, spatial)
    _randomize(unit)
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
    # Weights of gain 2 on normalised features: a variance of 2 a branch.
    self.assertBetween(logits.std(), 1, 2.5)
    self.assertLess((score > 0.99).mean(), 0.01)

  def test_without_its_convolution_sact_is_act(self):
    spatial, whole = _unit(5, True), _unit(5, False, seed=1)
    _randomize(spatial)
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


def _model(method, depths=(2, 1, 3), kind=BasicBlock, dtype=jnp.float32):
  return ResNet(
    Architecture(kind, depths, 4, 'cifar'),
    num_classes=5,
    width_multiplier=1.0,
    gate=lambda stage, i, features, strides: (
      _unit(features, method == 'sact') if i and method != 'dense' else None
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
  """Gives the target the weights of the same path in the source."""
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
    # Weights by which every gate leaves some positions active.
    ('sact', BasicBlock, 0, 3.0),
    ('sact', Bottleneck, 6, 3.0),
    ('act', BasicBlock, 6, 5.0),
  )
  def test_logits_and_masks_against_the_algorithm(
    self, method, kind, seed, bias
  ):
    model = _model(method, kind=kind)
    _randomize(model, seed)
    _set_bias(model, bias)
    model = _view(model)
    # Some images are paler than others, or all would halt at one unit.
    images = _images(8, 6, 5, 3) * np.geomspace(0.1, 5, 8)[:, None, None, None]
    logits, masks = _call(model, images)
    self.assertEqual(
      [mask.name for mask in masks],
      ['layer1.1', 'layer3.1', 'layer3.2'],
    )
    # The network by its blocks; where a unit halted its state is copied.
    x, given, cost = model.stem(images), iter(masks), 0
    for stage in model.stages:
      states, scores, units = [], [], None
      for block in stage:
        y = np.asarray(block(x))
        if states:
          scores.append(np.broadcast_to(block.masker.score(x), x.shape[:3]))
          _, units, _ = _stage([*states, y], scores)
          active = units > len(states)
          mask = next(given)
          np.testing.assert_array_equal(mask.hard, active)
          np.testing.assert_allclose(mask.score, scores[-1], atol=1e-5)
          self.assertBetween(active.mean(), 0.1, 0.9)
          y = np.where(active[..., None], y, x)
        states.append(y)
        x = jnp.asarray(y)
      if units is not None:
        x, units, remainders = _stage(states, scores)
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
    # Every unit and the whole remainder, of two stages.
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
    # One unit and the whole remainder, of two stages.
    self.assertEqual(losses.ponder_cost(masks), 2 * (1 + 1))

  def test_masks_are_nested_dilated_and_counted(self):
    model = _model('sact')
    _set_bias(model, 4.5)
    model = _view(model)
    images = _images(4, 12, 10, 3)
    _, masks = _call(model, images)
    report = count_macs(
      model, jax.ShapeDtypeStruct((1, 12, 10, 3), jnp.float32)
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
    # The halting unit's convolution, with its bias, is counted everywhere.
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

    # By the ponder cost alone would be too little: the output has to help.
    for weight in (0.0, 0.01):
      given = dict(nnx.to_flat_state(grads(params, weight)))
      units = [path for path in given if 'masker' in path]
      # Three gates, of two norms and two layers; of ACT, one and one.
      self.assertLen(units, 3 * {'sact': 7, 'act': 4}[method])
      for path in units:
        self.assertTrue(np.all(np.isfinite(given[path])), path)
        self.assertGreater(np.abs(given[path]).max(), 0, path)


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters('sact', 'act')
  def test_no_stage_of_two_blocks(self, method):
    with self.assertRaisesRegex(
      ValueError,
      f'{method} needs a stage of two blocks or more.*; cifar_resnet8 has one',
    ):
      create_model('cifar_resnet8', method=method, rngs=nnx.Rngs(0))


if __name__ == '__main__':
  absltest.main()
