"""Tests of masked residual blocks against position-by-position execution."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from dynconv_jax.methods.gate import Decision, Gate
from dynconv_jax.models.blocks import BasicBlock, Bottleneck
from dynconv_jax.models.gated import Gating

PLANES = 3


def _block(kind, in_features, strides, gate=None):
  """Returns a block in evaluation with random parameters and statistics."""
  block = kind(
    in_features,
    PLANES,
    strides,
    name='layer2.0',
    gate=gate,
    dtype=jnp.float32,
    rngs=nnx.Rngs(0),
  )
  rng = np.random.default_rng(0)
  nnx.update(
    block,
    jax.tree.map(
      # Positive, so that they also serve as variances; kernels get signs.
      lambda a: jnp.asarray(
        rng.uniform(0.5, 1.5, a.shape)
        * (rng.choice((-1, 1), a.shape) if a.ndim == 4 else 1),
        jnp.float32,
      ),
      nnx.state(block),
    ),
  )
  return nnx.view(block, use_running_average=True)


def _folded(conv, norm):
  """Returns a convolution's kernel and bias with batch norm, in float64."""
  scale = np.asarray(norm.scale[...], np.float64)
  scale = scale / np.sqrt(np.asarray(norm.var[...], np.float64) + 1e-5)
  bias = np.asarray(norm.bias[...]) - np.asarray(norm.mean[...]) * scale
  return np.asarray(conv.kernel[...], np.float64) * scale, bias


