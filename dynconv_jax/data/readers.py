"""Host side of the batches: which examples, and reading them ahead."""

from __future__ import annotations

import dataclasses
import functools
import os

import grain
import numpy as np

from dynconv_jax.data import augment, decode, device_cache

_FOREVER = 2**62

# Each thread reads a whole batch, which takes memory.
_MAX_THREADS = 16


@dataclasses.dataclass(frozen=True)
class EpochOrder:
  """Which examples make up which batch."""

  num_examples: int
  batch_size: int
  seed: int

  @property
  def steps_per_epoch(self) -> int:
    return self.num_examples // self.batch_size

  def candidates(self, step: int) -> np.ndarray:
    """Returns int64[num_examples], of which the first good ones are the batch.

    That is the epoch's order from the batch's start on, and then around.
    """
    epoch, batch = divmod(step, self.steps_per_epoch)
    order = _permutation(self.num_examples, self.seed, epoch)
    return np.roll(order, -batch * self.batch_size)

  def rng(self, step: int) -> np.random.Generator:
    """Returns the generator of a batch's crops."""
    return np.random.default_rng((self.seed, 1, step))


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, 0, epoch)).permutation(n)


@dataclasses.dataclass(frozen=True)
class TrainReader:
  """Reads the batch of a step on the host: decoded, cropped, uint8."""

  source: object
  order: EpochOrder
  image_size: int
  augmentation: augment.Augmentation
  skip_corrupt: bool

  def __call__(self, step: int) -> dict:
    size, batch_size = self.image_size, self.order.batch_size
    images = np.empty((batch_size, size, size, 3), np.uint8)
    labels = np.empty(batch_size, np.int32)
    uniform = self.order.rng(step).random((batch_size, 4))
    skipped, count = [], 0
    for index in self.order.candidates(step):
      example = self.source[int(index)]
      box_fn = fitted_box(size)
      if self.augmentation.crop == 'resized':
        box_fn = functools.partial(
          augment.crop_boxes, uniform[count], augmentation=self.augmentation
        )
      try:
        images[count] = decode.decode_resized(
          example['image'],
          example['name'],
          size,
          box_fn,
          reducing_gap=device_cache.REDUCING_GAP,
        )
      except decode.CorruptImageError:
        if not self.skip_corrupt:
          raise
        skipped.append(example['name'])
        continue
      labels[count] = example['label']
      count += 1
      if count == batch_size:
        break
    check_full(count, self.order)
    return {'image': images, 'label': labels, 'skipped': skipped}


@dataclasses.dataclass(frozen=True)
class EvalReader:
  """Decodes an example for evaluation: the center, uint8; weight 0: corrupt."""

  image_size: int
  resize_ratio: float
  skip_corrupt: bool

  def __call__(self, example: dict) -> dict:
    size, name = self.image_size, example['name']
    result = {
      'image': np.zeros((size, size, 3), np.uint8),
      'label': np.int32(example['label']),
      'weight': np.float32(0),
    }
    if 'object_mask' in example:
      result['object_mask'] = np.zeros((size, size), bool)
    try:
      result['image'] = decode.decode_resized(
        example['image'], name, size, fitted_box(size, self.resize_ratio)
      )
      if 'object_mask' in example:
        result['object_mask'] = decode.decode_mask(
          example['object_mask'], name, size, self.resize_ratio
        )
      result['weight'] = np.float32(1)
    except decode.CorruptImageError:
      if not self.skip_corrupt:
        raise
    return result


def fitted_box(image_size: int, resize_ratio: float = 1.0):
  """Returns the function from (width, height) to evaluation's box."""
  return functools.partial(
    decode.evaluation_box, image_size=image_size, resize_ratio=resize_ratio
  )


def train_batches(reader: TrainReader, start: int) -> grain.MapDataset:
  """Returns the batches of all steps from `start` on."""
  return grain.MapDataset.range(start, _FOREVER).map(reader)


def eval_batches(
  source, reader: EvalReader, batch_size: int
) -> grain.MapDataset:
  """Returns every example once, in batches; the last is padded with zeros."""
  pad = functools.partial(
    grain.experimental.batch_and_pad, batch_size=batch_size
  )
  rows = grain.MapDataset.source(source).map(reader)
  return rows.batch(batch_size, batch_fn=pad)


def read_ahead(
  dataset: grain.MapDataset, num_workers: int
) -> grain.DatasetIterator:
  """Returns an iterator over a data set of batches, read ahead, in order.

  Args:
    dataset: picklable.
    num_workers: processes that read; 0: threads of this process, one a core.
      The order of the batches is the same for any.
  """
  num_threads = 1 if num_workers else min(os.cpu_count(), _MAX_THREADS)
  dataset = dataset.to_iter_dataset(
    grain.ReadOptions(
      num_threads=num_threads, prefetch_buffer_size=num_threads + 1
    )
  )
  if num_workers:
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=2
      )
    )
  return iter(dataset)


def check_full(count: int, order: EpochOrder) -> None:
  """Raises ValueError if too few images are good for a batch."""
  if count < order.batch_size:
    raise ValueError(
      f'only {count} of the {order.num_examples} images can be decoded, fewer '
      f'than the batch size {order.batch_size}'
    )
