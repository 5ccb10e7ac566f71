"""Exports networks to ONNX and compares the results with JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from flax import nnx

from dynconv_jax.layers import BatchNorm
from dynconv_jax.sparse.onnx import FORMS, export_onnx

# Odd sizes in every stage.
SIZE = (21, 27)


def make_images(batch=3, size=SIZE):
  rng = np.random.default_rng(0)
  return rng.normal(size=(batch, *size, 3)).astype(np.float32)


def run(model, images):
  """Returns logits and masks of the model's own jitted forward pass."""
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
  """Exports a network, compares logits and densities, and returns them."""
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
  """Returns the evaluation view, with nontrivial statistics and biases."""
  rng = np.random.default_rng(seed)
  for _, module in nnx.iter_modules(model):
    if isinstance(module, BatchNorm):
      size = module.scale.shape
      module.scale[...] = jnp.asarray(rng.uniform(0.5, 1, size))
      module.var[...] = jnp.asarray(rng.uniform(0.5, 1.5, size))
      module.bias[...] = jnp.asarray(0.1 * rng.normal(size=size))
      module.mean[...] = jnp.asarray(0.1 * rng.normal(size=size))
  return nnx.view(model, deterministic=True, use_running_average=True)


def forced(masks, kind):
  """Returns masks with the given shapes: no, one, some or all positions."""
  rng = np.random.default_rng(1)
  for mask in masks:
    shape = mask.hard.shape
    hard = np.full(shape, kind == 'all', np.float32)
    if kind == 'one':
      hard.reshape(-1)[rng.integers(hard.size)] = 1
    elif kind == 'some':
      hard = np.float32(rng.random(shape) < 0.4)
    yield hard


def count_nodes(exported, *ops):
  return sum(node.op_type in ops for node in exported.graph.node)
