"""Tests of exported ONNX models against the networks' forward pass in JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.forced import force_gates
from dynconv_jax import create_model
from dynconv_jax.layers import BatchNorm, conv
from dynconv_jax.macs import count_macs
from dynconv_jax.methods.mask_unit import MaskUnit
from dynconv_jax.methods.sact import HaltingUnit
from dynconv_jax.models.blocks import BasicBlock
from dynconv_jax.models.gated import Gating, gated_blocks

pytest.importorskip('onnx', reason='pip install dynconv_jax[onnx]')
onnxruntime = pytest.importorskip(
  'onnxruntime', reason='pip install dynconv_jax[onnx]'
)

from onnx_export import (  # noqa: E402
  SIZE,
  assert_exported,
  assert_same,
  count_nodes,
  forced,
  make_images,
  randomize,
  run,
)

from dynconv_jax.macs.onnx import count_macs as count_onnx_macs  # noqa: E402
from dynconv_jax.sparse.onnx import FORMS, export_onnx  # noqa: E402

VARIANTS = [
  ('dynconv', {}),
  ('dynconv', {'mask_granularity': (3,)}),
  ('dynconv', {'mask_kernel_size': 1}),
  ('dynconv', {'inherited_masks': True}),
  ('dynconv', {'inherited_masks': True, 'mask_units': ('layer1.1',)}),
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
    if isinstance(block.masker, HaltingUnit):  # halts within a stage
      _sharpen(block.masker)
  cases = [(images, *run(model, images)) for images in map(make_images, (3, 1))]
  for form in FORMS:
    exported = export_onnx(model, SIZE, form=form)
    session = onnxruntime.InferenceSession(exported.SerializeToString())
    means = []
    for images, expected, masks in cases:
      logits, density = session.run(None, {'images': images})
      assert_same(logits, expected)
      np.testing.assert_allclose(
        density, np.stack([m.density() for m in masks], 1), rtol=1e-6
      )
      means.append(density.mean())
  if method != 'skipnet':  # A random SkipNet's gates all agree.
    assert 0 < means[0] < 1


@pytest.mark.parametrize('method', ['dynconv', 'convnet_aig', 'sact'])
@pytest.mark.parametrize('form', FORMS)
def test_masks_and_their_macs_are_those_of_the_model(
  make_network, method, form
):
  model, images = make_network('bottleneck', method), make_images()
  logits, masks = run(model, images)
  exported = export_onnx(model, SIZE, form=form, masks=True)
  session = onnxruntime.InferenceSession(exported.SerializeToString())
  names = [output.name for output in session.get_outputs()]
  assert names[:3] == ['logits', 'density', 'executed_macs']
  assert names[3:] == [f'mask_{i}' for i in range(len(masks))]
  got, _, macs, *maps = session.run(None, {'images': images})
  assert_same(got, logits)
  for mask, found in zip(masks, maps, strict=True):
    np.testing.assert_array_equal(found, mask.hard)
  report = count_macs(model, jax.ShapeDtypeStruct((1, *SIZE, 3), np.float32))
  nothing = jax.tree.map(np.zeros_like, masks)
  expected = report.executed(masks) - report.executed(nothing)
  np.testing.assert_allclose(macs, expected, rtol=1e-6)


@pytest.mark.parametrize('batch_size', [None, 2])
def test_dropped_blocks_have_constant_masks(batch_size):
  model = create_model(
    'cifar_resnet8',
    method='drop',
    dropped_blocks=('layer1.0',),
    num_classes=3,
    rngs=nnx.Rngs(0),
  )
  images = make_images(2)
  densities = assert_exported(randomize(model), images, batch_size=batch_size)
  np.testing.assert_array_equal(densities, np.zeros((2, 1)))


def test_a_dense_network_has_no_masks(make_network):
  exported = export_onnx(make_network('basic', 'dense'), SIZE, masks=True)
  assert [output.name for output in exported.graph.output] == ['logits']


def _sharpen(unit):
  for layer in (unit.local_conv, unit.global_fc):
    if layer is not None:
      layer.kernel[...] = 12 * layer.kernel[...]


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


class UNet(nnx.Module):
  """Blocks at three resolutions, concatenated, with a different output size."""

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

  @property
  def dtype(self):
    return self.encode1.dtype

  def __call__(self, images):
    gating = Gating()
    assert self.encode2.strides == 2  # Networks may read their blocks.
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
  """A dense network stays channels-first, a sparse one uses rows."""
  model = make_network('bottleneck', 'dense')
  assert (
    count_nodes(export_onnx(model, SIZE), 'Transpose') == 1
  )  # of the images
  model = make_network('bottleneck', 'dynconv')
  dense = export_onnx(model, SIZE, form='dense')
  assert count_nodes(dense, 'Transpose') == 1
  sparse = export_onnx(model, SIZE, form='sparse')
  # To rows after the stem, and the few products of the mask units.
  assert count_nodes(sparse, 'Transpose') == 2 + len(gated_blocks(model)) - 1


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
  # The only difference is the biases from folded batch norms.
  count = functools.partial(count_macs, convention='conv+linear')
  expected = count(model, jax.ShapeDtypeStruct((1, *size, 3), jnp.float32))
  counted = count_onnx_macs(
    exported, dimensions={'N': 1}, convention='conv+linear'
  )
  assert counted.total == expected.total


@pytest.mark.parametrize('form', FORMS)
def test_a_bfloat16_network_is_exported_in_float32(make_network, form):
  """It equals the network with the same parameters that computes in float32."""
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
