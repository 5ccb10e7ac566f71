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

from dynconv_jax import layers, native
from dynconv_jax.branch import Branch, Conv
from dynconv_jax.masks import execution_mask
from dynconv_jax.methods.mask_unit import Squeeze
from dynconv_jax.sparse import SparseExecutor, sparsify
from dynconv_jax.sparse.backends import cpu
from dynconv_jax.sparse.backends.dense import activate, convolve, run_dense
from dynconv_jax.sparse.fold import FoldedBlock, FoldedConv

BACKEND = cpu.CpuBackend()


@pytest.fixture(autouse=True, scope='module')
def kernels():
  if not BACKEND.supports_platform(jnp.float32, jax.default_backend()):
    pytest.skip('the kernels need a CPU and a C++ compiler')


def fill(rng, conv):
  kernel = rng.normal(size=conv.kernel_shape)
  return FoldedConv(
    jnp.asarray(kernel / np.sqrt(np.prod(kernel.shape[:3])), jnp.float32),
    jnp.asarray(rng.normal(size=conv.features), jnp.float32),
    conv,
  )


def fold(rng, *convs):
  same = convs[0].in_features == convs[-1].features
  same &= all(conv.strides == 1 for conv in convs)
  shortcut = 'identity' if same else 'projection'
  branch = Branch(convs, shortcut=shortcut, input_activated=True)
  projection = branch.projection and fill(rng, branch.projection)
  return FoldedBlock(tuple(fill(rng, c) for c in convs), projection, branch)


def make_basic_block(rng, features):
  return fold(
    rng,
    Conv('a', 'an', features, features, 3, activation='relu'),
    Conv('b', 'bn', features, features, 3),
  )


def make_block(rng, in_features, planes, features, strides=1):
  return fold(
    rng,
    Conv('a', 'an', in_features, planes, activation='relu'),
    Conv('b', 'bn', planes, planes, 3, strides, activation='relu'),
    Conv('c', 'cn', planes, features),
  )


def masked(block, x, hard):
  hard = jnp.asarray(hard, jnp.float32)
  return execution_mask(block.branch, hard, x.shape[1:3], name='b')


def run(block, x, hard=None):
  # A new function uses the current kernels, not those of a cached trace.
  mask = None if hard is None else masked(block, x, hard)
  return jax.jit(lambda *args: BACKEND.run(*args))(BACKEND.pack(block), x, mask)


def assert_near(got, expected):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * scale)


def compare(block, shape, rng, density=0.5):
  x = jnp.asarray(np.maximum(rng.normal(size=shape), 0), jnp.float32)
  output = (shape[0], *block.branch.sizes(shape[1:3])[-1])
  hard = (rng.random(output) < density).astype(np.float32)
  assert_near(run(block, x, hard), run_dense(block, x, hard))


# Every remainder of tiles and panels, narrow panels and full ones.
@pytest.mark.parametrize('features', (1, 7, 15, 16, 17, 31, 32, 33, 48, 65))
def test_any_number_of_channels(features):
  rng = np.random.default_rng(features)
  compare(
    make_block(rng, features, features + 2, features), (1, 5, 7, features), rng
  )


# More channels than one piece of the weights has steps, in 1x1 and 3x3
# convolutions, for one tile of rows and for several.
@pytest.mark.parametrize('channels', ((300, 7), (8, 300), (520, 260)))
@pytest.mark.parametrize('size', (3, 9))
def test_more_channels_than_a_piece(channels, size):
  rng = np.random.default_rng(size)
  features, planes = channels
  block = make_block(rng, features, planes, features)
  compare(block, (1, size, size, features), rng)


@pytest.mark.parametrize('count', range(1, 18))
def test_any_number_of_rows(count):
  """As many active positions as there are columns in a one-row map."""
  rng = np.random.default_rng(count)
  compare(make_block(rng, 8, 4, 8), (1, 1, count, 8), rng, density=1.1)


@pytest.mark.parametrize('strides', (1, 2))
def test_groups_of_images(strides):
  rng = np.random.default_rng(0)
  block = make_block(rng, 8, 4, 24, strides)
  area = np.prod(block.branch.sizes((5, 7))[-1])
  for images in (0, 1, 2):  # the last group of 2 has one image
    with mock.patch.object(cpu, '_GROUP_POSITIONS', images * area):
      compare(block, (5, 5, 7, 8), rng)


def test_many_rows_are_shared_among_threads():
  rng = np.random.default_rng(0)
  compare(make_block(rng, 64, 96, 64), (2, 61, 67, 64), rng, density=0.7)


