"""Tests of batches that are shared by devices; devices_test.py runs them.

They need a process that has two devices, which no other test is to share.
"""

from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynconv_jax.models.create import METHODS
from dynconv_jax.models.resnet import ResNet
from dynconv_jax.sparse import BlockPlan, SparseExecutor
from dynconv_jax.sparse.cost import clustered_masks

_SHAPE = (4, 21, 27, 3)


def test_there_are_two_devices():
  assert jax.local_device_count() == 2


def _images(shape=_SHAPE):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _executors(model, shape=_SHAPE, **kwargs):
  one = SparseExecutor(model, shape, devices=jax.devices()[:1], **kwargs)
  return one, SparseExecutor(model, shape, **kwargs)


def _masks(model, density=0.4):
  rng = np.random.default_rng(1)
  _, masks = jax.eval_shape(model, _images())
  return [clustered_masks(rng, mask.hard.shape, density) for mask in masks]


def _check_same(got, expected, tolerance=1e-6):
  (logits, stats), (expected, expected_stats) = jax.device_get((got, expected))
  scale = np.abs(expected).max()
  assert np.isfinite(scale) and scale > 0
  np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance * scale)
  for mask, expected in zip(stats.masks, expected_stats.masks, strict=True):
    np.testing.assert_array_equal(mask.hard, expected.hard)
    np.testing.assert_array_equal(mask.dilated, expected.dilated)
  chex.assert_trees_all_equal(
    stats.replace(masks=None), expected_stats.replace(masks=None)
  )
  assert stats.positions.shape == (len(stats.masks),)


@pytest.mark.parametrize('method', [m for m in METHODS if m != 'dense'])
def test_two_devices_give_what_one_gives(make_network, method):
  model, images = make_network('bottleneck', method), _images()
  one, two = _executors(model, mode='sparse')
  result = two(images)
  assert len(result[0].sharding.device_set) == 2
  _check_same(result, one(images))


def test_given_masks_and_nothing_is_traced_again(make_network):
  model, images = make_network('basic', 'dynconv'), _images()
  one, two = _executors(model, mode='sparse')
  cases = [_masks(model, density) for density in (0.05, 0.5, 1.0)]
  # Of the second device's share only.
  half = np.arange(4).reshape(-1, 1, 1) >= 2
  cases.append([np.where(half, mask, 0) for mask in cases[1]])
  expected = [one(images, masks) for masks in cases]
  chex.clear_trace_counter()
  once = chex.assert_max_traces(ResNet.head, n=1)
  with mock.patch.object(ResNet, 'head', once):
    for masks, result in zip(cases, expected, strict=True):
      # Wherever the batch lies.
      for device in jax.devices():
        given = jax.device_put((images, masks), device)
        _check_same(two(*given), result)


def test_one_overflow_is_counted_where_one_share_is_above(make_network):
  model, images = make_network('bottleneck', 'dynconv'), _images()
  one, two = _executors(model, mode='sparse', limit=0.7)
  masks = _masks(model, 0.05)
  # All positions of two images of four: half of the batch's, a share's all.
  for i in (1, 3):
    masks[i] = np.zeros_like(masks[i])
    masks[i][2:] = 1
  logits, stats = two(images, masks)
  expected, expected_stats = one(images, masks)
  assert stats.overflows.tolist() == [0, 1, 0, 1]
  assert expected_stats.overflows.tolist() == [0, 0, 0, 0]
  _check_same(
    (logits, stats.replace(overflows=expected_stats.overflows)),
    (expected, expected_stats),
  )


def test_plans_are_measured_for_a_share(make_network):
  model, images = make_network('basic', 'dynconv'), _images()
  shapes = []

  def measure(block, shape, dtype, *, mesh, **kwargs):
    shapes.append((shape, mesh.size))
    return BlockPlan('dense')

  with mock.patch('dynconv_jax.sparse.executor.calibrate', measure):
    SparseExecutor(model, _SHAPE)
  assert shapes[0] == ((2, 21, 27, 8), 2)
  two = SparseExecutor(model, _SHAPE, density=0.3)
  one = SparseExecutor(model, _SHAPE, mode='dense', devices=jax.devices()[:1])
  masks = _masks(model, 0.3)
  (logits, stats), expected = two(images, masks), one(images, masks)
  # Which shares are above a measured limit is not known here.
  stats = stats.replace(overflows=jnp.zeros_like(stats.overflows))
  _check_same((logits, stats), expected, 1e-5)


def test_whole_images_are_given_by_one_value_each(make_network):
  model, images = make_network('bottleneck', 'convnet_aig'), _images()
  one, two = _executors(model, mode='sparse')
  masks = [np.float32(a).reshape(4, 1, 1) for a in np.ndindex(2, 2, 2, 2)][
    1:16:4
  ]
  _check_same(two(images, masks), one(images, masks))


def test_masks_of_another_shape(make_network):
  executor = SparseExecutor(make_network('basic', 'dynconv'), (2, 9, 9, 3))
  with pytest.raises(
    ValueError, match=r'mask of layer1.0 must be \(2, 9, 9\); got \(1, 9, 9\)'
  ):
    executor(jnp.zeros((2, 9, 9, 3)), [jnp.zeros((1, 9, 9))] * 4)


def test_what_two_devices_do_not_divide_is_run_by_one(make_network):
  model, images = make_network('basic', 'dynconv'), _images((3, 9, 9, 3))
  logits, _ = SparseExecutor(model, images.shape, mode='sparse')(images)
  assert len(logits.sharding.device_set) == 1
  with pytest.raises(
    ValueError, match='divides a batch of 3 images; got 2 devices'
  ):
    SparseExecutor(model, images.shape, devices=jax.devices())
