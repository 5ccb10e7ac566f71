"""Tests of the networks: structure, masks, MACs, types and errors."""

import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

from dynconv_jax.methods.mask_unit import MaskUnit
from dynconv_jax.models import resnet
from dynconv_jax.models.blocks import BasicBlock, Bottleneck
from dynconv_jax.models.create import create_model
from dynconv_jax.models.gated import Gating
from dynconv_jax.models.resnet import ARCHITECTURES, Architecture

# A plain NumPy recomputation of a network in evaluation, in float64.


def _array(variable):
  return np.asarray(variable[...], np.float64)


def _conv(x, layer, strides=1):
  kernel = _array(layer.kernel)
  k = len(kernel)
  pad = k // 2
  h, w = ((size + 2 * pad - k) // strides + 1 for size in x.shape[1:3])
  x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  y = np.zeros((len(x), h, w, kernel.shape[-1]))
  for i in range(h):
    for j in range(w):
      top, left = i * strides, j * strides
      window = x[:, top : top + k, left : left + k]
      y[:, i, j] = np.einsum('nabc,abcf->nf', window, kernel)
  return y


def _norm(x, norm):
  x = (x - _array(norm.mean)) / np.sqrt(_array(norm.var) + 1e-5)
  return x * _array(norm.scale) + _array(norm.bias)


def _relu(x):
  return np.maximum(x, 0)


def _max_pool(x):
  h, w = ((size - 1) // 2 + 1 for size in x.shape[1:3])
  y = np.zeros((len(x), h, w, x.shape[-1]))
  for i in range(h):
    for j in range(w):
      rows = slice(max(2 * i - 1, 0), 2 * i + 2)
      columns = slice(max(2 * j - 1, 0), 2 * j + 2)
      y[:, i, j] = x[:, rows, columns].max((1, 2))
  return y


def _mask_logits(x, unit, strides):
  conv, fc = unit.maskconv.conv, unit.maskconv.fc
  squeezed = x.mean((1, 2)) @ _array(fc.kernel) + _array(fc.bias)
  logits = _conv(x, conv, strides) + _array(conv.bias)
  return (logits + squeezed[:, None, None])[..., 0]


def _forward(model, images, forced=None):
  """Returns (logits, masks, mask logits) of a network with mask units."""
  imagenet = model.architecture.stem == 'imagenet'
  x = _conv(np.float64(images), model.conv1, 2 if imagenet else 1)
  x = _relu(_norm(x, model.bn1))
  x = _max_pool(x) if imagenet else x
  masks, all_logits = [], []
  for b, block in enumerate(model.blocks):
    logits = _mask_logits(x, block.masker, block.strides)
    mask = logits >= 0 if forced is None else forced[b]
    if not isinstance(block, Bottleneck):
      y = _relu(_norm(_conv(x, block.conv1, block.strides), block.bn1))
      y = _norm(_conv(y, block.conv2), block.bn2)
    else:
      y = _relu(_norm(_conv(x, block.conv1), block.bn1))
      y = _relu(_norm(_conv(y, block.conv2, block.strides), block.bn2))
      y = _norm(_conv(y, block.conv3), block.bn3)
    shortcut = x
    if block.downsample is not None:
      projection, norm = block.downsample
      shortcut = _norm(_conv(x, projection, block.strides), norm)
    x = _relu(shortcut + mask[..., None] * y)
    masks.append(mask)
    all_logits.append(logits)
  features = x.mean((1, 2))
  logits = features @ _array(model.fc.kernel) + _array(model.fc.bias)
  return logits, masks, all_logits


def _tiny(kind, depths, stem, mask_kernel_size=3):
  """Returns an evaluation view with random statistics, scales and biases."""
  model = resnet.ResNet(
    Architecture(kind, depths, 4, stem),
    num_classes=5,
    width_multiplier=1.0,
    gate=lambda site: MaskUnit(
      site.in_features,
      strides=site.strides,
      kernel_size=mask_kernel_size,
      rngs=nnx.Rngs(site.in_features),
    ),
    dtype=jnp.float32,
    rngs=nnx.Rngs(0),
  )
  rng = np.random.default_rng(0)
  for path, node in nnx.iter_graph(model):
    del path
    if isinstance(node, nnx.BatchNorm):
      for variable in (node.scale, node.var):
        variable[...] = rng.uniform(0.5, 1.5, variable.shape).astype('f4')
      for variable in (node.bias, node.mean):
        variable[...] = rng.normal(0, 0.5, variable.shape).astype('f4')
  # Seeds that open some positions of every block and close others.
  rng = np.random.default_rng({1: 3, 3: 9}[mask_kernel_size])
  for block in model.blocks:
    unit = block.masker.maskconv
    for variable in (unit.conv.kernel, unit.fc.kernel):
      variable[...] = rng.normal(size=variable.shape).astype('f4')
  return nnx.view(model, deterministic=True, use_running_average=True)


def _images(*shape):
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


_run = nnx.jit(lambda model, images, masks=None: model(images, masks=masks))


class ForwardTest(parameterized.TestCase):
  @parameterized.parameters(
    (BasicBlock, 'cifar', 3, (6, 7)),
    (BasicBlock, 'cifar', 1, (6, 6)),
    (Bottleneck, 'imagenet', 3, (18, 22)),
  )
  def test_masks_and_logits_against_numpy(
    self, kind, stem, mask_kernel_size, size
  ):
    model = _tiny(kind, (1, 1), stem, mask_kernel_size)
    images = _images(3, *size, 3)
    logits, masks, mask_logits = _forward(model, images)
    # Rounding cannot change a decision, and both decisions occur.
    margin = min(np.abs(block).min() for block in mask_logits)
    self.assertGreater(margin, 1e-4)
    for mask in masks:
      self.assertBetween(mask.mean(), 0.05, 0.95)
    given_logits, given = _run(model, images)
    for mask, expected in zip(given, masks, strict=True):
      np.testing.assert_array_equal(mask.hard, expected)
    self._assert_close(given_logits, logits)

  @parameterized.parameters(
    (BasicBlock, 'cifar', (6, 7)), (Bottleneck, 'imagenet', (18, 22))
  )
  def test_forced_masks_against_numpy(self, kind, stem, size):
    model = _tiny(kind, (1, 1), stem)
    images = _images(3, *size, 3)
    _, masks, _ = _forward(model, images)
    rng = np.random.default_rng(0)
    some = [rng.integers(0, 2, m.shape).astype(np.float32) for m in masks]
    # Some positions (the gates'), all, and none.
    for forced in (
      some,
      [m.astype(np.float32) for m in masks],
      [np.ones_like(m) for m in some],
      [np.zeros_like(m) for m in some],
    ):
      forced_logits, returned = _run(model, images, forced)
      for mask, expected in zip(returned, forced, strict=True):
        np.testing.assert_array_equal(mask.hard, expected)
      self._assert_close(forced_logits, _forward(model, images, forced)[0])

  def test_masks_of_ones_are_the_dense_network(self):
    gated = create_model(
      'cifar_resnet8',
      method='dynconv',
      width_multiplier=0.25,
      rngs=nnx.Rngs(0),
    )
    dense = create_model(
      'cifar_resnet8', width_multiplier=0.25, rngs=nnx.Rngs(1)
    )
    shared = [
      (path, value)
      for path, value in nnx.to_flat_state(nnx.state(gated))
      if 'masker' not in path
    ]
    nnx.update(dense, nnx.from_flat_state(shared))
    images = _images(2, 8, 8, 3)
    ones = [jnp.ones((2, s, s)) for s in (8, 4, 2)]
    # In training mode also batch statistics and their running averages.
    logits, masks = _run(gated, images, ones)
    dense_logits, none = _run(dense, images)
    self.assertEmpty(none)
    self.assertLen(masks, 3)
    np.testing.assert_array_equal(logits, dense_logits)
    np.testing.assert_array_equal(
      gated.layer3[0].bn2.var[...], dense.layer3[0].bn2.var[...]
    )

  def _assert_close(self, given, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(given / scale, expected / scale, atol=1e-4)


class TrainingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    chex.clear_trace_counter()

  def test_bfloat16_types_and_one_trace(self):
    model = create_model(
      'cifar_resnet8',
      method='dynconv',
      num_classes=5,
      width_multiplier=0.25,
      dtype=jnp.bfloat16,
      rngs=nnx.Rngs(0),
    )
    for leaf in jax.tree.leaves(nnx.state(model)):
      self.assertEqual(leaf.dtype, jnp.float32)
    graphdef, state = nnx.split(model)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def forward(state, images, key, temperature, noise):
      model = nnx.merge(graphdef, state)
      return model(
        images,
        rngs=nnx.Rngs(gumbel=key),
        temperature=temperature,
        gumbel_noise=noise,
      )

    images, key = _images(4, 8, 8, 3), jax.random.key(0)
    outputs = [
      forward(state, images, key, jnp.float32(t), jnp.array(noise))
      for t, noise in ((5.0, True), (1.0, True), (1.0, False))
    ]
    for logits, masks in outputs:
      self.assertEqual(logits.dtype, jnp.float32)
      for mask, size in zip(masks, (8, 4, 2), strict=True):
        self.assertEqual(mask.hard.shape, (4, size, size))
        for array in (mask.hard, mask.dilated):
          self.assertEqual(array.dtype, jnp.float32)
          self.assertContainsSubset(np.unique(array), (0, 1))
    # The temperature does not affect decisions; the noise does.
    np.testing.assert_array_equal(outputs[0][0], outputs[1][0])
    self.assertGreater(np.abs(outputs[1][0] - outputs[2][0]).max(), 1e-3)

  def test_sampling_without_a_key(self):
    model = _abstract('cifar_resnet8', method='dynconv')
    view = nnx.view(model, use_running_average=True)
    with self.assertRaisesRegex(ValueError, r'needs rngs=nnx.Rngs\(gumbel='):
      _traced(view, (1, 8, 8, 3))

  @pytest.mark.slow
  def test_in_tree_mode(self):
    program = """
import jax, jax.numpy as jnp
from flax import nnx
from dynconv_jax import create_model
model = create_model('cifar_resnet8', method='dynconv', num_classes=2,
                     width_multiplier=0.25, rngs=nnx.Rngs(0))
graphdef, params, rest = nnx.split(model, nnx.Param, ...)
params, rest = nnx.as_pure((params, rest))
@jax.jit
@jax.grad
def grads(params):
  model = nnx.merge(graphdef, params, rest)
  logits, masks = model(jnp.ones((2, 8, 8, 3)), rngs=nnx.Rngs(gumbel=0))
  return jnp.sum(logits[:, 0]) + sum(jnp.sum(m.hard) for m in masks)
print(all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads(params)['fc'])))
"""
    mode = {'NNX_GRAPH_MODE': 'false', 'NNX_GRAPH_UPDATES': 'false'}
    done = subprocess.run(
      [sys.executable, '-c', program],
      env=os.environ | mode,
      capture_output=True,
      text=True,
    )
    self.assertEqual(done.stdout, 'True\n', done.stderr)


def _abstract(name, **kwargs):
  return nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0), **kwargs))


