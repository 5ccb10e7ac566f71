"""A uint8 cache of the training set on the device, and random crops from it.

Every image is resized to a square of `cache_size` pixels. Its aspect ratio is
stored too, and the crop undoes the distortion. Padding to a square would waste
memory, and a center crop would lose the rest of the image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epy

from dynconv_jax.data import augment, decode, readers

# Imported lazily because it is slow.
with epy.lazy_imports():
  import grain


@dataclasses.dataclass(frozen=True)
class DecodedImages:
  """The decoded images of a data set, resized to one size.

  Attributes:
    image: uint8[n, C, C, 3]; rows of corrupt images are zero.
    label: int32[n].
    aspect: float32[n], width divided by height of the original images.
    corrupt: index -> name of images that could not be decoded.
  """

  image: np.ndarray
  label: np.ndarray
  aspect: np.ndarray
  corrupt: dict[int, str]


def default_cache_size(
  image_size: int, augmentation: augment.Augmentation
) -> int:
  """Returns the smallest side at which no square crop is enlarged."""
  if augmentation.crop != 'resized':
    return image_size
  return math.ceil(image_size / math.sqrt(augmentation.crop_scale[0]))


def check_memory(shape: tuple[int, ...]) -> None:
  """Raises ValueError if uint8 images of this shape exceed the memory.

  Args:
    shape: (n, height, width, channels).
  """
  num_bytes = math.prod(shape)
  stats = jax.local_devices()[0].memory_stats() or {}
  limit = stats.get('bytes_limit')
  if limit is None:  # A CPU, which uses the host's memory.
    limit = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if num_bytes > limit:
    raise ValueError(
      f'cache=device needs {num_bytes / 2**30:.1f} GiB for {shape[0]} images '
      f'of {shape[1]} x {shape[2]} pixels; the device has '
      f'{limit / 2**30:.1f} GiB. Use a smaller cache_size or cache=none'
    )


def decode_all(
  source,
  cache_size: int,
  *,
  box_fn=decode.whole_image,
  skip_corrupt: bool = False,
) -> DecodedImages:
  """Decodes all images of a source in parallel into one array.

  Args:
    source: the encoded examples.
    cache_size: side of the cached images, in pixels.
    box_fn: returns the box to keep, given an image's (width, height).
    skip_corrupt: whether to record corrupt images instead of raising an error.

  Raises:
    CorruptImageError: an image cannot be decoded, unless `skip_corrupt` is set.
    ValueError: the array does not fit into memory.
  """
  n = len(source)
  shape = (n, cache_size, cache_size, 3)
  check_memory(shape)
  images = np.zeros(shape, np.uint8)
  labels, aspects = np.zeros(n, np.int32), np.ones(n, np.float32)
  corrupt = {}
  reader = readers.ExampleReader(
    cache_size, box_fn, skip_corrupt, readers.REDUCING_GAP
  )
  rows = grain.MapDataset.source(source).map(reader)
  with contextlib.closing(readers.read_ahead(rows, num_workers=0)) as ahead:
    for i, row in enumerate(ahead):
      images[i], labels[i] = row['image'], row['label']
      aspects[i] = row['aspect']
      if not row['weight']:
        corrupt[i] = source[i]['name']
      logging.log_every_n_seconds(
        logging.INFO, 'decoded %d of %d images', 10, i + 1, n
      )
  logging.info('cached %d images, %.0f MiB', n, images.nbytes / 2**20)
  return DecodedImages(images, labels, aspects, corrupt)


def random_crops(
  key: jax.Array,
  images: jax.Array,
  aspects: jax.Array,
  *,
  image_size: int,
  augmentation: augment.Augmentation,
) -> jax.Array:
  """Returns random crops, float32[N, image_size, image_size, 3] in [0, 1].

  Args:
    key: the batch's random key.
    images: uint8[N, C, C, 3], cached images.
    aspects: float32[N], width divided by height of the original images.
    image_size: side of the crops, in pixels.
    augmentation: its `crop_scale` and `crop_ratio` are used.
  """
  uniform = jax.random.uniform(key, (images.shape[0], 4))
  boxes = augment.crop_boxes(
    uniform, aspects, jnp.ones_like(aspects), augmentation, jnp
  )
  # Map from the original proportions to the square.
  to_square = jnp.stack([1 / aspects, jnp.ones_like(aspects)], axis=1)
  boxes *= images.shape[1] * jnp.tile(to_square, 2)
  return crop_and_resize(images, boxes, image_size)


def crop_and_resize(
  images: jax.Array, boxes: jax.Array, image_size: int
) -> jax.Array:
  """Resamples boxes; returns float32[N, image_size, image_size, 3] in [0, 1].

  Bilinear and antialiased, like Pillow's `resize(box=...)` on the host.

  Args:
    images: uint8[N, H, W, 3].
    boxes: float32[N, 4] of (left, top, right, bottom), in pixels.
    image_size: side of the result, in pixels.
  """

  def crop(image: jax.Array, box: jax.Array) -> jax.Array:
    start, stop = box[1::-1], box[:1:-1]  # (top, left), (bottom, right)
    scale = image_size / (stop - start)
    return jax.image.scale_and_translate(
      image,
      (image_size, image_size, 3),
      (0, 1),
      scale,
      -start * scale,
      'linear',
    )

  return jax.vmap(crop)(images.astype(jnp.float32) / 255, boxes)
