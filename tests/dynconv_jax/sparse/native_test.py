"""Tests of the kernels that are compiled on this machine."""

import concurrent.futures
import functools
import platform
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax import layers
from dynconv_jax.masks import dilate
from dynconv_jax.methods.dynconv import Squeeze
from dynconv_jax.sparse import SparseExecutor, native
from dynconv_jax.sparse.dense import convolve, run_dense
from dynconv_jax.sparse.fold import FoldedBlock, Layer


@pytest.fixture(autouse=True, scope='module')
def kernels():
  if not native.usable(jnp.dtype(jnp.float32)):
    pytest.skip('the kernels need a CPU and a C++ compiler')


def make_layer(rng, size, in_features, features, strides=1):
  kernel = rng.normal(size=(size, size, in_features, features))
  return Layer(
    jnp.asarray(kernel / np.sqrt(size**2 * in_features), jnp.float32),
    jnp.asarray(rng.normal(size=features), jnp.float32),
    strides,
  )


def make_basic_block(rng, features):
  layers = [make_layer(rng, 3, features, features) for _ in range(2)]
  return FoldedBlock(*layers, None, None)


def make_block(rng, in_features, planes, features, strides=1):
  projected = strides > 1 or features != in_features
  return FoldedBlock(
    make_layer(rng, 1, in_features, planes),
    make_layer(rng, 3, planes, planes, strides),
    make_layer(rng, 1, planes, features),
    make_layer(rng, 1, in_features, features, strides) if projected else None,
  )


def assert_near(got, expected):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * scale)


def compare(block, shape, rng, density=0.5):
  x = jnp.asarray(np.maximum(rng.normal(size=shape), 0), jnp.float32)
  hard = rng.random(block.output_shape(shape)) < density
  hard = jnp.asarray(hard, jnp.float32)
  strides = block.second.strides if block.third is not None else 1
  dilated = dilate(hard, strides)[:, : shape[1], : shape[2]]
  # A fresh function: the kernels of the moment, not those of a cached trace.
  run = jax.jit(lambda *args: native.run_native(*args))
  assert_near(
    run(native.pack(block), x, hard, dilated), run_dense(block, x, hard)
  )


# Every remainder of tiles and panels, narrow panels and full ones.
@pytest.mark.parametrize('features', (1, 7, 15, 16, 17, 31, 32, 33, 48, 65))
def test_any_number_of_channels(features):
  rng = np.random.default_rng(features)
  compare(
    make_block(rng, features, features + 2, features), (1, 5, 7, features), rng
  )


# More channels than a piece of weights has steps, in 1x1 and 3x3 convolutions,
# for one tile of rows and for several.
@pytest.mark.parametrize('channels', ((300, 7), (8, 300), (520, 260)))
@pytest.mark.parametrize('size', (3, 9))
def test_more_channels_than_a_piece(channels, size):
  rng = np.random.default_rng(size)
  features, planes = channels
  block = make_block(rng, features, planes, features)
  compare(block, (1, size, size, features), rng)


@pytest.mark.parametrize('count', range(1, 18))
def test_any_number_of_rows(count):
  """As many active positions as there are columns in a map of one row."""
  rng = np.random.default_rng(count)
  compare(make_block(rng, 8, 4, 8), (1, 1, count, 8), rng, density=1.1)


@pytest.mark.parametrize('strides', (1, 2))
def test_groups_of_images(strides):
  rng = np.random.default_rng(0)
  block = make_block(rng, 8, 4, 24, strides)
  area = np.prod(block.output_shape((5, 5, 7, 8))[1:])
  for images in (0, 1, 2):  # The last group of 2 has one image.
    with mock.patch.object(native, '_GROUP_POSITIONS', images * area):
      compare(block, (5, 5, 7, 8), rng)


def test_many_rows_are_shared_among_threads():
  rng = np.random.default_rng(0)
  compare(make_block(rng, 64, 96, 64), (2, 61, 67, 64), rng, density=0.7)