def _traced(model, shape):
  graphdef, state = nnx.split(model)
  return jax.eval_shape(
    lambda state, images: nnx.merge(graphdef, state)(images),
    state,
    jax.ShapeDtypeStruct(shape, jnp.float32),
  )


def _count(state):
  return sum(leaf.size for leaf in jax.tree.leaves(state))


class StructureTest(parameterized.TestCase):
  @parameterized.parameters(
    # torchvision's published counts.
    ('resnet18', 11_689_512),
    ('resnet34', 21_797_672),
    ('resnet50', 25_557_032),
    ('resnet101', 44_549_160),
    ('resnet152', 60_192_808),
  )
  def test_parameters(self, name, number):
    self.assertEqual(_count(nnx.state(_abstract(name), nnx.Param)), number)

  @parameterized.parameters(8, 14, 20, 26, 32, 44, 56, 110)
  def test_cifar_parameters(self, depth):
    # A batch norm has two parameters per channel. Each stage has n blocks of
    # two 3x3 convolutions; stages two and three project from half the channels.
    n = (depth - 2) // 6
    number = 27 * 16 + 2 * 16
    for c in (16, 32, 64):
      number += n * 2 * (9 * c * c + 2 * c)
      if c > 16:
        number += -9 * c * c // 2 + c * c // 2 + 2 * c
    number += 64 * 10 + 10
    model = _abstract(f'cifar_resnet{depth}', num_classes=10)
    self.assertEqual(_count(nnx.state(model, nnx.Param)), number)
    self.assertLen(model.blocks, 3 * n)
    # He et al., CVPR 2016, table 6, which has shortcuts without parameters.
    published = {20: 0.27e6, 32: 0.46e6, 44: 0.66e6, 56: 0.85e6, 110: 1.7e6}
    if depth in published:
      self.assertAlmostEqual(number / published[depth], 1, delta=0.03)

  @parameterized.parameters((3, 9), (1, 1))
  def test_mask_units_add(self, mask_kernel_size, taps):
    given = _abstract(
      'cifar_resnet8', method='dynconv', mask_kernel_size=mask_kernel_size
    )
    dense = _abstract('cifar_resnet8')
    # A convolution and a linear map to one logit, for the blocks' inputs.
    added = sum((taps * c + 1) + (c + 1) for c in (16, 16, 32))
    self.assertEqual(_count(nnx.state(given)) - _count(nnx.state(dense)), added)

  @parameterized.parameters(0.25, 0.3, 2.0)
  def test_width_multiplier(self, width):
    model = _abstract('resnet18', width_multiplier=width)
    self.assertEqual(model.conv1.kernel.shape[-1], int(64 * width))
    for s, c in enumerate((64, 128, 256, 512), start=1):
      block = getattr(model, f'layer{s}')[0]
      self.assertEqual(block.conv2.kernel.shape[-1], int(c * width))
    self.assertEqual(model.fc.kernel.shape[0], int(512 * width))

  @parameterized.parameters(
    # All convolutions, without the stem (112^2 * 147 * 64, or 32^2 * 27 * 16)
    # and the projections.
    ('resnet101', 224, 7_799_357_440 - 118_013_952 - 359_661_568),
    ('resnet50', 224, 4_087_136_256 - 118_013_952 - 359_661_568),
    ('cifar_resnet32', 32, 69_124_096 - 442_368 - 262_144),
  )
  def test_masked_macs(self, name, size, number):
    model = _abstract(name, method='dynconv')
    view = nnx.view(model, deterministic=True, use_running_average=True)
    logits, masks = _traced(view, (2, size, size, 3))
    self.assertEqual(logits.shape, (2, 1000))
    self.assertEqual(sum(mask.dense_macs() for mask in masks), number)
    self.assertEqual(
      [m.name for m in masks],
      [
        f'layer{s}.{i}'
        for s, depth in enumerate(ARCHITECTURES[name].depths, start=1)
        for i in range(depth)
      ],
    )


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'name': 'resnet52'}, r"unknown model 'resnet52' \(did you mean 'resn"),
    ({'name': 'vgg'}, r"unknown model 'vgg'; allowed: resnet18, resnet34"),
    ({'method': 'dynconf'}, r"'dynconf' \(did you mean 'dynconv'\?\)"),
    ({'method': None}, 'unknown method None; allowed: dense, drop, dynconv'),
    ({'bugdet': 0.5}, 'unknown options bugdet; dense has drop_path'),
    (
      {'method': 'act', 'bugdet': 0.5},
      'bugdet; act has drop_path, ponder_weight',
    ),
    ({'num_classes': 0}, 'num_classes must be at least 1; got 0'),
    (
      {'width_multiplier': 0.06},
      'width_multiplier must leave the stem a channel, at least 0.0625; '
      'got 0.06',
    ),
    ({'width_multiplier': -1.0}, 'width_multiplier must .*; got -1.0'),
    (
      {'method': 'dynconv', 'mask_kernel_size': 5},
      'mask_kernel_size must be 1 or 3; got 5',
    ),
    (
      {'method': 'dynconv', 'mask_granularity': 2},
      r'mask_granularity must be of type tuple\[int, ...\]; got 2',
    ),
    (
      {'method': 'dynconv', 'gumbel_temperatures': ('5', '1')},
      r"gumbel_temperatures must be of type .*; got \('5', '1'\)",
    ),
    (
      {'method': 'drop', 'dropped_blocks': 'layer1.0'},
      r"dropped_blocks must be of type tuple\[str, ...\]; got 'layer1.0'",
    ),
    (
      {'method': 'dynconv', 'budget': '0.5'},
      "budget must be a number; got '0.5'",
    ),
    (
      {'method': 'dynconv', 'mask_bias': '2'},
      "mask_bias must be a number or empty; got '2'",
    ),
  )
  def test_create_model(self, arguments, message):
    arguments = {'name': 'cifar_resnet8', 'rngs': nnx.Rngs(0)} | arguments
    with self.assertRaisesRegex(ValueError, message):
      create_model(**arguments)

  @parameterized.parameters(
    ('resnet18', 64, 32), ('resnet152', 64, 32), ('cifar_resnet110', 8, 4)
  )
  def test_image_size(self, name, least, stride):
    self.assertEqual(ARCHITECTURES[name].min_image_size, least)
    self.assertEqual(least, 2 * stride)
    view = nnx.view(
      _abstract(name, method='dynconv'),
      deterministic=True,
      use_running_average=True,
    )
    _, masks = _traced(view, (1, least, least, 3))
    self.assertEqual(masks[-1].hard.shape, (1, 2, 2))

  def test_number_of_masks(self):
    model = _abstract('cifar_resnet8')
    with self.assertRaisesRegex(
      ValueError, 'masks must be one per block; got 1, none for layer2.0'
    ):
      nnx.eval_shape(
        lambda model: model(_images(1, 8, 8, 3), masks=[np.ones((1, 8, 8))]),
        model,
      )


