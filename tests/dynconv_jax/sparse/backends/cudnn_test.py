"""Tests of dense layers as cuDNN reads them against the layers as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynconv_jax.branch import Conv
from dynconv_jax.sparse.backends import cudnn
from dynconv_jax.sparse.backends.dense import convolve, run_dense
from dynconv_jax.sparse.fold import FoldedConv, fold_block


def make_inputs(shape):
  x = np.random.default_rng(0).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


def fill(conv):
  kernel, bias = make_inputs(conv.kernel_shape), make_inputs((conv.features,))
  return FoldedConv(kernel, bias, conv)


def assert_near(got, expected):
  atol = 2e-6 * float(jnp.abs(expected).max())
  np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize('size', ((32, 40), (33, 37), (7, 1)))
def test_the_stem_reads_squares(size):
  stem = fill(Conv('c', 'n', 3, 8, 7, 2))
  laid_out = cudnn.lay_out_conv(stem)
  x = make_inputs((2, *size, 3))
  assert laid_out.block == 2
  assert laid_out.kernel.shape == (8, 4, 4, 16)
  assert_near(convolve(x, laid_out), convolve(x, stem))


@pytest.mark.parametrize(
  'conv',
  [
    Conv('c', 'n', 4, 6, 3, 2),
    Conv('c', 'n', 4, 4, 5, 2, 4, padding='same'),
    Conv('c', 'n', 3, 6, 7, 2, padding='same'),
    Conv('c', 'n', 4, 6),
  ],
)
def test_other_convolutions_have_their_features_first(conv):
  layer = fill(conv)
  laid_out = cudnn.lay_out_conv(layer)
  assert laid_out.block == 1
  assert laid_out.kernel.shape[0] == conv.features
  x = make_inputs((2, 13, 10, conv.in_features))
  assert_near(convolve(x, laid_out), convolve(x, layer))


@pytest.mark.parametrize('index', (0, 2))
@pytest.mark.parametrize('family', ('basic', 'bottleneck'))
def test_blocks_are_the_same_in_both_layouts(make_network, family, index):
  block = fold_block(make_network(family, 'dynconv').blocks[index])
  x = jax.nn.relu(make_inputs((2, 9, 7, block.branch.in_features)))
  size = block.branch.sizes((9, 7))[-1]
  hard = (np.random.default_rng(1).random((2, *size)) < 0.5).astype('f4')
  laid_out = cudnn.lay_out(block)
  assert all(isinstance(c, cudnn.CudnnConv) for c in laid_out.convs)
  assert_near(run_dense(laid_out, x, hard), run_dense(block, x, hard))
