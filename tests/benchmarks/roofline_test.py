"""Tests of the lower bound for GPU time, against the MAC counter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.roofline import Kernel, count_kernels
from dynconv_jax import create_model
from dynconv_jax.macs import count_macs
from dynconv_jax.masks import execution_mask
from dynconv_jax.sparse.calibrate import clustered_masks


def count(method, batch_size=2, name='resnet50'):
  model = nnx.eval_shape(
    lambda: create_model(name, method=method, rngs=nnx.Rngs(0))
  )
  model = nnx.view(model, deterministic=True, use_running_average=True)
  images = jax.ShapeDtypeStruct((batch_size, 96, 96, 3), jnp.float32)
  return model, count_macs(model, images, convention='conv')


@pytest.mark.parametrize('model', ('resnet50', 'resnet101'))
def test_dense_macs_are_those_of_the_counter(model):
  _, report = count('dense', name=model)
  kernels = count_kernels(2, 96, None, model=model)
  assert sum(kernel.macs for kernel in kernels) == report.total
  for kernel in kernels:
    if kernel.macs and kernel.name != 'stem':
      assert kernel.macs == report.by_layer[kernel.name].macs


@pytest.mark.parametrize('density', (0.3, 1.0))
def test_sparse_macs_are_those_of_the_counter(density):
  model, report = count('dynconv')
  rng, masks, side = np.random.default_rng(0), [], 24
  for block in model.blocks:
    size, side = (side, side), -(-side // block.strides)
    hard = jnp.asarray(clustered_masks(rng, (2, side, side), density))
    masks.append(execution_mask(block.branch, hard, size, name=block.name))
  units = sum(
    layer.macs for name, layer in report.by_layer.items() if 'masker' in name
  )
  kernels = count_kernels(2, 96, density)
  got = sum(k.macs for k in kernels if not k.name.endswith('.mask'))
  assert got == report.executed(masks).sum() - units


def test_a_kernel_is_bound_by_memory_or_by_arithmetic():
  assert Kernel('', macs=10, moved=300).seconds(100, 10) == 6
  assert Kernel('', macs=100, moved=300).seconds(100, 10) == 20


def test_less_is_moved_where_less_is_executed():
  moved = [
    sum(kernel.moved for kernel in count_kernels(2, 96, density))
    for density in (0.1, 0.5, 1.0)
  ]
  assert moved == sorted(moved)


def test_patches_are_dilated_less():
  def macs(part, sides):
    kernels = count_kernels(2, 96, 0.3, mask_granularity=sides)
    return sum(kernel.macs for kernel in kernels if part in kernel.name)

  positions, patches = (1,), (4, 4, 2, 1)
  assert macs('layer1.1.conv1', patches) < macs('layer1.1.conv1', positions)
  # Three units read them: this block's, the next one's, and the next stage's
  # first.
  for sides in (positions, patches):
    assert macs('layer1.1.mask', sides) == 2 * 24**2 * 2560 * 3


def test_units_of_one_map_multiply_what_was_changed():
  kernels = {k.name: k for k in count_kernels(2, 96, 0.3, model='resnet101')}
  active = round(0.3 * 36) * 2
  macs = [kernels[f'layer3.{i}.mask'].macs for i in range(1, 23)]
  macs.append(kernels['layer4.0.mask'].macs)
  columns = [10 * n for n in (6, 5, 4, 3, 2, 1) * 3 + (5, 4, 3, 2, 1)]
  rows = [72 if i % 6 == 0 else active for i in range(23)]
  assert macs == [r * 1024 * c for r, c in zip(rows, columns, strict=True)]


@pytest.mark.parametrize(
  'options, message',
  [
    ({'model': 'resnet18'}, "unknown model 'resnet18'.*allowed: resnet50, "),
    ({'mask_granularity': (2, 1)}, 'mask_granularity must be 1 or 4 integers'),
  ],
)
def test_other_networks_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    count_kernels(1, 96, 0.5, **options)