# Odd sizes and even ones, every remainder of tiles and panels.
@pytest.mark.parametrize('features', (1, 7, 16, 17, 31, 33, 48, 65))
@pytest.mark.parametrize('size', ((13, 17), (14, 22)))
def test_squares_of_outputs(features, size):
  rng = np.random.default_rng(features)
  for density in (0.9, 1.1):
    shape = (2, *size, features)
    compare(
      make_block(rng, features, features + 2, features), shape, rng, density
    )
    compare(make_basic_block(rng, features), shape, rng, density)


def test_squares_of_outputs_by_many_tasks():
  """Blocks of squares, groups of panels, groups of images."""
  rng = np.random.default_rng(0)
  block = make_block(rng, 16, 144, 16)
  compare(block, (5, 37, 41, 16), rng, density=0.95)
  compare(block, (3, 11, 23, 16), rng, density=1.1)


def test_squares_serve_where_positions_are_neighbours():
  """By squares the same sums are formed in another order."""
  rng = np.random.default_rng(0)
  block = native.pack(make_block(rng, 8, 4, 8))
  by_rows = block.replace(second=block.second.replace(squares=None))
  x = jnp.asarray(np.maximum(rng.normal(size=(1, 30, 30, 8)), 0), jnp.float32)
  row, column = np.indices((1, 30, 30))[1:]

  def differ(hard):
    hard = jnp.asarray(hard, jnp.float32)
    out, other = (
      native.run_native(b, x, hard, dilate(hard, 1)) for b in (block, by_rows)
    )
    return bool((out != other).any())

  assert differ(row >= 0)
  assert differ(row < 15)
  assert not differ((row + column) % 3 == 0)  # At most two of a square.
  assert not differ(row + column < 3)  # More weights would be fetched.


@pytest.mark.parametrize('family', ('basic', 'bottleneck'))
def test_squares_in_a_network(make_network, family):
  model = make_network(family, 'dynconv')
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(2, 97, 122, 3)), jnp.float32)
  executor = SparseExecutor(model, images.shape, mode='sparse', native=True)
  logits, stats = executor(images)
  expected, masks = model(images)
  np.testing.assert_array_equal(
    stats.positions, [mask.hard.sum() for mask in masks]
  )
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * scale)


def test_by_squares_a_value_reaches_its_window_only():
  """What is no number shows where it went."""
  rng = np.random.default_rng(0)
  block = native.pack(make_block(rng, 8, 4, 8))
  for y, x in ((14, 14), (14, 15), (15, 14), (15, 15)):
    images = rng.normal(size=(1, 30, 30, 8)).astype(np.float32)
    images[0, y, x] = np.nan
    reached = np.isnan(native.run_native(block, jnp.asarray(images))).all(-1)
    expected = np.zeros((30, 30), bool)
    expected[y - 1 : y + 2, x - 1 : x + 2] = True
    np.testing.assert_array_equal(reached[0], expected)


def test_without_masks_a_block_is_computed_everywhere():
  rng = np.random.default_rng(0)
  block = make_block(rng, 8, 4, 8)
  x = jnp.asarray(np.maximum(rng.normal(size=(2, 5, 7, 8)), 0), jnp.float32)
  out = native.run_native(native.pack(block), x)
  assert_near(out, run_dense(block, x))


def test_the_input_is_kept():
  """Without a projection the output is written where the input was."""
  rng = np.random.default_rng(0)
  block = native.pack(make_block(rng, 8, 4, 8))
  x = jnp.asarray(np.maximum(rng.normal(size=(2, 5, 7, 8)), 0), jnp.float32)
  before = np.array(x)
  both = jax.jit(lambda b, x: (native.run_native(b, x), x + 1))(block, x)
  np.testing.assert_array_equal(x, before)
  np.testing.assert_array_equal(both[1], before + 1)
  assert (np.asarray(both[0]) != before).any()


@pytest.mark.parametrize('size,strides', ((3, 1), (7, 2)))
def test_a_convolution_and_a_relu(size, strides):
  rng = np.random.default_rng(0)
  layer = make_layer(rng, size, 3, 20, strides)
  x = jnp.asarray(rng.normal(size=(2, 13, 18, 3)), jnp.float32)
  packed = native.pack((layer,))[0]
  expected = jax.nn.relu(convolve(x, layer))
  assert_near(native.convolve(x, packed, relu=True), expected)


