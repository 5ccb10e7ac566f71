"""The host side of batches: order of examples, reading, and prefetching."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import numpy as np
from etils import epy

from dynconv_jax.data import augment, decode, scenes
from dynconv_jax.data.randaugment import randaugment

# Imported lazily because it is slow, and most programs do not need it.
with epy.lazy_imports():
  import grain

# Minimum number of decoded JPEG pixels per pixel of a training image.
REDUCING_GAP = 2.0

_FOREVER = 2**62

# Each thread reads a whole batch, which takes memory.
_MAX_THREADS = 16


@dataclasses.dataclass(frozen=True)
class EpochOrder:
  """The order of examples in batches."""

  num_examples: int
  batch_size: int
  seed: int

  @property
  def steps_per_epoch(self) -> int:
    return self.num_examples // self.batch_size

  def candidates(self, step: int) -> np.ndarray:
    """Returns candidates for a batch, int64[num_examples].

    The batch consists of the first good candidates. Candidates are the epoch's
    order, rotated to the batch's start.
    """
    epoch, batch = divmod(step, self.steps_per_epoch)
    order = _permutation(self.num_examples, self.seed, epoch)
    return np.roll(order, -batch * self.batch_size)

  def rng(self, step: int) -> np.random.Generator:
    """Returns the random generator of a batch's crops."""
    return np.random.default_rng((self.seed, 1, step))


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, 0, epoch)).permutation(n)


@dataclasses.dataclass(frozen=True)
class ExampleReader:
  """Decodes an example and resamples a box of its image as uint8.

  Attributes:
    image_size: side of the result, in pixels.
    box_fn: returns the box, given the image's (width, height).
    skip_corrupt: whether to give corrupt images weight 0 instead of raising an
      error.
    reducing_gap: see `decode.decode_resized`.
    mask_ratio: `resize_ratio` of `decode.decode_mask`; None for no object mask.
  """

  image_size: int
  box_fn: Callable[[int, int], decode.Box]
  skip_corrupt: bool
  reducing_gap: float | None = None
  mask_ratio: float | None = None

  def __call__(self, example: dict) -> dict:
    size, name = self.image_size, example['name']
    row = {
      'image': np.zeros((size, size, 3), np.uint8),
      'label': np.int32(example['label']),
      'weight': np.float32(0),
      'aspect': np.float32(1),
    }

    def box_fn(width: int, height: int) -> decode.Box:
      row['aspect'] = np.float32(width / height)
      return self.box_fn(width, height)

    has_mask = self.mask_ratio is not None and 'object_mask' in example
    if has_mask:
      row['object_mask'] = np.zeros((size, size), bool)
    try:
      row['image'] = decode.decode_resized(
        example['image'], name, size, box_fn, reducing_gap=self.reducing_gap
      )
      if has_mask:
        row['object_mask'] = decode.decode_mask(
          example['object_mask'], name, size, self.mask_ratio
        )
      row['weight'] = np.float32(1)
    except decode.CorruptImageError:
      if not self.skip_corrupt:
        raise
    return row