def _conv_at(positions, x, kernel, bias, strides):
  """Evaluates a convolution at the given positions only; NaN elsewhere."""
  k = len(kernel)
  pad = k // 2
  h, w = ((size + 2 * pad - k) // strides + 1 for size in x.shape[1:3])
  x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  y = np.full((len(x), h, w, kernel.shape[-1]), np.nan)
  for n, i, j in np.argwhere(positions):
    top, left = i * strides, j * strides
    window = x[n, top : top + k, left : left + k]
    y[n, i, j] = np.einsum('abc,abcf->f', window, kernel) + bias
  return y


def _sliced(block, x, hard, dilated):
  """Runs the block with its branch at the active positions only.

  A value that is read but was not computed is NaN, which would show.
  """
  x = np.asarray(x, np.float64)
  everywhere = np.ones_like(hard)
  out = x
  if block.downsample is not None:
    out = _conv_at(everywhere, x, *_folded(*block.downsample), block.strides)
  basic = type(block) is BasicBlock
  first, second = (block.strides, 1) if basic else (1, block.strides)
  y = _conv_at(dilated, x, *_folded(block.conv1, block.bn1), first)
  y = np.maximum(y, 0)
  y = _conv_at(hard, y, *_folded(block.conv2, block.bn2), second)
  if not basic:
    y = np.maximum(y, 0)
    y = _conv_at(hard, y, *_folded(block.conv3, block.bn3), 1)
  out = out.copy()
  out[hard == 1] += y[hard == 1]
  return np.maximum(out, 0)


def _input(in_features, size=(6, 6)):
  x = np.random.default_rng(1).normal(size=(2, *size, in_features))
  return jnp.asarray(np.maximum(x, 0), jnp.float32)


def _run(block, x, hard=None, **gate_kwargs):
  """Returns the block's output and its execution mask (None without one)."""
  masks = None if hard is None else [hard]
  gating = Gating(masks=masks, **gate_kwargs)
  out = block(x, gating)
  return out, next(iter(gating.finish()), None)


CASES = (
  # kind, in_features, strides, input size
  (BasicBlock, PLANES, 1, (5, 6)),
  (BasicBlock, 2, 2, (6, 6)),
  (BasicBlock, 2, 2, (7, 5)),
  (Bottleneck, 4 * PLANES, 1, (5, 6)),
  (Bottleneck, 5, 2, (6, 6)),
  (Bottleneck, 5, 2, (7, 5)),
)


class BlockTest(parameterized.TestCase):
  @parameterized.parameters(*CASES)
  def test_masked_equals_sliced(self, kind, in_features, strides, size):
    block = _block(kind, in_features, strides)
    x = _input(in_features, size)
    h, w = ((n - 1) // strides + 1 for n in size)
    hard = (np.random.default_rng(2).random((2, h, w)) < 0.25).astype('f4')
    hard[1] = 0
    hard[1, -1, -1] = 1
    out, mask = jax.jit(functools.partial(_run, block))(x, hard)
    np.testing.assert_array_equal(mask.hard, hard)
    at = (h, w) if kind is BasicBlock else size
    self.assertEqual(mask.dilated.shape, (2, *at))
    sliced = _sliced(block, x, hard, mask.dilated)
    self.assertGreater(np.abs(sliced).max(), 1)
    np.testing.assert_allclose(out, sliced, rtol=1e-4, atol=1e-4)

  @parameterized.parameters(CASES[1], CASES[5])
  def test_dilated_holds_no_more_than_is_needed(
    self, kind, in_features, strides, size
  ):
    block = _block(kind, in_features, strides)
    h, w = ((n - 1) // strides + 1 for n in size)
    hard = np.zeros((2, h, w), np.float32)
    hard[:, 1, 1] = 1
    x = _input(in_features, size)
    dilated = np.array(
      jax.jit(functools.partial(_run, block))(x, hard)[1].dilated
    )
    for position in np.argwhere(dilated):
      fewer = dilated.copy()
      fewer[tuple(position)] = 0
      self.assertTrue(np.isnan(_sliced(block, x, hard, fewer)).any())

  @parameterized.parameters(CASES[0], CASES[1], CASES[3], CASES[5])
  def test_full_and_empty_masks(self, kind, in_features, strides, size):
    block = _block(kind, in_features, strides)
    x = _input(in_features, size)
    h, w = ((n - 1) // strides + 1 for n in size)
    dense, none = _run(block, x)
    self.assertIsNone(none)
    full, mask = _run(block, x, jnp.ones((2, h, w)))
    np.testing.assert_array_equal(full, dense)
    np.testing.assert_array_equal(mask.dilated, np.ones(mask.dilated.shape))
    empty, mask = _run(block, x, jnp.zeros((2, h, w)))
    np.testing.assert_array_equal(empty, nnx.relu(block.shortcut(x)))
    self.assertEqual(jnp.sum(mask.executed_macs()), 0)
    self.assertGreater(float(jnp.max(jnp.abs(dense - empty))), 0.1)

  def test_gates_get_their_arguments_and_what_the_one_before_returned(self):
    seen = []

    class Rows(Gate):
      def __call__(self, x, carry=None, **kwargs):
        seen.append((carry, kwargs))
        return Decision(jnp.zeros((2, 3, 3)).at[:, 1].set(1)), len(seen)

    block = _block(BasicBlock, 2, 2, Rows())
    x = _input(2)
    gating = Gating(temperature=2.0, gumbel_noise=False)
    block(x, gating)
    block(x, gating)
    kwargs = {'rngs': None, 'temperature': 2.0, 'gumbel_noise': False}
    self.assertEqual(seen, [(None, kwargs), (1, kwargs)])
    mask, again = gating.finish()
    np.testing.assert_array_equal(mask.hard.sum((1, 2)), [3, 3])
    chex.assert_trees_all_equal(again, mask)
    # With a given mask, the gate is not used.
    _, given = _run(block, x, mask.hard)
    chex.assert_trees_all_equal(given, mask)
    self.assertLen(seen, 2)

  @parameterized.parameters(BasicBlock, Bottleneck)
  def test_a_gate_per_image(self, kind):
    class First(Gate):
      def __call__(self, x, carry=None, **kwargs):
        hard = jnp.array([1.0, 0.0]).reshape(2, 1, 1)
        return Decision(hard, 0.5 * hard), carry

    block = _block(kind, 2, 2, First())
    out, mask = _run(block, _input(2))
    np.testing.assert_array_equal(
      mask.hard, [np.ones((3, 3)), np.zeros((3, 3))]
    )
    np.testing.assert_array_equal(mask.score, 0.5 * mask.hard)
    chex.assert_trees_all_equal(
      (out, mask.dilated),
      (lambda y, m: (y, m.dilated))(*_run(block, _input(2), mask.hard)),
    )

  def test_gradient_of_an_interpolating_gate(self):
    class Given(Gate):
      interpolates = True

      def __init__(self, hard):
        super().__init__()
        self.hard = nnx.Variable(hard)

      def __call__(self, x, carry=None, **kwargs):
        return Decision(self.hard[...]), carry

    plain = _block(BasicBlock, PLANES, 1)
    x = _input(PLANES)

    def run(hard):
      block = _block(BasicBlock, PLANES, 1)
      block.masker = Given(hard)
      return _run(block, x)[0]

    for hard in jnp.zeros((2, 6, 6)), jnp.ones((2, 6, 6)):
      np.testing.assert_array_equal(run(hard), _run(plain, x, hard)[0])
      grad = jax.grad(lambda m: jnp.sum(run(m)))(hard)
      # m block(x) + (1 - m) x for any m.
      expected = nnx.relu(x + plain.run_branch(x)) - nnx.relu(x)
      np.testing.assert_allclose(grad, expected.sum(-1), rtol=1e-4, atol=1e-4)

  @parameterized.parameters(
    (BasicBlock, ((2, 9, 1), (PLANES, 9, 0))),
    (
      Bottleneck,
      ((2, 1, 1), (PLANES, 9, 0), (PLANES, 4, 0)),
    ),
  )
  def test_layers_and_their_macs(self, kind, layers):
    block = _block(kind, 2, 2)
    _, mask = jax.eval_shape(
      functools.partial(_run, block), _input(2), jnp.ones((2, 3, 3))
    )
    self.assertEqual(mask.name, 'layer2.0')
    # Multiply-accumulates per output position: inputs * k * k * outputs.
    self.assertEqual(
      [(m.name, m.macs_per_position, m.level) for m in mask.layers],
      [
        (f'layer2.0.conv{i}', inputs * taps * PLANES, level)
        for i, (inputs, taps, level) in enumerate(layers, start=1)
      ],
    )

  def test_gradient_with_respect_to_the_mask(self):
    block = _block(BasicBlock, PLANES, 1)
    x = _input(PLANES)
    grad = jax.grad(lambda m: jnp.sum(_run(block, x, m)[0]))(
      jnp.ones((2, 6, 6))
    )
    # out = relu(x + mask * branch): the branch if the output is positive.
    branch = block.run_branch(x)
    expected = jnp.sum(jnp.where(x + branch > 0, branch, 0), -1)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4)

  def test_evaluation_views_with_and_without_a_gate(self):
    for gate in None, Gate():
      block = _block(BasicBlock, PLANES, 1, gate)
      view = nnx.view(block, deterministic=True)
    self.assertTrue(view.masker.deterministic)
    self.assertFalse(block.masker.deterministic)

  @parameterized.parameters(jnp.bool, jnp.int32, jnp.bfloat16)
  def test_decisions_of_other_types_count_in_float32(self, dtype):
    class Positive(Gate):
      def __call__(self, x, carry=None, **kwargs):
        return Decision((x[..., 0] > 0).astype(dtype)), carry

    block = _block(BasicBlock, PLANES, 1, Positive())
    x = _input(PLANES)
    out, mask = _run(block, x)
    expected = _run(block, x, x[..., 0] > 0)
    chex.assert_trees_all_equal((out, mask), expected)
    self.assertEqual(mask.executed_macs().dtype, jnp.float32)

  @parameterized.parameters(
    ((2, 6),), ((1, 6, 6),), ((2, 3, 3),), ((2, 6, 6, 1),)
  )
  def test_mask_of_another_shape(self, shape):
    class Ones(Gate):
      def __call__(self, x, carry=None, **kwargs):
        return Decision(jnp.ones(shape)), carry

    block = _block(BasicBlock, PLANES, 1, Ones())
    for what, masks in ('mask', jnp.ones(shape)), ('decision', None):
      with self.assertRaisesRegex(
        ValueError,
        re.escape(
          f'the {what} of layer2.0 must be (2, 6, 6) or (2, 1, 1); got {shape}'
        ),
      ):
        _run(block, _input(PLANES), masks)


if __name__ == '__main__':
  absltest.main()
