"""Tests of the augmentation: combinations, boxes, distributions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from dynconv_jax.data import augment
from dynconv_jax.data.augment import Augmentation

PLAIN = dict(crop='none', flip=False)
CLASSES = 5
MEAN, STD = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])


def batch_of(n=16, size=12, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (n, size, size, 3)).astype(np.uint8)
  return images, rng.integers(0, CLASSES, n).astype(np.int32)


def run(images, labels, seed=0, **options):
  batch = jax.jit(augment.augment, static_argnames=STATIC)(
    jax.random.key(seed),
    images,
    labels,
    augmentation=Augmentation(**{**PLAIN, **options}),
    num_classes=CLASSES,
  )
  return np.asarray(batch['image']), np.asarray(batch['label'])


STATIC = ('augmentation', 'num_classes')


def to_uint8(images):
  """Undoes the normalization; rounding hides differences from XLA's fusions."""
  pixels = images * STD + MEAN
  return np.round(255 * pixels).astype(np.uint8)


class NormalizeTest(parameterized.TestCase):
  def test_inception_is_that_of_tensorflow(self):
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    expected = (pixels.astype(np.float32) - 127) / 128
    actual = augment.normalize(pixels, 'inception')
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    np.testing.assert_array_equal(
      augment.denormalize(actual, 'inception'), pixels
    )
    batch = augment.augment(
      jax.random.key(0),
      pixels[None],
      np.zeros(1, np.int32),
      augmentation=Augmentation(**PLAIN),
      num_classes=CLASSES,
      normalization='inception',
    )
    np.testing.assert_allclose(batch['image'][0], expected, atol=1e-6)

  def test_hand_computed(self):
    images = np.array([[[[0, 128, 255]]]], np.uint8)
    expected = [-0.485 / 0.229, (128 / 255 - 0.456) / 0.224, 0.594 / 0.225]
    actual = augment.normalize(images)
    np.testing.assert_allclose(actual[0, 0, 0], expected, rtol=1e-5)
    self.assertEqual(actual.dtype, jnp.float32)
    np.testing.assert_allclose(
      augment.normalize(images / np.float32(255)), actual, rtol=1e-5
    )


