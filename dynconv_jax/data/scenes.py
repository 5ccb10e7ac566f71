"""Scenes: a small photograph at a random place on another, blurred photograph.

Scenes turn any data set of photographs into one in which most of each image
need not be computed. The photograph's rectangle is the object's true location.

The host draws each scene's layout from the seed, the epoch, and the example,
because it must know the background before it decodes. `Scenes.compose` then
composes a batch under jit. Layouts are in pixels of the scene, and photographs
are resampled once, directly to the network's input. Networks with different
input sizes thus see the same scenes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynconv_jax.data import decode

# Backgrounds are shrunk to this side and then smoothly enlarged, which makes
# their objects unrecognizable.
BACKGROUND_SIZE = 8

# Scenes of evaluation are the same for all networks and seeds.
EVALUATION_SEED = (0, 3)


def training_seed(seed: int) -> tuple[int, ...]:
  """Returns the seed of a run's scenes, separate from order and crops."""
  return (seed, 2)


@dataclasses.dataclass(frozen=True)
class Scenes:
  """Sizes of scenes and of the photographs in them.

  Attributes:
    scene_size: side of a scene in pixels, as (low, high) or one number.
    object_size: side of the photograph in pixels of the scene, as (low, high)
      or one number; at most the smallest scene.
  """

  scene_size: tuple[int, ...]
  object_size: tuple[int, ...]

  def __post_init__(self):
    given = ', '.join(f'{k}={v}' for k, v in dataclasses.asdict(self).items())
    for name in ('scene_size', 'object_size'):
      value = getattr(self, name)
      if len(value) not in (1, 2):
        raise ValueError(
          'scene_size and object_size must each be one number or two (low and '
          f'high), or both must be empty; got {given}'
        )
      object.__setattr__(self, name, (value[0], value[-1]))
    small, large = self.object_size
    low, high = self.scene_size
    limit = decode.MAX_IMAGE_SIZE
    if not 1 <= small <= large <= low <= high <= limit:
      raise ValueError(
        f'object_size and scene_size must rise from 1 to {limit}, and the '
        f'largest object must fit into the smallest scene; got {given}'
      )

  @property
  def crop_size(self) -> int:
    """Side of photographs' crops, in pixels; equals the largest object."""
    return self.object_size[1]

  def compose(
    self,
    images: jax.Array,
    background: jax.Array,
    layout: jax.Array,
    *,
    image_size: int,
  ) -> jax.Array:
    """Returns scenes, uint8 or float32[N, image_size, image_size, 3].

    The function is pure and has static shapes; call it under jit. The
    photograph is resampled once, with antialiasing, from its crop to its place
    in the result, with subpixel-accurate borders. If the result has the scene's
    size and the object its crop's size, the crop's pixels are copied exactly.

    Args:
      images: [N, C, C, 3], the photographs, uint8 in [0, 255] or float in
        [0, 1]. The scenes are uint8 or float32, respectively.
      background: uint8[N, B, B, 3], other photographs, shrunk.
      layout: int32[N, 4] of (scene, object, left, top): sides of the scene and
        the object, and the object's corner, in pixels of the scene. Zeros leave
        the object out.
      image_size: side of the result, in pixels.
    """
    n, crop_size = images.shape[:2]
    shape = (n, image_size, image_size, 3)
    scenes = jax.image.resize(_to_float(background), shape, 'cubic')
    scenes = jnp.clip(scenes, 0, 1)
    # Resample only a patch around the object, which is a quarter of the work.
    least, most = np.divide(self.object_size, self.scene_size[::-1])
    patch = min(image_size, math.ceil(most * image_size) + 1)
    # Border pixels are partly covered, so extend the crop beyond its edges.
    pad = math.ceil(0.5 * crop_size / (least * image_size))
    edges = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    padded = jnp.pad(_to_float(images), edges, 'edge')
    start, stop = _corners(layout, image_size)
    corner = jnp.clip(jnp.floor(start), 0, image_size - patch)
    corner = corner.astype(jnp.int32)
    start, stop = start - corner, stop - corner
    cover = _cover(start, stop, patch)
    scale = jnp.maximum(stop - start, 1) / crop_size

    def place(scene, image, corner, start, scale, cover):
      at, size = (corner[0], corner[1], 0), (patch, patch, 3)
      image = jax.image.scale_and_translate(
        image, size, (0, 1), scale, start - pad * scale, 'linear'
      )
      around = jax.lax.dynamic_slice(scene, at, size)
      cover = (cover[0][:, None] * cover[1])[..., None]
      image = around + cover * (image - around)
      return jax.lax.dynamic_update_slice(scene, image, at)

    scenes = jax.vmap(place)(scenes, padded, corner, start, scale, cover)
    if images.dtype == jnp.uint8:
      # Round ties, from borders that cover half a pixel, down on any device.
      return jnp.round(255 * scenes - 1e-3).astype(jnp.uint8)
    return scenes


