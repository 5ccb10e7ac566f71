"""Tests of folded convolutions against convolution and batch norm."""

import jax.numpy as jnp
import numpy as np
import pytest

from dynconv_jax.models.resnet import ResNet
from dynconv_jax.sparse.dense import convolve, run_dense
from dynconv_jax.sparse.fold import fold_conv, fold_network


def _input(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize('im2col', (False, True))
@pytest.mark.parametrize('family', ('basic', 'bottleneck'))
def test_folded_layers_are_convolution_and_norm(make_network, family, im2col):
  model = make_network(family, 'dynconv')
  block = model.blocks[2]
  assert block.strides == 2
  for conv, norm in (
    (block.conv1, block.bn1),
    (block.conv2, block.bn2),
    tuple(block.downsample),
    (model.conv1, model.bn1),
  ):
    x = _input(2, 7, 6, conv.kernel.shape[2])
    expected = norm(conv(x))
    folded = convolve(x, fold_conv(conv, norm, jnp.float32), im2col)
    np.testing.assert_allclose(folded, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('family', ('basic', 'bottleneck'))
def test_a_folded_network_is_the_dense_one(make_network, family):
  model = make_network(family, 'dense')
  assert isinstance(model, ResNet)
  network = fold_network(model)
  x = jnp.abs(_input(2, 9, 7, model.blocks[0].conv1.kernel.shape[2]))
  y = x
  for block, folded in zip(model.blocks, network.blocks, strict=True):
    shape = folded.output_shape(y.shape)
    x, y = block(x), run_dense(folded, y)
    assert y.shape[:3] == shape
  np.testing.assert_allclose(y, x, rtol=0, atol=1e-5 * float(jnp.max(x)))


def test_kernels_have_the_compute_dtype_and_biases_float32(make_network):
  model = make_network('bottleneck', 'dynconv', jnp.bfloat16)
  network = fold_network(model)
  for layer in (network.stem, network.blocks[0].first, network.blocks[2].third):
    assert layer.kernel.dtype == jnp.bfloat16
    assert layer.bias.dtype == jnp.float32
