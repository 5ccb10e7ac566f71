"""Tests of exported ONNX models against the networks' own forward in JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.forced import force_gates
from dynconv_jax import create_model
from dynconv_jax.branch import Branch, Conv
from dynconv_jax.layers import BatchNorm, conv
from dynconv_jax.macs import count_macs
from dynconv_jax.methods.dynconv import MaskUnit
from dynconv_jax.methods.gate import Decision, Gate
from dynconv_jax.methods.sact import HaltingUnit
from dynconv_jax.models.blocks import BasicBlock
from dynconv_jax.models.gated import GatedBlock, Gating, gated_blocks

pytest.importorskip('onnx', reason='pip install dynconv_jax[onnx]')
onnxruntime = pytest.importorskip(
  'onnxruntime', reason='pip install dynconv_jax[onnx]'
)

from dynconv_jax.macs.onnx import count_macs as count_onnx_macs  # noqa: E402
from dynconv_jax.sparse.onnx import FORMS, export_onnx  # noqa: E402

# Odd sizes in every stage.
SIZE = (21, 27)


def make_images(batch=3, size=SIZE):
  rng = np.random.default_rng(0)
  return rng.normal(size=(batch, *size, 3)).astype(np.float32)


def run(model, images):
  """Logits and masks of the model's own forward pass, jitted."""
  graphdef, state = nnx.split(model)
  forward = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))
  return forward(nnx.as_pure(state), images)


def assert_same(got, expected):
  expected = np.asarray(expected)
  scale = np.abs(expected).max()
  assert np.isfinite(scale)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)


def assert_exported(model, images, *, forms=FORMS, expected=None, **kwargs):
  """Exports a network, and compares logits and densities; returns those."""
  logits, masks = expected or run(model, images)
  densities = np.stack([m.density() for m in masks], 1)
  for form in forms:
    exported = export_onnx(model, images.shape[1:3], form=form, **kwargs)
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    got, density = session.run(None, {'images': images})
    assert_same(got, logits)
    np.testing.assert_allclose(density, densities, rtol=1e-6)
  return densities


def randomize(model, seed=0):
  """The evaluation view, with statistics and biases that count."""
  rng = np.random.default_rng(seed)
  for _, module in nnx.iter_modules(model):
    if isinstance(module, BatchNorm):
      size = module.scale.shape
      module.scale[...] = jnp.asarray(rng.uniform(0.5, 1, size))
      module.var[...] = jnp.asarray(rng.uniform(0.5, 1.5, size))
      module.bias[...] = jnp.asarray(0.1 * rng.normal(size=size))
      module.mean[...] = jnp.asarray(0.1 * rng.normal(size=size))
  return nnx.view(model, deterministic=True, use_running_average=True)


VARIANTS = [
  ('dynconv', {}),
  ('dynconv', {'mask_granularity': (3,)}),
  ('dynconv', {'mask_kernel_size': 1}),
  ('convnet_aig', {}),
  ('skipnet', {'skip_gate': 'ff1'}),
  ('skipnet', {'skip_gate': 'ff2'}),
  ('skipnet', {'skip_gate': 'recurrent'}),
  ('sact', {}),
  ('act', {}),
]


@pytest.mark.parametrize('family', ['basic', 'bottleneck'])
@pytest.mark.parametrize(
  ('method', 'options'),
  VARIANTS,
  ids=['-'.join([m, *map(str, o.values())]) for m, o in VARIANTS],
)
def test_logits_and_densities_are_those_of_the_model(
  make_network, method, options, family
):
  model = make_network(family, method, **options)
  for block in gated_blocks(model):
    if isinstance(block.masker, HaltingUnit):  # Halts in the midst of a stage.
      _sharpen(block.masker)
  for form in FORMS:
    exported = export_onnx(model, SIZE, form=form)
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    means = []
    for batch in (3, 1):
      images = make_images(batch)
      expected, masks = run(model, images)
      logits, density = session.run(None, {'images': images})
      assert_same(logits, expected)
      np.testing.assert_allclose(
        density, np.stack([m.density() for m in masks], 1), rtol=1e-6
      )
      means.append(density.mean())
  if method != 'skipnet':  # All gates of a random one decide the same.
    assert 0 < means[0] < 1


