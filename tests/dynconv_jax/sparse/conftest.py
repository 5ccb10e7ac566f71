"""Small networks of every method, shared by the tests of this folder."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax import create_model
from dynconv_jax.models.blocks import BasicBlock, Bottleneck
from dynconv_jax.models.resnet import ARCHITECTURES, Architecture
from dynconv_jax.sparse.backends.cpu import CpuBackend

# Identities, projections and strides of both families, in four blocks.
SMALL = {
  'basic': Architecture(BasicBlock, (2, 2), 8, 'cifar'),
  'bottleneck': Architecture(Bottleneck, (2, 2), 8, 'imagenet'),
}


@pytest.fixture(params=('xla', 'cpu'))
def backend(request):
  """A backend that executes active positions on this machine."""
  if request.param == 'cpu' and not CpuBackend().supports_platform(
    jnp.dtype(jnp.float32), jax.default_backend()
  ):
    pytest.skip('the kernels need a CPU and a C++ compiler')
  return request.param


@pytest.fixture(scope='session')
def make_network():
  """Returns an evaluation view with random parameters and statistics."""

  def make(family, method, dtype=jnp.float32, seed=0, **kwargs):
    with mock.patch.dict(ARCHITECTURES, SMALL):
      model = nnx.eval_shape(
        lambda: create_model(
          family,
          method=method,
          num_classes=5,
          dtype=dtype,
          rngs=nnx.Rngs(0),
          **kwargs,
        )
      )
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
      keys = [getattr(key, 'key', None) for key in path]
      name = [key for key in keys if isinstance(key, str)][-1]
      if name == 'var':
        value = rng.uniform(0.5, 1.5, leaf.shape)
      elif name == 'scale':
        value = rng.uniform(0.5, 1.0, leaf.shape)
      elif name in ('bias', 'mean'):
        value = 0.1 * rng.normal(size=leaf.shape)
      else:
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        value = rng.normal(size=leaf.shape) * np.sqrt(2 / fan_in)
      return jnp.asarray(value, leaf.dtype)

    state = nnx.state(model)
    nnx.update(model, jax.tree_util.tree_map_with_path(fill, state))
    return nnx.view(model, deterministic=True, use_running_average=True)

  return make