@dataclasses.dataclass(frozen=True)
class TrainReader:
  """Reads, decodes, and crops the batch of a step on the host, as uint8.

  Attributes:
    source: the encoded examples.
    order: order of examples in batches.
    image_size: side of the images, in pixels.
    augmentation: its crop and RandAugment are applied.
    skip_corrupt: whether to replace corrupt images with the next good ones. If
      so, all rows are decoded, even those that this process does not keep.
    rows: int[share], rows of the batch to keep.
    scene_reader: reads the parts of scenes, or None.
  """

  source: object
  order: EpochOrder
  image_size: int
  augmentation: augment.Augmentation
  skip_corrupt: bool
  rows: np.ndarray
  scene_reader: scenes.SceneReader | None = None

  def __call__(self, step: int) -> dict:
    epoch = step // self.order.steps_per_epoch
    rng, n = self.order.rng(step), self.order.batch_size
    uniform = rng.random((n, 4))
    operations, strength = (*self.augmentation.randaugment, 0, 0)[:2]
    drawn = rng.random((n, int(operations), 2))
    rows, skipped = [], []
    for index in self.order.candidates(step):
      if len(rows) == self.order.batch_size:
        break
      if not self.skip_corrupt and len(rows) not in self.rows:
        rows.append(None)
        continue
      box_fn = fitted_box(self.image_size)
      if self.augmentation.crop == 'resized':
        box_fn = functools.partial(
          augment.crop_boxes,
          uniform[len(rows)],
          augmentation=self.augmentation,
        )
      example = self.source[int(index)]
      row = ExampleReader(
        self.image_size, box_fn, self.skip_corrupt, REDUCING_GAP
      )(example)
      if not row['weight']:
        skipped.append(example['name'])
        continue
      if operations:
        row['image'] = randaugment(row['image'], drawn[len(rows)], strength)
      if self.scene_reader is not None:
        row |= self.scene_reader(index, epoch)
      rows.append(row)
    check_full(len(rows), self.order)
    rows = [rows[i] for i in self.rows]
    keys = rows[0].keys() - {'weight', 'aspect'}
    batch = {key: np.stack([r[key] for r in rows]) for key in keys}
    return batch | {'skipped': skipped}


@dataclasses.dataclass(frozen=True)
class EvalReader:
  """Reads the example at an index, and the parts of its scene.

  An index below 0 is padding and yields zeros.
  """

  source: object
  read: ExampleReader
  scene_reader: scenes.SceneReader | None = None

  def __call__(self, index: int) -> dict:
    if index < 0:
      return self._padding
    row = self.read(self.source[index])
    del row['aspect']
    if self.scene_reader is not None:
      row |= self.scene_reader(index)
    return row

  @functools.cached_property
  def _padding(self) -> dict:
    read = dataclasses.replace(self.read, skip_corrupt=True)
    row = dataclasses.replace(self, read=read)(0)
    return {name: np.zeros_like(value) for name, value in row.items()}


def scene_reader(
  sizes: scenes.Scenes | None, source, seed: tuple[int, ...], skip_corrupt: bool
) -> scenes.SceneReader | None:
  """Returns the reader of the parts of scenes, or None without scenes."""
  if sizes is None:
    return None
  read = ExampleReader(
    scenes.BACKGROUND_SIZE, decode.whole_image, skip_corrupt, REDUCING_GAP
  )
  return scenes.SceneReader(sizes, source, read, seed)


def fitted_box(image_size: int, resize_ratio: float = 1.0):
  """Returns a function from (width, height) to evaluation's box."""
  return functools.partial(
    decode.evaluation_box, image_size=image_size, resize_ratio=resize_ratio
  )


def train_batches(reader: TrainReader, start: int) -> grain.MapDataset:
  """Returns the batches of all steps from `start` on."""
  return grain.MapDataset.range(start, _FOREVER).map(reader)


def eval_batches(
  reader: EvalReader, indices: Sequence[int], batch_size: int, rows: np.ndarray
) -> grain.MapDataset:
  """Returns batches of examples; the last one is padded with zeros.

  Args:
    reader: reads an example.
    indices: indices of the examples.
    batch_size: size of a batch over all processes.
    rows: int[share], rows of each batch to read.
  """
  padded = np.full(-(-len(indices) // batch_size) * batch_size, -1)
  padded[: len(indices)] = indices
  share = padded.reshape(-1, batch_size)[:, rows].reshape(-1)
  return grain.MapDataset.source(share).map(reader).batch(len(rows))


def read_ahead(
  dataset: grain.MapDataset, num_workers: int
) -> grain.DatasetIterator:
  """Returns an iterator that prefetches batches, in order.

  Args:
    dataset: the batches; must be picklable.
    num_workers: number of reading processes; 0 for threads of this process, one
      per core, up to 16. The order of batches does not depend on it.
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
  """Raises ValueError if there are too few good images for a batch."""
  if count < order.batch_size:
    raise ValueError(
      f'only {count} of the {order.num_examples} images can be decoded, fewer '
      f'than the batch size {order.batch_size}'
    )
