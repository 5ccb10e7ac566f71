"""Tests of dense layers as cuDNN reads them against the layers as they were."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynconv_jax.sparse import cudnn
from dynconv_jax.sparse.dense import convolve, run_dense
from dynconv_jax.sparse.fold import fold_network


def make_inputs(shape):
  x = np.random.default_rng(0).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


def assert_near(got, expected):
  atol = 2e-6 * float(jnp.abs(expected).max())
  np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize('size', ((32, 40), (33, 37), (7, 1)))
def test_the_stem_reads_squares(make_network, size):
  network = fold_network(make_network('bottleneck', 'dynconv'))
  stem = cudnn.lay_out(network).stem
  x = make_inputs((2, *size, 3))
  assert (stem.block, stem.strides, stem.shape[:3]) == (2, 1, (4, 4, 16))
  assert stem.output_shape(x.shape) == network.stem.output_shape(x.shape)
  assert_near(cudnn.convolve(x, stem), convolve(x, network.stem))


@pytest.mark.parametrize('family', ('basic', 'bottleneck'))
def test_blocks_are_laid_out_where_they_are_dense(
  monkeypatch, make_network, family
):
  network = fold_network(make_network(family, 'dynconv'))
  chosen = [True] * len(network.blocks)
  chosen[1] = False
  laid_out = cudnn.lay_out(network, chosen)
  x = make_inputs((2, 9, 7, network.blocks[0].first.shape[2]))
  for block, other, dense in zip(
    network.blocks, laid_out.blocks, chosen, strict=True
  ):
    assert other.first.features_first == dense
    assert other.first.shape == block.first.shape
    hard = jnp.ones(block.output_shape(x.shape)).at[0, 0].set(0)
    expected = run_dense(block, x, hard)
    with monkeypatch.context() as patch:
      patch.setattr(jax, 'default_backend', lambda: 'gpu')
      got = jax.jit(functools.partial(run_dense, hard=hard))(other, x)
    assert_near(got, expected)
    x = expected
