"""Tests of every backend against the block's own masked forward pass."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax.branch import Branch, Conv
from dynconv_jax.masks import execution_mask
from dynconv_jax.models.blocks import BasicBlock, Bottleneck, InvertedResidual
from dynconv_jax.models.gated import GatedBlock, Gating
from dynconv_jax.sparse.backend import get_backend
from dynconv_jax.sparse.backends import cpu
from dynconv_jax.sparse.backends.xla import run_chunks
from dynconv_jax.sparse.calibrate import clustered_masks
from dynconv_jax.sparse.fold import fold_block

FEATURES = 8
BATCH = 3


def resnet(kind, planes, strides=1, **kwargs):
  return functools.partial(kind, FEATURES, planes, strides, **kwargs)


def inverted(features, strides, **kwargs):
  kind = functools.partial(InvertedResidual, FEATURES, features, strides)
  return functools.partial(kind, **kwargs)


def chain(*convs, **kwargs):
  return functools.partial(GatedBlock, Branch(convs, **kwargs))


def depthwise(padding, strides=1):
  features = 5 if strides > 1 else FEATURES
  return chain(
    Conv('a', 'an', FEATURES, 24, activation='relu6'),
    Conv('b', 'bn', 24, 24, 5, strides, 24, 'relu6', padding),
    Conv('c', 'cn', 24, features),
    activation=None,
    shortcut='none' if strides > 1 else 'identity',
  )


BLOCKS = {
  'basic': resnet(BasicBlock, FEATURES, input_activated=True),
  'basic_strided': resnet(BasicBlock, 6, 2),
  'bottleneck': resnet(Bottleneck, FEATURES // 4, input_activated=True),
  'bottleneck_projected': resnet(Bottleneck, 3),
  'bottleneck_strided': resnet(Bottleneck, 3, 2),
  # The input may be negative: positions that are not executed change, too.
  'not_activated': resnet(BasicBlock, FEATURES),
  'depthwise': depthwise('symmetric'),
  'depthwise_strided': depthwise('symmetric', 2),
  'depthwise_same': depthwise('same', 2),
  'inverted': inverted(FEATURES, 1),
  'inverted_strided': inverted(5, 2),
  'inverted_same': inverted(5, 2, padding='same', kernel_size=5),
  'inverted_unexpanded': inverted(FEATURES, 1, expand_ratio=1),
  'expanded_by_1': chain(
    Conv('b', 'bn', FEATURES, FEATURES, 3, 1, FEATURES, 'relu6'),
    Conv('c', 'cn', FEATURES, FEATURES),
    activation=None,
  ),
  'projected_relu6': chain(
    Conv('a', 'an', FEATURES, 17, activation='relu6'),
    Conv('b', 'bn', 17, 17, 3, 2, 17),
    Conv('c', 'cn', 17, 12),
    activation='relu6',
    shortcut='projection',
  ),
  # Kernels of one tap, which scale each channel.
  'scaled': chain(
    Conv('a', 'an', FEATURES, 17, 3, activation='relu'),
    Conv('b', 'bn', 17, 17, 1, 1, 17),
    shortcut='projection',
  ),
  'scaled_twice': chain(
    Conv('a', 'an', FEATURES, FEATURES, 1, 1, FEATURES, 'relu'),
    Conv('b', 'bn', FEATURES, FEATURES, 3, 1, FEATURES, 'relu'),
    Conv('c', 'cn', FEATURES, FEATURES, 1, 1, FEATURES),
    activation=None,
  ),
  'silu': chain(
    Conv('a', 'an', FEATURES, 6, 3, activation='silu'),
    Conv('b', 'bn', 6, FEATURES, 3),
    activation='silu',
  ),
  'grouped': chain(
    Conv('a', 'an', FEATURES, 12, groups=4, activation='gelu'),
    Conv('b', 'bn', 12, FEATURES, 3, groups=2),
  ),
  'three_levels': chain(
    Conv('a', 'an', FEATURES, 6, 3, activation='relu'),
    Conv('b', 'bn', 6, 5, 3, activation='relu'),
    Conv('c', 'cn', 5, 7, 1, activation='relu'),
    Conv('d', 'dn', 7, FEATURES, 3),
    input_activated=True,
  ),
  'one_convolution': chain(
    Conv('a', 'an', FEATURES, FEATURES, 3), input_activated=True
  ),
}
# Not supported by the CPU kernels: group sums, other activations, and writing
# an output over an input that is still read.
UNSUPPORTED_BY_CPU = ('not_activated', 'silu', 'grouped', 'one_convolution')


@functools.cache
def make_block(kind):
  """Returns a block in evaluation with random parameters and statistics."""
  block = BLOCKS[kind](name='layer1.0', rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  nnx.update(
    block,
    jax.tree.map(
      lambda a: jnp.asarray(
        # Positive, so that they also serve as variances; kernels get signs.
        rng.uniform(0.5, 1.5, a.shape) * rng.choice((-1, 1), a.shape) / 4
        if a.ndim == 4
        else rng.uniform(0.5, 1.5, a.shape),
        jnp.float32,
      ),
      nnx.state(block),
    ),
  )
  return nnx.view(block, use_running_average=True)


@functools.cache
def masked_dense(kind):
  """Jits the block's own forward pass: (x, hard) to (output, mask)."""
  block = make_block(kind)

  @jax.jit
  def run(x, hard):
    gating = Gating(masks=[hard])
    return block(x, gating), gating.finish()[0]

  return run


@pytest.fixture(params=('dense', 'xla', 'cpu'))
def backend(request):
  backend = get_backend(request.param)
  platform = jax.default_backend()
  if not backend.supports_platform(jnp.dtype(jnp.float32), platform):
    pytest.skip('the kernels need a CPU and a C++ compiler')
  return backend


