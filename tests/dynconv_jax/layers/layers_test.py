"""Tests of convolution, batch norm and max-pool against loops and PyTorch."""

import unittest

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx
from jax import lax

from dynconv_jax import layers

try:
  import torch
except ImportError:
  torch = None

needs_torch = unittest.skipIf(torch is None, 'PyTorch is not installed')


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _nchw(x):
  return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def _nhwc(x):
  return x.detach().numpy().transpose(0, 2, 3, 1)


def _conv_by_loops(x, kernel, strides, padding):
  k = len(kernel)
  x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  h, w = ((size - k) // strides + 1 for size in x.shape[1:3])
  y = np.zeros((len(x), h, w, kernel.shape[-1]))
  for i in range(h):
    for j in range(w):
      top, left = i * strides, j * strides
      window = x[:, top : top + k, left : left + k]
      y[:, i, j] = np.einsum('nabc,abcf->nf', window, kernel)
  return y


class ConvTest(parameterized.TestCase):
  @parameterized.parameters(
    ((5, 6), 3, 1), ((7, 6), 3, 2), ((9, 8), 7, 2), ((5, 4), 1, 2)
  )
  def test_pads_as_torch(self, shape, kernel_size, strides):
    layer = layers.conv(
      3,
      4,
      kernel_size,
      strides=strides,
      dtype=jnp.float32,
      rngs=nnx.Rngs(0),
    )
    x = _normal(2, *shape, 3)
    kernel = np.asarray(layer.kernel[...])
    y = layer(x)
    np.testing.assert_allclose(
      y, _conv_by_loops(x, kernel, strides, kernel_size // 2), atol=1e-5
    )
    if torch is not None:
      expected = torch.nn.functional.conv2d(
        _nchw(x),
        torch.tensor(kernel.transpose(3, 2, 0, 1)),
        stride=strides,
        padding=kernel_size // 2,
      )
      np.testing.assert_allclose(y, _nhwc(expected), atol=1e-5)

  def test_has_no_bias_and_float32_parameters(self):
    layer = layers.conv(3, 4, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    self.assertIsNone(layer.bias)
    self.assertEqual(layer.kernel.dtype, jnp.float32)
    self.assertEqual(layer(_normal(1, 4, 4, 3)).dtype, jnp.bfloat16)

  def test_initialisation(self):
    layer = layers.conv(32, 64, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    kernel = np.asarray(layer.kernel[...])
    # Kaiming normal, fan_out: sqrt(2 / (3 * 3 * 64)).
    self.assertAlmostEqual(kernel.std(), (2 / 576) ** 0.5, delta=0.001)
    self.assertAlmostEqual(kernel.mean(), 0, delta=0.002)


class ConvGeneralDilatedTest(parameterized.TestCase):
  """The forms that a CPU uses for small maps and for single features."""

  @parameterized.parameters(
    ((2, 2), 3, 1),
    ((1, 1), 3, 1),
    ((4, 3), 3, 2),
    ((1, 5), 3, 1),
    ((4, 5), 7, 2),
    ((6, 5), 3, 1, 1),
    ((7, 6), 3, 2, 1),
    ((1, 1), 3, 1, 1),
  )
  def test_equals_plain_with_gradients(self, shape, k, strides, features=4):
    x, kernel = _normal(2, *shape, 3), _normal(k, k, 3, features, seed=1)
    arguments = (strides,) * 2, ((k // 2,) * 2,) * 2
    layout = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}

    def ours(x, kernel):
      return layers.conv_general_dilated(x, kernel, *arguments, **layout)

    def plain(x, kernel):
      return lax.conv_general_dilated(x, kernel, *arguments, **layout)

    cotangent = _normal(*jax.eval_shape(plain, x, kernel).shape, seed=2)
    # The branch under test is used: the jaxpr chooses by platform.
    self.assertIn('platform_index', str(jax.make_jaxpr(ours)(x, kernel)))

    @jax.jit
    def both(x, kernel):
      results = []
      for function in (ours, plain):
        y, pull = jax.vjp(function, x, kernel)
        results.append((y, *pull(cotangent)))
      return results

    for given, expected in zip(*both(x, kernel), strict=True):
      np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)

  @parameterized.parameters(1, 4)
  def test_bfloat16_is_summed_in_float32_where_asked(self, features):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 1, 2, 8)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 8, features)), jnp.bfloat16)

    @jax.jit
    def run(x, kernel):
      return layers.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        preferred_element_type=jnp.float32,
      )

    exact = run(x.astype(jnp.float32), kernel.astype(jnp.float32))
    np.testing.assert_allclose(run(x, kernel), exact, rtol=1e-5, atol=1e-5)

  def test_large_maps_are_convolved_plainly(self):
    jaxpr = jax.make_jaxpr(
      lambda x, k: layers.conv_general_dilated(
        x,
        k,
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      )
    )(_normal(1, 3, 3, 2), _normal(3, 3, 2, 2))
    self.assertEqual(
      [e.primitive.name for e in jaxpr.eqns], ['conv_general_dilated']
    )