def _sharpen(unit):
  for layer in (unit.local_conv, unit.global_fc):
    if layer is not None:
      layer.kernel[...] = 12 * layer.kernel[...]


def forced(masks, kind):
  """Masks of the shapes of others: of no, one, some or all positions."""
  rng = np.random.default_rng(1)
  for mask in masks:
    shape = mask.hard.shape
    hard = np.full(shape, kind == 'all', np.float32)
    if kind == 'one':
      hard.reshape(-1)[rng.integers(hard.size)] = 1
    elif kind == 'some':
      hard = np.float32(rng.random(shape) < 0.4)
    yield hard


@pytest.mark.parametrize('kind', ['none', 'one', 'some', 'all'])
@pytest.mark.parametrize('family', ['basic', 'bottleneck'])
def test_masks_of_no_one_some_or_all_positions(make_network, family, kind):
  model, images = make_network(family, 'dynconv'), make_images()
  hard = list(forced(run(model, images)[1], kind))
  names = [block.name for block in gated_blocks(model)]
  expected, masks = model(images, masks=[jnp.asarray(m) for m in hard])
  densities = assert_exported(
    force_gates(model, dict(zip(names, hard, strict=True))),
    images,
    expected=(expected, masks),
    batch_size=len(images),
  )
  np.testing.assert_allclose(densities[0], [m[0].mean() for m in hard], 1e-6)


@pytest.mark.parametrize('logit', [-100.0, 100.0])
def test_gates_that_are_open_or_shut(make_network, logit):
  model = make_network('bottleneck', 'dynconv')
  for block in gated_blocks(model):
    block.masker.open(logit)
  densities = assert_exported(model, make_images())
  assert (densities == (logit > 0)).all()


class Halves(Gate):
  """Executes where the mean of the features is above that of the image."""

  def __init__(self, strides=1):
    super().__init__()
    self.strides = strides

  def __call__(self, x, carry=None, **kwargs):
    x = jnp.mean(x.astype(jnp.float32), axis=-1)[
      :, :: self.strides, :: self.strides
    ]
    hard = x > jnp.mean(x, axis=(1, 2), keepdims=True)
    return Decision(hard.astype(jnp.float32)), carry


class Network(nnx.Module):
  """Any blocks, one after another."""

  def __init__(self, blocks, dtype=jnp.float32):
    self.blocks, self.dtype = nnx.List(blocks), dtype

  def __call__(self, images, masks=None):
    gating = Gating(masks=masks)
    x = images.astype(self.dtype)
    for block in self.blocks:
      x = block(x, gating)
    return x.astype(jnp.float32), gating.finish()


def network(*branches, dtype=jnp.float32):
  rngs = nnx.Rngs(0)
  blocks = [
    GatedBlock(
      branch,
      name=f'block{i}',
      gate=Halves(branch.strides),
      dtype=dtype,
      rngs=rngs,
    )
    for i, branch in enumerate(branches)
  ]
  return randomize(Network(blocks, dtype))


def inverted(kernel_size, strides, activation, padding, shortcut):
  """A branch as in mobile networks."""
  wide = 12
  return Branch(
    (
      Conv('expand', 'bn1', 3, wide, activation=activation),
      Conv(
        'depthwise',
        'bn2',
        wide,
        wide,
        kernel_size,
        strides,
        wide,
        activation,
        padding,
      ),
      Conv('project', 'bn3', wide, 3),
    ),
    activation=None,
    shortcut=shortcut,
  )


