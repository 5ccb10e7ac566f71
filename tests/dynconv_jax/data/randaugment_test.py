"""Tests of RandAugment's operations against formulas, and of its sampling."""

import io

import chex
import numpy as np
import pytest
from PIL import Image

from dynconv_jax.data import augment, batches, randaugment
from dynconv_jax.data.augment import Augmentation
from dynconv_jax.training.config import Config

_NAMES = list(randaugment.OPERATIONS)


def _image(size=16, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (size, size, 3), np.uint8)


def _apply(name, strength, direction=0.0, image=None):
  which = (_NAMES.index(name) + 0.5) / len(_NAMES)
  image = _image() if image is None else image
  return randaugment.randaugment(
    image, np.array([[which, direction]]), strength
  )


def _blend(image, other, factor):
  """Returns other + factor (image - other), as Pillow's enhancers blend."""
  blended = other + factor * (image.astype(np.float64) - other)
  return np.clip(blended, 0, 255)


def _grey(image):
  return image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def test_tones():
  image = _image()
  # Strength 5 is half of the range: 256 -> 128, 8 bits -> 6.
  chex.assert_trees_all_equal(
    _apply('solarize', 5), np.where(image < 128, image, 255 - image)
  )
  chex.assert_trees_all_equal(_apply('posterize', 5), image & 0b11111100)
  chex.assert_trees_all_equal(_apply('posterize', 10), image & 0b11110000)
  low, high = image.min((0, 1)), image.max((0, 1))
  dull = (60 + image // 4).astype(np.uint8)
  stretched = _apply('autocontrast', 3, image=dull)
  assert np.all(stretched.min((0, 1)) == 0) and np.all(
    stretched.max((0, 1)) == 255
  )
  assert np.any(low > 0) or np.any(high < 255)
  # After equalizing, each quarter of the values has about a quarter of the
  # pixels.
  counts, _ = np.histogram(
    _apply('equalize', 0, image=dull[..., :1].repeat(3, -1)), 4, (0, 256)
  )
  np.testing.assert_allclose(counts / counts.sum(), 0.25, atol=0.08)


@pytest.mark.parametrize(('direction', 'sign'), [(0.0, 1), (0.9, -1)])
def test_factors_go_either_way(direction, sign):
  image, factor = _image(), 1 + sign * 0.9 * 0.6
  grey = _grey(image)
  for name, other in (
    ('brightness', np.zeros_like(image)),
    ('color', np.round(grey)[..., None]),
    ('contrast', np.round(np.mean(np.round(grey)))),
  ):
    actual = _apply(name, 6, direction)
    expected = _blend(image, other, factor)
    np.testing.assert_allclose(actual, expected, atol=2, err_msg=name)
  flat = np.full((8, 8, 3), 77, np.uint8)
  chex.assert_trees_all_equal(_apply('sharpness', 6, direction, flat), flat)
  sharper = _apply('sharpness', 6, direction).astype(float).std()
  assert (sharper > image.std()) == (sign > 0)


def test_moves():
  image = _image(20)
  moved = _apply('translate_x', 10, image=image)  # 0.45 of 20 pixels
  chex.assert_trees_all_equal(moved[:, :11], image[:, 9:])
  assert np.all(moved[:, 11:] == 128)
  moved = _apply('translate_y', 10, 0.9, image)
  chex.assert_trees_all_equal(moved[9:], image[:11])
  # A line through the origin of the shear is tilted by 0.3.
  line = np.zeros((20, 20, 3), np.uint8)
  line[:, 10] = 255
  sheared = _apply('shear_x', 10, image=line)[..., 0].astype(float)
  columns = (sheared[:, :14] @ np.arange(14)) / sheared[:, :14].sum(1)
  np.testing.assert_allclose(np.diff(columns).mean(), -0.3, atol=0.02)
  chex.assert_trees_all_equal(
    _apply('shear_y', 10, image=line.swapaxes(0, 1)),
    _apply('shear_x', 10, image=line).swapaxes(0, 1),
  )
  turned = _apply('rotate', 10, image=line)[..., 0].astype(float)
  rows = np.arange(3, 17)
  middle = (turned[rows, 2:18] @ np.arange(2, 18)) / turned[rows, 2:18].sum(1)
  slope = np.polyfit(rows, middle, 1)[0]
  np.testing.assert_allclose(abs(slope), np.tan(np.pi / 6), atol=0.15)


def test_strength_zero_leaves_the_image():
  for name in set(_NAMES) - {'autocontrast', 'equalize'}:
    for direction in (0.0, 0.9):
      chex.assert_trees_all_equal(_apply(name, 0, direction), _image())


def test_operations_follow_each_other_and_are_drawn_evenly():
  image = _image()
  draws = [[(_NAMES.index(n) + 0.5) / len(_NAMES), 0.0]
           for n in ('solarize', 'translate_x')]  # fmt: skip
  both = randaugment.randaugment(image, np.array(draws), 4)
  one = _apply('translate_x', 4, image=_apply('solarize', 4))
  chex.assert_trees_all_equal(both, one)
  chex.assert_trees_all_equal(
    randaugment.randaugment(image, np.zeros((0, 2)), 9), image
  )
  # The largest float below 1 still selects an entry of the list.
  randaugment.randaugment(image, np.full((1, 2), np.nextafter(1, 0)), 9)


class _Source:
  class_names = ('a', 'b')

  def __init__(self, image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, 'PNG')
    self._example = {'image': buffer.getvalue(), 'label': 0, 'name': 'x.png'}

  def __len__(self):
    return 64

  def __getitem__(self, index):
    return self._example


def _first_batch(**options):
  image = _image()
  iterator = batches.TrainBatches(
    _Source(image),
    image_size=16,
    batch_size=64,
    augmentation=Augmentation(crop='none', flip=False, **options),
  )
  seen = augment.denormalize(next(iterator)['image'])
  iterator.close()
  return image, np.asarray(seen)


def test_batches_hold_what_the_operations_give():
  image, plain = _first_batch()
  assert np.all(plain == image)
  _, seen = _first_batch(randaugment=(1, 7))
  possible = np.stack(
    [_apply(name, 7, sign) for name in _NAMES for sign in (0.0, 0.9)]
  )
  matches = np.all(seen[:, None] == possible, axis=(2, 3, 4))
  assert np.all(matches.any(1))
  # 64 draws of 28 outcomes, some of which look the same.
  assert len({tuple(m) for m in matches.tolist()}) > 12
  _, again = _first_batch(randaugment=(1, 7))
  chex.assert_trees_all_equal(again, seen)
  _, twice = _first_batch(randaugment=(2, 7))
  assert not np.all(np.all(twice[:, None] == possible, (2, 3, 4)).any(1))


@pytest.mark.parametrize(
  'given', [(2,), (1.5, 9), (0, 9), (2, 11), (2, -1), (2, 9, 1), (2, np.nan)]
)
def test_errors(given):
  with pytest.raises(ValueError, match='randaugment must be N,M \\(a number'):
    Augmentation(randaugment=given)


def test_a_device_cache_is_refused_before_any_data_is_read():
  config = Config.make(cache='device', randaugment=(2.0, 9.0))
  with pytest.raises(ValueError, match='randaugment runs on the host.*device'):
    config.check()
  Config.make(randaugment=[2.0, 9.0]).check()
  with pytest.raises(ValueError, match='needs cache=none; got cache=device'):
    batches.TrainBatches(
      _Source(_image()),
      image_size=16,
      batch_size=8,
      augmentation=Augmentation(randaugment=(2, 9)),
      cache='device',
    )