class BatchNormTest(parameterized.TestCase):
  def _norm(self, features):
    norm = layers.BatchNorm(features, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.linspace(0.5, 2, features)
    norm.bias[...] = jnp.linspace(-1, 1, features)
    return norm

  def test_training_by_hand(self):
    norm = layers.BatchNorm(1, rngs=nnx.Rngs(0))
    x = jnp.array([1.0, 2.0, 3.0, 6.0]).reshape(1, 2, 2, 1)
    y = norm(x)
    # Mean 3, variance 14/4 over the batch, 14/3 unbiased.
    np.testing.assert_allclose(
      y.ravel(), np.array([-2, -1, 0, 3]) / (3.5 + 1e-5) ** 0.5, rtol=1e-5
    )
    np.testing.assert_allclose(norm.mean[...], [0.3], rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], [0.9 + 0.1 * 14 / 3], rtol=1e-6)

  def test_running_statistics(self):
    norm = self._norm(2)
    norm.mean[...], norm.var[...] = jnp.array([1.0, -2]), jnp.array([4.0, 9])
    x = _normal(2, 3, 3, 2)
    y = nnx.view(norm, use_running_average=True)(x)
    expected = (x - [1, -2]) / np.sqrt(np.array([4, 9]) + 1e-5)
    expected = expected * [0.5, 2] + [-1, 1]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(norm.mean[...], [1, -2])

  @needs_torch
  def test_equals_torch_with_gradients(self):
    features = 3
    norm = self._norm(features)
    reference = torch.nn.BatchNorm2d(features)
    with torch.no_grad():
      reference.weight.copy_(torch.tensor(np.asarray(norm.scale[...])))
      reference.bias.copy_(torch.tensor(np.asarray(norm.bias[...])))
    x, cotangent = 3 * _normal(2, 4, 5, 3) + 1, _normal(2, 4, 5, 3, seed=1)
    graphdef, params, rest = nnx.split(norm, nnx.Param, ...)
    params, rest = nnx.as_pure((params, rest))

    def function(params, x):
      norm = nnx.merge(graphdef, params, rest)
      return norm(x), nnx.as_pure(nnx.split(norm, nnx.Param, ...)[2])

    y, pull, moved = jax.vjp(function, params, jnp.asarray(x), has_aux=True)
    grads, grad_x = pull(jnp.asarray(cotangent))
    torch_x = _nchw(x).requires_grad_()
    torch_y = reference(torch_x)
    torch_y.backward(_nchw(cotangent))
    for given, expected in (
      (y, _nhwc(torch_y)),
      (grad_x, _nhwc(torch_x.grad)),
      (grads['scale'], reference.weight.grad.numpy()),
      (grads['bias'], reference.bias.grad.numpy()),
      (moved['mean'], reference.running_mean.numpy()),
      (moved['var'], reference.running_var.numpy()),
    ):
      np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)

  def test_bfloat16_keeps_float32_statistics(self):
    norm = layers.BatchNorm(1, rngs=nnx.Rngs(0))
    # 256 + 1 is not a bfloat16: sums in bfloat16 would lose the ones.
    x = jnp.array([256.0, 258.0] * 32, jnp.bfloat16).reshape(4, 4, 4, 1)
    y = norm(x)
    self.assertEqual(y.dtype, jnp.bfloat16)
    np.testing.assert_allclose(jnp.abs(y.astype(jnp.float32)), 1.0, rtol=1e-2)
    np.testing.assert_allclose(norm.mean[...], [25.7], rtol=1e-6)
    self.assertEqual(norm.var.dtype, jnp.float32)


class MaxPoolTest(parameterized.TestCase):
  @parameterized.product(shape=((4, 6), (5, 7), (1, 2)), ties=(False, True))
  def test_value_and_gradient(self, shape, ties):
    x = _normal(2, *shape, 3)
    if ties:
      # A rectified map: most windows contain equal zeros and equal ones.
      x = np.round(np.maximum(x, 0))
    h, w = ((size - 1) // 2 + 1 for size in shape)
    cotangent = _normal(2, h, w, 3, seed=1)
    expected, grad = np.zeros((2, h, w, 3)), np.zeros(x.shape)
    for n, i, j, c in np.ndindex(expected.shape):
      best = None
      for a in range(max(2 * i - 1, 0), min(2 * i + 2, shape[0])):
        for b in range(max(2 * j - 1, 0), min(2 * j + 2, shape[1])):
          if best is None or x[n, a, b, c] > x[n, best[0], best[1], c]:
            best = a, b
      expected[n, i, j, c] = x[n, best[0], best[1], c]
      grad[n, best[0], best[1], c] += cotangent[n, i, j, c]

    @jax.jit
    def run(x):
      y, pull = jax.vjp(layers.max_pool, x)
      return layers.max_pool(x), y, pull(cotangent)[0]

    plain, y, given = run(x)
    np.testing.assert_array_equal(plain, y)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    np.testing.assert_allclose(given, grad, rtol=1e-5, atol=1e-6)
    if torch is not None:
      torch_x = _nchw(x).requires_grad_()
      torch_y = torch.nn.functional.max_pool2d(torch_x, 3, 2, 1)
      torch_y.backward(_nchw(cotangent))
      np.testing.assert_array_equal(y, _nhwc(torch_y))
      np.testing.assert_allclose(
        given, _nhwc(torch_x.grad), rtol=1e-5, atol=1e-6
      )


if __name__ == '__main__':
  absltest.main()
