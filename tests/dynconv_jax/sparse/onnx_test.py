"""Tests of exported ONNX models against the masked dense forward in JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax.macs import count_macs
from dynconv_jax.models.create import create_model

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


def session(model, size=SIZE, **kwargs):
  exported = export_onnx(model, size, **kwargs)
  return onnxruntime.InferenceSession(exported.SerializeToString())


def run(model, images, masks=None):
  """Logits and masks of the model's own forward pass, jitted."""
  graphdef, state = nnx.split(model)
  forward = jax.jit(lambda s, x, m: nnx.merge(graphdef, s)(x, masks=m))
  return forward(nnx.as_pure(state), images, masks)


def assert_same(got, expected):
  expected = np.asarray(expected)
  scale = np.abs(expected).max()
  assert np.isfinite(scale) and scale > 0
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('family', ['basic', 'bottleneck'])
@pytest.mark.parametrize('method', ['dynconv', 'convnet_aig'])
def test_logits_and_densities_are_those_of_the_model(
  make_network, method, family, form
):
  model = make_network(family, method)
  exported = session(model, form=form)
  for batch in (3, 1):
    images = make_images(batch)
    expected, masks = run(model, images)
    logits, density = exported.run(None, {'images': images})
    assert_same(logits, expected)
    assert logits.dtype == density.dtype == np.float32
    np.testing.assert_allclose(
      density, np.stack([m.density() for m in masks], 1), rtol=1e-6
    )


def given(masks, kind):
  """Masks of the shapes of others: of no, one, some or all positions."""
  rng = np.random.default_rng(1)
  for mask in masks:
    shape = mask.hard.shape
    hard = np.float32(kind == 'all') * np.ones(shape, np.float32)
    if kind == 'one':
      hard.reshape(-1)[rng.integers(hard.size)] = 1
    elif kind == 'some':
      hard = np.float32(rng.random(shape) < 0.4)
    yield hard


@pytest.mark.parametrize('kind', ['none', 'one', 'some', 'all'])
@pytest.mark.parametrize('family', ['basic', 'bottleneck'])
def test_given_masks_are_obeyed(make_network, family, kind):
  model, images = make_network(family, 'dynconv'), make_images()
  masks = list(given(run(model, images)[1], kind))
  expected, _ = run(model, images, [jnp.asarray(m) for m in masks])
  feed = {f'mask_{i}': mask[:, None] for i, mask in enumerate(masks)}
  for form in FORMS:
    exported = session(model, form=form, given_masks=True)
    logits, density = exported.run(None, {'images': images, **feed})
    assert_same(logits, expected)
    np.testing.assert_allclose(
      density, np.stack([m.mean((1, 2)) for m in masks], 1), rtol=1e-6
    )


@pytest.mark.parametrize(
  'arguments', [{'mask_granularity': (3,)}, {'mask_kernel_size': 1}]
)
def test_variants_of_the_mask_unit(make_network, arguments):
  model, images = make_network('basic', 'dynconv', **arguments), make_images()
  expected, masks = run(model, images)
  densities = [float(m.density().mean()) for m in masks]
  assert 0 < np.mean(densities) < 1
  logits, density = session(model).run(None, {'images': images})
  assert_same(logits, expected)
  np.testing.assert_allclose(density.mean(0), densities, rtol=1e-6)


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


def test_what_cannot_be_exported(make_network):
  with pytest.raises(ValueError, match='dynconv and convnet_aig .* Halting'):
    export_onnx(make_network('basic', 'sact'), SIZE)
  allowed = "unknown form 'fast'; allowed: sparse, dense"
  with pytest.raises(ValueError, match=allowed):
    export_onnx(make_network('basic', 'dynconv'), SIZE, form='fast')
  training = create_model('cifar_resnet8', method='dynconv', rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='evaluation view'):
    export_onnx(training, SIZE)
