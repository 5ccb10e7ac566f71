"""Tests of scenes against Pillow and the true positions, with both caches."""

import io
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image

from dynconv_jax.data import augment, batches, decode
from dynconv_jax.data.augment import Augmentation
from dynconv_jax.data.scenes import (
  EVALUATION_SEED,
  SceneReader,
  Scenes,
  object_mask,
)
from dynconv_jax.masks import ExecutionMask, MaskedLayer
from dynconv_jax.training import evaluation, inputs
from dynconv_jax.training.config import Config

STILL = Augmentation(crop='none', flip=False)
SCENES = Scenes((24, 40), (8, 12))
# At 32 pixels, no pixel is both object and background.
WHOLE = Scenes((32,), (8, 12))
CACHES = ('none', 'device')


def png(image):
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'PNG')
  return buffer.getvalue()


def smooth(n, size, seed=0):
  """Returns smooth uint8[n, size, size, 3], which resampling barely changes."""
  rng = np.random.default_rng(seed)
  return np.stack(
    [
      Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
      )
      for _ in range(n)
    ]
  )


def compose(scenes, *args, image_size):
  return np.asarray(scenes.compose(*args, image_size=image_size))


class Plain:
  """Plain images: red encodes the example, as object and as background."""

  def __init__(self, n=9, corrupt=()):
    self.class_names = tuple(map(str, range(n)))
    self._corrupt = corrupt

  def __len__(self):
    return len(self.class_names)

  def __getitem__(self, index):
    image = np.full((16, 20, 3), 0, np.uint8)
    image[..., 0] = 10 * index + 10
    name = f'image{index}.png'
    data = b'' if index in self._corrupt else png(image)
    return {'image': data, 'label': index, 'name': name}


def train(source=None, **options):
  options = dict(
    image_size=32, batch_size=4, augmentation=STILL, scenes=SCENES
  ) | options  # fmt: skip
  return batches.TrainBatches(source or Plain(), **options)


def evaluate(source=None, **options):
  options = dict(
    image_size=32, batch_size=4, resize_ratio=1.0, scenes=SCENES
  ) | options  # fmt: skip
  return batches.EvalBatches(source or Plain(), **options)


def take(iterator, n):
  return [jax.tree.map(np.asarray, next(iterator)) for _ in range(n)]


def by_example(batch_list):
  """Returns {example: scene}, from batches whose labels are the examples."""
  return {
    int(np.argmax(label)) if np.ndim(label) else int(label): image
    for batch in batch_list
    for image, label, weight in zip(
      np.asarray(batch['image']),
      np.asarray(batch['label']),
      np.asarray(batch.get('weight', np.ones(len(batch['label'])))),
      strict=True,
    )
    if weight
  }