BRANCHES = {
  'depthwise 5x5': inverted(5, 1, 'relu6', 'symmetric', 'identity'),
  'depthwise 5x5 strided same': inverted(5, 2, 'silu', 'same', 'none'),
  'depthwise 3x3 strided': inverted(3, 2, 'relu6', 'symmetric', 'projection'),
  'depthwise first': Branch(
    (
      Conv('conv1', 'bn1', 3, 6, 3, 2, 3, 'silu', 'same'),
      Conv('conv2', 'bn2', 6, 3, 3, 1, 1, 'gelu'),
    ),
    activation='silu',
    shortcut='projection',
  ),
  'groups': Branch(
    (
      Conv('conv1', 'bn1', 3, 8, 1, 1, 1, 'gelu'),
      Conv('conv2', 'bn2', 8, 12, 3, 1, 4, 'relu'),
      Conv('conv3', 'bn3', 12, 3, 1, 1, 3),
    ),
    activation='gelu',
  ),
  'strides of three and one': Branch(
    (
      Conv('conv1', 'bn1', 3, 6, 5, 3, 1, 'relu', 'same'),
      Conv('conv2', 'bn2', 6, 6, 3, 2, 1, 'relu', 'same'),
      Conv('conv3', 'bn3', 6, 5, 3, 1, 1),
    ),
    shortcut='none',
  ),
  'strided 1x1': Branch(
    (
      Conv('conv1', 'bn1', 3, 6, 1, 2, 1, 'relu'),
      Conv('conv2', 'bn2', 6, 4, 3, 1, 1),
    ),
    shortcut='projection',
  ),
}


@pytest.mark.parametrize('size', [(21, 27), (20, 16)])
@pytest.mark.parametrize('name', BRANCHES)
def test_any_branch_that_can_be_described(name, size):
  model = network(BRANCHES[name])
  densities = assert_exported(model, make_images(3, size))
  assert 0.2 < densities.mean() < 0.8
  for kind in ('none', 'one'):
    images = make_images(2, size)
    hard = list(forced(model(images)[1], kind))
    assert_exported(
      force_gates(model, {'block0': hard[0]}),
      images,
      forms=('sparse',),
      expected=model(images, masks=hard),
      batch_size=2,
    )


class SiluBlock(BasicBlock):
  """Says that it is a basic block, but is not."""

  def run_branch(self, x):
    return self.bn2(self.conv2(nnx.silu(self.conv1(x))))


class SqueezeExcite(BasicBlock):
  """Weighs the channels of the branch, which no description can say."""

  describable = False

  def __init__(self, in_features, planes, *args, rngs, **kwargs):
    super().__init__(in_features, planes, *args, rngs=rngs, **kwargs)
    self.squeeze = nnx.Conv(planes, 2, (1, 1), rngs=rngs)
    self.excite = nnx.Conv(2, planes, (1, 1), rngs=rngs)

  def run_branch(self, x):
    x = super().run_branch(x)
    weights = jnp.mean(x, axis=(1, 2), keepdims=True)
    return x * nnx.sigmoid(self.excite(nnx.silu(self.squeeze(weights))))


def test_own_blocks():
  rngs, images = nnx.Rngs(0), make_images()

  def make(kind, i, strides=1, features=3):
    return kind(
      3, features, strides, name=f'b{i}', gate=Halves(strides), rngs=rngs
    )

  model = randomize(
    Network([make(SqueezeExcite, 0), make(BasicBlock, 1, 2, 5)])
  )
  densities = assert_exported(model, images)
  assert densities.min() > 0.2 and densities.max() < 0.8
  assert _count(export_onnx(model, SIZE), 'NonZero') == 2  # b1's two levels.
  with pytest.raises(ValueError, match='b0 .SiluBlock, .*describable = False'):
    export_onnx(randomize(Network([make(SiluBlock, 0)])), SIZE)


def _count(exported, *ops):
  return sum(node.op_type in ops for node in exported.graph.node)


class UNet(nnx.Module):
  """Blocks of three resolutions, concatenated; another size of output."""

  foldable = (('conv1', 'bn1'),)

  def __init__(self, rngs):
    def block(name, in_features, features, strides=1):
      return BasicBlock(
        in_features,
        features,
        strides,
        name=name,
        gate=MaskUnit(in_features, strides=strides, rngs=rngs),
        input_activated=True,
        rngs=rngs,
      )

    self.conv1 = conv(3, 8, 3, rngs=rngs)
    self.bn1 = BatchNorm(8, activation='relu', rngs=rngs)
    self.encode1 = block('encode1', 8, 8)
    self.encode2 = block('encode2', 8, 16, 2)
    self.decode2 = block('decode2', 16, 8)
    self.decode1 = block('decode1', 16, 8)
    self.head = nnx.Conv(8, 2, (1, 1), rngs=rngs)

  def __call__(self, images):
    gating = Gating()
    full = self.encode1(self.bn1(self.conv1(images)), gating)
    half = self.decode2(self.encode2(full, gating), gating)
    up = jax.image.resize(half, full.shape[:3] + (8,), 'nearest')
    x = self.decode1(jnp.concatenate([up, full], -1), gating)
    return self.head(x), gating.finish()


