"""Tests of the layers whose kernels are timed on a GPU."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from benchmarks.gpu_gluon import make_layer
from dynconv_jax import create_model


@pytest.mark.parametrize('stage,features', ((2, 256), (3, 512)))
@pytest.mark.parametrize('index,kernel_size', ((0, 1), (1, 3)))
def test_layers_are_those_of_resnet50(stage, features, index, kernel_size):
  model = nnx.eval_shape(
    lambda: create_model('resnet50', method='dynconv', rngs=nnx.Rngs(0))
  )
  block = model.stages[stage][1]
  expected = block.branch.convs[index]
  layer = make_layer(np.random.default_rng(0), features, kernel_size)
  names = {'name': expected.name, 'norm': expected.norm}
  assert dataclasses.replace(layer.conv, **names) == expected
  assert layer.kernel.shape == expected.kernel_shape
  assert layer.bias.shape == (features,)