class AugmentTest(parameterized.TestCase):
  def test_nothing_is_normalization_and_one_hot(self):
    images, labels = batch_of()
    actual, actual_labels = run(images, labels)
    np.testing.assert_allclose(actual, augment.normalize(images), atol=1e-5)
    np.testing.assert_array_equal(actual_labels, np.eye(CLASSES)[labels])

  def test_float_and_uint8_images_agree(self):
    images, labels = batch_of()
    options = dict(color_jitter=0.4, flip=True, mixup=0.5)
    for a, b in zip(
      run(images, labels, **options),
      run(images / np.float32(255), labels, **options),
      strict=True,
    ):
      np.testing.assert_allclose(a, b, atol=1e-5)

  def test_label_smoothing(self):
    images, labels = batch_of()
    _, actual = run(images, labels, label_smoothing=0.1)
    np.testing.assert_allclose(
      actual, 0.9 * np.eye(CLASSES)[labels] + 0.1 / CLASSES, rtol=1e-5
    )

  def test_flip_mirrors_about_half(self):
    images, labels = batch_of(n=200, size=6)
    actual = to_uint8(run(images, labels, flip=True)[0])
    flipped = np.all(actual == images[:, :, ::-1], axis=(1, 2, 3))
    kept = np.all(actual == images, axis=(1, 2, 3))
    self.assertTrue(np.all(flipped ^ kept))
    self.assertBetween(flipped.mean(), 0.35, 0.65)

  def test_padded_crop_is_a_slice_of_the_padded_image(self):
    images, labels = batch_of(n=300, size=6)
    actual = to_uint8(run(images, labels, crop='pad', crop_padding=2)[0])
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    starts = []
    for image, source in zip(actual, padded, strict=True):
      found = [
        (top, left)
        for top in range(5)
        for left in range(5)
        if np.array_equal(image, source[top : top + 6, left : left + 6])
      ]
      self.assertLen(found, 1)
      starts += found
    self.assertLen(set(starts), 25)

  def test_color_jitter_is_per_image_and_bounded(self):
    rng = np.random.default_rng(0)
    image = rng.uniform(0.3, 0.7, (1, 8, 8, 3)).astype(np.float32)
    images = np.repeat(image, 100, axis=0)
    actual, _ = run(images, np.zeros(100, int), color_jitter=0.1)
    pixels = actual * STD + MEAN
    self.assertTrue(np.all((pixels > -1e-5) & (pixels < 1 + 1e-5)))
    means = pixels.mean(axis=(1, 2, 3)) - image.mean()
    # Of the four factors, only brightness changes the mean noticeably.
    self.assertBetween(means.max(), 0.035, 0.065)
    self.assertBetween(means.min(), -0.065, -0.035)
    self.assertLess(abs(means.mean()), 0.015)
    # Factors in [0.9, 1.1], brightness times contrast.
    spread = pixels.mean(axis=-1).std(axis=(1, 2))
    spread /= image.mean(axis=-1).std()
    self.assertBetween(spread.max(), 1.08, 1.25)
    self.assertBetween(spread.min(), 0.78, 0.92)

  def test_tiny_color_jitter_is_almost_the_identity(self):
    images, labels = batch_of()
    actual, _ = run(images, labels, color_jitter=1e-6)
    np.testing.assert_allclose(actual, augment.normalize(images), atol=1e-3)

  def test_erased_boxes(self):
    images, labels = batch_of(n=400, size=32)
    images = np.maximum(images, 1)  # zero marks erased pixels below
    actual, actual_labels = run(images, labels, random_erasing=0.5)
    plain = np.asarray(augment.normalize(images))
    erased = np.all(actual == 0, axis=-1)
    np.testing.assert_allclose(actual[~erased], plain[~erased], atol=1e-5)
    shares = []
    for mask in erased[erased.any(axis=(1, 2))]:
      rows, columns = (
        np.nonzero(mask.any(axis=1))[0],
        np.nonzero(mask.any(0))[0],
      )
      box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
      self.assertEqual(mask.sum(), box)  # a full rectangle
      shares.append(box / 32**2)
    self.assertBetween(len(shares) / 400, 0.4, 0.6)
    # Zhong et al.: the share of the area is uniform in [0.02, 0.33].
    self.assertBetween(min(shares), 0.01, 0.06)
    self.assertBetween(max(shares), 0.28, 0.37)
    self.assertBetween(np.mean(shares), 0.155, 0.195)
    np.testing.assert_array_equal(actual_labels, np.eye(CLASSES)[labels])

  def test_mixup_is_the_combination_that_its_labels_state(self):
    images, labels = batch_of(n=50)
    labels = np.arange(50, dtype=np.int32) % CLASSES  # neighbors differ
    actual, actual_labels = run(images, labels, mixup=1.0)
    share = actual_labels[np.arange(50), labels][:, None, None, None]
    plain = np.asarray(augment.normalize(images))
    expected = share * plain + (1 - share) * np.roll(plain, 1, axis=0)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_allclose(actual_labels.sum(axis=1), 1, rtol=1e-6)
    other = actual_labels[np.arange(50), np.roll(labels, 1)]
    np.testing.assert_allclose(other, 1 - share[:, 0, 0, 0], atol=1e-6)
    # Beta(1, 1) is uniform.
    self.assertBetween(share.mean(), 0.38, 0.62)
    self.assertBetween(share.std(), 0.23, 0.35)

  def test_cutmix_label_share_is_the_pasted_area(self):
    n, size = 60, 16
    labels = np.arange(n, dtype=np.int32) % CLASSES
    shade = np.arange(n, dtype=np.float32)[:, None, None, None] / n
    images = np.broadcast_to(shade, (n, size, size, 3))
    actual, actual_labels = run(images, labels, cutmix=1.0)
    plain = np.asarray(augment.normalize(images))
    own = np.all(actual == plain, axis=-1)
    pasted = np.all(actual == np.roll(plain, 1, axis=0), axis=-1)
    self.assertTrue(np.all(own ^ pasted))
    np.testing.assert_allclose(
      actual_labels[np.arange(n), labels], own.mean(axis=(1, 2)), atol=1e-6
    )
    np.testing.assert_allclose(
      actual_labels[np.arange(n), np.roll(labels, 1)],
      pasted.mean(axis=(1, 2)),
      atol=1e-6,
    )
    for mask in pasted:
      outer = mask.any(axis=1).sum() * mask.any(axis=0).sum()
      self.assertEqual(mask.sum(), outer)
    self.assertBetween(pasted.mean(), 0.2, 0.5)

  def test_mixup_and_cutmix_share_the_batch(self):
    n = 200
    images, _ = batch_of(n, size=8)
    labels = np.arange(n, dtype=np.int32) % CLASSES
    actual, actual_labels = run(images, labels, mixup=1.0, cutmix=1.0)
    plain = np.asarray(augment.normalize(images))
    own = np.isclose(actual, plain, atol=1e-5).all(axis=-1)
    other = np.isclose(actual, np.roll(plain, 1, axis=0), atol=1e-5)
    pasted = other.all(axis=-1)
    # CutMix takes each pixel from one of the two images; mixup almost never
    # does.
    cut = np.all(own | pasted, axis=(1, 2))
    self.assertBetween(cut.mean(), 0.35, 0.65)
    share = actual_labels[np.arange(n), labels]
    np.testing.assert_allclose(
      share[cut], own[cut].mean(axis=(1, 2)), atol=1e-6
    )
    share = share[:, None, None, None]
    blend = share * plain + (1 - share) * np.roll(plain, 1, axis=0)
    np.testing.assert_allclose(actual[~cut], blend[~cut], atol=1e-5)

  def test_keys_decide(self):
    images, labels = batch_of()
    options = dict(
      crop='pad', flip=True, color_jitter=0.4, mixup=0.2, cutmix=1.0,
      random_erasing=0.5, label_smoothing=0.1,
    )  # fmt: skip
    first = run(images, labels, **options)
    again = run(images, labels, **options)
    other = run(images, labels, seed=1, **options)
    chex.assert_trees_all_equal(first, again)
    self.assertFalse(np.array_equal(first[0], other[0]))


