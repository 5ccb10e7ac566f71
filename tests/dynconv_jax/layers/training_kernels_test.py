"""Tests of training kernels against XLA's and PyTorch's layers."""

import functools
import os
import subprocess
import sys
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dynconv_jax.layers import norm, training_kernels
from dynconv_jax.layers.cpu import conv_general_dilated
from dynconv_jax.layers.depthwise import depthwise

torch = pytest.importorskip('torch')

_DIMENSIONS = ('NHWC', 'HWIO', 'NHWC')


def _normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _pads(padding, size, k, strides):
  if padding == 'symmetric':
    return ((k // 2, k // 2),) * 2
  return tuple(lax.padtype_to_pads(size, (k, k), (strides, strides), 'SAME'))


def _value_and_gradients(function, *args):
  value = jax.jit(function)(*args)
  grad = _normal(*value.shape, seed=9)
  gradients = jax.jit(lambda *args: jax.vjp(function, *args)[1](grad))(*args)
  return value, *gradients


@pytest.fixture
def calls():
  """Returns the names of the kernels that are called."""
  names, call = [], training_kernels.call

  def spy(name, *args, **kwargs):
    names.append(name)
    return call(name, *args, **kwargs)

  with mock.patch.object(training_kernels, 'call', spy):
    yield names


@pytest.mark.parametrize('padding', ('symmetric', 'same'))
@pytest.mark.parametrize(
  'size, channels, k, strides',
  [
    ((7, 8), 24, 3, 1),
    ((8, 5), 17, 5, 2),
    ((9, 9), 40, 5, 2),
    ((3, 2), 16, 5, 1),  # Each window crosses a border.
    ((6, 7), 33, 7, 3),
    ((6, 5), 16, 1, 2),  # Some elements of x are in no window.
    ((70, 66), 32, 3, 2),  # Several bands.
    ((1, 1), 3, 3, 1),
  ],
)
def test_depthwise_is_the_grouped_convolution(
  calls, size, channels, k, strides, padding
):
  x, kernel = _normal(2, *size, channels), _normal(k, k, 1, channels, seed=1)
  pads = _pads(padding, size, k, strides)
  got = _value_and_gradients(
    lambda x, w: depthwise(x, w, strides, pads), x, kernel
  )
  expected = _value_and_gradients(
    lambda x, w: lax.conv_general_dilated(
      x,
      w,
      (strides, strides),
      pads,
      dimension_numbers=_DIMENSIONS,
      feature_group_count=channels,
    ),
    x,
    kernel,
  )
  assert set(calls) == {
    'depthwise', 'depthwise_input_gradient', 'depthwise_kernel_gradient'
  }  # fmt: skip
  # A gradient of the kernel sums up to 9,000 products.
  chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
  'k, features, strides, groups', [(1, 5, 1, 1), (1, 5, 2, 1), (3, 6, 1, 2)]
)
def test_other_convolutions_are_computed_the_same(k, features, strides, groups):
  x, kernel = _normal(2, 5, 6, 4), _normal(k, k, 4 // groups, features, seed=1)
  kwargs = dict(dimension_numbers=_DIMENSIONS, feature_group_count=groups)
  pads = _pads('symmetric', x.shape[1:3], k, strides)
  functions = (conv_general_dilated, lax.conv_general_dilated)
  got, expected = (
    _value_and_gradients(
      lambda x, w, f=f: f(x, w, (strides, strides), pads, **kwargs), x, kernel
    )
    for f in functions
  )
  chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def _torch_batch_norm(x, scale, bias, activation, grad):
  leaves = [
    torch.tensor(np.asarray(v), dtype=torch.float64, requires_grad=True)
    for v in (x, scale, bias)
  ]
  y = torch.nn.functional.batch_norm(
    leaves[0].permute(0, 3, 1, 2), None, None, *leaves[1:], True, 0.0, 1e-3
  ).permute(0, 2, 3, 1)
  y = {None: lambda y: y, 'relu': torch.relu, 'silu': torch.nn.functional.silu,
       'relu6': lambda y: torch.clamp(y, 0, 6)}[activation](y)  # fmt: skip
  y.backward(torch.tensor(np.asarray(grad), dtype=torch.float64))
  return [y.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]


@pytest.mark.parametrize('activation', (None, 'relu', 'relu6', 'silu'))
@pytest.mark.parametrize(
  'shape', ((3, 5, 7, 20), (4, 30, 30, 16), (2, 1, 1, 3))
)
def test_batch_norm_is_that_of_pytorch_in_float64(calls, shape, activation):
  # Far from zero, where computing the variance from squares would cancel.
  x = 50 + 3 * _normal(*shape)
  scale, bias = 1 + _normal(shape[-1], seed=1), 3 * _normal(shape[-1], seed=2)
  grad = _normal(*shape, seed=9)
  function = functools.partial(
    norm._batch_norm, epsilon=1e-3, activation=activation
  )
  y, mean, var = jax.jit(function)(x, scale, bias)
  gradients = jax.jit(
    lambda *args: jax.vjp(lambda *a: function(*a)[0], *args)[1](grad)
  )(x, scale, bias)
  expected = _torch_batch_norm(x, scale, bias, activation, grad)
  assert ('batch_norm_sums' in calls) == (activation != 'silu')
  assert 'moments' in calls
  for got, wanted in zip((y, *gradients), expected, strict=True):
    size = np.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=3e-5 * size)
  wide = np.asarray(x, np.float64)
  np.testing.assert_allclose(mean, wide.mean((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(var, wide.var((0, 1, 2)), rtol=1e-4)


def test_without_kernels_xla_computes_the_same():
  x, scale = _normal(2, 5, 5, 8), jnp.ones(8)

  def run(x, kernel):
    y = depthwise(x, kernel, 1, ((1, 1), (1, 1)))
    return norm._batch_norm(y, scale, scale, 1e-5, 'relu6')[0]

  kernel = _normal(3, 3, 1, 8, seed=1)
  got = _value_and_gradients(run, x, kernel)
  with mock.patch.object(training_kernels, '_library', lambda: None):
    jax.clear_caches()
    expected = _value_and_gradients(run, x, kernel)
  chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)


def test_results_do_not_depend_on_the_number_of_threads():
  """A run resumed on a different machine must continue with the same bits."""
  program = """
import os, sys
os.sched_setaffinity(0, {int(core) for core in sys.argv[1:]})
import hashlib, jax, jax.numpy as jnp, numpy as np
from dynconv_jax.layers import norm
from dynconv_jax.layers.depthwise import depthwise
rng = np.random.default_rng(0)
x, w = (jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((4, 40, 41, 24), (3, 3, 1, 24)))
def loss(x, w):
  y = depthwise(x, w, 1, ((1, 1), (1, 1)))
  return jnp.sum(norm._batch_norm(y, w[0, 0, 0], w[1, 1, 0], 1e-5, 'relu')[1])
sums = jax.jit(jax.grad(lambda x, w: jnp.vdot(x, depthwise(
    x, w, 1, ((1, 1), (1, 1)))), (0, 1)))(x, w)
moments = norm._batch_norm(x, w[0, 0, 0], w[1, 1, 0], 1e-5, None)[1:]
print(hashlib.sha256(b''.join(
    np.asarray(a).tobytes() for a in (*sums[1:], *moments))).hexdigest())
"""
  prints = set()
  for cores in ({min(os.sched_getaffinity(0))}, os.sched_getaffinity(0)):
    run = subprocess.run(
      [sys.executable, '-c', program, *map(str, cores)],
      capture_output=True,
      text=True,
      check=True,
    )
    prints.add(run.stdout)
  assert len(prints) == 1


def test_a_batch_over_devices_stays_there():
  """The kernels compute each device's share; only sums are communicated."""
  program = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update('jax_num_cpu_devices', 2)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from dynconv_jax.layers import norm
from dynconv_jax.layers.depthwise import depthwise
mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
x, w = (jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((4, 9, 9, 24), (5, 5, 1, 24)))
def loss(x, w):
  y = depthwise(x, w, 2, ((2, 2), (2, 2)))
  y, mean, var = norm._batch_norm(y, w[0, 0, 0], w[1, 1, 0], 1e-5, 'relu6')
  return jnp.sum(jnp.sin(y)), (mean, var)
step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
shared = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))
w2 = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
text = step.lower(shared, w2).compile().as_text()
assert 'all-gather' not in text and 'all-reduce' in text
got = step(shared, w2)
assert got[1][0].sharding.spec[0] == 'data'
alone = jax.device_put(x, jax.devices()[1]), jax.device_put(w, jax.devices()[1])
for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(step(*alone))):
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
"""
  subprocess.run([sys.executable, '-c', program], check=True)


@pytest.mark.parametrize('devices', (1, 2))
def test_under_vmap(devices):
  """Several models at once, as in ensemble training, with their gradients."""
  program = f"""
import jax, jax.numpy as jnp, numpy as np
jax.config.update('jax_num_cpu_devices', {devices})
from dynconv_jax.layers import norm
from dynconv_jax.layers.depthwise import depthwise
rng = np.random.default_rng(0)
args = [jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((3, 2, 5, 5, 8), (3, 3, 3, 1, 8), (3, 8))]
def loss(x, w, s):
  y = depthwise(x, w, 1, ((1, 1), (1, 1)))
  return jnp.sum(jnp.sin(norm._batch_norm(y, s, s, 1e-5, 'relu')[0]))
both = jax.value_and_grad(loss, (0, 1, 2))
together = jax.jit(jax.vmap(both))(*args)
for i in range(3):
  alone = both(*(a[i] for a in args))
  for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
    np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)
"""
  subprocess.run([sys.executable, '-c', program], check=True)
