"""Tests of DynConv's mask units and inherited masks."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from dynconv_jax import create_model
from dynconv_jax.methods.gumbel import binary_gumbel
from dynconv_jax.methods.mask_unit import (
  InheritedMask,
  MaskUnit,
  Ran,
  RecordedMaskUnit,
  union,
)
from dynconv_jax.models.gated import gated_blocks


def _mask(unit, *args, **kwargs):
  decision, carry = unit(*args, **kwargs)
  assert carry is None and decision.score is None
  return decision.hard


def _unit(strides=1, kernel_size=3, seed=0):
  return MaskUnit(
    5, strides=strides, kernel_size=kernel_size, rngs=nnx.Rngs(seed)
  )


def _images(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _logits(unit, x, strides):
  """Computes the mask logits by loops over positions, in float64."""
  kernel = np.asarray(unit.maskconv.conv.kernel[...], np.float64)[..., 0]
  k = len(kernel)
  x = np.asarray(x, np.float64)
  padded = np.pad(x, ((0, 0), (k // 2,) * 2, (k // 2,) * 2, (0, 0)))
  height, width = x.shape[1:3]
  h, w = (height - 1) // strides + 1, (width - 1) // strides + 1
  logits = np.zeros((len(x), h, w))
  squeezed = x.mean((1, 2)) @ np.asarray(unit.maskconv.fc.kernel[...])[:, 0]
  for n in range(len(x)):
    for i in range(h):
      for j in range(w):
        top, left = i * strides, j * strides
        window = padded[n, top : top + k, left : left + k]
        logits[n, i, j] = (window * kernel).sum() + squeezed[n]
  bias = unit.maskconv.conv.bias[...] + unit.maskconv.fc.bias[...]
  return logits + float(bias[0])


class MaskUnitTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 2, (6, 7)), (3, 1, (7, 5)), (3, 2, (6, 6)), (3, 2, (7, 5))
  )
  def test_logits_and_mask_against_loops(self, kernel_size, strides, shape):
    unit = _unit(strides, kernel_size)
    x = _images(2, *shape, 5)
    expected = _logits(unit, x, strides)
    # Rounding cannot change a decision.
    self.assertGreater(np.abs(expected).min(), 1e-4)
    self.assertBetween((expected > 0).mean(), 0.05, 0.95)
    np.testing.assert_allclose(unit.maskconv(x), expected, atol=1e-5)
    mask = _mask(nnx.view(unit, deterministic=True), x)
    np.testing.assert_array_equal(mask, expected >= 0)
    self.assertEqual(mask.dtype, jnp.float32)

  @parameterized.parameters(
    (1, 2, (8, 8)), (1, 4, (7, 10)), (2, 2, (8, 12)), (2, 3, (7, 9))
  )
  def test_patches_against_loops(self, strides, granularity, shape):
    unit = MaskUnit(
      5, strides=strides, granularity=granularity, rngs=nnx.Rngs(0)
    )
    side = strides * granularity
    # Means of patches are small, but as far from 0 as the bias.
    x = side * _images(4, *shape, 5)
    rows, columns = (range(0, n, side) for n in shape)
    pooled = np.array(
      [
        [
          [image[i : i + side, j : j + side].mean((0, 1)) for j in columns]
          for i in rows
        ]
        for image in x
      ]
    )
    logits = _logits(unit, pooled, 1)
    self.assertGreater(np.abs(logits).min(), 1e-4)
    self.assertBetween((logits > 0).mean(), 0.05, 0.95)
    h, w = (-(-n // strides) for n in shape)
    expected = [
      [
        [logit[i // granularity, j // granularity] >= 0 for j in range(w)]
        for i in range(h)
      ]
      for logit in logits
    ]
    mask = _mask(nnx.view(unit, deterministic=True), x)
    np.testing.assert_array_equal(mask, expected)
    # Samples are also drawn once per patch.
    sample = np.asarray(_mask(unit, x, rngs=nnx.Rngs(gumbel=0)))
    for i in range(h):
      for j in range(w):
        corner = i - i % granularity, j - j % granularity
        np.testing.assert_array_equal(sample[:, i, j], sample[:, *corner])

  def test_threshold_is_inclusive(self):
    unit = _unit()
    state = nnx.state(unit)
    nnx.update(unit, jax.tree.map(jnp.zeros_like, state))
    np.testing.assert_array_equal(
      _mask(nnx.view(unit, deterministic=True), _images(1, 4, 4, 5)),
      np.ones((1, 4, 4)),
    )

  def test_sampling_is_the_binary_gumbel_of_the_logits(self):
    unit = _unit()
    x = _images(2, 6, 6, 5)
    mask = _mask(unit, x, rngs=nnx.Rngs(gumbel=7), temperature=2.0)
    expected = binary_gumbel(unit.maskconv(x), nnx.Rngs(gumbel=7)['gumbel']())
    np.testing.assert_array_equal(mask, expected)
    self.assertGreater(float(jnp.sum(mask != (unit.maskconv(x) >= 0))), 0)

  def test_training_without_noise_needs_no_key(self):
    unit = _unit()
    x = _images(2, 6, 6, 5)
    np.testing.assert_array_equal(
      _mask(unit, x, gumbel_noise=False),
      _mask(nnx.view(unit, deterministic=True), x),
    )

  def test_gradient_by_hand(self):
    unit = _unit()
    x = _images(2, 4, 4, 5)
    graphdef, params = nnx.split(unit)

    def ones(params):
      unit = nnx.merge(graphdef, params)
      return jnp.sum(_mask(unit, x, temperature=2.0, gumbel_noise=False))

    grads = jax.grad(ones)(params)
    soft = 1 / (1 + np.exp(-_logits(unit, x, 1) / 2))
    slope = soft * (1 - soft) / 2
    np.testing.assert_allclose(
      grads['maskconv']['conv']['bias'][...], [slope.sum()], rtol=1e-5
    )
    np.testing.assert_allclose(
      grads['maskconv']['fc']['kernel'][...][:, 0],
      slope.sum((1, 2)) @ x.mean((1, 2)),
      rtol=1e-4,
      atol=1e-6,
    )

  def test_computes_in_float32(self):
    unit = _unit()
    x = jnp.asarray(_images(2, 6, 6, 5), jnp.bfloat16)
    logits = unit.maskconv(x)
    self.assertEqual(logits.dtype, jnp.float32)
    np.testing.assert_allclose(
      logits, unit.maskconv(x.astype(jnp.float32)), rtol=1e-6
    )

  def test_initialisation_has_the_bounds_of_torch(self):
    unit = MaskUnit(400, strides=1, rngs=nnx.Rngs(0))
    for layer, fan_in in ((unit.maskconv.conv, 3600), (unit.maskconv.fc, 400)):
      bound = fan_in**-0.5
      kernel = np.asarray(layer.kernel[...])
      self.assertLessEqual(np.abs(kernel).max(), bound)
      self.assertGreater(np.abs(kernel).max(), 0.95 * bound)
      self.assertAlmostEqual(kernel.std() / bound, 3**-0.5, delta=0.03)
      self.assertBetween(abs(float(layer.bias[0])), 1e-9, bound)

  def test_without_a_key(self):
    with self.assertRaisesRegex(
      ValueError, r'needs rngs=nnx.Rngs\(gumbel=key\); got None.*deterministic'
    ):
      _unit()(_images(1, 4, 4, 5))

  def test_without_the_gumbel_stream(self):
    with self.assertRaisesRegex(
      ValueError, r"needs rngs=nnx.Rngs\(gumbel=key\); got \['dropout'\]"
    ):
      _unit()(_images(1, 4, 4, 5), rngs=nnx.Rngs(dropout=0))

  def test_default_stream_stands_in(self):
    x = _images(1, 4, 4, 5)
    unit = _unit()
    np.testing.assert_array_equal(
      _mask(unit, x, rngs=nnx.Rngs(3)),
      _mask(unit, x, rngs=nnx.Rngs(default=3)),
    )


class InheritedMaskTest(parameterized.TestCase):
  @parameterized.parameters((1, (4, 6)), (2, (4, 6)), (2, (5, 7)), (3, (7, 8)))
  def test_runs_where_a_position_in_its_place_ran(self, strides, shape):
    before = np.random.default_rng(0).random((2, *shape)) < 0.2
    h, w = (-(-n // strides) for n in shape)
    expected = np.zeros((2, h, w))
    for n, i, j in np.argwhere(before):
      expected[n, i // strides, j // strides] = 1
    carry = Ran(jnp.asarray(before, jnp.float32), inherited=False)
    decision, carry = InheritedMask(strides)(_images(2, *shape, 5), carry)
    np.testing.assert_array_equal(decision.hard, expected)
    self.assertIs(carry.mask, decision.hard)
    self.assertTrue(carry.inherited)

  def test_units_record_the_union_of_their_stage(self):
    units = [
      nnx.view(
        RecordedMaskUnit(5, strides=1, rngs=nnx.Rngs(seed)), deterministic=True
      )
      for seed in (0, 1)
    ]
    x = _images(2, 6, 6, 5)
    old = Ran(jnp.ones((2, 6, 6)), inherited=True)
    first, carry = units[0](x, old)
    np.testing.assert_array_equal(carry.mask, first.hard)
    second, carry = units[1](x, carry)
    either = np.maximum(first.hard, second.hard)
    self.assertBetween(either.mean(), np.mean(first.hard) + 0.01, 0.99)
    np.testing.assert_array_equal(carry.mask, either)
    self.assertFalse(carry.inherited)

  def test_a_stage_keeps_its_masks_past_a_block_that_inherits(self):
    x = _images(1, 2, 2, 5)
    first, second = jnp.array([[[[1, 0], [0, 0]]], [[[0, 1], [0, 0]]]])
    decision, carry = InheritedMask(1, identity=True)(x, Ran(first, False))
    np.testing.assert_array_equal(decision.hard, first)
    unit = RecordedMaskUnit(5, strides=1, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(
      unit.record(second, carry).mask, first + second
    )
    _, carry = InheritedMask(1)(x, Ran(first, False))
    np.testing.assert_array_equal(unit.record(second, carry).mask, second)

  def test_gradient_of_a_union(self):
    masks = jnp.array([[0, 0, 1, 1], [0, 1, 0, 1]], jnp.float32)
    found = jax.grad(lambda m: jnp.sum(union(m)))(masks)
    # Closing one mask changes the union only if the other one is closed.
    np.testing.assert_array_equal(found, [[1, 0, 1, 0], [1, 1, 0, 0]])

  def _lite0(self, gated='all', **options):
    return create_model(
      'efficientnet_lite0',
      method='dynconv',
      num_classes=3,
      gated_blocks=gated,
      inherited_masks=True,
      rngs=nnx.Rngs(1),
      **options,
    )

  def test_in_a_network(self):
    model = self._lite0(dropped_blocks=('blocks.4.1', 'blocks.4.2'))
    _, masks = model(_images(2, 64, 64, 3), rngs=nnx.Rngs(0))
    hard = {mask.name: np.asarray(mask.hard) for mask in masks}
    self.assertNotIn('blocks.0.0', hard)
    self.assertNotIn('blocks.1.0', hard)
    either = np.maximum(hard['blocks.3.1'], hard['blocks.3.2'])
    self.assertBetween(either.mean(), 0.1, 0.95)
    # Blocks 3.1, 3.2, and 4.0 have a stride of 1, and stage 4 has no mask unit.
    np.testing.assert_array_equal(hard['blocks.4.0'], either)
    blocks = either.reshape(2, 2, 2, 2, 2).max((2, 4))
    np.testing.assert_array_equal(hard['blocks.5.0'], blocks)

  def test_given_masks_are_inherited(self):
    model = self._lite0()
    images = _images(1, 64, 64, 3)
    _, masks = model(images, rngs=nnx.Rngs(0))
    shapes = {mask.name: mask.hard.shape for mask in masks}
    corner = jnp.zeros(shapes['blocks.1.1']).at[:, :3, :5].set(1)
    given = {
      'blocks.1.1': corner,
      'blocks.3.0': jnp.zeros(shapes['blocks.3.0']),
    }
    for name in ('blocks.3.1', 'blocks.3.2'):
      given[name] = jnp.zeros(shapes[name])
    _, masks = model(images, rngs=nnx.Rngs(0), masks=given)
    hard = {mask.name: np.asarray(mask.hard) for mask in masks}
    expected = np.zeros(shapes['blocks.2.0'])
    expected[:, :2, :3] = 1
    np.testing.assert_array_equal(hard['blocks.2.0'], expected)
    self.assertFalse(hard['blocks.4.0'].any())

  def test_blocks_before_the_first_mask_unit_run_everywhere(self):
    model = self._lite0(dropped_blocks=('blocks.1.1',))
    model = nnx.view(model, deterministic=True, use_running_average=True)
    _, masks = jax.eval_shape(lambda x: model(x), _images(1, 64, 64, 3))
    names = [mask.name for mask in masks]
    self.assertEqual(names[:3], ['blocks.1.1', 'blocks.2.1', 'blocks.3.0'])

  def test_one_mask_unit_for_the_whole_network(self):
    model = self._lite0(mask_units=('blocks.1.1',))
    units = [
      block.name
      for block in gated_blocks(model)
      if isinstance(block.masker, MaskUnit)
    ]
    self.assertEqual(units, ['blocks.1.1'])
    images = _images(2, 64, 64, 3)
    _, masks = model(images, rngs=nnx.Rngs(0))
    hard = {mask.name: np.asarray(mask.hard) for mask in masks}
    self.assertBetween(hard['blocks.1.1'].mean(), 0.1, 0.9)
    corner = jnp.zeros(hard['blocks.1.1'].shape).at[:, :3, :5].set(1)
    _, masks = model(images, rngs=nnx.Rngs(0), masks={'blocks.1.1': corner})
    for mask in masks:
      stride = corner.shape[1] // mask.hard.shape[1]
      expected = np.zeros(mask.hard.shape)
      expected[:, : -(-3 // stride), : -(-5 // stride)] = 1
      np.testing.assert_array_equal(mask.hard, expected, mask.name)

  @parameterized.parameters('blocks.2.0', 'blocks.4.1', 'blocks.9.9')
  def test_mask_units_of_such_blocks_are_refused(self, name):
    with self.assertRaisesRegex(ValueError, f'blocks.5.1.*; got {name}'):
      self._lite0(mask_units=(name,), dropped_blocks=('blocks.4.1',))

  def test_mask_units_need_inherited_masks(self):
    with self.assertRaisesRegex(
      ValueError, 'needs inherited_masks; got blocks'
    ):
      create_model(
        'efficientnet_lite0',
        method='dynconv',
        num_classes=3,
        mask_units=('blocks.1.1',),
        rngs=nnx.Rngs(1),
      )

  def test_networks_without_such_blocks_are_refused(self):
    with self.assertRaisesRegex(ValueError, 'for example gated_blocks=all'):
      self._lite0(gated='identity')


if __name__ == '__main__':
  absltest.main()
