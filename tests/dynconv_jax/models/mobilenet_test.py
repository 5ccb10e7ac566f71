"""Tests of MobileNetV2 and EfficientNet-Lite, dense and gated."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax import create_model
from dynconv_jax.layers import BatchNorm
from dynconv_jax.macs import count_macs
from dynconv_jax.models import efficientnet_lite, mobilenet
from dynconv_jax.models.blocks import InvertedResidual
from dynconv_jax.models.gated import Gating, gated_blocks
from dynconv_jax.models.mobilenet import Architecture, Stage
from dynconv_jax.sparse import sparsify

NETWORKS = {**mobilenet.ARCHITECTURES, **efficientnet_lite.ARCHITECTURES}
# Identities, strides, both kernels and a block that does not expand.
SMALL = Architecture(
  (Stage(1, 8, 2, 1), Stage(6, 16, 3, 2, 5), Stage(6, 24, 2, 1)),
  depth=1.0,
  image_size=32,
)


def abstract(name, **kwargs):
  model = nnx.eval_shape(
    lambda: NETWORKS[name](
      **{'num_classes': 1000, 'gate': lambda site: None, **kwargs},
      dtype=jnp.float32,
      rngs=nnx.Rngs(0),
    )
  )
  return nnx.view(model, deterministic=True, use_running_average=True)


def make_small(method='dense', drop_path=0.2, **kwargs):
  """Returns a small network in training mode with random values."""
  model = create_model(
    SMALL,
    method=method,
    num_classes=5,
    drop_path=drop_path,
    rngs=nnx.Rngs(0),
    **kwargs,
  )
  rng = np.random.default_rng(0)
  for _, node in nnx.iter_modules(model):
    if isinstance(node, nnx.BatchNorm):
      shape = node.mean.shape
      node.mean[...] = jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32)
      node.var[...] = jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)
      node.bias[...] = jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)
    elif isinstance(node, nnx.Conv):
      # The same width as the input, and depthwise.
      shape = node.kernel.shape
      std = np.sqrt(2 / np.prod(shape[:-1]))
      value = std * rng.normal(size=shape)
      node.kernel[...] = jnp.asarray(value, jnp.float32)
    elif isinstance(node, nnx.Linear):
      value = rng.normal(size=node.kernel.shape) / 8
      node.kernel[...] = jnp.asarray(value, jnp.float32)
  return model


def evaluation(model):
  return nnx.view(model, deterministic=True, use_running_average=True)


def make_images(size=(33, 38)):
  x = np.random.default_rng(1).normal(size=(3, *size, 3))
  return jnp.asarray(x, jnp.float32)


# Millions of parameters from torchvision's and timm's tables; identity
# shortcuts.
@pytest.mark.parametrize(
  ('name', 'parameters', 'blocks', 'identities'),
  [
    ('mobilenet_v2', 3_504_872, 17, 10),
    ('efficientnet_lite0', 4_652_008, 16, 9),
    ('efficientnet_lite1', 5_416_680, 21, 14),
    ('efficientnet_lite2', 6_092_072, 21, 14),
    ('efficientnet_lite3', 8_197_096, 24, 17),
    ('efficientnet_lite4', 13_006_568, 30, 23),
  ],
)
def test_parameters_and_sites(name, parameters, blocks, identities):
  sites = {'identity': [], 'all': []}
  for which, into in sites.items():
    model = abstract(name, gated_blocks=which, gate=into.append)
  leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert sum(leaf.size for leaf in leaves) == parameters
  found = gated_blocks(model)
  assert len(sites['all']) == blocks
  assert sites['identity'] == [s for s in sites['all'] if s.identity]
  assert len(sites['identity']) == identities
  assert [s.index for s in sites['all']] == list(range(blocks))
  for block, site in zip(found, sites['all'], strict=True):
    assert (block.name, block.stage) == (site.name, site.stage)
    assert block.branch.in_features == site.in_features
    assert (block.branch.shortcut == 'identity') == site.identity


@pytest.mark.parametrize(
  ('width', 'ends', 'planes'),
  [
    # Channels of torchvision's MobileNetV2 at these widths.
    (0.35, (16, 1280), (8, 8, 16, 24, 32, 56, 112)),
    (0.75, (24, 1280), (16, 24, 24, 48, 72, 120, 240)),
    (1.4, (48, 1792), (24, 32, 48, 88, 136, 224, 448)),
  ],
)
def test_widths(width, ends, planes):
  model = abstract('mobilenet_v2', width_multiplier=width)
  assert (model.conv_stem.out_features, model.conv_head.out_features) == ends
  assert tuple(stage[0].branch.features for stage in model.blocks) == planes


def lite0_macs():
  """Counts Lite0 at 224 pixels by hand: map size, then kernels."""
  stem, head = 112 * 112 * 27 * 32, 7 * 7 * 320 * 1280 + 1280 * 1000

  def block(size, inputs, outputs, k, t=6, stride=1):
    hidden = t * inputs
    expand = inputs * hidden if t > 1 else 0
    after = (size // stride) ** 2
    return size**2 * expand + after * hidden * (k * k + outputs)

  return (
    stem
    + head
    + block(112, 32, 16, 3, t=1)
    + (block(112, 16, 24, 3, stride=2) + block(56, 24, 24, 3))
    + (block(56, 24, 40, 5, stride=2) + block(28, 40, 40, 5))
    + (block(28, 40, 80, 3, stride=2) + 2 * block(14, 80, 80, 3))
    + (block(14, 80, 112, 5) + 2 * block(14, 112, 112, 5))
    + (block(14, 112, 192, 5, stride=2) + 3 * block(7, 192, 192, 5))
    + block(7, 192, 320, 3)
  )


@pytest.mark.parametrize(
  ('name', 'macs'),
  # Published: 300.77 M.
  [('mobilenet_v2', 300_774_272), ('efficientnet_lite0', lite0_macs())],
)
def test_macs(name, macs):
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  report = count_macs(abstract(name), images, convention='conv+linear')
  assert report.total == macs
  assert lite0_macs() == 385_187_552


@pytest.mark.parametrize('padding', ['symmetric', 'same'])
@pytest.mark.parametrize('strides', [1, 2])
@pytest.mark.parametrize('ratio', [1, 3])
def test_a_block_is_its_convolutions(padding, strides, ratio):
  features = 6 if strides == 1 else 7
  block = InvertedResidual(
    6,
    features,
    strides,
    expand_ratio=ratio,
    kernel_size=5,
    padding=padding,
    name='b',
    rngs=nnx.Rngs(0),
  )
  block = nnx.view(block, use_running_average=True)
  x = jnp.asarray(
    4 * np.random.default_rng(0).normal(size=(2, 9, 11, 6)), jnp.float32
  )
  # Batch norm is the identity except for epsilon.
  scale = (1 + 1e-5) ** -0.5

  def convolve(y, conv, **kwargs):
    kernel = conv.kernel[...]
    groups = y.shape[-1] // kernel.shape[2]
    return scale * jax.lax.conv_general_dilated(
      y,
      kernel,
      **{'window_strides': (1, 1), 'padding': 'VALID', **kwargs},
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=groups,
    )

  y = x
  if ratio > 1:
    y = jnp.clip(convolve(y, block.conv_pw), 0, 6)
    assert y.shape[-1] == 18
  pads = ((2, 2), (2, 2)) if padding == 'symmetric' else 'SAME'
  y = convolve(y, block.conv_dw, padding=pads, window_strides=(strides,) * 2)
  y = convolve(
    jnp.clip(y, 0, 6), block.conv_pw if ratio == 1 else block.conv_pwl
  )
  expected = x + y if strides == 1 else y
  assert block.branch.shortcut == ('identity' if strides == 1 else 'none')
  np.testing.assert_allclose(block(x), expected, rtol=1e-4, atol=1e-4)
  # If nothing is executed, the input remains, or zero.
  nothing = block(x, Gating(masks=[jnp.zeros(y.shape[:3])]))
  np.testing.assert_array_equal(nothing, x if strides == 1 else 0 * y)


@pytest.mark.parametrize(
  ('method', 'which', 'padding'),
  [
    ('dynconv', 'identity', 'same'),
    ('dynconv', 'all', 'symmetric'),
    ('sact', 'identity', 'same'),
    ('convnet_aig', 'all', 'same'),
    ('skipnet', 'identity', 'symmetric'),
  ],
)
def test_sparse_networks_equal_masked_dense_ones(method, which, padding):
  model = evaluation(make_small(method, gated_blocks=which, padding=padding))
  images = make_images()
  expected, masks = jax.jit(lambda x: model(x))(images)
  # SkipNet's first block has no gate.
  gated = (4 if which == 'identity' else 7) - (method == 'skipnet')
  assert len(masks) == gated
  density = np.mean([float(m.density().mean()) for m in masks])
  assert 0.1 < density < 0.95
  scale = float(jnp.std(expected, axis=0).max())
  assert scale > 0.01
  for backend in ('dense', 'xla'):
    sparse = sparsify(model, backend)
    assert not isinstance(sparse.bn2, BatchNorm)  # folded
    out, got = jax.jit(lambda x, sparse=sparse: sparse(x))(images)
    for mine, theirs in zip(got, masks, strict=True):
      np.testing.assert_array_equal(mine.hard, theirs.hard)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4 * scale)
  # The masks affect the count.
  opened = [np.ones_like(m.hard) for m in masks]
  named = dict(zip([m.name for m in masks], opened, strict=True))
  if method == 'dynconv':
    other, _ = jax.jit(lambda x, m: model(x, masks=m))(images, named)
    assert np.abs(other - expected).max() > scale / 100


def test_all_and_no_masks():
  model = evaluation(make_small())
  images = make_images()
  run = jax.jit(lambda x, masks=None: model(x, masks=masks))
  dense, none = run(images)
  assert none == []
  sizes = [(17, 19)] * 2 + [(9, 10)] * 5
  ones = [np.ones((3, *size)) for size in sizes]
  opened, masks = run(images, ones)
  np.testing.assert_allclose(opened, dense, atol=1e-5)
  assert [m.stage for m in masks] == [0] * 2 + [1] * 3 + [2] * 2
  # 5x5 at stride 2: the expansion runs where it is read.
  assert masks[2].dilated.shape == (3, 17, 19)
  zeros, _ = run(images, [0 * m for m in ones])
  assert bool(jnp.isfinite(zeros).all())
  assert float(jnp.abs(zeros - zeros[:1]).max()) < 1e-6  # nothing remains


def test_training():
  model = make_small('dynconv')
  images = make_images()
  key = jax.random.key(0)
  with pytest.raises(
    ValueError, match=re.escape("dropout=key); got ['gumbel']")
  ):
    model(images, rngs=nnx.Rngs(gumbel=key))

  @jax.jit
  def step(seed):
    graphdef, *split = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.as_pure(split)

    def loss(params):
      net = nnx.merge(graphdef, params, rest)
      rngs = nnx.Rngs(gumbel=key, dropout=jax.random.key(seed))
      logits, masks = net(images, rngs=rngs)
      return jnp.mean(logits**2), (logits, masks)

    return jax.grad(loss, has_aux=True)(params)

  grads, (logits, masks) = step(0)
  assert len(masks) == 4
  for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
    assert float(jnp.abs(grad).max()) > 0, jax.tree_util.keystr(path)
  assert float(jnp.abs(step(1)[1][0] - logits).max()) > 1e-3
  np.testing.assert_array_equal(step(0)[1][0], logits)


def test_stochastic_depth():
  model = make_small()
  rates = [block.drop and block.drop.rate for block in gated_blocks(model)]
  # Increases with the block's index; without a shortcut nothing may be dropped.
  expected = [
    None,
    0.2 / 7,
    None,
    *(0.2 * i / 7 for i in (3, 4)),
    None,
    0.2 * 6 / 7,
  ]
  assert [r is None for r in rates] == [r is None for r in expected]
  np.testing.assert_allclose(
    [r for r in rates if r], [e for e in expected if e]
  )
  block = InvertedResidual(
    4, 4, name='b', drop_rate=0.25, expand_ratio=2, rngs=nnx.Rngs(0)
  )
  x = np.random.default_rng(0).normal(size=(400, 2, 2, 4))
  x = jnp.asarray(x, jnp.float32)
  branch = block.run_branch(x)
  out = block(x, Gating(rngs=nnx.Rngs(dropout=0))) - x
  kept = np.asarray(jnp.abs(out).max((1, 2, 3)) > 1e-6)
  assert 0.65 < kept.mean() < 0.85
  np.testing.assert_allclose(
    out, np.where(kept[:, None, None, None], branch / 0.75, 0), atol=1e-5
  )
  # Gates may sample in evaluation, but nothing is dropped.
  for view in (
    {'deterministic': True},
    {'deterministic': False, 'use_running_average': True},
  ):
    still = nnx.view(block, **view)
    np.testing.assert_allclose(still(x), x + still.run_branch(x), atol=1e-6)


def test_bfloat16():
  model = make_small('dynconv', dtype=jnp.bfloat16)
  view = evaluation(model)
  logits, masks = jax.jit(lambda x: view(x))(make_images())
  assert logits.dtype == masks[0].hard.dtype == jnp.float32
  assert model.conv_stem.dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ('padding', 'epsilon', 'momentum'),
  [('symmetric', 1e-5, 0.9), ('same', 1e-3, 0.99)],
)
def test_constants_of_batch_norm(padding, epsilon, momentum):
  model = make_small(padding=padding)
  norms = [
    node for _, node in nnx.iter_modules(model) if isinstance(node, BatchNorm)
  ]
  assert len(norms) == 2 + 2 * 2 + 5 * 3
  assert {(n.epsilon, n.momentum) for n in norms} == {(epsilon, momentum)}
  rng = np.random.default_rng(0)
  norm, x = norms[0], 0.03 * rng.normal(size=(2, 3, 4, 32))
  before = norm.mean[...]
  y = norm(jnp.asarray(x, jnp.float32))
  std = np.sqrt(x.var((0, 1, 2)) + epsilon)
  expected = (x - x.mean((0, 1, 2))) / std * norm.scale[...] + norm.bias[...]
  np.testing.assert_allclose(y, np.clip(expected, 0, 6), rtol=1e-3, atol=1e-4)
  moved = momentum * before + (1 - momentum) * x.mean((0, 1, 2))
  np.testing.assert_allclose(norm.mean[...], moved, rtol=1e-5, atol=1e-6)


def test_initialization():
  block = InvertedResidual(64, 64, kernel_size=5, name='b', rngs=nnx.Rngs(0))
  # He initialization by the fan-out of the group: k * k * outputs.
  for conv, fan_out in (
    (block.conv_pw, 384),
    (block.conv_dw, 25),
    (block.conv_pwl, 64),
  ):
    std = float(jnp.std(conv.kernel[...]))
    np.testing.assert_allclose(std, np.sqrt(2 / fan_out), rtol=0.05)


def test_choices():
  make = functools.partial(
    SMALL,
    num_classes=2,
    gate=lambda site: None,
    dtype=jnp.float32,
    rngs=nnx.Rngs(0),
  )
  with pytest.raises(ValueError, match="padding 'valid'; allowed: symmetric"):
    make(padding='valid')
  with pytest.raises(ValueError, match="gated_blocks 'none'.*identity, all"):
    make(gated_blocks='none')
