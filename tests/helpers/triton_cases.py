"""Blocks, masks and mask units shared by the tests of GPU kernels."""

from __future__ import annotations

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax.branch import Branch, Conv
from dynconv_jax.masks import ExecutionMask, execution_mask
from dynconv_jax.methods.mask_unit import MaskUnit
from dynconv_jax.sparse.backends import triton
from dynconv_jax.sparse.backends.dense import convolve, run_dense
from dynconv_jax.sparse.calibrate import clustered_masks
from dynconv_jax.sparse.fold import FoldedBlock, FoldedConv

BACKEND = triton.TritonBackend()
DTYPES = (jnp.float32, jnp.bfloat16)
# Kind, and channels of the input, inside and of the output.
BLOCKS = {
  'basic': ('basic', 20, 20, 20),
  'basic_projected': ('basic', 17, 33, 33),
  # More features than a kernel takes at a time.
  'bottleneck': ('bottleneck', 70, 9, 70),
  'bottleneck_projected': ('bottleneck', 17, 40, 70),
  # Too wide for one kernel after the first convolution.
  'bottleneck_wide': ('bottleneck', 70, 42, 70),
}
on_gpu = pytest.mark.skipif(
  jax.default_backend() != 'gpu', reason='needs a GPU'
)


def need(*packages):
  """Skips a test if a package is missing."""
  for package in packages:
    pytest.importorskip(
      package, reason=f'needs {package}', exc_type=ImportError
    )


def make_conv(rng, conv: Conv, dtype) -> FoldedConv:
  """Returns a folded convolution with random weights."""
  kernel = rng.normal(size=conv.kernel_shape)
  return FoldedConv(
    jnp.asarray(kernel / np.sqrt(np.prod(kernel.shape[:3])), dtype),
    jnp.asarray(rng.normal(size=conv.features), jnp.float32),
    conv,
  )


def fold(branch: Branch, dtype) -> FoldedBlock:
  """Returns a folded block with random weights."""
  rng = np.random.default_rng(branch.features)
  projection = branch.projection
  return FoldedBlock(
    tuple(make_conv(rng, conv, dtype) for conv in branch.convs),
    projection and make_conv(rng, projection, dtype),
    branch,
  )


def make_branch(kind, in_features, planes, features, strides) -> Branch:
  """Returns a branch whose shortcut is projected if the shape changes."""
  if kind == 'basic':
    convs = (
      Conv('a', 'an', in_features, features, 3, strides, 1, 'relu'),
      Conv('b', 'bn', features, features, 3),
    )
  else:
    convs = (
      Conv('a', 'an', in_features, planes, activation='relu'),
      Conv('b', 'bn', planes, planes, 3, strides, 1, 'relu'),
      Conv('c', 'cn', planes, features),
    )
  same = strides == 1 and in_features == features
  return Branch(
    convs,
    shortcut='identity' if same else 'projection',
    input_activated=True,
  )


def make_block(*sizes_and_strides, dtype) -> FoldedBlock:
  """Returns `make_branch` with random weights."""
  return fold(make_branch(*sizes_and_strides), dtype)


def make_input(shape, dtype) -> jax.Array:
  """Returns a map after a ReLU."""
  x = np.random.default_rng(1).normal(size=shape)
  return jnp.asarray(np.maximum(x, 0), dtype)


def make_masks(shape) -> dict[str, np.ndarray]:
  """Returns masks of every kind by name, float32[N, h, w]."""
  rng = np.random.default_rng(2)
  one, odd = np.zeros((2, np.prod(shape)), np.float32)
  one[-1] = 1
  odd[rng.choice(odd.size, odd.size // 3 | 1, replace=False)] = 1
  return {
    'none': np.zeros(shape, np.float32),
    'one': one.reshape(shape),
    'odd': odd.reshape(shape),
    'clustered': clustered_masks(rng, shape, 0.4),
    'all': np.ones(shape, np.float32),
  }


def mask_of(block: FoldedBlock, x, hard) -> ExecutionMask:
  """Returns the execution mask for hard decisions."""
  hard = jnp.asarray(hard, jnp.float32)
  return execution_mask(block.branch, hard, x.shape[1:3], name='block')


def make_mask_unit(in_features, kernel_size, strides, granularity, seed=1):
  """Returns DynConv's gate."""
  return MaskUnit(
    in_features,
    strides=strides,
    kernel_size=kernel_size,
    granularity=granularity,
    rngs=nnx.Rngs(seed),
  )


@jax.jit
def masked_dense(block, x, hard):
  """Sums in float32, even if cuDNN's form rounds the branch by itself."""
  with mock.patch.object(jax, 'default_backend', lambda: 'cpu'):
    return run_dense(block, x, hard)


def assert_near(got, expected, name='', rounded=0.0):
  """Compares up to the order of sums, and in bfloat16 up to extra roundings.

  Sums on both sides of a tie are rounded to neighbors, which are at most 2**-7
  apart. Values between the layers may also differ by that much, with a smaller
  effect on their sums.

  Args:
    got: the computed values.
    expected: the reference.
    name: name of the case.
    rounded: element-wise difference allowed for terms that both sides round.
  """
  assert got.dtype == expected.dtype
  rtol, tolerance = 0, 2e-6
  if got.dtype == jnp.bfloat16:
    rtol, tolerance = 2**-7, 2**-9
  got, expected = (np.asarray(v, np.float32) for v in (got, expected))
  allowed = tolerance * np.abs(expected).max() + rtol * np.abs(expected)
  off = np.abs(got - expected)
  assert (off <= allowed + rounded).all(), (name, (off - allowed).max())


def check_list(found, mask):
  """Checks that a list has each active position once, with correct indices."""
  expected, count = np.flatnonzero(mask), int(found.count[0])
  assert count == len(expected)
  listed = np.asarray(found.indices)[:count]
  np.testing.assert_array_equal(np.sort(listed), expected)
  rows = np.asarray(found.rows)
  np.testing.assert_array_equal(rows[listed], np.arange(count))
  assert (np.delete(rows, expected) == -1).all()


def compare(block: FoldedBlock, shape):
  """Compares a block with itself, dense and masked, on masks of every kind."""
  x = make_input(shape, block.convs[0].kernel.dtype)
  # A new function, so that no trace with other stand-ins is reused.
  run = jax.jit(lambda *args: BACKEND.run(*args))
  size = block.branch.sizes(shape[1:3])[-1]
  packed = triton.PackedBlock.pack(block)
  for name, hard in make_masks((shape[0], *size)).items():
    mask, rounded = mask_of(block, x, hard), 0.0
    if block.projection is not None and x.dtype == jnp.bfloat16:
      # Each rounding is off by at most half of 2**-7. The reference rounds the
      # projection. The backend does not if the last product adds it; otherwise
      # it rounds the products and the bias first.
      projected, bias = convolve(x, block.projection), block.projection.bias
      rounded = 2**-8 * jnp.where(
        mask.hard[..., None] != 0,
        jnp.abs(projected),
        jnp.abs(projected - bias) + jnp.abs(bias),
      )
    assert_near(
      run(packed, x, mask),
      masked_dense(block, x, mask.hard),
      name,
      np.asarray(rounded),
    )