def test_a_network_of_another_kind():
  model, images = randomize(UNet(nnx.Rngs(0))), make_images()
  densities = assert_exported(model, images, batch_size=3)
  assert 0.1 < densities.mean() < 0.9


def test_features_are_not_transposed_between_convolutions(make_network):
  """A dense network stays channels first, a sparse one in rows."""
  model = make_network('bottleneck', 'dense')
  assert _count(export_onnx(model, SIZE), 'Transpose') == 1  # Of the images.
  model = make_network('bottleneck', 'dynconv')
  dense = export_onnx(model, SIZE, form='dense')
  assert _count(dense, 'Transpose') == 1
  sparse = export_onnx(model, SIZE, form='sparse')
  # To rows after the stem, and the few products of the mask units.
  assert _count(sparse, 'Transpose') == 2 + len(gated_blocks(model)) - 1


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'cifar_resnet8'])
def test_a_dense_network_and_its_macs(name):
  size = (32, 32)
  model = create_model(name, num_classes=7, rngs=nnx.Rngs(0))
  model = nnx.view(model, deterministic=True, use_running_average=True)
  exported = export_onnx(model, size)
  images = make_images(2, size)
  (logits,) = onnxruntime.InferenceSession(exported.SerializeToString()).run(
    None, {'images': images}
  )
  assert_same(logits, run(model, images)[0])
  # The biases that batch norm became are the only difference.
  count = functools.partial(count_macs, convention='conv+linear')
  expected = count(model, jax.ShapeDtypeStruct((1, *size, 3), jnp.float32))
  counted = count_onnx_macs(
    exported, dimensions={'N': 1}, convention='conv+linear'
  )
  assert counted.total == expected.total


@pytest.mark.parametrize('name', BRANCHES)
def test_macs_of_a_masked_branch_are_those_of_the_model(name):
  model = network(BRANCHES[name])
  count = functools.partial(count_macs, convention='conv+linear')
  expected = count(model, jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32))
  exported = export_onnx(model, SIZE, form='dense')
  counted = count_onnx_macs(
    exported, dimensions={'N': 1}, convention='conv+linear'
  )
  assert counted.total == expected.total > 0


@pytest.mark.parametrize('form', FORMS)
def test_a_bfloat16_network_is_exported_in_float32(make_network, form):
  """It is the network of the same parameters that computes in float32."""
  low = make_network('bottleneck', 'dynconv', dtype=jnp.bfloat16)
  high = make_network('bottleneck', 'dynconv')
  images = make_images()
  assert_exported(low, images, forms=(form,), expected=run(high, images))
  assert all(block.dtype == jnp.bfloat16 for block in gated_blocks(low))


def test_the_batch_is_as_asked(make_network):
  model = make_network('basic', 'dynconv')
  for batch, shape in ((None, 'N'), (2, 2)):
    exported = export_onnx(model, SIZE, batch_size=batch)
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    shapes = [v.shape for v in session.get_inputs() + session.get_outputs()]
    assert shapes == [[shape, *SIZE, 3], [shape, 5], [shape, 4]]


def test_what_is_refused(make_network):
  model = make_network('basic', 'dynconv')
  allowed = "unknown form 'fast'; allowed: sparse, dense"
  with pytest.raises(ValueError, match=allowed):
    export_onnx(model, SIZE, form='fast')
  with pytest.raises(ValueError, match='image_size .*height, width.* got 224'):
    export_onnx(model, 224)
  with pytest.raises(ValueError, match='batch_size must be .* got 0'):
    export_onnx(model, SIZE, batch_size=0)
  training = create_model('cifar_resnet8', method='dynconv', rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='evaluation view'):
    export_onnx(training, SIZE)