def seen(image):
  """Returns the examples whose color is in a scene, and their pixel counts."""
  image = np.asarray(augment.denormalize(image))
  red, counts = np.unique(image[..., 0], return_counts=True)
  return dict(zip((red // 10 - 1).tolist(), counts.tolist(), strict=True))


class DrawTest(parameterized.TestCase):
  def test_layouts_are_uniform_in_their_ranges(self):
    reader = SceneReader(Scenes((10, 12), (3, 5)), Plain(), None, (0, 2))
    layouts = np.stack([reader.draw(i % 9, i)[0] for i in range(6000)])
    scene, side, left, top = layouts.T
    for values, expected in ((scene, (10, 11, 12)), (side, (3, 4, 5))):
      found, counts = np.unique(values, return_counts=True)
      np.testing.assert_array_equal(found, expected)
      # Four standard deviations of a binomial share of one third.
      np.testing.assert_allclose(counts / 6000, 1 / 3, atol=0.025)
    for place in (left, top):
      self.assertEqual(place.min(), 0)
      self.assertTrue((place + side <= scene).all())
      self.assertTrue((place + side == scene).any())
      share = place / (scene - side)
      self.assertAlmostEqual(share.mean(), 0.5, delta=0.03)
    self.assertLess(abs(np.corrcoef(left, top)[0, 1]), 0.2)

  def test_candidates_are_all_others_and_start_anywhere(self):
    reader = SceneReader(SCENES, Plain(), None, (0, 2))
    first = np.zeros(9, int)
    for epoch in range(800):
      candidates = list(reader.draw(4, epoch)[1])
      self.assertCountEqual(candidates, set(range(9)) - {4})
      first[candidates[0]] += 1
    self.assertEqual(first[4], 0)
    self.assertGreater(np.delete(first, 4).min(), 60)  # of 100, by chance

  def test_published_scenes_stay(self):
    # Different scenes are a different test set: results would not be
    # comparable.
    scenes = Scenes((160, 224), (64, 96))
    reader = SceneReader(scenes, range(250), None, EVALUATION_SEED)
    layout, candidates = reader.draw(7)
    u = np.random.default_rng((0, 3, 0, 7)).random(5)
    scene, side = 160 + int(65 * u[0]), 64 + int(33 * u[1])
    left, top = (int((scene - side + 1) * x) for x in u[2:4])
    np.testing.assert_array_equal(layout, [scene, side, left, top])
    np.testing.assert_array_equal(layout, [216, 83, 102, 43])
    self.assertEqual(next(candidates), 8 + int(249 * u[4]))

  def test_seed_epoch_and_example_decide(self):
    def draw(seed, epoch, index):
      layout, candidates = SceneReader(SCENES, Plain(), None, seed).draw(
        index, epoch
      )
      return (*layout.tolist(), *candidates)

    others = {
      draw(*case)
      for case in itertools.product([(0, 2), (0, 3)], (0, 1), (2, 5))
    }
    self.assertLen(others, 8)
    self.assertEqual(draw((0, 2), 1, 5), draw((0, 2), 1, np.int64(5)))

  @parameterized.parameters(
    ((), (8,), 'must each be one number or two .* must be empty; got scene_'),
    ((8,), (), r'both must be empty; got scene_size=\(8,\), object_size=\(\)'),
    ((1, 2, 3), (1,), r'number or two \(low and high.*got scene_size=\(1, '),
    ((20,), (21,), 'the largest object must fit into the smallest scene; got'),
    ((20, 40), (10, 30), r'rise from 1 to 4096.*got scene_size=\(20, 40\)'),
    ((40, 20), (10,), 'rise from 1 to 4096'),
    ((20,), (0,), r'rise from 1 to 4096.*object_size=\(0,\)'),
    ((5000,), (10,), 'rise from 1 to 4096'),
  )  # fmt: skip
  def test_sizes_that_cannot_be(self, scene_size, object_size, message):
    with self.assertRaisesRegex(ValueError, message):
      Scenes(scene_size, object_size)
    config = Config.make(scene_size=scene_size, object_size=object_size)
    with self.assertRaisesRegex(ValueError, message):
      config.check()

  def test_options(self):
    config = Config.make(scene_size=(192,), object_size=(64, 96))
    config.check()
    self.assertEqual(config.data.scenes(), Scenes((192, 192), (64, 96)))
    self.assertIsNone(Config().data.scenes())


class ComposeTest(parameterized.TestCase):
  @parameterized.parameters(24, 32, 17, 50, 96)
  def test_the_box_is_the_truth(self, image_size):
    scenes = Scenes((20, 40), (4, 9))
    reader = SceneReader(scenes, Plain(), None, (0, 3))
    layout = np.stack([reader.draw(0, i)[0] for i in range(64)])
    images = np.full((64, 9, 9, 3), 255, np.uint8)
    black = np.zeros((64, 8, 8, 3), np.uint8)
    bright = compose(scenes, images / 255, black, layout, image_size=image_size)
    mask = np.asarray(object_mask(layout, image_size))
    # The brightness of border pixels is the share that the object covers.
    scale = image_size / layout[:, 0]
    np.testing.assert_allclose(
      bright.mean(-1).sum((1, 2)), (layout[:, 1] * scale) ** 2, rtol=1e-4
    )
    self.assertTrue(mask[bright[..., 0] > 0.75].all())
    self.assertTrue((bright[mask] > 0.249).all())
    # By hand: the pixels whose centers lie in the rectangle.
    centers = np.arange(image_size) + 0.5
    for (scene, side, left, top), found in zip(layout, mask, strict=True):
      rows, columns = (
        (centers * scene >= image_size * start)
        & (centers * scene < image_size * (start + side))
        for start in (top, left)
      )
      np.testing.assert_array_equal(found, rows[:, None] & columns)

  def test_at_their_own_size_scenes_are_copies(self):
    scenes = Scenes((40,), (12,))
    images = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), np.uint8)
    layout = np.array([[40, 12, 0, 0], [40, 12, 28, 28], [40, 12, 5, 17]])
    drawn = compose(
      scenes, images, smooth(3, 8), layout.astype(np.int32), image_size=40
    )
    mask = np.asarray(object_mask(layout, 40))
    self.assertEqual(drawn.dtype, np.uint8)
    np.testing.assert_array_equal(mask.sum((1, 2)), 144)
    for i, (_, _, left, top) in enumerate(layout):
      patch = drawn[i, top : top + 12, left : left + 12]
      np.testing.assert_array_equal(patch, images[i])
      self.assertTrue(mask[i, top : top + 12, left : left + 12].all())

  def test_equals_a_scene_drawn_with_pillow(self):
    scenes = Scenes((48, 64), (10, 24))
    reader = SceneReader(scenes, Plain(), None, (0, 3))
    n, size = 12, 64
    images, backgrounds = smooth(n, 24), smooth(n, 8, seed=1)
    layout = np.stack([reader.draw(0, i)[0] for i in range(n)])
    layout[:, 0] = size
    drawn = compose(scenes, images, backgrounds, layout, image_size=size)
    for i, (_, side, left, top) in enumerate(layout):
      expected = Image.fromarray(backgrounds[i]).resize(
        (size, size), Image.Resampling.BICUBIC
      )
      photograph = Image.fromarray(images[i])
      photograph = photograph.resize((side, side), Image.Resampling.BILINEAR)
      expected.paste(photograph, (left, top))
      difference = np.abs(drawn[i].astype(int) - np.asarray(expected))
      self.assertLessEqual(difference.max(), 4)
      self.assertLess(difference.mean(), 0.5)

  @parameterized.parameters((64, 128), (64, 192))
  def test_scenes_of_two_sizes_agree(self, small, large):
    scenes = Scenes((100, 140), (40, 60))
    reader = SceneReader(scenes, Plain(), None, (0, 3))
    n, times = 12, large // small
    layout = np.stack([reader.draw(0, i)[0] for i in range(n)])
    args = smooth(n, 60) / np.float32(255), smooth(n, 8, seed=1), layout
    shrunk = compose(scenes, *args, image_size=large)
    shrunk = shrunk.reshape(n, small, times, small, times, 3).mean((2, 4))
    drawn = compose(scenes, *args, image_size=small)
    np.testing.assert_allclose(drawn, shrunk, atol=6 / 255)
    self.assertLess(np.abs(drawn - shrunk).mean(), 0.5 / 255)

  def test_zeros_leave_the_object_out(self):
    scenes = Scenes((40,), (12,))
    background = smooth(1, 8)
    drawn = compose(
      scenes, np.ones((1, 12, 12, 3)), background,
      np.zeros((1, 4), np.int32), image_size=40,
    )  # fmt: skip
    plain = jax.image.resize(background / 255, (1, 40, 40, 3), 'cubic')
    np.testing.assert_allclose(drawn, np.clip(plain, 0, 1), atol=1e-6)


class TrainTest(parameterized.TestCase):
  @parameterized.parameters(*CACHES)
  def test_a_scene_is_its_examples_own(self, cache):
    # Nine examples make two batches of four, or three of three, per epoch.
    fours, threes = train(cache=cache), train(cache=cache, batch_size=3)
    epochs = []
    for _ in range(2):
      a = by_example(take(fours, 2))
      b = by_example(take(threes, 3))
      self.assertLen(a, 8)
      self.assertLen(b, 9)
      # The matrix products that resize backgrounds round the last columns of
      # a batch differently on some CPUs, by the last bit.
      same = {i: b[i] for i in a}
      chex.assert_trees_all_close(a, same, rtol=0, atol=3e-7)
      pixels = [jax.tree.map(augment.denormalize, x) for x in (a, same)]
      chex.assert_trees_all_equal(*pixels)
      epochs.append(b)
    for i in range(9):
      self.assertFalse(np.array_equal(epochs[0][i], epochs[1][i]))
    other = by_example(take(train(cache=cache, batch_size=3, seed=1), 3))
    self.assertFalse(np.array_equal(other[0], epochs[0][0]))

  @parameterized.parameters(*CACHES)
  def test_true_masks_are_where_the_photograph_is(self, cache):
    (batch,) = take(train(cache=cache, scenes=WHOLE), 1)
    for image, label, mask in zip(
      batch['image'], batch['label'], batch['object_mask'], strict=True
    ):
      red = np.asarray(augment.denormalize(image))[..., 0]
      np.testing.assert_array_equal(mask, red == 10 * np.argmax(label) + 10)
    self.assertNotIn('object_mask', next(train(cache=cache, scenes=None)))

  def test_both_caches_draw_the_same_scenes(self):
    # Bit for bit without random crops; with them, the generators differ.
    chex.assert_trees_all_equal(
      *(take(train(Plain(corrupt=(2,)), cache=c, skip_corrupt=True), 5)
        for c in CACHES)
    )  # fmt: skip
    crops = [
      by_example(take(train(cache=c, augmentation=Augmentation()), 2))
      for c in CACHES
    ]
    chex.assert_trees_all_close(*crops, atol=1e-5)  # crops of plain images

  @parameterized.parameters(*CACHES)
  def test_resume(self, cache):
    rich = Augmentation(
      color_jitter=0.3, mixup=0.2, cutmix=1.0, random_erasing=0.3
    )
    options = dict(cache=cache, augmentation=rich)
    whole = train(**options)
    take(whole, 3)
    state = json.loads(json.dumps(whole.get_state()))
    rest = take(whole, 3)
    resumed = train(**options)
    resumed.set_state(state)
    chex.assert_trees_all_equal(take(resumed, 3), rest)
    chex.assert_shape(rest[0]['image'], (4, 32, 32, 3))

  @parameterized.parameters(*CACHES)
  def test_never_itself_nor_corrupt_behind_it(self, cache):
    iterator = train(
      Plain(corrupt=(1, 2, 6)), cache=cache, scenes=WHOLE, skip_corrupt=True
    )
    behind = set()
    for batch in take(iterator, 30):
      for example, image in by_example([batch]).items():
        shown = seen(image)
        self.assertNotIn(example, {1, 2, 6})
        self.assertLen(shown, 2)  # itself and another
        self.assertIn(example, shown)
        self.assertIn(shown.pop(example) ** 0.5, range(8, 13))
        behind |= shown.keys()
    self.assertEqual(behind, {0, 3, 4, 5, 7, 8})

  @parameterized.parameters(*CACHES)
  def test_corrupt_without_skipping(self, cache):
    with self.assertRaisesRegex(decode.CorruptImageError, 'image6.png'):
      take(train(Plain(corrupt=(6,)), cache=cache), 12)

  @parameterized.parameters(*CACHES)
  def test_nothing_left_behind(self, cache):
    source = Plain(3, corrupt=(0, 2))
    with self.assertRaisesRegex(ValueError, 'scenes need at least two images'):
      take(train(source, cache=cache, batch_size=1, skip_corrupt=True), 1)

  @parameterized.parameters(
    (
      dict(source=Plain(1), batch_size=1),
      'scenes need at least two examples.* got 1',
    ),
    (
      dict(augmentation=Augmentation(crop='pad', crop_padding=12)),
      'crop_padding must be less than object_size, 12; got 12',
    ),
    (
      dict(cache='device', cache_size=11, augmentation=Augmentation()),
      r'cache_size must be in \[12, 4096\], at least object_size; got 11',
    ),
  )
  def test_errors(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      train(**options)

  def test_no_retrace(self):
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(augment.augment, n=1)
    with absltest.mock.patch.object(augment, 'augment', traced):
      take(train(cache='device', image_size=31), 5)
      take(train(cache='device', image_size=31, seed=1), 1)


class EvalTest(parameterized.TestCase):
  @parameterized.parameters(*CACHES)
  def test_fixed_whatever_the_batches(self, cache):
    expected = by_example(evaluate(batch_size=9))
    self.assertLen(expected, 9)
    (batch,) = evaluate(batch_size=9)
    reader = SceneReader(SCENES, Plain(), None, EVALUATION_SEED)
    layout = np.stack([reader.draw(i)[0] for i in range(9)])
    np.testing.assert_array_equal(batch['object_mask'], object_mask(layout, 32))
    again = evaluate(cache=cache)
    for _ in range(2):
      chex.assert_trees_all_equal(by_example(again), expected)
    some = evaluate(indices=(7, 2), batch_size=2, cache=cache)
    self.assertEqual((some.num_examples, len(some)), (2, 1))
    (batch,) = some
    np.testing.assert_array_equal(batch['label'], [7, 2])
    chex.assert_trees_all_equal(
      by_example([batch]), {i: expected[i] for i in (7, 2)}
    )
    # The seed of a run only changes training scenes.
    config = Config.make(
      scene_size=(24, 40), object_size=(8, 12), crop='none', seed=7
    )
    other = inputs.eval_batches(config.data, Plain(), image_size=32)
    chex.assert_trees_all_equal(by_example(other), expected)

  def test_padding_is_finite_and_shows_no_object(self):
    *_, last = evaluate()
    np.testing.assert_array_equal(last['weight'], [1, 0, 0, 0])
    shown = np.asarray(last['object_mask']).any((1, 2))
    np.testing.assert_array_equal(shown, [True, False, False, False])
    self.assertTrue(np.isfinite(last['image']).all())

  @parameterized.parameters(*CACHES)
  def test_the_photograph_is_evaluations_crop(self, cache):
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)

    class Noise(Plain):
      def __getitem__(self, index):
        return super().__getitem__(index) | {'image': png(image)}

    (batch,) = evaluate(
      Noise(2), image_size=32, batch_size=2, scenes=Scenes((32,), (12,)),
      resize_ratio=1.25, cache=cache,
    )  # fmt: skip
    expected = decode.preprocess_image(image, 12, 1.25).reshape(-1, 3)
    for i in range(2):
      inside = np.asarray(batch['object_mask'][i])
      drawn = augment.denormalize(batch['image'][i])[inside]
      np.testing.assert_array_equal(drawn, expected)

  @parameterized.parameters(*CACHES)
  def test_corrupt(self, cache):
    source = Plain(corrupt=(0, 5))
    batch_list = evaluate(source, scenes=WHOLE, skip_corrupt=True, cache=cache)
    shown = by_example(batch_list)
    self.assertCountEqual(shown, {1, 2, 3, 4, 6, 7, 8})
    self.assertEqual(batch_list.skipped, ['image0.png', 'image5.png'])
    for example, image in shown.items():
      self.assertIn(example, seen(image))
      self.assertLen(seen(image), 2)
      self.assertNoCommonElements(seen(image), {0, 5})
    with self.assertRaisesRegex(decode.CorruptImageError, 'image0.png'):
      list(evaluate(source, cache=cache))

  def test_object_recall_of_the_box_is_one(self):
    layers = (MaskedLayer('layer1.0.conv1', 7, level=0),)
    boxes = iter([batch['object_mask'] for batch in evaluate()])

    def predict(images):
      # Positions of four pixels, active if the object touches them.
      box = next(boxes).reshape(len(images), 8, 4, 8, 4).any((2, 4))
      box = box.astype(jnp.float32)
      masks = [
        ExecutionMask((hard,), f'layer1.{i}', layers)
        for i, hard in enumerate((box, 1 - box))
      ]
      return jnp.zeros((len(images), 9)), masks

    result = evaluation.evaluate(predict, evaluate())
    np.testing.assert_array_equal(result.object_recall[:, 0], 1)
    np.testing.assert_array_equal(result.object_recall[:, 1], 0)
    background = result.background_density
    np.testing.assert_allclose(background.sum(1), 1)
    self.assertLess(background[:, 0].max(), 0.4)


if __name__ == '__main__':
  absltest.main()
