"""Tests of operations as ONNX nodes, against JAX's results."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

onnx = pytest.importorskip('onnx', reason='pip install dynconv_jax[onnx]')
onnxruntime = pytest.importorskip(
  'onnxruntime', reason='pip install dynconv_jax[onnx]'
)

from dynconv_jax.sparse.onnx import export_onnx  # noqa: E402

SIZE = (5, 6)
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(3, 3, 3, 4)).astype(np.float32)
DEPTHWISE = RNG.normal(size=(3, 3, 1, 6)).astype(np.float32)
MATRIX = RNG.normal(size=(3, 7)).astype(np.float32)
ALONG = nnx.Conv(3, 4, (3,), rngs=nnx.Rngs(0))
CHANNELS = RNG.normal(size=(3,)).astype(np.float32)


class Network(nnx.Module):
  """Any function of images."""

  def __init__(self, function):
    self.function = function

  def __call__(self, images):
    return self.function(images)


def export(function, **kwargs):
  exported = export_onnx(Network(function), SIZE, **kwargs)
  return onnxruntime.InferenceSession(exported.SerializeToString())


def images(batch=2):
  rng = np.random.default_rng(1)
  return rng.normal(size=(batch, *SIZE, 3)).astype(np.float32)


def check(function, tolerance=1e-5, **kwargs):
  session = export(function, **kwargs)
  for batch in (kwargs.get('batch_size') or 2, kwargs.get('batch_size') or 1):
    x = images(batch)
    (got,) = session.run(None, {'images': x})
    expected = np.asarray(function(jnp.asarray(x)), np.float32)
    assert got.shape == expected.shape
    assert np.ptp(expected) > 0 or batch == 1
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def conv(x, kernel=KERNEL, strides=(1, 1), padding='SAME', **kwargs):
  return lax.conv_general_dilated(
    x,
    kernel,
    strides,
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    **kwargs,
  )


ELEMENTWISE = {
  name: getattr(jnp, name)
  for name in (
    *('abs', 'arctan', 'ceil', 'cos', 'cosh', 'exp', 'exp2', 'expm1', 'floor'),
    *('negative', 'round', 'sign', 'sin', 'sinh', 'square', 'tan', 'tanh'),
    'trunc',
  )
} | {
  name: getattr(jax.nn, name)
  for name in (
    *('celu', 'elu', 'hard_sigmoid', 'hard_swish', 'leaky_relu', 'log_softmax'),
    *('mish', 'relu', 'relu6', 'sigmoid', 'silu', 'softmax'),
    *('softplus', 'gelu', 'standardize'),
  )
}
ELEMENTWISE |= {
  'arcsin': lambda x: jnp.arcsin(jnp.tanh(x)),
  'arccos': lambda x: jnp.arccos(jnp.tanh(x)),
  'isfinite': lambda x: jnp.isfinite(jnp.log(x)),
  'logsumexp': lambda x: jax.nn.logsumexp(x, -1),
  'log': lambda x: jnp.log(jnp.abs(x)),
  'sqrt and rsqrt': lambda x: jnp.sqrt(abs(x)) + lax.rsqrt(abs(x) + 1),
  'powers': lambda x: x**3 + abs(x) ** 2.5 - x**-2,
  'exact gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'remainder': lambda x: x % 0.7 + (10 * x).astype(int) % 3,
  'floor_divide': lambda x: (10 * x).astype(int) // 3,
  'clip': lambda x: jnp.clip(x, -0.5, 0.7),
  'comparisons': lambda x: sum(
    (i + 1) * c.astype(jnp.float32)
    for i, c in enumerate([x > 0, x >= 0.1, x < 0.2, x <= 0.3, x == x, x != x])
  ),
  'logic': lambda x: (~(x > 0) & (x < 1)) | ((x > 1) ^ (x > 2)),
  'integer logic': lambda x: ((9 * x).astype(int) & 6) | 1,
  'maximum of bool': lambda x: jnp.maximum(x > 1, x < 0),
  'where': lambda x: (
    jnp.where(x > 0, x, 0.1 * x) + jnp.where(x.mean() > 9, 1, x)
  ),
  'channels': lambda x: (
    (x - CHANNELS) * CHANNELS / (1 + x.mean(-1, keepdims=True))
  ),
  'by number': lambda x: x * jnp.sum(x[:1]),
  'bfloat16': lambda x: (x.astype(jnp.bfloat16) > 0).astype(jnp.bfloat16) + 1,
}


@pytest.mark.parametrize('name', ELEMENTWISE)
def test_elementwise(name):
  check(ELEMENTWISE[name])


SHAPES = {
  'reshape': lambda x: x.reshape(x.shape[0], -1),
  'transpose': lambda x: x.transpose(0, 2, 3, 1),
  'swap the batch': lambda x: x.transpose(3, 0, 1, 2),
  'newaxis': lambda x: x[:, None, ..., None],
  'squeeze': lambda x: x[:, :1].squeeze(1),
  'broadcast': lambda x: jnp.broadcast_to(x[:, :1], x.shape),
  'constant broadcast': lambda x: (
    jnp.full((x.shape[0], 2), 3.0) * x[:, 0, 0, :2]
  ),
  'concatenate': lambda x: jnp.concatenate([x, x[:, :2], 0 * x], 1),
  'stack': lambda x: jnp.stack([x, 2 * x], axis=-1),
  'slices': lambda x: x[:, 1:4:2, ::-1, 1:],
  'index': lambda x: x[:, -1, 2],
  'take': lambda x: jnp.take(x, jnp.array([[2, 0], [1, 1]]), axis=2),
  'channels': lambda x: x[..., np.array([2, 0, 1, 1])],
  'dynamic slice': lambda x: lax.dynamic_slice_in_dim(x, 4, 3, axis=2),
  'split': lambda x: (
    jnp.split(x, 3, axis=2)[1] * jnp.split(x, (1, 2), 3)[1][:, :, :2]
  ),
  'pad': lambda x: jnp.pad(
    x, ((0, 0), (1, 2), (0, 3), (1, 0)), constant_values=2
  ),
  'interior padding': lambda x: lax.pad(
    x, 2.0, ((0, 0, 0), (1, -1, 2), (-2, 3, 1), (0, 1, 0))
  ),
  'repeat': lambda x: jnp.repeat(jnp.repeat(x, 2, 1), 2, 2),
  'tile': lambda x: jnp.tile(x, (1, 2, 1, 1)),
  'bilinear': lambda x: jax.image.resize(x, (2, 10, 9, 3), 'bilinear'),
  'nearest': lambda x: jax.image.resize(x, (2, 10, 12, 3), 'nearest'),
  'flip': lambda x: jnp.flip(x, (1, 2)),
}


@pytest.mark.parametrize('first', ['images', 'map'])
@pytest.mark.parametrize('name', SHAPES)
def test_shapes(name, first):
  """Shapes of images, and of a map that is channels-first in ONNX."""
  function, fixed = SHAPES[name], name in ('bilinear', 'nearest')
  kernel = KERNEL[..., :3]
  whole = function if first == 'images' else lambda x: function(conv(x, kernel))
  check(whole, batch_size=2 if fixed else None)


SUMS = {
  'sum': lambda x: x.sum(-1),
  'mean of positions': lambda x: x.mean((1, 2)),
  'mean of rows': lambda x: x.mean(1),
  'mean of an image': lambda x: x.mean((1, 2, 3)),
  'mean of the batch': lambda x: x - x.mean((0, 1, 2)),
  'mean of all': lambda x: x - x.mean(),
  'variance': lambda x: x.var((1, 2), keepdims=True) + x.std(-1, keepdims=True),
  'of no axis': lambda x: x.sum(()) + 1,
  'extremes': lambda x: (
    x.max(3) - x.min(3) + x.max((1, 2, 3), keepdims=True)[..., 0]
  ),
  'product': lambda x: x.prod(-1),
  'any and all': lambda x: (x > 0).any(-1) + 2 * (x > -1).all(-1),
  'count': lambda x: (x > 0).sum((1, 2)),
  'of a broadcast value': lambda x: (
    jnp.ones((x.shape[0], 2, 2)) * x[:, :1, :1, 0]
  ).sum((1, 2)),
  'argmax': lambda x: x.argmax(-1) + x.argmin(2).max(-1, keepdims=True),
  'argmax of bool': lambda x: (x > 0).argmax(2),
  'top_k': lambda x: lax.top_k(x, 2)[0] + lax.top_k(x, 2)[1],
  'top_k of an axis': lambda x: lax.top_k(x, 2, axis=1)[0],
  'cumsum': lambda x: jnp.cumsum(x, 1) + lax.cumsum(x, 2, reverse=True),
}


@pytest.mark.parametrize('first', ['images', 'map'])
@pytest.mark.parametrize('name', SUMS)
def test_sums(name, first):
  function, kernel = SUMS[name], KERNEL[..., :3]
  check(function if first == 'images' else lambda x: function(conv(x, kernel)))


def attention(x):
  q = k = v = x.reshape(x.shape[0], -1, 3) @ MATRIX[:, :6]
  q, k, v = (y.reshape(y.shape[0], -1, 2, 3) for y in (q, 2 * k, v))
  return jax.nn.dot_product_attention(q, k, v)


def pool(x, op, initial, window=(1, 3, 2, 1), padding='SAME', **kwargs):
  return lax.reduce_window(
    x, initial, op, window, (1, 2, 1, 1), padding, **kwargs
  )


PRODUCTS = {
  'matrix': lambda x: x @ MATRIX,
  'matrix from the left': lambda x: jnp.einsum(
    'fc,nhwf->nchw', MATRIX.T[:3], x
  ),
  'gram': lambda x: jnp.einsum('nhwc,nhwd->ncd', x, x),
  'attention': attention,
  'convolution': conv,
  'strides and padding': lambda x: conv(
    x, strides=(2, 1), padding=((0, 2), (1, 1))
  ),
  'dilated': lambda x: conv(x, rhs_dilation=(2, 1)),
  'depthwise': lambda x: conv(x, DEPTHWISE, feature_group_count=3),
  'channels first': lambda x: lax.conv(
    x.transpose(0, 3, 1, 2), KERNEL.transpose(3, 2, 0, 1), (1, 2), 'SAME'
  ),
  'of one axis': lambda x: ALONG(x[:, 0]),
  'batch norm after it': lambda x: (conv(x) - KERNEL[0, 0, 0]) * 2 + conv(x),
  'maximum': lambda x: pool(x, lax.max, -np.inf),
  'sum': lambda x: pool(x, lax.add, 0.0),
  'average': lambda x: nnx.avg_pool(x, (3, 3), padding='SAME'),
}


@pytest.mark.parametrize('name', PRODUCTS)
def test_products(name):
  check(PRODUCTS[name], 1e-4 if name == 'gram' else 1e-5)


def test_calls():
  @jax.custom_vjp
  def doubled(x):
    return 2 * x

  doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

  def function(x):
    x = jax.jit(lambda x: x + 1)(jax.checkpoint(jnp.sin)(x))
    return lax.platform_dependent(
      doubled(x), cpu=lambda x: x, default=lambda x: x + 5 - 5
    )

  check(function)


def test_maps_stay_channels_first():
  def function(x):
    y = jax.nn.silu(conv(x, KERNEL[..., :3]) * CHANNELS - CHANNELS)
    weights = jax.nn.sigmoid(y.mean((1, 2), keepdims=True))
    mask = (y.mean(-1, keepdims=True) > 0).astype(jnp.float32)
    y = jnp.concatenate([y * weights, mask * y], -1)
    y = jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))[:, 1:, 1:]
    return conv(y, np.tile(KERNEL, (1, 1, 2, 1))).mean((1, 2))

  check(function)
  graph = onnx.shape_inference.infer_shapes(
    export_onnx(Network(function), SIZE, batch_size=1)
  ).graph
  sizes = {
    value.name: np.prod([d.dim_value for d in value.type.tensor_type.shape.dim])
    for value in graph.value_info
  }
  maps = [
    node
    for node in graph.node
    if node.op_type == 'Transpose'
    and sizes[node.output[0]] >= np.prod(SIZE) * 2
  ]
  assert len(maps) == 1  # the images; others have few values


REFUSED = {
  'sort': (lambda x: jnp.sort(x), 'the operation sort'),
  'scan': (
    lambda x: lax.scan(lambda c, _: (2 * c, None), x, length=3)[0],
    'the operation scan',
  ),
  'cond': (
    lambda x: lax.cond(x.mean() > 0, lambda: x, lambda: 2 * x),
    'the operation cond',
  ),
  'values as indices': (
    lambda x: jnp.take_along_axis(x, x.argmax(1, keepdims=True), 1),
    'indexing by values',
  ),
  'padding between images': (
    lambda x: lax.pad(x, 0.0, ((0, 0, 1), (0, 0, 0), (0, 0, 0), (0, 0, 0))),
    'padding by',
  ),
  'dilated pooling': (
    lambda x: pool(x, lax.max, -np.inf, window_dilation=(1, 2, 2, 1)),
    'pooling with window',
  ),
  'transposed convolution': (
    lambda x: conv(x, padding=((2, 2), (2, 2)), lhs_dilation=(2, 2)),
    'a transposed convolution',
  ),
  'rounding': (lambda x: lax.round(x), 'rounding away from zero'),
  'complex': (lambda x: jnp.fft.fft(x).real, 'complex64|the operation fft'),
  'part of the batch': (
    lambda x: x[1:],
    'depend on the number of images|batch',
  ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_written_is_named_with_its_place(name):
  function, message = REFUSED[name]
  with pytest.raises(ValueError, match='ONNX export cannot write') as caught:
    export(function)
  text = str(caught.value)
  place = r'onnx_ops_test.py:\d+; it supports'
  assert re.search(rf'({message}).* of .*{place}', text)
  if name == 'sort':
    line = function.__code__.co_firstlineno
    assert f'onnx_ops_test.py:{line};' in text


def test_a_network_that_asks_for_the_batch():
  def function(x):
    return x if x.shape[0] > 2 else 2 * x

  with pytest.raises(ValueError, match='export needs batch_size'):
    export(function)
  check(function, batch_size=3)


def test_images_of_other_channels():
  def function(x):
    return x.sum(-1)

  x = np.tile(images(), 2)[..., :5]
  (got,) = export(function, channels=5).run(None, {'images': x})
  np.testing.assert_allclose(got, x.sum(-1), rtol=1e-5, atol=1e-6)