class CropBoxesTest(parameterized.TestCase):
  def test_area_and_ratio_are_as_asked(self):
    n = 20_000
    uniform = np.random.default_rng(0).random((n, 4))
    augmentation = Augmentation(crop_scale=(0.3, 0.9))
    width, height = 120, 90
    boxes = augment.crop_boxes(uniform, width, height, augmentation)
    left, top, right, bottom = boxes.T
    self.assertTrue(np.all((left >= 0) & (right <= width + 1e-9)))
    self.assertTrue(np.all((top >= 0) & (bottom <= height + 1e-9)))
    area = (right - left) * (bottom - top) / (width * height)
    ratio = (right - left) / (bottom - top)
    quantiles = np.quantile(area, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(
      quantiles, [0.3, 0.45, 0.6, 0.75, 0.9], atol=0.01
    )
    self.assertBetween(ratio.min(), 3 / 4 - 1e-9, 0.77)
    self.assertBetween(ratio.max(), 1.32, 4 / 3 + 1e-9)
    # Positions are uniform in the space that the box leaves.
    room = width - (right - left)
    self.assertAlmostEqual(np.mean(left[room > 1] / room[room > 1]), 0.5, 2)

  def test_small_areas_draw_the_log_ratio_uniformly(self):
    uniform = np.random.default_rng(0).random((20_000, 4))
    augmentation = Augmentation(crop_scale=(0.1, 0.2))
    boxes = augment.crop_boxes(uniform, 100, 100, augmentation)
    log_ratio = np.log(
      (boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])
    )
    edge = np.log(4 / 3)
    np.testing.assert_allclose(
      np.quantile(log_ratio, [0, 0.25, 0.5, 0.75, 1]),
      [-edge, -edge / 2, 0, edge / 2, edge],
      atol=0.01,
    )

  @parameterized.parameters((300, 100, 4 / 3), (100, 300, 3 / 4))
  def test_elongated_image_gives_the_largest_allowed_box(self, w, h, ratio):
    uniform = np.random.default_rng(0).random((100, 4))
    augmentation = Augmentation(crop_scale=(0.9, 1.0))
    boxes = augment.crop_boxes(uniform, w, h, augmentation)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    np.testing.assert_allclose(width / height, ratio)
    np.testing.assert_allclose(
      np.maximum(width / w, height / h), 1.0, rtol=1e-9
    )

  def test_whole_square_image(self):
    augmentation = Augmentation(crop_scale=(1.0, 1.0))
    box = augment.crop_boxes(np.full(4, 0.7), 50, 50, augmentation)
    np.testing.assert_allclose(box, [0, 0, 50, 50], atol=1e-9)

  def test_numpy_and_jax_agree(self):
    uniform = np.random.default_rng(0).random((50, 4)).astype(np.float32)
    width = np.linspace(50, 200, 50).astype(np.float32)
    height = np.full(50, 100, np.float32)
    np.testing.assert_allclose(
      augment.crop_boxes(uniform, width, height, Augmentation(), jnp),
      augment.crop_boxes(uniform, width, height, Augmentation()),
      rtol=1e-4,
      atol=1e-3,
    )


class AugmentationTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(crop_scale=(0.5,)), 'crop_scale must be two numbers'),
    (dict(crop='five'), r"crop must be one of .*; got 'five'"),
    (dict(crop_scale=(0.0, 1.0)), r'crop_scale .*; got \(0.0, 1.0\)'),
    (dict(crop_scale=(0.9, 0.5)), r'crop_scale .*; got \(0.9, 0.5\)'),
    (dict(crop_scale=(0.9, 1.5)), r'crop_scale .*; got \(0.9, 1.5\)'),
    (dict(crop_ratio=(2.0, 1.0)), r'crop_ratio .*; got \(2.0, 1.0\)'),
    (dict(crop_ratio=(1.0, float('inf'))), r'crop_ratio .*; got \(1.0, inf\)'),
    (dict(crop_padding=-1), r'crop_padding must be in \[0, 4096\]; got -1'),
    (dict(crop_padding=10**9), r'crop_padding must be in .*; got 1000000000'),
    (dict(color_jitter=1.5), r'color_jitter must be in \[0, 1\]; got 1.5'),
    (dict(random_erasing=-1), r'random_erasing must be in \[0, 1\]; got -1'),
    (dict(mixup=-0.2), 'mixup must be >= 0; got -0.2'),
    (dict(cutmix=float('nan')), 'cutmix must be >= 0; got nan'),
    (dict(mixup=float('inf')), 'mixup must be finite; got inf'),
    (dict(label_smoothing=1.0), r'label_smoothing must be in \[0, 1\); got 1'),
    (dict(crop_padding=-1, mixup=-1), 'crop_padding.*; mixup'),
  )
  def test_errors(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      Augmentation(**options)

  def test_lists_are_taken(self):
    a = Augmentation(crop_scale=[0.1, 1.0], crop_ratio=[0.5, 2.0])
    b = Augmentation(crop_scale=(0.1, 1.0), crop_ratio=(0.5, 2.0))
    self.assertEqual(hash(a), hash(b))


if __name__ == '__main__':
  absltest.main()