if __name__ == '__main__':
  absltest.main()


def test_stochastic_depth_drops_branches_of_images_in_training():
  model = create_model(
    'cifar_resnet8',
    method='dense',
    num_classes=4,
    drop_path=0.6,
    rngs=nnx.Rngs(0),
  )
  # Blocks 0, 1 and 2 of 3; the projections of two are always executed.
  assert [b.drop and round(b.drop.rate, 6) for b in model.blocks] == [
    None,
    0.2,
    0.4,
  ]
  still = nnx.view(model, deterministic=True, use_running_average=True)
  images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 16, 16, 3)))
  plain = create_model(
    'cifar_resnet8', method='dense', num_classes=4, rngs=nnx.Rngs(0)
  )
  assert all(b.drop is None for b in plain.blocks)
  plain = nnx.view(plain, deterministic=True, use_running_average=True)
  np.testing.assert_array_equal(still(images)[0], plain(images)[0])
  block = model.blocks[2]
  x = np.random.default_rng(0).normal(size=(400, 4, 4, 32))
  x = jnp.asarray(np.maximum(x, 0), jnp.float32)
  out = block(x, Gating(rngs=nnx.Rngs(dropout=0)))
  shortcut = block.shortcut(x)
  branch = jnp.asarray(block.run_branch(x))
  dropped = np.all(
    np.abs(out - _relu(np.asarray(shortcut))) < 1e-5, axis=(1, 2, 3)
  )
  assert 0.3 < dropped.mean() < 0.5
  expected = jnp.maximum(shortcut + branch / 0.6, 0)
  np.testing.assert_allclose(out[~dropped], expected[~dropped], atol=1e-4)
  with pytest.raises(ValueError, match='dropout in training needs rngs'):
    model(images)
