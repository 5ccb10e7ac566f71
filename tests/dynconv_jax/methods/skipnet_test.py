"""Tests of SkipNet's gates against NumPy, and in limiting cases."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from dynconv_jax.macs import count_macs
from dynconv_jax.methods import skipnet as skip_gate
from dynconv_jax.models.create import create_model
from dynconv_jax.models.gated import Gating


def _images(*shape, seed=1):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _gate(kind, features=3, *, first=True, training='supervised', seed=0):
  kwargs = {'training': training, 'rngs': nnx.Rngs(seed)}
  if kind == 'recurrent':
    gate = skip_gate.RecurrentGate(features, first=first, **kwargs)
  else:
    gate = skip_gate.FeedForwardGate(features, pooled=kind == 'ff1', **kwargs)
  rng = np.random.default_rng(seed)
  for _, node in nnx.iter_graph(gate):
    if isinstance(node, nnx.BatchNorm):
      for variable in (node.scale, node.var):
        variable[...] = rng.uniform(0.5, 1.5, variable.shape).astype('f4')
      for variable in (node.bias, node.mean):
        variable[...] = rng.normal(0, 0.5, variable.shape).astype('f4')
    elif isinstance(node, nnx.Conv | nnx.Linear) and node.bias is not None:
      node.bias[...] = rng.normal(size=node.bias.shape).astype('f4')
  return gate


def _evaluation(module):
  norms = any(isinstance(n, nnx.BatchNorm) for _, n in nnx.iter_graph(module))
  modes = {'use_running_average': True} if norms else {}
  return nnx.view(module, deterministic=True, **modes)


def _array(variable):
  return np.asarray(variable[...], np.float64)


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _conv_norm_relu(x, layer, norm, strides):
  kernel = _array(layer.kernel)
  h, w = (-(-size // strides) for size in x.shape[1:3])
  x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  y = np.zeros((len(x), h, w, kernel.shape[-1]))
  for i in range(h):
    for j in range(w):
      top, left = i * strides, j * strides
      window = x[:, top : top + 3, left : left + 3]
      y[:, i, j] = np.einsum('nabc,abcf->nf', window, kernel)
  y = (y - _array(norm.mean)) / np.sqrt(_array(norm.var) + 1e-5)
  return np.maximum(y * _array(norm.scale) + _array(norm.bias), 0)


def _max_pool(x):
  rows, columns = (min(2, size) for size in x.shape[1:3])
  h, w = x.shape[1] // rows, x.shape[2] // columns
  y = np.zeros((len(x), h, w, x.shape[-1]))
  for i in range(h):
    for j in range(w):
      window = x[:, rows * i : rows * (i + 1)]
      y[:, i, j] = window[:, :, columns * j : columns * (j + 1)].max((1, 2))
  return y


def _feed_forward(x, gate):
  """Returns the probabilities to execute, float64[N], from the softmax."""
  x = np.float64(x)
  if gate.pooled:
    x = _conv_norm_relu(_max_pool(x), gate.conv1, gate.bn1, 1)
    x = _conv_norm_relu(x, gate.conv2, gate.bn2, 2)
  else:
    x = _conv_norm_relu(x, gate.conv1, gate.bn1, 2)
  logits = x.mean((1, 2)) @ _array(gate.linear.kernel)[0, 0]
  exp = np.exp(logits + _array(gate.linear.bias))
  return exp[:, 1] / exp.sum(1)


def _lstm(x, cell, output, rnn):
  """Computes one step of an LSTM, gate by gate (Gers et al., 2000)."""
  hidden = cell.shape[1]

  def affine(k):
    columns = slice(k * hidden, (k + 1) * hidden)
    return (
      x @ _array(rnn.dense_i.kernel)[:, columns]
      + output @ _array(rnn.dense_h.kernel)[:, columns]
      + _array(rnn.dense_h.bias)[columns]
    )

  entering, forgotten, candidate, shown = map(affine, range(4))
  cell = _sigmoid(forgotten) * cell + _sigmoid(entering) * np.tanh(candidate)
  return cell, _sigmoid(shown) * np.tanh(cell)


class FeedForwardGateTest(parameterized.TestCase):
  @parameterized.product(
    kind=('ff1', 'ff2'),
    size=((8, 8), (7, 5), (4, 4), (3, 3), (2, 2), (2, 1), (1, 1)),
  )
  def test_against_numpy(self, kind, size):
    gate = _gate(kind)
    x = 2 * _images(12, *size, 3)
    # A bias that opens some of them, with as wide a margin as possible.
    score = np.sort(_feed_forward(x, gate))
    logits = np.log(score / (1 - score))
    closed = 1 + np.argmax(np.diff(logits))
    middle = logits[closed - 1 : closed + 1].mean()
    gate.linear.bias[...] = gate.linear.bias[...].at[0].add(middle)
    score = _feed_forward(x, gate)
    self.assertGreater(np.abs(score - 0.5).min(), 1e-4)
    decision, carry = _evaluation(gate)(x)
    self.assertIsNone(carry)
    self.assertEqual(decision.hard.shape, (12, 1, 1))
    np.testing.assert_allclose(decision.score[:, 0, 0], score, rtol=1e-4)
    np.testing.assert_array_equal(decision.hard[:, 0, 0], score > 0.5)
    self.assertEqual(decision.hard.sum(), 12 - closed)

  def test_gradient_reaches_every_pixel_of_a_maximum_once(self):
    x = np.arange(2 * 5 * 4 * 1, dtype=np.float32).reshape(2, 5, 4, 1)
    given = jax.grad(lambda x: jnp.sum(skip_gate._halve(x) ** 2))(x)
    # The largest of 2x2 is the last; the fifth row is in no window.
    expected = np.zeros_like(x)
    expected[:, 1:4:2, 1::2] = 2 * x[:, 1:4:2, 1::2]
    np.testing.assert_array_equal(given, expected)


class RecurrentGateTest(absltest.TestCase):
  def test_a_network_of_gates_against_numpy(self):
    gates = [_gate('recurrent', 3 + i, first=not i, seed=i) for i in range(4)]
    control = gates[0].control
    rng = np.random.default_rng(7)
    bias = control.rnn.dense_h.bias
    bias[...] = rng.normal(size=bias.shape).astype('f4')
    images = [_images(9, 6 - i, 5, 3 + i, seed=i) for i in range(4)]
    cell = output = np.zeros((9, 10))
    outputs = []
    for gate, x in zip(gates, images, strict=True):
      embedded = x.mean((1, 2), dtype=np.float64)
      embedded = embedded @ _array(gate.embed.kernel)[0, 0]
      embedded += _array(gate.embed.bias)
      cell, output = _lstm(embedded, cell, output, control.rnn)
      outputs.append(output)
    logits = np.stack(outputs) @ _array(control.proj.kernel)[:, 0]
    # A bias between the two middle values: half of the decisions are to skip.
    middle = np.sort(logits.ravel())[17:19]
    self.assertGreater(np.diff(middle), 1e-4)
    control.proj.bias[...] = jnp.array([-middle.mean()])
    scores = _sigmoid(logits + _array(control.proj.bias))
    carry, num_open = None, 0
    for gate, x, score in zip(gates, images, scores, strict=True):
      decision, carry = _evaluation(gate)(x, carry)
      np.testing.assert_allclose(decision.score[:, 0, 0], score, rtol=1e-4)
      np.testing.assert_array_equal(decision.hard[:, 0, 0], score > 0.5)
      num_open += decision.hard.sum()
    self.assertEqual(num_open, 18)
    np.testing.assert_allclose(carry[1][0], cell, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(carry[1][1], output, rtol=1e-4, atol=1e-5)

  def test_only_the_first_gate_holds_the_lstm(self):
    self.assertIsNone(_gate('recurrent', first=False).control)
    with self.assertRaisesRegex(
      ValueError, 'needs the carry of the previous gate; got None'
    ):
      _gate('recurrent', first=False)(_images(1, 4, 4, 3))

  def test_the_network_has_one_lstm_under_the_first_gate(self):
    model = _network('recurrent')
    held = [
      '.'.join(map(str, path))
      for path, _ in nnx.to_flat_state(nnx.state(model))
      if 'control' in path
    ]
    self.assertLen(held, 5)
    for name in held:
      self.assertStartsWith(name, 'layer2.0.masker.control.')
    deeper = nnx.eval_shape(
      lambda: create_model('cifar_resnet14', method='skipnet', rngs=nnx.Rngs(0))
    )
    gates = [block.masker for block in deeper.blocks]
    self.assertIsNone(gates[0])
    self.assertEqual(
      [gate.control is not None for gate in gates[1:]], [True] + [False] * 4
    )


class DecisionTest(parameterized.TestCase):
  @parameterized.parameters(*skip_gate.SKIP_GATES)
  def test_supervised_gradient_is_the_score_s(self, kind):
    gate = _gate(kind)
    graphdef, params, rest = nnx.split(gate, nnx.Param, ...)
    params, rest = nnx.as_pure((params, rest))
    x = _images(8, 6, 6, 3)

    def total(which):
      def of(params):
        decision, _ = nnx.merge(graphdef, params, rest)(x)
        return jnp.sum(
          getattr(decision, which) * jnp.arange(8.0)[:, None, None]
        )

      return jax.grad(of)(params)

    hard, _ = gate(x)
    self.assertContainsSubset(np.unique(hard.hard), (0, 1))
    given = total('hard')
    chex.assert_trees_all_equal(given, total('score'))
    self.assertTrue(any(np.any(g) for g in jax.tree.leaves(given)))

  @parameterized.parameters(*skip_gate.SKIP_GATES)
  def test_samples_have_their_probability_and_no_gradient(self, kind):
    gate = _gate(kind, training='reinforce')
    x = np.broadcast_to(_images(3, 1, 4, 4, 3), (3, 4000, 4, 4, 3))
    x = x.reshape(-1, 4, 4, 3)
    decision, _ = gate(x, rngs=nnx.Rngs(gumbel=0), gumbel_noise=False)
    rates = np.asarray(decision.hard).reshape(3, -1).mean(1)
    scores = np.asarray(decision.score).reshape(3, -1)[:, 0]
    # Four standard deviations.
    np.testing.assert_allclose(rates, scores, atol=4 * (0.25 / 4000) ** 0.5)
    again, _ = gate(x, rngs=nnx.Rngs(gumbel=1))
    self.assertGreater(float(jnp.sum(again.hard != decision.hard)), 0)
    graphdef, state = nnx.split(gate)
    state = nnx.as_pure(state)

    def opened(x):
      gate = nnx.merge(graphdef, state)
      return jnp.sum(gate(x, rngs=nnx.Rngs(gumbel=0))[0].hard)

    self.assertFalse(np.any(jax.grad(opened)(x[:5])))

  def test_evaluation_of_a_sampling_gate_is_that_of_the_other(self):
    x = _images(20, 4, 4, 3)
    chex.assert_trees_all_equal(
      _evaluation(_gate('ff2', training='reinforce'))(x)[0],
      _evaluation(_gate('ff2'))(x)[0],
    )

  def test_sampling_without_a_key(self):
    with self.assertRaisesRegex(ValueError, r'needs rngs=nnx.Rngs\(gumbel='):
      _gate('ff2', training='reinforce')(_images(1, 4, 4, 3))

  @parameterized.parameters(*skip_gate.SKIP_GATES)
  def test_open_and_sharpen(self, kind):
    gate, x = _gate(kind), _images(4, 4, 4, 3)
    before = _evaluation(gate)(x)[0].score
    gate.sharpen(0.5)
    odds = before / (1 - before)
    np.testing.assert_allclose(
      _evaluation(gate)(x)[0].score, odds**2 / (1 + odds**2), rtol=1e-4
    )
    for logit in (-2.0, 2.0):
      gate.open(logit)
      decision, _ = gate(x)
      np.testing.assert_allclose(decision.score, _sigmoid(logit), rtol=1e-6)
      np.testing.assert_array_equal(decision.hard, logit > 0)

  def test_another_gate_holds_the_last_layer(self):
    gate = _gate('recurrent', first=False)
    before = jax.tree.map(jnp.copy, nnx.state(gate))
    gate.open(2.0)
    gate.sharpen(0.1)
    chex.assert_trees_all_equal(nnx.state(gate), before)


def _network(kind, training='supervised', dtype=jnp.float32, method='skipnet'):
  return create_model(
    'cifar_resnet8',
    method=method,
    skip_gate=kind,
    skip_training=training,
    num_classes=5,
    width_multiplier=0.25,
    dtype=dtype,
    rngs=nnx.Rngs(0),
  )


def _openings(model, logit):
  for block in model.blocks[1:]:
    block.masker.open(logit)


class NetworkTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    chex.clear_trace_counter()

  @parameterized.product(kind=skip_gate.SKIP_GATES, training=(False, True))
  def test_all_open_is_the_dense_network(self, kind, training):
    model, dense = _network(kind), _network(kind, method='dense')
    nnx.update(
      dense,
      nnx.from_flat_state(
        [
          (path, value)
          for path, value in nnx.to_flat_state(nnx.state(model))
          if 'masker' not in path
        ]
      ),
    )
    _openings(model, 2.0)
    if not training:
      model, dense = _evaluation(model), _evaluation(dense)
    # One operation at a time: fused operations round sums differently.
    x = _images(3, 8, 8, 3)
    np.testing.assert_array_equal(model(x)[0], dense(x)[0])

  @parameterized.parameters(*skip_gate.SKIP_GATES)
  def test_all_closed_is_the_first_block_and_shortcuts(self, kind):
    model = _evaluation(_network(kind))
    _openings(model, -2.0)
    images = _images(3, 8, 8, 3)
    logits, masks = model(images)
    self.assertEqual([m.name for m in masks], ['layer2.0', 'layer3.0'])
    self.assertEqual(sum(float(jnp.sum(m.executed_macs())) for m in masks), 0)
    first, second, third = model.blocks
    x = model.stem(images)
    x = nnx.relu(x + first.run_branch(x))
    x = nnx.relu(second.shortcut(x))
    x = nnx.relu(third.shortcut(x))
    np.testing.assert_allclose(logits, model.head(x), rtol=1e-6, atol=1e-6)

  @parameterized.parameters(*skip_gate.SKIP_GATES)
  def test_later_gates_decide_after_a_given_mask(self, kind):
    model, images = _evaluation(_network(kind)), _images(6, 8, 8, 3)
    given = np.arange(6)[:, None, None] % 2
    logits, masks = model(images, masks={'layer2.0': given})
    np.testing.assert_array_equal(masks[0].density(), given[:, 0, 0])
    # The last gate is then the first that decides.
    x, (*blocks, last) = model.stem(images), model.blocks
    for block, hard in zip(blocks, (None, given), strict=True):
      x = block(x, Gating(masks=[hard]))
    gate, carry = last.masker, None
    if kind == 'recurrent':
      carry = (blocks[-1].masker.control, None)
    decision, _ = gate(x, carry)
    np.testing.assert_array_equal(masks[1].score[:, :1, :1], decision.score)
    x = last(x, Gating(masks=[decision.hard]))
    np.testing.assert_array_equal(logits, model.head(x))

  @parameterized.parameters(*skip_gate.SKIP_GATES)
  def test_macs_of_gates_in_full_and_of_blocks_by_masks(self, kind):
    model = _evaluation(_network(kind))
    images = _images(16, 8, 8, 3)
    _, masks = model(images)
    report = count_macs(model, images, convention='conv+linear')
    gates = {
      name: layer.macs
      for name, layer in report.by_layer.items()
      if 'masker' in name
    }
    # Gates read 8x8x4 and 4x4x8 maps; outputs times inputs times taps.
    expected = {
      'ff1': 9 * (4**2 * (16 + 4) + 8**2 * (4 + 1)) + 2 * (4 + 8),
      'ff2': 9 * (4**2 * 16 + 8**2 * 4) + 2 * (4 + 8),
      'recurrent': 10 * (4 + 8) + 2 * (40 * 10 + 40 * 10 + 10),
    }[kind]
    self.assertEqual(sum(gates.values()), 16 * expected)
    # A 4x4 map, 4 to 8 and 8 to 8 channels, then 2x2, 8 to 16 and 16 to 16,
    # each with a 1x1 projection that always runs.
    hard = np.stack([np.asarray(m.hard)[:, 0, 0] for m in masks])
    blocks = 9 * np.array([16 * (4 * 8 + 8 * 8), 4 * (8 * 16 + 16 * 16)])
    always = 64 * 9 * (3 * 4 + 4 * 4 + 4 * 4) + 16 * 4 * 8 + 4 * 8 * 16
    always += 16 * 5  # the head
    np.testing.assert_array_equal(
      report.executed(masks), always + expected + blocks @ hard
    )

  @parameterized.product(
    kind=skip_gate.SKIP_GATES, training=skip_gate.SKIP_TRAININGS
  )
  def test_bfloat16_and_one_trace(self, kind, training):
    model = _network(kind, training, jnp.bfloat16)
    graphdef, state = nnx.split(model)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def forward(state, images, key):
      return nnx.merge(graphdef, state)(images, rngs=nnx.Rngs(gumbel=key))

    for seed in range(2):
      logits, masks = forward(
        state, _images(4, 8, 8, 3, seed=seed), jax.random.key(seed)
      )
    self.assertEqual(logits.dtype, jnp.float32)
    for mask, size in zip(masks, (4, 2), strict=True):
      for array in (mask.hard, mask.score):
        self.assertEqual(array.shape, (4, size, size))
        self.assertEqual(array.dtype, jnp.float32)
      self.assertContainsSubset(np.unique(mask.hard), (0, 1))

  @parameterized.parameters(
    ({'skip_gate': 'ff3'}, r"unknown skip_gate 'ff3' \(did you mean 'ff"),
    (
      {'skip_training': 'rl'},
      "unknown skip_training 'rl'; allowed: supervised, reinforce",
    ),
  )
  def test_errors(self, arguments, message):
    with self.assertRaisesRegex(ValueError, message):
      create_model(
        'cifar_resnet8', method='skipnet', rngs=nnx.Rngs(0), **arguments
      )


if __name__ == '__main__':
  absltest.main()
