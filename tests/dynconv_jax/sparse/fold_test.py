"""Tests of folded convolutions against convolution and batch norm."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax.branch import Conv
from dynconv_jax.layers import BatchNorm, conv
from dynconv_jax.sparse.backends.dense import activate, convolve
from dynconv_jax.sparse.fold import describe_conv, fold_block, fold_conv


@pytest.mark.parametrize('family', ('basic', 'bottleneck'))
def test_folded_layers_are_convolution_and_norm(make_network, family):
  model = make_network(family, 'dynconv')
  block = model.blocks[2]
  assert block.strides == 2
  for layer, norm in (
    *(
      (getattr(block, c.name), getattr(block, c.norm))
      for c in block.branch.convs
    ),
    tuple(block.downsample),
    (model.conv1, model.bn1),
  ):
    x = np.random.default_rng(0).normal(size=(2, 7, 6, layer.in_features))
    x = jnp.asarray(x, jnp.float32)
    folded = fold_conv(layer, norm, describe_conv(layer, norm), jnp.float32)
    got = activate(convolve(x, folded), folded)
    np.testing.assert_allclose(got, norm(layer(x)), rtol=0, atol=1e-5)


def test_kernels_have_the_compute_dtype_and_biases_float32(make_network):
  block = fold_block(
    make_network('bottleneck', 'dynconv', jnp.bfloat16).blocks[2]
  )
  for layer in (*block.convs, block.projection):
    assert layer.kernel.dtype == jnp.bfloat16
    assert layer.bias.dtype == jnp.float32


def test_what_a_description_says_and_what_it_cannot():
  rngs = nnx.Rngs(0)
  for what in (
    Conv('conv', 'norm', 4, 6, 3, 2, 2, 'relu6'),
    Conv('conv', 'norm', 4, 6, 5, 2, padding='same'),
    Conv('conv', 'norm', 4, 6),
  ):
    layer = conv(
      what.in_features,
      what.features,
      what.kernel_size,
      strides=what.strides,
      groups=what.groups,
      padding=what.padding,
      rngs=rngs,
    )
    norm = BatchNorm(6, activation=what.activation, rngs=rngs)
    assert describe_conv(layer, norm) == what
  norm = BatchNorm(6, rngs=rngs)
  assert describe_conv(nnx.Linear(4, 6, rngs=rngs), norm) is None
  assert describe_conv(None, None) is None
  for kwargs in (
    {'use_bias': True},
    {'padding': 'VALID', 'use_bias': False},
    {'kernel_dilation': 2, 'use_bias': False},
    {'strides': (1, 2), 'use_bias': False},
    {'mask': jnp.zeros((3, 3, 4, 6)), 'use_bias': False},
    {'conv_general_dilated': lambda *_, **__: None, 'use_bias': False},
  ):
    kwargs = {'padding': ((1, 1), (1, 1))} | kwargs
    assert (
      describe_conv(nnx.Conv(4, 6, (3, 3), rngs=rngs, **kwargs), norm) is None
    )
