"""Tests of masks from the true object positions."""

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import oracle
from dynconv_jax import create_model


@pytest.mark.parametrize('size', [(1, 1), (3, 4), (5, 7), (12, 14)])
def test_cells_that_touch_the_object(size):
  rng = np.random.default_rng(0)
  objects = rng.random((3, 12, 14)) < 0.02
  found = np.asarray(oracle.touched(objects, size))
  for n, i, j in np.ndindex(3, *size):
    # A pixel covers the square from its index to the next one.
    inside = [
      objects[n, y, x]
      for y in range(12)
      for x in range(14)
      if y < (i + 1) * 12 / size[0]
      and y + 1 > i * 12 / size[0]
      and x < (j + 1) * 14 / size[1]
      and x + 1 > j * 14 / size[1]
    ]
    assert found[n, i, j] == any(inside)


def test_chosen_blocks_obey_and_others_run_everywhere():
  model = create_model(
    'cifar_resnet14', method='dense', num_classes=3, rngs=nnx.Rngs(0)
  )
  model = nnx.view(model, deterministic=True, use_running_average=True)
  images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  objects = np.zeros((2, 32, 32), bool)
  objects[0, 3:9, 4:20] = True
  objects[1] = True
  logits, masks = oracle.make_oracle(model, [])((images, objects))
  assert not masks
  np.testing.assert_allclose(logits, model(images)[0], rtol=1e-5, atol=1e-5)
  names = ['layer1.1', 'layer3.1']
  chosen, masks = oracle.make_oracle(model, names)((images, objects))
  assert [mask.name for mask in masks] == names
  for mask in masks:
    size = mask.hard.shape[1:]
    np.testing.assert_array_equal(mask.hard, oracle.touched(objects, size))
  # The second image is all object, so nothing changes.
  np.testing.assert_allclose(chosen[1], logits[1], rtol=1e-4, atol=1e-5)
  assert np.abs(chosen[0] - logits[0]).max() > 1e-3


def test_true_masks_of_the_blocks_that_run():
  dropped = 'layer3.1'
  model, gated = (
    nnx.view(
      create_model(
        'cifar_resnet14', num_classes=3, rngs=nnx.Rngs(0), **options
      ),
      deterministic=True,
      use_running_average=True,
    )
    for options in (
      {'method': 'drop', 'dropped_blocks': (dropped,)},
      {'method': 'dynconv', 'mask_bias': 2.0},
    )
  )
  objects = np.zeros((2, 16, 16), bool)
  objects[0, 3:9, 4:15] = True
  masks = oracle.true_masks(model, 16)({'object_mask': objects})
  stages = [f'layer{i}.{j}' for i in (1, 2, 3) for j in (0, 1)]
  assert list(masks) == [name for name in stages if name != dropped]
  for name, size in (('layer1.1', 16), ('layer2.0', 8)):
    expected = oracle.touched(objects, (size, size))
    np.testing.assert_array_equal(masks[name], expected)
  # The network accepts them.
  _, used = model(np.zeros((2, 16, 16, 3), np.float32), masks=masks)
  assert {m.name for m in used} == {dropped, *masks}
  with pytest.raises(ValueError, match='without gates of its own'):
    oracle.true_masks(gated, 16)
