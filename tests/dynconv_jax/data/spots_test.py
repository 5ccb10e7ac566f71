import chex
import numpy as np
import pytest
from absl.testing import parameterized

from dynconv_jax.data import spots

_OPTIONS = spots.Options(48, 30, 6, 3)


class DrawTest(parameterized.TestCase):
  def test_depends_on_seed_split_and_index_alone(self):
    image, mask, label = spots.draw(_OPTIONS, 'train', 7)
    more = spots.Options(48, 99, 9, 3)
    chex.assert_trees_all_equal(
      spots.draw(more, 'train', 7), (image, mask, label)
    )
    other_seed = spots.Options(48, spots_seed=4)
    for other in (
      spots.draw(_OPTIONS, 'test', 7),
      spots.draw(_OPTIONS, 'train', 13),
      spots.draw(other_seed, 'train', 7),
    ):
      self.assertEqual(other[2], label)
      self.assertGreater(np.mean(other[0] != image), 0.9)

  def test_types(self):
    image, mask, label = spots.draw(_OPTIONS, 'train', 8)
    chex.assert_shape([image, mask], [(48, 48, 3), (48, 48)])
    self.assertEqual((image.dtype, mask.dtype), (np.uint8, np.bool_))
    self.assertEqual(label, 8 % len(spots.CLASS_NAMES))

  def test_only_the_object_tells_the_class(self):
    # Everything except the object is drawn independently of the class.
    for index in range(5):
      drawn = [
        spots.draw(_OPTIONS, 'train', index, label)[:2]
        for label in range(len(spots.CLASS_NAMES))
      ]
      # One more pixel on each side for the soft edge.
      reached = _grow(np.any([mask for _, mask in drawn], axis=0))
      for image, mask in drawn[1:]:
        chex.assert_trees_all_equal(image[~reached], drawn[0][0][~reached])
        self.assertTrue(np.any(image[mask] != drawn[0][0][mask]))

  @parameterized.parameters(24, 32, 48, 64)
  def test_the_object_is_small_whole_and_anywhere(self, size):
    options = spots.Options(size)
    places = []
    for index in range(120):
      _, mask, _ = spots.draw(options, 'train', index)
      self.assertBetween(mask.mean(), 0.02, 0.11)
      border = np.ones_like(mask)
      border[1:-1, 1:-1] = False
      self.assertFalse(np.any(mask & border))
      places.append(np.argwhere(mask).mean(axis=0) / size)
    places = np.array(places)
    self.assertTrue(np.all(places.min(axis=0) < 0.33))
    self.assertTrue(np.all(places.max(axis=0) > 0.67))

  def test_areas_of_shapes(self):
    # A radius of 10 pixels, drawn at 100 times the radius' area resolution.
    v, u = np.mgrid[-1.2:1.2:0.005, -1.2:1.2:0.005]
    area = {
      name: np.sum(spots.SHAPES[name](u, v) < 0) * 0.005**2
      for name in spots.CLASS_NAMES
    }
    expected = {
      'disc': np.pi * 0.9**2,
      'ring': np.pi * (0.97**2 - 0.53**2),
      'square': 1.5**2,
      # Equilateral, with an inscribed circle of radius 0.5.
      'triangle': 3 * np.sqrt(3) * 0.5**2,
      'cross': 2 * (2 * 0.5) - 0.5**2,
      'bars': 2 * 0.44 * 1.8,
    }
    chex.assert_trees_all_close(area, expected, rtol=0.02)

  def test_the_object_stands_out(self):
    for index in range(60):
      image, mask, _ = spots.draw(_OPTIONS, 'test', index)
      inner = mask & ~_grow(~mask)
      inner = inner if inner.any() else mask
      ring = _grow(_grow(mask)) & ~_grow(mask)
      contrast = np.linalg.norm(
        image[inner].mean(axis=0) - image[ring].mean(axis=0)
      )
      self.assertGreater(contrast, 45)

  @parameterized.parameters(
    (dict(spots_size=8), r'spots_size must be in \[24, 4096\]; got 8'),
    (dict(spots_size=10**6), r'spots_size must be in .*; got 1000000'),
    (dict(spots_test=0), r'spots_test must be in \[1, .*; got 0'),
  )
  def test_errors(self, options, message):
    with pytest.raises(ValueError, match=message):
      spots.Options(**options)


def _grow(mask):
  padded = np.pad(mask, 1)
  h, w = mask.shape
  return np.any(
    [padded[i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0
  )
