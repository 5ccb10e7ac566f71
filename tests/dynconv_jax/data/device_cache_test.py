"""Tests of the device cache: its crops against Pillow and array slices."""

import io
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from dynconv_jax.data import augment, decode, device_cache
from dynconv_jax.data.augment import Augmentation


def noise(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def png(image):
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'PNG')
  return buffer.getvalue()


def examples(images):
  return [
    {'image': png(image), 'label': i % 3, 'name': f'image{i}.png'}
    for i, image in enumerate(images)
  ]


class CropAndResizeTest(parameterized.TestCase):
  def test_whole_image_at_its_own_size_is_the_identity(self):
    images = noise(2, 16, 16, 3)
    boxes = jnp.array([[0.0, 0.0, 16.0, 16.0]] * 2)
    actual = device_cache.crop_and_resize(images, boxes, 16)
    np.testing.assert_allclose(actual, images / 255, atol=1e-6)

  def test_box_of_the_result_size_is_a_slice(self):
    images = noise(3, 20, 24, 3)
    boxes = jnp.array([[0, 0, 8, 8], [5, 3, 13, 11], [16, 12, 24, 20]])
    actual = device_cache.crop_and_resize(images, boxes.astype(float), 8)
    for image, crop, (left, top, right, bottom) in zip(
      images, actual, np.asarray(boxes), strict=True
    ):
      np.testing.assert_allclose(
        crop, image[top:bottom, left:right] / 255, atol=1e-5
      )

  @parameterized.parameters(
    (0, 0, 64, 48), (3.5, 7.25, 40.5, 33), (10, 20, 22, 28), (30, 0, 64, 10)
  )
  def test_equals_pillow(self, *box):
    image = noise(48, 64, 3)
    expected = Image.fromarray(image).resize(
      (16, 16), Image.Resampling.BILINEAR, box=box
    )
    actual = device_cache.crop_and_resize(image[None], jnp.array([box]), 16)[0]
    # Pillow rounds to uint8 after each of its two passes.
    np.testing.assert_allclose(255 * actual, np.asarray(expected), atol=1.1)

  def test_random_crops_undo_the_squash(self):
    # A ramp in both directions: a pixel's value encodes its position.
    height, width, size = 60, 90, 30
    y, x = np.mgrid[:height, :width] + 0.5
    image = np.stack([2 * x, 4 * y, 0 * x], axis=-1).astype(np.uint8)
    square = Image.fromarray(image).resize((48, 48), Image.Resampling.BOX)
    key = jax.random.key(3)
    n = 40
    augmentation = Augmentation(crop_scale=(0.3, 0.6), crop_ratio=(1.0, 1.0))
    crops = device_cache.random_crops(
      key,
      jnp.tile(jnp.asarray(square)[None], (n, 1, 1, 1)),
      jnp.full(n, width / height),
      image_size=size,
      augmentation=augmentation,
    )
    crops = np.asarray(255 * crops)
    inner = crops[:, 4:-4, 4:-4]
    # Image pixels per crop pixel, along x and y.
    step_x = np.diff(inner[..., 0], axis=2).mean(axis=(1, 2)) / 2
    step_y = np.diff(inner[..., 1], axis=1).mean(axis=(1, 2)) / 4
    np.testing.assert_allclose(step_x, step_y, rtol=0.05)  # aspect ratio 1
    area = step_x * step_y * size**2 / (width * height)
    self.assertTrue(np.all((area > 0.28) & (area < 0.63)))
    self.assertGreater(np.ptp(area), 0.2)


class DecodeAllTest(parameterized.TestCase):
  def test_rows_are_the_squashed_images(self):
    images = [noise(20, 30, 3), noise(24, 24, 3), noise(40, 10, 3)]
    decoded = device_cache.decode_all(examples(images), 24)
    self.assertEqual(decoded.image.shape, (3, 24, 24, 3))
    for image, row in zip(images, decoded.image, strict=True):
      expected = Image.fromarray(image).resize(
        (24, 24), Image.Resampling.BILINEAR
      )
      np.testing.assert_array_equal(row, expected)
    np.testing.assert_array_equal(decoded.label, [0, 1, 2])
    np.testing.assert_allclose(decoded.aspect, [1.5, 1.0, 0.25])
    self.assertEmpty(decoded.corrupt)

  def test_corrupt(self):
    source = examples([noise(9, 9, 3, seed=i) for i in range(6)])
    source[4]['image'] = source[4]['image'][:-30]
    source[2]['image'] = b''
    with self.assertRaisesRegex(
      decode.CorruptImageError, "'image2.png': the file is empty"
    ):
      device_cache.decode_all(source, 8)
    decoded = device_cache.decode_all(source, 8, skip_corrupt=True)
    self.assertEqual(decoded.corrupt, {2: 'image2.png', 4: 'image4.png'})
    self.assertFalse(decoded.image[[2, 4]].any())
    self.assertTrue(decoded.image[[0, 1, 3, 5]].any(axis=(1, 2, 3)).all())

  def test_too_large_for_the_memory(self):
    with self.assertRaisesRegex(
      ValueError, r'needs .* GiB for 10{9} images of 512 x 512 pixels; .* has'
    ):
      device_cache.check_memory((10**9, 512, 512, 3))
    device = mock.Mock()
    device.memory_stats.return_value = {'bytes_limit': 3 * 2**30}
    with (
      mock.patch.object(jax, 'local_devices', return_value=[device]),
      self.assertRaisesRegex(ValueError, 'needs 4.0 GiB .* the device has 3.0'),
    ):
      device_cache.check_memory((2**12, 1024, 1024, 1))

  @parameterized.parameters(
    (dict(), 64, 128), (dict(crop_scale=(1.0, 1.0)), 64, 64),
    (dict(crop='pad'), 32, 32),
  )  # fmt: skip
  def test_default_size_enlarges_no_crop(self, options, size, expected):
    augmentation = Augmentation(**options)
    actual = device_cache.default_cache_size(size, augmentation)
    self.assertEqual(actual, expected)
    if augmentation.crop == 'resized':
      smallest = augment.crop_boxes(
        np.zeros(4), actual, actual, Augmentation(**options, crop_ratio=(1, 1))
      )
      self.assertAlmostEqual(smallest[2], size)


if __name__ == '__main__':
  absltest.main()