@pytest.mark.parametrize('size', ((1, 1), (6, 9), (7, 4)))
def test_max_pool(size):
  x = np.random.default_rng(0).normal(size=(2, *size, 20)).astype(np.float32)
  x[0, 0, 0, 3] = np.nan
  x[1, -1, -1] = -np.inf
  np.testing.assert_array_equal(native.max_pool(x), layers.max_pool(x))


def test_what_is_no_number_stays_so():
  rng = np.random.default_rng(0)
  layer = make_layer(rng, 1, 4, 33)
  x = jnp.asarray(rng.normal(size=(1, 1, 3, 4)), jnp.float32)
  x = x.at[0, 0, 1, 2].set(jnp.nan)
  out = native.convolve(x, native.pack((layer,))[0], relu=True)
  is_nan = np.isnan(np.asarray(out)).all(-1)
  assert is_nan.tolist() == [[[False, True, False]]]


@pytest.mark.parametrize('kernel_size', (1, 3))
@pytest.mark.parametrize('strides', (1, 2))
@pytest.mark.parametrize('size', ((1, 1), (5, 8)))
def test_mask_logits(kernel_size, strides, size):
  squeeze = Squeeze(
    20,
    strides=strides,
    kernel_size=kernel_size,
    conv_general_dilated=jax.lax.conv_general_dilated,
    rngs=nnx.Rngs(1),
  )
  x = np.random.default_rng(0).normal(size=(3, *size, 20))
  x = jnp.asarray(x, jnp.float32)
  assert_near(native.NativeSqueeze(squeeze)(x), squeeze(x))


@pytest.mark.skipif(
  platform.machine() != 'x86_64', reason='flags of x86-64 compilers'
)
@pytest.mark.parametrize('machine', ('x86-64', 'x86-64-v3'))
def test_machines_with_fewer_instructions(machine):
  """As far as this machine runs what is compiled for them."""
  register = functools.partial(native._register, (f'-march={machine}',))
  assert register() != native._register()
  with mock.patch.object(native, '_register', register):
    rng = np.random.default_rng(0)
    for features in (16, 20, 48):
      block = make_block(rng, features, features - 3, features)
      compare(block, (2, 5, 7, features), rng)


def test_calls_from_several_threads(make_network):
  """Callers that wait for each other's threads would never return."""
  model = make_network('bottleneck', 'dynconv')
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(3, 21, 27, 3)), jnp.float32)
  executor = SparseExecutor(model, images.shape, mode='sparse', native=True)
  expected = np.asarray(executor(images)[0])
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for logits in pool.map(lambda _: executor(images)[0], range(100)):
      np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize('compiler', ('no-such-compiler', 'false'))
def test_without_a_compiler_xla_serves(make_network, monkeypatch, compiler):
  monkeypatch.setenv('CXX', compiler)
  register = functools.cache(native._register.__wrapped__)
  model = make_network('bottleneck', 'dynconv')
  with (
    mock.patch.object(native, '_register', register),
    mock.patch.object(native.logging, 'warning') as warning,
  ):
    executor = SparseExecutor(model, (1, 9, 9, 3), mode='sparse')
    assert not executor.native
    assert {plan.form for plan in executor.plans} == {'chunks'}
    with pytest.raises(ValueError, match='native needs a CPU, a C'):
      SparseExecutor(model, (1, 9, 9, 3), native=True)
  warning.assert_called_once()
  assert compiler in warning.call_args.args[0] % warning.call_args.args[1:]


def test_the_compilers_error_is_told(monkeypatch):
  register = functools.cache(native._register.__wrapped__)
  with mock.patch.object(native.logging, 'warning') as warning:
    assert register(('-include', 'no_such_header.h')) is None
  text = warning.call_args.args[0] % warning.call_args.args[1:]
  assert 'no_such_header.h' in text


def test_a_library_is_compiled_once():
  path = native.build()
  before = path.stat().st_mtime_ns
  assert native.build() == path
  assert path.stat().st_mtime_ns == before