def make_input(kind, size=(7, 9)):
  x = np.random.default_rng(1).normal(size=(BATCH, *size, FEATURES))
  if make_block(kind).branch.input_activated:
    x = np.maximum(x, 0)
  return jnp.asarray(x, jnp.float32)


def make_masks(shape):
  """Returns masks of every kind, by name."""
  rng = np.random.default_rng(2)
  size = np.prod(shape)
  one, corner, odd = (np.zeros(size, np.float32) for _ in range(3))
  one[size // 2 + 1] = 1
  corner[-1] = 1
  odd[rng.choice(size, size // 3 | 1, replace=False)] = 1
  flat = {'one': one, 'corner': corner, 'odd': odd}
  return {
    'none': np.zeros(shape, np.float32),
    'all': np.ones(shape, np.float32),
    'clustered': clustered_masks(rng, shape, 0.4),
    'images': clustered_masks(rng, shape, 0.4, per_image=True),
    **{name: mask.reshape(shape) for name, mask in flat.items()},
  }


def compare(kind, backend, masks, x, run=None):
  packed = backend.pack(fold_block(make_block(kind)))
  run = jax.jit(run or backend.run)
  for name, hard in masks.items():
    expected, mask = masked_dense(kind)(x, jnp.asarray(hard))
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(
      run(packed, x, mask), expected, rtol=0, atol=2e-6 * scale, err_msg=name
    )


@pytest.mark.parametrize('kind', BLOCKS)
def test_a_backend_equals_the_masked_dense_block(backend, kind):
  block, x = make_block(kind), make_input(kind)
  supported = backend.supports(block.branch, block.dtype, jax.default_backend())
  refused = backend.name == 'cpu' and kind in UNSUPPORTED_BY_CPU
  assert supported == (not refused)
  if not supported:
    return
  shape = (BATCH, *block.branch.sizes(x.shape[1:3])[-1])
  compare(kind, backend, make_masks(shape), x)
  everywhere = jax.jit(backend.run)(backend.pack(fold_block(block)), x, None)
  expected = jax.jit(block)(x)
  scale = float(jnp.max(jnp.abs(expected)))
  np.testing.assert_allclose(everywhere, expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize('sizes', [(32, 8), (16,), (7, 3)])
@pytest.mark.parametrize('kind', ['basic', 'bottleneck_strided', 'depthwise'])
def test_chunks_of_any_size(kind, sizes):
  x = make_input(kind)
  shape = (BATCH, *make_block(kind).branch.sizes(x.shape[1:3])[-1])
  run = functools.partial(run_chunks, sizes=sizes)
  compare(kind, get_backend('xla'), make_masks(shape), x, run)


def test_maps_of_one_position(backend):
  masks = {
    'some': np.array([1, 0, 1], np.float32).reshape(3, 1, 1),
    'none': np.zeros((3, 1, 1), np.float32),
  }
  compare('bottleneck', backend, masks, make_input('bottleneck', (1, 1)))


@pytest.mark.parametrize('kind', ['bottleneck', 'three_levels'])
def test_nothing_is_read_that_was_not_computed(backend, kind):
  """NaNs at inactive positions stay there."""
  if backend.name == 'dense':
    pytest.skip('reads everything')
  block, x = make_block(kind), make_input(kind, (13, 15))
  hard = np.zeros(x.shape[:3], np.float32)
  hard[0, 5:7, 6:9] = 1
  expected, mask = masked_dense(kind)(x, jnp.asarray(hard))
  read = execution_mask(  # the positions that the first convolution reads
    Branch((*block.branch.convs,), shortcut='none'),
    jnp.asarray(hard),
    x.shape[1:3],
    name='b',
  ).dilated
  if block.branch.convs[0].kernel_size == 3:
    read = jax.lax.reduce_window(
      read, 0.0, jax.lax.max, (1, 3, 3), (1, 1, 1), 'SAME'
    )
  spoilt = jnp.where(read[..., None] != 0, x, jnp.nan)
  out = backend.run(backend.pack(fold_block(block)), spoilt, mask)
  active = hard != 0
  scale = float(jnp.max(jnp.abs(expected)))
  np.testing.assert_allclose(
    out[active], expected[active], rtol=0, atol=2e-6 * scale
  )
  assert np.isnan(np.asarray(out)[np.asarray(read) == 0]).all()


@pytest.mark.parametrize('size', [(7, 9), (23, 20)])
@pytest.mark.parametrize(
  'kind',
  ['depthwise', 'depthwise_strided', 'depthwise_same', 'expanded_by_1'],
)
def test_bands_of_lines_equal_the_masked_dense_block(kind, size):
  """As on maps that do not fit into a cache."""
  backend = get_backend('cpu')
  if not backend.supports_platform(jnp.float32, jax.default_backend()):
    pytest.skip('the kernels need a CPU and a C++ compiler')
  branch, x = make_block(kind).branch, make_input(kind, size)
  shape = (BATCH, *branch.sizes(size)[-1])
  assert not cpu.runs_in_bands(branch, size)
  with mock.patch.object(cpu, '_LARGE_MAP', 0):
    assert cpu.runs_in_bands(branch, size)
    # A new function, so that no trace for small maps is reused.
    compare(kind, backend, make_masks(shape), x, lambda *a: backend.run(*a))


def test_bands_need_full_products():
  with mock.patch.object(cpu, '_LARGE_MAP', 0):
    assert not cpu.runs_in_bands(make_block('scaled_twice').branch, (7, 9))
