"""Batches for training and evaluation, with caching and resuming."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from absl import flags, logging

from dynconv_jax import distributed, extras
from dynconv_jax.data import augment, decode
from dynconv_jax.data import scenes as scenes_lib

extras.require('train', 'grain')

from dynconv_jax.data import device_cache, readers  # noqa: E402

CACHES = ('none', 'device')


class TrainBatches:
  """An endless iterator over shuffled, augmented batches, with a saved state.

  A batch depends only on the seed and the step, not on the number of workers or
  the first step of the iteration. Each epoch shuffles the examples and drops
  the last partial batch.

  Attributes:
    steps_per_epoch: number of whole batches in one pass over the source.
    step: index of the next batch.
    skipped: names of the corrupt images found so far.
  """

  def __init__(
    self,
    source,
    *,
    image_size: int,
    batch_size: int,
    augmentation: augment.Augmentation | None = None,
    scenes: scenes_lib.Scenes | None = None,
    normalization: str = 'imagenet',
    seed: int = 0,
    cache: str = 'none',
    cache_size: int | None = None,
    num_workers: int = 0,
    skip_corrupt: bool = False,
    sharding: jax.sharding.Sharding | None = None,
  ):
    """Checks the arguments and, for `cache='device'`, decodes the source.

    Args:
      source: the encoded examples; picklable, and safe to read from threads.
      image_size: side of the images, in pixels.
      batch_size: number of images per batch, over all devices.
      augmentation: the augmentation; None for `Augmentation()`.
      scenes: scenes to place the images into, after the crop, flip, and color
        jitter but before erasing, mixup, and cutmix. None for images that fill
        the network's input.
      normalization: one of `augment.NORMALIZATIONS`.
      seed: seed of order and augmentation.
      cache: 'none' decodes each image on the host in every epoch; 'device'
        decodes once into device memory and crops there.
      cache_size: side of the cached images, in pixels; only for a resized crop.
        None for the smallest size at which no crop is enlarged.
      num_workers: number of decoding processes, which need parsed absl flags; 0
        for threads of this process, one per core, up to 16. Threads always fill
        the device cache.
      skip_corrupt: whether to replace corrupt images with the next good ones in
        the epoch's order and log their names, instead of raising an error.
      sharding: sharding of the batch's arrays along the batch axis; None for
        the default device.

    Raises:
      ValueError: an argument is out of range, or the source is smaller than one
        batch.
      CorruptImageError: an image is corrupt. Raised by the constructor with a
        device cache, and by `next` otherwise.
    """
    _check(source, image_size, batch_size, cache, num_workers, sharding)
    augmentation = augmentation or augment.Augmentation()
    name = 'object_size' if scenes else 'image_size'
    size = scenes.crop_size if scenes else image_size
    augmentation.check_cache(cache, cache_size, size, name)
    _require(
      (
        batch_size <= len(source),
        f'batch_size {batch_size} exceeds the {len(source)} training examples',
      ),
      (0 <= seed < 2**63, f'seed must be in [0, 2**63); got {seed}'),
    )

    self.step = 0
    self.skipped: list[str] = []
    self._order = readers.EpochOrder(len(source), batch_size, seed)
    self.steps_per_epoch = self._order.steps_per_epoch
    self._crop_size = size
    self._augmentation = augmentation
    self._static = dict(
      augmentation=augmentation,
      num_classes=len(source.class_names),
      normalization=normalization,
      scenes=scenes,
      image_size=image_size,
    )
    self._scene_reader = readers.scene_reader(
      scenes, source, scenes_lib.training_seed(seed), skip_corrupt
    )
    self._key = jax.random.key(seed)
    self._num_workers = num_workers
    self._skip_corrupt = skip_corrupt
    self._sharding = sharding
    self._place = functools.partial(distributed.place, sharding=sharding)
    self._rows = distributed.rows_of(sharding, batch_size)
    self._host = None
    if cache == 'device':
      self._feed = self._cached_feed(source, cache_size)
    else:
      self._feed = self._host_feed(source)

  @property
  def num_skipped(self) -> int:
    """Number of corrupt images found so far, each counted once."""
    return len(self.skipped)

  def __iter__(self) -> TrainBatches:
    return self

  def __next__(self) -> dict[str, jax.Array]:
    """Returns 'image', float32[N, S, S, 3], and 'label', float32[N, classes].

    With scenes, also 'object_mask', bool[N, S, S], the true masks.
    """
    batch = self._feed(np.int32(self.step))
    self.step += 1
    return batch

  def get_state(self) -> dict:
    """Returns a JSON-serializable state for `set_state`."""
    return {
      'step': self.step,
      'skipped': list(self.skipped),
      **dataclasses.asdict(self._order),
    }

  def set_state(self, state: dict) -> None:
    """Restores a state returned by `get_state`.

    Raises:
      ValueError: the state has another number of examples, seed, or batch size.
    """
    differing = [
      f'{name}: {state.get(name)} in the state, {value} here'
      for name, value in dataclasses.asdict(self._order).items()
      if state.get(name) != value
    ]
    if differing:
      raise ValueError(f'cannot resume the batches; {"; ".join(differing)}')
    self.close()
    self.step = state['step']
    self.skipped = list(state['skipped'])

  def close(self) -> None:
    """Stops the workers; the next batch restarts them."""
    if self._host is not None:
      self._host.close()
      self._host = None

  def _host_feed(self, source):
    """Returns a function from a step to its batch, read on the host."""
    read = readers.TrainReader(
      source,
      self._order,
      self._crop_size,
      self._augmentation,
      self._skip_corrupt,
      self._rows,
      self._scene_reader,
    )
    finish = _compile(_finish, self._sharding, **self._static)

    def feed(step):
      if self._host is None:
        self._host = readers.read_ahead(
          readers.train_batches(read, int(step)), self._num_workers
        )
      batch = next(self._host)
      _note_skipped(self.skipped, batch.pop('skipped'))
      return finish(self._key, step, self._place(batch))

    return feed

  def _cached_feed(self, source, cache_size: int | None):
    """Returns a function from a step to its batch, cropped from the cache."""
    size, augmentation = self._crop_size, self._augmentation
    resized = augmentation.crop == 'resized'
    decoded = device_cache.decode_all(
      source,
      cache_size or device_cache.default_cache_size(size, augmentation),
      box_fn=decode.whole_image if resized else readers.fitted_box(size),
      skip_corrupt=self._skip_corrupt,
    )
    _note_skipped(self.skipped, decoded.corrupt.values())
    good = np.ones(len(source), bool)
    good[list(decoded.corrupt)] = False
    # Replicate the cache, because a batch's rows come from all parts of it.
    cache = distributed.place(
      (decoded.image, decoded.label, decoded.aspect),
      distributed.replicated(self._sharding),
    )
    backgrounds = None
    if self._scene_reader:
      backgrounds = device_cache.decode_all(
        source, scenes_lib.BACKGROUND_SIZE, skip_corrupt=self._skip_corrupt
      ).image
    draw = _compile(_draw, self._sharding, crop_size=size, **self._static)

    def feed(step):
      candidates = self._order.candidates(step)
      indices = candidates[good[candidates]][: self._order.batch_size]
      readers.check_full(len(indices), self._order)
      indices = indices[self._rows]
      batch = {'index': indices.astype(np.int32)}
      if self._scene_reader:
        epoch = int(step) // self.steps_per_epoch
        batch |= self._scene_reader.take(indices, epoch, backgrounds, good)
      return draw(self._key, step, cache, self._place(batch))

    return feed


class EvalBatches:
  """An iterable over all examples in order; the last batch is padded.

  Attributes:
    num_examples: number of examples in one pass.
    skipped: names of the corrupt images found so far.
  """

  def __init__(
    self,
    source,
    *,
    image_size: int,
    batch_size: int,
    resize_ratio: float = decode.RESIZE_RATIO,
    scenes: scenes_lib.Scenes | None = None,
    indices: Sequence[int] | None = None,
    normalization: str = 'imagenet',
    cache: str = 'none',
    num_workers: int = 0,
    skip_corrupt: bool = False,
    sharding: jax.sharding.Sharding | None = None,
  ):
    """Checks the arguments.

    Args:
      source: the encoded examples; picklable, and safe to read from threads.
      image_size: side of the images, in pixels.
      batch_size: number of images per batch, over all devices.
      resize_ratio: short side of the resized image divided by `image_size`,
        before the center crop.
      scenes: scenes to place the images into; None for images that fill the
        network's input.
      indices: examples to read, in this order; None for all.
      normalization: one of `augment.NORMALIZATIONS`.
      cache: 'none' decodes in each pass; 'device' keeps the uint8 batches of
        the first pass in device memory.
      num_workers: see `TrainBatches`. Each pass restarts the processes, which
        takes seconds, so prefer threads (0) or the cache.
      skip_corrupt: whether to give corrupt images weight 0 and log their names,
        instead of raising an error.
      sharding: see `TrainBatches`.

    Raises:
      ValueError: an argument is out of range.
    """
    _check(source, image_size, batch_size, cache, num_workers, sharding)
    size = scenes.crop_size if scenes else image_size
    decode.evaluation_box(1, 1, size, resize_ratio)  # raises
    self._indices = range(len(source)) if indices is None else indices
    self.num_examples = len(self._indices)
    if cache == 'device':
      device_cache.check_memory((self.num_examples, image_size, image_size, 3))
    self.skipped: list[str] = []
    self._batch_size = batch_size
    self._num_workers = num_workers
    self._sharding = sharding
    self._source = source
    self._read = readers.EvalReader(
      source,
      readers.ExampleReader(
        size,
        readers.fitted_box(size, resize_ratio),
        skip_corrupt,
        mask_ratio=None if scenes else resize_ratio,
      ),
      readers.scene_reader(
        scenes, source, scenes_lib.EVALUATION_SEED, skip_corrupt
      ),
    )
    self._compose = scenes and _compile(
      scenes_lib.compose_batch, sharding, scenes=scenes, image_size=image_size
    )
    self._keep = cache == 'device'
    self._kept: list[dict[str, jax.Array]] | None = None
    self._normalize = _compile(
      augment.normalize, sharding, normalization=normalization
    )

  @property
  def num_skipped(self) -> int:
    """Number of corrupt images found so far, each counted once."""
    return len(self.skipped)

  def __len__(self) -> int:
    return -(-self.num_examples // self._batch_size)

  def __iter__(self) -> Iterator[dict[str, jax.Array]]:
    """Yields batches of N = batch_size examples.

    'image': normalized float32[N, S, S, 3]; 'label': int32[N]; 'weight':
    float32[N], 1 for examples, 0 for padding and corrupt images; 'object_mask':
    bool[N, S, S], with scenes or if the source has masks.
    """
    for batch in self._uint8_batches():
      yield {**batch, 'image': self._normalize(batch['image'])}

  def _uint8_batches(self) -> Iterator[dict[str, jax.Array]]:
    if self._kept is not None:
      yield from self._kept
      return
    kept = []
    size = self._batch_size
    rows = distributed.rows_of(self._sharding, size)
    host = readers.read_ahead(
      readers.eval_batches(self._read, self._indices, size, rows),
      self._num_workers,
    )
    try:
      for number, batch in enumerate(host):
        weightless = number * size + rows[batch['weight'] == 0]
        _note_skipped(
          self.skipped,
          (
            self._source[self._indices[i]]['name']
            for i in weightless
            if i < self.num_examples
          ),
        )
        batch = distributed.place(batch, self._sharding)
        if self._compose:
          batch = self._compose(batch)
        kept += [batch] if self._keep else []
        yield batch
    finally:
      host.close()
    self._kept = kept or None


def _draw(key, step, cache, batch, *, crop_size, augmentation, **static):
  """Returns the batch of a step from the device cache."""
  crop_key, _ = jax.random.split(jax.random.fold_in(key, step))
  index = batch.pop('index')
  images, labels, aspects = (array[index] for array in cache)
  if augmentation.crop == 'resized':
    images = device_cache.random_crops(
      crop_key,
      images,
      aspects,
      image_size=crop_size,
      augmentation=augmentation,
    )
  batch |= {'image': images, 'label': labels}
  return _finish(key, step, batch, augmentation=augmentation, **static)


def _finish(key, step, batch, *, scenes, image_size, **static):
  """Returns the batch of a step, given cropped images and parts of scenes."""
  _, key = jax.random.split(jax.random.fold_in(key, step))
  images, labels = batch.pop('image'), batch.pop('label')
  place = scenes and functools.partial(
    scenes.compose, **batch, image_size=image_size
  )
  result = augment.augment(key, images, labels, place=place, **static)
  if scenes:
    mask = scenes_lib.object_mask(batch['layout'], image_size)
    result['object_mask'] = mask
  return result


@functools.lru_cache(maxsize=64)
def _compile(function, sharding, **static):
  """Returns a jitted function, cached by its configuration."""
  return jax.jit(functools.partial(function, **static), out_shardings=sharding)


def _note_skipped(skipped: list[str], names: Iterable[str]) -> None:
  for name in names:
    if name not in skipped:
      logging.warning('skipping the corrupt image %r', name)
      skipped.append(name)


def _require(*conditions: tuple[bool, str]) -> None:
  """Raises ValueError with the message of the first violated condition."""
  for holds, message in conditions:
    if not holds:
      raise ValueError(message)


def _check(source, image_size, batch_size, cache, num_workers, sharding):
  largest = decode.MAX_IMAGE_SIZE
  _require(
    (bool(len(source)), 'the data set has no examples'),
    (
      1 <= image_size <= largest,
      f'image_size must be in [1, {largest}]; got {image_size}',
    ),
    (batch_size >= 1, f'batch_size must be >= 1; got {batch_size}'),
    (cache in CACHES, f'cache must be one of {CACHES}; got {cache!r}'),
    (num_workers >= 0, f'num_workers must be >= 0; got {num_workers}'),
    (
      not num_workers or flags.FLAGS.is_parsed(),
      f'num_workers={num_workers} needs parsed absl flags, which grain uses: '
      'start the program with absl.app.run',
    ),
  )
  if sharding is not None:
    try:
      sharding.shard_shape((batch_size,))
    except ValueError as error:
      raise ValueError(
        f'batch_size {batch_size} cannot be split evenly over '
        f'{len(sharding.device_set)} devices'
      ) from error
