"""Tests of batches: order, resuming, skipping, padding, both caches."""

import io
import json
import subprocess
import sys
from unittest import mock

import chex
import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from absl.testing import absltest, parameterized
from PIL import Image

from dynconv_jax.data import augment, batches, decode
from dynconv_jax.data.augment import Augmentation

# Worker processes cannot import a test module by name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

STILL = Augmentation(crop='none', flip=False)


def png(image):
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'PNG')
  return buffer.getvalue()


class FakeSource:
  """Flat images whose red channel is the example's index."""

  def __init__(self, n=11, size=10, corrupt=(), mask=False, noise=False):
    self.class_names = ('a', 'b', 'c')
    self._n, self._size, self._corrupt = n, size, corrupt
    self._mask, self._noise = mask, noise

  def __len__(self):
    return self._n

  def __getitem__(self, index):
    rng = np.random.default_rng(index)
    image = np.full((self._size, self._size, 3), 90, np.uint8)
    if self._noise:
      image = rng.integers(0, 256, image.shape, np.uint8)
    image[..., 0] = index
    example = {
      'image': b'' if index in self._corrupt else png(image),
      'label': index % 3,
      'name': f'image{index}.png',
    }
    if self._mask:
      mask = np.zeros(image.shape[:2], np.uint8)
      mask[index // 2 :, index // 3 :] = 255
      image[mask > 0] = 255
      image[mask == 0] = 0
      example |= {'image': png(image), 'object_mask': png(mask)}
    return example


def train(source=None, **options):
  options = dict(image_size=10, batch_size=4, augmentation=STILL) | options
  return batches.TrainBatches(source or FakeSource(), **options)


def evaluate(source=None, **options):
  options = dict(image_size=10, batch_size=4, resize_ratio=1.0) | options
  return batches.EvalBatches(source or FakeSource(), **options)


def take(iterator, n):
  return [jax.tree.map(np.asarray, next(iterator)) for _ in range(n)]


def indices(batch):
  """Reads the examples' indices from the red channel."""
  red = batch['image'][:, 0, 0, 0] * 0.229 + 0.485
  return np.round(255 * np.asarray(red)).astype(int).tolist()


CACHES = ('none', 'device')
RICH = Augmentation(
  color_jitter=0.3, mixup=0.2, cutmix=1.0, random_erasing=0.3,
  label_smoothing=0.1,
)  # fmt: skip


class TrainBatchesTest(parameterized.TestCase):
  @parameterized.parameters(*CACHES)
  def test_each_epoch_has_its_order_and_drops_the_rest(self, cache):
    batch_iterator = train(cache=cache)
    self.assertEqual(batch_iterator.steps_per_epoch, 2)
    seen = []
    for _ in range(5):
      epoch = [i for b in take(batch_iterator, 2) for i in indices(b)]
      self.assertLen(set(epoch), 8)
      self.assertContainsSubset(epoch, range(11))
      seen.append(tuple(epoch))
    self.assertLen(set(seen), 5)
    # An example dropped in one epoch appears in another.
    self.assertEqual({i for epoch in seen for i in epoch}, set(range(11)))

  @parameterized.parameters(*CACHES)
  def test_batch(self, cache):
    (batch,) = take(train(cache=cache), 1)
    chex.assert_shape(batch['image'], (4, 10, 10, 3))
    chex.assert_shape(batch['label'], (4, 3))
    chex.assert_type([batch['image'], batch['label']], jnp.float32)
    examples = indices(batch)
    np.testing.assert_array_equal(
      batch['label'], np.eye(3)[np.array(examples) % 3]
    )
    image = np.full((10, 10, 3), 90, np.uint8)
    image[..., 0] = examples[0]
    np.testing.assert_allclose(
      batch['image'][0], augment.normalize(image), atol=1e-5
    )

  def test_both_caches_have_the_same_order(self):
    source = FakeSource(corrupt=(3,))
    orders = [
      [indices(b) for b in take(train(source, cache=c, skip_corrupt=True), 6)]
      for c in CACHES
    ]
    self.assertEqual(*orders)

  @parameterized.parameters(*CACHES)
  def test_repeatable_and_seeded(self, cache):
    options = dict(cache=cache, augmentation=RICH)
    source = FakeSource(noise=True)
    first = take(train(source, seed=1, **options), 5)
    chex.assert_trees_all_equal(
      first, take(train(source, seed=1, **options), 5)
    )
    other = take(train(source, seed=2, **options), 5)
    self.assertFalse(np.array_equal(first[0]['image'], other[0]['image']))
    crops = Augmentation(flip=False, crop_scale=(0.3, 0.5))
    a, b = (
      take(train(FakeSource(1, noise=True), batch_size=1, cache=cache,
                 augmentation=crops, seed=seed), 2)
      for seed in (1, 2)
    )  # fmt: skip
    self.assertFalse(np.allclose(a[0]['image'], a[1]['image']))  # by step
    self.assertFalse(np.allclose(a[0]['image'], b[0]['image']))  # by seed

  @parameterized.parameters(*CACHES)
  def test_resume_in_the_middle_of_an_epoch(self, cache):
    source = FakeSource(noise=True, corrupt=(5,))
    options = dict(cache=cache, augmentation=RICH, skip_corrupt=True)
    whole = train(source, **options)
    take(whole, 3)
    state = json.loads(json.dumps(whole.get_state()))
    rest = take(whole, 4)
    self.assertEqual(state['step'], 3)
    resumed = train(source, **options)
    take(resumed, 1)  # an iterator that has started can also be set
    resumed.set_state(state)
    chex.assert_trees_all_equal(take(resumed, 4), rest)
    self.assertEqual(resumed.get_state(), whole.get_state())

  def test_state_of_another_run(self):
    state = train().get_state()
    other = train(FakeSource(12), batch_size=6, seed=3)
    with self.assertRaisesRegex(
      ValueError,
      'cannot resume the batches; num_examples: 11 in the state, 12 here; '
      'batch_size: 4 in the state, 6 here; seed: 0 in the state, 3 here',
    ):
      other.set_state(state)

  @parameterized.parameters(*CACHES)
  def test_no_retrace(self, cache):
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(augment.augment, n=1)
    with mock.patch.object(augment, 'augment', traced):
      # A unique size: compiled functions of other tests are shared.
      iterator = train(cache=cache, image_size=9)
      take(iterator, 5)
      iterator.set_state(iterator.get_state())
      take(iterator, 2)
      take(train(cache=cache, image_size=9, seed=1), 1)
      # A different configuration causes a new trace, so the counter works.
      with self.assertRaisesRegex(AssertionError, 'traced > 1 times'):
        take(train(cache=cache, image_size=8), 1)

  @parameterized.parameters(*CACHES)
  def test_corrupt_image_stops_and_is_named(self, cache):
    with self.assertRaisesRegex(
      decode.CorruptImageError, "'image7.png': the file is empty"
    ):
      take(train(FakeSource(corrupt=(7,)), cache=cache), 10)

  @parameterized.parameters(*CACHES)
  def test_skips_corrupt_images_and_fills_the_batch(self, cache):
    source = FakeSource(corrupt=(1, 7))
    with self.assertLogs(level='WARNING') as logs:
      iterator = train(source, cache=cache, skip_corrupt=True)
      seen = [indices(b) for b in take(iterator, 12)]
    for batch in seen:
      self.assertLen(set(batch), 4)
    self.assertEqual({i for b in seen for i in b}, set(range(11)) - {1, 7})
    self.assertEqual(iterator.num_skipped, 2)
    self.assertCountEqual(iterator.skipped, ['image1.png', 'image7.png'])
    self.assertLen(logs.output, 2)  # once per image
    self.assertIn("skipping the corrupt image 'image", logs.output[0])

  @parameterized.parameters(*CACHES)
  def test_too_few_good_images(self, cache):
    source = FakeSource(5, corrupt=(0, 2, 4))
    with self.assertRaisesRegex(
      ValueError, 'only 2 of the 5 images can be decoded, .* batch size 4'
    ):
      take(train(source, cache=cache, skip_corrupt=True), 1)

  def test_crops_on_host_and_device_see_the_same_parts(self):
    # The random numbers differ; compare distributions by mean brightness.
    options = dict(
      batch_size=1, augmentation=Augmentation(crop_scale=(0.25, 0.25)),
      image_size=16,
    )  # fmt: skip

    class Gradient(FakeSource):
      def __getitem__(self, index):
        x = np.linspace(0, 255, 96).astype(np.uint8)
        image = np.broadcast_to(x[None, :, None], (64, 96, 3))
        return super().__getitem__(index) | {'image': png(image.copy())}

    means = {
      cache: np.array([
        b['image'][..., 0].mean() * 0.229 + 0.485
        for b in take(train(Gradient(1), cache=cache, **options), 300)
      ])
      for cache in CACHES
    }  # fmt: skip
    for function in (np.mean, np.std):
      self.assertAlmostEqual(
        function(means['none']), function(means['device']), delta=0.03
      )
    self.assertGreater(means['none'].std(), 0.1)

  @parameterized.parameters(
    (dict(batch_size=12), 'batch_size 12 exceeds the 11 training examples'),
    (dict(batch_size=0), 'batch_size must be >= 1; got 0'),
    (dict(image_size=0), r'image_size must be in \[1, 4096\]; got 0'),
    (dict(image_size=10**6), r'image_size must be in \[1, 4096\]; got 1000000'),
    (dict(cache='disk'), r"cache must be one of .*; got 'disk'"),
    (dict(num_workers=-1), 'num_workers must be >= 0; got -1'),
    (dict(seed=-1), r'seed must be in \[0, 2\*\*63\); got -1'),
    (dict(seed=2**63), r'seed must be in \[0, 2\*\*63\); got 9223372036854'),
    (dict(cache_size=20), 'cache_size needs cache=device and crop=resized'),
    (
      dict(cache_size=9, cache='device', augmentation=Augmentation()),
      r'cache_size must be in \[10, 4096\], at least image_size; got 9',
    ),
    (
      dict(augmentation=Augmentation(crop='pad', crop_padding=10)),
      'crop_padding must be less than image_size, 10; got 10',
    ),
    (dict(source=FakeSource(0)), 'the data set has no examples'),
  )
  def test_errors(self, options, message):
    source = options.get('source', FakeSource())
    options = {k: v for k, v in options.items() if k != 'source'}
    with self.assertRaisesRegex(ValueError, message):
      batches.TrainBatches(source, **(
        dict(image_size=10, batch_size=4, augmentation=STILL) | options
      ))  # fmt: skip

  def test_workers_need_parsed_flags(self):
    with (
      mock.patch.object(flags.FlagValues, 'is_parsed', return_value=False),
      self.assertRaisesRegex(
        ValueError, 'num_workers=2 needs parsed absl flag'
      ),
    ):
      train(num_workers=2)


class WorkersTest(absltest.TestCase):
  """Worker processes take seconds to start, so few tests start them."""

  def test_batches_do_not_depend_on_the_workers(self):
    source = FakeSource(noise=True, corrupt=(5,))
    options = dict(augmentation=RICH, skip_corrupt=True)
    expected = take(train(source, **options), 6)
    workers = train(source, num_workers=2, **options)
    self.addCleanup(workers.close)
    chex.assert_trees_all_equal(take(workers, 4), expected[:4])
    self.assertEqual(workers.skipped, ['image5.png'])
    state = workers.get_state()
    workers.close()
    resumed = train(source, num_workers=1, **options)
    self.addCleanup(resumed.close)
    resumed.set_state(state)
    chex.assert_trees_all_equal(take(resumed, 2), expected[4:])

  def test_corrupt_image_in_a_worker_is_named(self):
    source = FakeSource(corrupt=(7,))
    workers = train(source, num_workers=1)
    self.addCleanup(workers.close)
    with self.assertRaisesRegex(
      decode.CorruptImageError, "'image7.png': the file is empty"
    ):
      take(workers, 10)

  def test_evaluation(self):
    expected = list(evaluate())
    chex.assert_trees_all_equal(list(evaluate(num_workers=1)), expected)


class EvalBatchesTest(parameterized.TestCase):
  @parameterized.parameters(*CACHES)
  def test_every_example_once_and_again(self, cache):
    batch_list = evaluate(cache=cache)
    self.assertLen(batch_list, 3)
    for _ in range(2):
      seen, labels = [], []
      for batch in batch_list:
        chex.assert_shape(batch['image'], (4, 10, 10, 3))
        chex.assert_type(
          [batch['image'], batch['weight'], batch['label']],
          [jnp.float32, jnp.float32, jnp.int32],
        )
        self.assertNotIn('object_mask', batch)
        real = np.asarray(batch['weight']) == 1
        seen += np.array(indices(batch))[real].tolist()
        labels += np.asarray(batch['label'])[real].tolist()
      self.assertEqual(seen, list(range(11)))
      self.assertEqual(labels, [i % 3 for i in range(11)])
      np.testing.assert_array_equal(batch['weight'], [1, 1, 1, 0])
    self.assertEqual(batch_list.num_examples, 11)

  @parameterized.parameters(*CACHES)
  def test_preprocessing_is_that_of_predict(self, cache):
    source = FakeSource(5, size=40, noise=True)
    (batch,) = evaluate(
      source, image_size=16, batch_size=5, resize_ratio=1.25, cache=cache
    )
    for index in range(5):
      image = decode.decode_image(source[index]['image'])
      image = decode.preprocess_image(image, 16, 1.25)
      np.testing.assert_allclose(
        batch['image'][index], augment.normalize(image), atol=1e-5
      )

  @parameterized.parameters(*CACHES)
  def test_the_device_cache_decodes_once(self, cache):
    source = mock.MagicMock(wraps=FakeSource())
    source.__len__.side_effect = lambda: 11
    source.__getitem__.side_effect = FakeSource().__getitem__
    batch_list = evaluate(source, cache=cache)
    list(batch_list)
    once = source.__getitem__.call_count
    list(batch_list)
    again = source.__getitem__.call_count - once
    self.assertEqual(again, 0 if cache == 'device' else 11)

  def test_a_pass_cut_short_is_not_kept(self):
    batch_list = evaluate(cache='device')
    next(iter(batch_list))
    self.assertLen(list(batch_list), 3)

  @parameterized.parameters(*CACHES)
  def test_object_mask_follows_the_image(self, cache):
    source = FakeSource(12, size=40, mask=True)
    for batch in evaluate(source, image_size=24, resize_ratio=1.2, cache=cache):
      mask = np.asarray(batch['object_mask'])
      chex.assert_shape(mask, (4, 24, 24))
      self.assertEqual(mask.dtype, bool)
      red = batch['image'][..., 0] * 0.229 + 0.485
      self.assertTrue(mask[np.asarray(red) > 0.999].all())
      self.assertFalse(mask[np.asarray(red) < 0.001].any())
      self.assertBetween(mask.mean(), 0.6, 1.0)

  @parameterized.parameters(*CACHES)
  def test_corrupt_images(self, cache):
    source = FakeSource(corrupt=(2, 9))
    with self.assertRaisesRegex(decode.CorruptImageError, 'image2.png'):
      list(evaluate(source, cache=cache))
    with self.assertLogs(level='WARNING') as logs:
      batch_list = evaluate(source, cache=cache, skip_corrupt=True)
      for _ in range(2):
        weight = np.concatenate([b['weight'] for b in batch_list])
        np.testing.assert_array_equal(
          weight, [1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0]
        )
    self.assertEqual(batch_list.skipped, ['image2.png', 'image9.png'])
    self.assertEqual(batch_list.num_skipped, 2)
    self.assertLen(logs.output, 2)

  def test_resize_ratio_below_one(self):
    with self.assertRaisesRegex(ValueError, 'resize_ratio must be .*; got 0.5'):
      evaluate(resize_ratio=0.5)


class ShardingTest(absltest.TestCase):
  def test_four_devices_equal_one(self):
    # The number of devices is fixed when JAX starts, so use another process.
    program = """
import importlib.util, sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
jax.config.update('jax_disable_most_optimizations', True)
import chex, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from dynconv_jax.data.scenes import Scenes
spec = importlib.util.spec_from_file_location('batches_test', sys.argv[1])
t = sys.modules['batches_test'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, P('data'))
source = t.FakeSource(21, noise=True)
for cache in t.CACHES:
  # Mixup and scenes are the same program for both caches.
  augmentation = t.Augmentation(mixup=0.2 * (cache == 'none'))
  scenes = Scenes((12,), (6, 8)) if cache == 'none' else None
  options = dict(
    batch_size=8, cache=cache, augmentation=augmentation, scenes=scenes)
  one, four = t.train(source, **options), t.train(
    source, sharding=split, **options)
  for _ in range(3):
    batch = next(four)
    for value in batch.values():
      assert value.sharding.is_equivalent_to(split, value.ndim), value.sharding
    chex.assert_trees_all_close(
      jax.device_get(batch), jax.device_get(next(one)), atol=1e-5)
  for batch, other in zip(
    t.evaluate(
      source, batch_size=8, cache=cache, scenes=scenes, sharding=split),
    t.evaluate(source, batch_size=8, cache=cache, scenes=scenes), strict=True):
    for value in batch.values():
      assert value.sharding.is_equivalent_to(split, value.ndim), value.sharding
    chex.assert_trees_all_close(
      jax.device_get(batch), jax.device_get(other), atol=1e-6)
for build in (t.train, t.evaluate):
  try:
    build(source, batch_size=6, sharding=split)
  except ValueError as error:
    print(error)
"""
    result = subprocess.run(
      [sys.executable, '-W', 'error', '-c', program, __file__],
      capture_output=True,
      text=True,
      timeout=120,
    )
    self.assertEqual(result.returncode, 0, result.stderr)
    message = 'batch_size 6 cannot be split evenly over 4 devices\n'
    self.assertEqual(result.stdout, 2 * message)


if __name__ == '__main__':
  absltest.main()