# Odd and even sizes, every remainder of tiles and panels.
@pytest.mark.parametrize('features', (1, 7, 16, 17, 31, 33, 48, 65))
@pytest.mark.parametrize('size', ((13, 17), (14, 22)))
def test_winograd_tiles(features, size):
  rng = np.random.default_rng(features)
  for density in (0.9, 1.1):
    shape = (2, *size, features)
    compare(
      make_block(rng, features, features + 2, features), shape, rng, density
    )
    compare(make_basic_block(rng, features), shape, rng, density)


def test_winograd_tiles_by_many_tasks():
  """Winograd tiles in several tasks: groups of panels, groups of images."""
  rng = np.random.default_rng(0)
  block = make_block(rng, 16, 144, 16)
  compare(block, (5, 37, 41, 16), rng, density=0.95)
  compare(block, (3, 11, 23, 16), rng, density=1.1)


def test_winograd_tiles_are_used_where_positions_are_neighbors():
  """With tiles, the same sums are computed in a different order."""
  rng = np.random.default_rng(0)
  block = make_block(rng, 8, 4, 8)
  packed = BACKEND.pack(block)
  none = packed.winograd[0]
  by_rows = packed.replace(winograd=(none,) * 3)
  x = jnp.asarray(np.maximum(rng.normal(size=(1, 30, 30, 8)), 0), jnp.float32)
  row, column = np.indices((1, 30, 30))[1:]

  def differ(hard):
    mask = masked(block, x, hard)
    out, other = (BACKEND.run(b, x, mask) for b in (packed, by_rows))
    return bool((out != other).any())

  assert differ(row >= 0)
  assert differ(row < 15)
  assert not differ((row + column) % 3 == 0)  # at most two in a tile
  assert not differ(row + column < 3)  # more weights would be fetched


@pytest.mark.parametrize('family', ('basic', 'bottleneck'))
def test_winograd_tiles_in_a_network(make_network, family):
  model = make_network(family, 'dynconv')
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(2, 97, 122, 3)), jnp.float32)
  executor = SparseExecutor(model, images.shape, backend='cpu')
  logits, stats = executor(images)
  expected, masks = model(images)
  np.testing.assert_array_equal(
    stats.positions, [mask.hard.sum() for mask in masks]
  )
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * scale)


def test_with_winograd_tiles_a_value_reaches_its_window_only():
  """NaNs show where a value was used."""
  rng = np.random.default_rng(0)
  block = make_block(rng, 8, 4, 8)
  for y, x in ((14, 14), (14, 15), (15, 14), (15, 15)):
    images = rng.normal(size=(1, 30, 30, 8)).astype(np.float32)
    images[0, y, x] = np.nan
    reached = np.isnan(run(block, jnp.asarray(images))).all(-1)
    expected = np.zeros((30, 30), bool)
    expected[y - 1 : y + 2, x - 1 : x + 2] = True
    np.testing.assert_array_equal(reached[0], expected)


def test_the_input_is_kept():
  """Without a projection, the output is written over the input."""
  rng = np.random.default_rng(0)
  block = BACKEND.pack(make_block(rng, 8, 4, 8))
  x = jnp.asarray(np.maximum(rng.normal(size=(2, 5, 7, 8)), 0), jnp.float32)
  before = np.array(x)
  both = jax.jit(lambda b, x: (BACKEND.run(b, x, None), x + 1))(block, x)
  np.testing.assert_array_equal(x, before)
  np.testing.assert_array_equal(both[1], before + 1)
  assert (np.asarray(both[0]) != before).any()


@pytest.mark.parametrize('activation', (None, 'relu', 'relu6'))
@pytest.mark.parametrize('padding', ('symmetric', 'same'))
@pytest.mark.parametrize('size,strides', ((3, 1), (3, 2), (7, 2)))
def test_a_convolution_outside_of_blocks(size, strides, padding, activation):
  rng = np.random.default_rng(0)
  conv = Conv('c', 'n', 3, 20, size, strides, 1, activation, padding)
  conv = fill(rng, conv)
  x = jnp.asarray(rng.normal(size=(2, 13, 18, 3)), jnp.float32)
  assert_near(BACKEND.convolution(conv)(x), activate(convolve(x, conv), conv))


def test_convolutions_that_the_kernels_leave_to_xla():
  rng = np.random.default_rng(0)
  for conv in (
    Conv('c', 'n', 4, 4, 3, groups=2),
    Conv('c', 'n', 4, 4, 3, activation='silu'),
    Conv('c', 'n', 4, 4, 3, groups=4),
  ):
    assert BACKEND.convolution(fill(rng, conv)) is None


