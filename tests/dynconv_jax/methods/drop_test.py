"""Tests of the control: networks without some of their blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynconv_jax import create_model
from dynconv_jax.macs import count_macs
from dynconv_jax.sparse import SparseExecutor

_NAMES = ('layer1.1', 'layer3.1')


def _models():
  dense, dropped = (
    create_model('cifar_resnet14', num_classes=3, rngs=nnx.Rngs(0), **options)
    for options in (
      {'method': 'dense'},
      {'method': 'drop', 'dropped_blocks': _NAMES},
    )
  )
  view = dict(deterministic=True, use_running_average=True)
  return nnx.view(dense, **view), nnx.view(dropped, **view)


def test_is_the_network_without_the_blocks():
  dense, dropped = _models()
  images = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
  images = jnp.asarray(images, jnp.float32)
  logits, masks = dropped(images)
  assert [mask.name for mask in masks] == list(_NAMES)
  for stage in (dense.layer1, dense.layer3):
    # The output of a block whose branch is zero.
    stage[1].run_branch = lambda x: jnp.zeros_like(x)
  np.testing.assert_allclose(logits, dense(images)[0], rtol=1e-5, atol=1e-6)
  sparse, stats = SparseExecutor(dropped, images.shape, mode='sparse')(images)
  np.testing.assert_allclose(sparse, logits, rtol=1e-4, atol=1e-5)
  assert not stats.positions.any()


def test_macs_are_those_of_the_other_blocks():
  dense, dropped = _models()
  image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  whole, rest = (
    count_macs(m, image, convention='conv') for m in (dense, dropped)
  )
  masks = dropped(jnp.zeros((1, 16, 16, 3)))[1]
  # Two 3x3 convolutions each: 16 channels at 16x16, 64 at 4x4.
  saved = 2 * 9 * (16**2 * 16**2 + 64**2 * 4**2)
  assert whole.total - rest.executed(masks)[0] == saved


def test_dynconv_gates_the_other_blocks():
  options = {'method': 'dynconv', 'num_classes': 3, 'rngs': nnx.Rngs(0)}
  view = dict(deterministic=True, use_running_average=True)
  gated, rest = (
    nnx.view(
      create_model('cifar_resnet14', dropped_blocks=d, **options), **view
    )
    for d in ((), _NAMES)
  )
  images = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
  images = jnp.asarray(images, jnp.float32)
  logits, masks = rest(images)
  assert len(masks) == 6
  assert all(
    (mask.name in _NAMES) <= (float(mask.hard.sum()) == 0) for mask in masks
  )
  # The same as masks of zeros for these blocks.
  nnx.update(gated, nnx.state(rest))
  closed = {name: jnp.zeros((2, 1, 1)) for name in _NAMES}
  np.testing.assert_allclose(
    logits, gated(images, masks=closed)[0], rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize('name', ('layer1', 'layer2.0', 'fc'))
def test_only_blocks_that_keep_their_input_can_be_dropped(name):
  with pytest.raises(
    ValueError, match=rf'identity shortcut, layer1.0, .*; got {name}'
  ):
    create_model(
      'cifar_resnet14',
      method='drop',
      dropped_blocks=(name,),
      num_classes=3,
      rngs=nnx.Rngs(0),
    )