@dataclasses.dataclass(frozen=True)
class SceneReader:
  """Draws layouts of scenes and reads their backgrounds.

  A scene depends only on the seed, the epoch, and the example's index in its
  split, not on the batch or the first step of the iteration.

  Attributes:
    scenes: sizes of the scenes.
    source: the encoded examples of the split.
    read: returns 'image', an example's whole image, uint8[B, B, 3], and
      'weight', which is 0 if the image is corrupt. The next candidate is then
      used as background.
    seed: seed of all scenes.
  """

  scenes: Scenes
  source: Any
  read: Callable[[Any], dict[str, np.ndarray]]
  seed: tuple[int, ...]

  def __post_init__(self):
    if len(self.source) < 2:
      raise ValueError(
        'scenes need at least two examples, one of them as the background; got '
        f'{len(self.source)}'
      )

  def draw(
    self, index: int, epoch: int = 0
  ) -> tuple[np.ndarray, Iterator[int]]:
    """Returns the layout of a scene, int32[4], and background candidates.

    The candidates are all other examples; the first good one is used.

    Args:
      index: index of the example.
      epoch: index of the epoch; always 0 in evaluation.
    """
    others = len(self.source) - 1
    rng = np.random.default_rng((*self.seed, epoch, int(index)))
    uniform = iter(rng.random(5))

    def integer(low: int, high: int) -> int:
      return low + int(next(uniform) * (high - low + 1))

    scene = integer(*self.scenes.scene_size)
    side = integer(*self.scenes.object_size)
    left, top = integer(0, scene - side), integer(0, scene - side)
    first = integer(0, others - 1)
    candidates = (
      (int(index) + 1 + (first + i) % others) % (others + 1)
      for i in range(others)
    )
    return np.array([scene, side, left, top], np.int32), candidates

  def __call__(self, index: int, epoch: int = 0) -> dict[str, np.ndarray]:
    """Returns a scene's 'layout', int32[4], and 'background', uint8[B, B, 3].

    Args:
      index: index of the example.
      epoch: see `draw`.

    Raises:
      CorruptImageError: raised by `read`.
      ValueError: all candidates are corrupt.
    """
    layout, candidates = self.draw(index, epoch)
    for candidate in candidates:
      row = self.read(self.source[candidate])
      if row['weight']:
        return {'layout': layout, 'background': row['image']}
    raise _no_background()

  def take(
    self, indices: np.ndarray, epoch: int, backgrounds: np.ndarray, good
  ) -> dict[str, np.ndarray]:
    """Returns the parts of a batch of scenes, given decoded backgrounds.

    Args:
      indices: int[N], indices of the examples.
      epoch: see `draw`.
      backgrounds: uint8[n, B, B, 3], backgrounds from all examples.
      good: bool[n], false if an example is corrupt.
    """
    layouts, chosen = [], []
    for layout, candidates in (self.draw(i, epoch) for i in indices):
      layouts.append(layout)
      chosen.append(next((c for c in candidates if good[c]), None))
    if None in chosen:
      raise _no_background()
    return {'layout': np.stack(layouts), 'background': backgrounds[chosen]}


def compose_batch(
  batch: dict[str, jax.Array], *, scenes: Scenes, image_size: int
) -> dict[str, jax.Array]:
  """Returns an evaluation batch with its photographs placed in scenes.

  Args:
    batch: has 'image', 'background', and 'layout', see `Scenes.compose`; other
      entries are kept.
    scenes: sizes of the scenes.
    image_size: side of the result, in pixels.

  Returns:
    The batch with composed 'image', and 'object_mask', the true mask,
    bool[N, image_size, image_size].
  """
  rest = dict(batch)
  parts = {name: rest.pop(name) for name in ('background', 'layout')}
  images = scenes.compose(rest['image'], **parts, image_size=image_size)
  mask = object_mask(parts['layout'], image_size)
  return {**rest, 'image': images, 'object_mask': mask}


def object_mask(layout: jax.Array, image_size: int) -> jax.Array:
  """Returns the true masks of objects, bool[N, image_size, image_size].

  A pixel belongs to the object if its center is in the object's rectangle.

  Args:
    layout: see `Scenes.compose`.
    image_size: side of the mask, in pixels.
  """
  scene, side, left, top = (layout[:, i, None] for i in range(4))
  # Compare the center (i + 1/2) / image_size with start / scene in integers.
  center = (2 * jnp.arange(image_size) + 1) * scene
  rows, columns = (
    (center >= 2 * image_size * start)
    & (center < 2 * image_size * (start + side))
    for start in (top, left)
  )
  return rows[:, :, None] & columns[:, None, :]


def _corners(layout, image_size: int) -> tuple[jax.Array, jax.Array]:
  """Returns (top, left) and (bottom, right) in pixels, float[N, 2] each."""
  scene, side, left, top = (layout[:, i, None] for i in range(4))
  start = jnp.concatenate([top, left], axis=1)
  # Divide last, so that whole numbers are exact.
  scene = jnp.maximum(scene, 1)
  return image_size * start / scene, image_size * (start + side) / scene


def _cover(start, stop, length: int) -> jax.Array:
  """Returns the fraction of each pixel in [start, stop], [N, 2, length]."""
  pixel = jnp.arange(length)
  start, stop = start[..., None], stop[..., None]
  inside = jnp.minimum(stop, pixel + 1) - jnp.maximum(start, pixel)
  return jnp.clip(inside, 0, 1)


def _to_float(images: jax.Array) -> jax.Array:
  scale = 255 if images.dtype == jnp.uint8 else 1
  return images.astype(jnp.float32) / scale


def _no_background() -> ValueError:
  return ValueError(
    'scenes need at least two images that can be decoded, one of them as the '
    'background'
  )