@pytest.mark.parametrize('use_bias', (True, False))
def test_a_linear_layer(use_bias):
  linear = nnx.Linear(700, 100, use_bias=use_bias, rngs=nnx.Rngs(0))
  x = np.random.default_rng(0).normal(size=(2, 3, 700)).astype(np.float32)
  kernels = BACKEND.replacement(linear)
  assert isinstance(kernels, cpu.CpuLinear)
  assert_near(kernels(jnp.asarray(x)), linear(jnp.asarray(x)))
  assert BACKEND.replacement(nnx.Linear(7, 10, rngs=nnx.Rngs(0))) is None
  # Of another dtype, or with a product of its own.
  for kwargs in ({'dtype': jnp.bfloat16}, {'dot_general': lambda *_, **__: 0}):
    other = nnx.Linear(700, 100, rngs=nnx.Rngs(0), **kwargs)
    assert BACKEND.replacement(other) is None


@pytest.mark.parametrize('size', ((1, 1), (6, 9), (7, 4)))
@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16))
def test_max_pool(size, dtype):
  x = np.random.default_rng(0).normal(size=(2, *size, 20))
  x[0, 0, 0, 3] = np.nan
  x[1, -1, -1] = -np.inf
  x = jnp.asarray(x, dtype)
  got = BACKEND.replacement(layers.MaxPool())(x)
  assert got.dtype == dtype
  # NumPy compares no bfloat16 that is no number.
  got, expected = (np.float32(y) for y in (got, layers.max_pool(x)))
  np.testing.assert_array_equal(got, expected)


def test_what_is_no_number_stays_so():
  conv = Conv('c', 'n', 4, 33, activation='relu')
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(1, 1, 3, 4)), jnp.float32)
  x = x.at[0, 0, 1, 2].set(jnp.nan)
  is_nan = np.isnan(BACKEND.convolution(fill(rng, conv))(x)).all(-1)
  assert is_nan.tolist() == [[[False, True, False]]]


@pytest.mark.parametrize('kernel_size', (1, 3))
@pytest.mark.parametrize('strides', (1, 2))
@pytest.mark.parametrize('size', ((1, 1), (5, 8)))
def test_mask_logits(kernel_size, strides, size):
  squeeze = Squeeze(
    20,
    strides=strides,
    kernel_size=kernel_size,
    rngs=nnx.Rngs(1),
  )
  x = np.random.default_rng(0).normal(size=(3, *size, 20))
  x = jnp.asarray(x, jnp.float32)
  assert_near(BACKEND.replacement(squeeze)(x), squeeze(x))


@pytest.mark.slow
@pytest.mark.skipif(
  platform.machine() != 'x86_64', reason='flags of x86-64 compilers'
)
@pytest.mark.parametrize('machine', ('x86-64', 'x86-64-v3'))
def test_machines_with_fewer_instructions(machine):
  """As far as this machine can run the compiled code."""
  register = functools.partial(cpu._register, (f'-march={machine}',))
  assert register() != cpu._register()
  with mock.patch.object(cpu, '_register', register):
    rng = np.random.default_rng(0)
    for features in (16, 20, 48):
      block = make_block(rng, features, features - 3, features)
      compare(block, (2, 5, 7, features), rng)


def test_calls_from_several_threads(make_network):
  """Callers that wait for each other's threads would never return."""
  model = make_network('bottleneck', 'dynconv')
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(3, 21, 27, 3)), jnp.float32)
  executor = SparseExecutor(model, images.shape, backend='cpu')
  expected = np.asarray(executor(images)[0])
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for logits in pool.map(lambda _: executor(images)[0], range(100)):
      np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize('compiler', ('no-such-compiler', 'false'))
def test_without_a_compiler_xla_serves(make_network, monkeypatch, compiler):
  monkeypatch.setenv('CXX', compiler)
  register = functools.cache(cpu._register.__wrapped__)
  model = make_network('bottleneck', 'dynconv')
  with (
    mock.patch.object(cpu, '_register', register),
    mock.patch.object(native.logging, 'warning') as warning,
  ):
    executor = SparseExecutor(model, (1, 9, 9, 3), mode='sparse')
    assert {plan.backend.name for plan in executor.plans.values()} == {'xla'}
    with pytest.raises(ValueError, match='backend cpu cannot execute'):
      sparsify(model, 'cpu')
  warning.assert_called_once()
  assert compiler in warning.call_args.args[0] % warning.call_args.args[1:]


def test_the_compilers_error_is_told(monkeypatch):
  register = functools.cache(cpu._register.__wrapped__)
  with mock.patch.object(native.logging, 'warning') as warning:
    assert register(('-include', 'no_such_header.h')) is None
  text = warning.call_args.args[0] % warning.call_args.args[1:]
  assert 'no_such_header.h' in text
