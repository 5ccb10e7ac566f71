"""Spots: synthetic images in which only one small object determines the class.

Each image has a textured background with clutter, independent of the class, and
one small shape at a random place. Most of the image need not be computed, and
the object's true mask shows whether a network computes in the right place.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from dynconv_jax.data import decode
from dynconv_jax.data.prepare import prepare
from dynconv_jax.data.source import Common, Dataset, DataSource, option

CLASS_NAMES = ('disc', 'ring', 'square', 'triangle', 'cross', 'bars')

_SPLIT_IDS = {'train': 0, 'test': 1}
# Radius of the object, relative to the image's side. At 32 pixels, the diameter
# is 10 to 13 pixels; objects cover 3 to 10 % of the image.
_MIN_RADIUS, _MAX_RADIUS = 0.15, 0.2


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the source, which determine every pixel."""

  spots_size: int = option(32, 'Side of the drawn images, in pixels.')
  spots_train: int = option(3000, 'Number of drawn training images.')
  spots_test: int = option(1000, 'Number of drawn test images.')
  spots_seed: int = option(0, 'Seed of the drawn images.')

  def __post_init__(self):
    for name, low, high in (
      ('spots_size', 24, decode.MAX_IMAGE_SIZE),
      ('spots_train', 1, 10**9),
      ('spots_test', 1, 10**9),
      ('spots_seed', 0, 2**63 - 1),
    ):
      if not low <= getattr(self, name) <= high:
        raise ValueError(
          f'{name} must be in [{low}, {high}]; got {getattr(self, name)}'
        )


def open_spots(options: Options, common: Common) -> Dataset:
  """Returns the data set; draws its images on first use."""
  numbers = {'train': options.spots_train, 'test': options.spots_test}
  return prepare(
    SOURCE.name,
    '1.0.0',
    lambda _: {
      split: _examples(options, split, number)
      for split, number in numbers.items()
    },
    CLASS_NAMES,
    common.data_dir,
    key=f'{options.spots_size}px-{options.spots_train}-{options.spots_test}-'
    f'seed{options.spots_seed}',
    masks=True,
  )


SOURCE = DataSource('spots', Options, open_spots)


def _examples(options: Options, split: str, number: int):
  for index in range(number):
    image, mask, label = draw(options, split, index)
    yield {
      'image': decode.to_png(image),
      'label': label,
      'name': f'{split}/{index:06d}',
      'object_mask': decode.to_png(mask),
    }


def draw(
  options: Options, split: str, index: int, label: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
  """Returns one image, the mask of its object, and its label.

  Args:
    options: size and seed; the numbers of images are ignored.
    split: 'train' or 'test'.
    index: index of the image in its split.
    label: the class to draw, at the same place. By default, classes alternate,
      so all are equally frequent.

  Returns:
    uint8[size, size, 3], bool[size, size], int.
  """
  rng = np.random.default_rng((options.spots_seed, _SPLIT_IDS[split], index))
  if label is None:
    label = index % len(CLASS_NAMES)
  size = options.spots_size
  image = _background(rng, size)
  radius = size * rng.uniform(_MIN_RADIUS, _MAX_RADIUS)
  center = rng.uniform(radius + 1, size - 2 - radius, 2)
  angle = rng.uniform(0, 2 * np.pi)
  y, x = _grid(size)
  # Coordinates in the object's own frame, in units of its radius.
  dy, dx = (y - center[0]) / radius, (x - center[1]) / radius
  u = np.cos(angle) * dx + np.sin(angle) * dy
  v = -np.sin(angle) * dx + np.cos(angle) * dy
  inside = SHAPES[CLASS_NAMES[label]](u, v)
  # One pixel of linear ramp at the edge.
  cover = np.clip(0.5 - inside * radius, 0, 1)[..., None]
  around = image[np.hypot(dy, dx) < 1].mean(axis=0)
  color = _contrasting_color(rng, around)
  image = image * (1 - cover) + color * cover
  image += rng.normal(0, 0.015, image.shape).astype(np.float32)
  image = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
  return image, cover[..., 0] >= 0.5, label


@functools.cache
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
  y, x = np.mgrid[:size, :size].astype(np.float32)
  return y, x


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
  """Returns texture with blobs and segments, float32[size, size, 3]."""
  y, x = _grid(size)
  # Texture: two gratings of any direction over a plain color.
  image = np.broadcast_to(
    rng.uniform(0.3, 0.7, 3).astype(np.float32), (size, size, 3)
  ).copy()
  for _ in range(2):
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    frequency = 2 * np.pi * rng.uniform(2, 8) / size
    wave = np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    image += wave[..., None] * rng.uniform(-0.08, 0.08, 3).astype(np.float32)
  # Clutter: soft blobs and thin segments of any color.
  for _ in range(rng.integers(2, 6)):
    cy, cx = rng.uniform(0, size, 2)
    sigma = size * rng.uniform(0.03, 0.1)
    d2 = ((y - cy) ** 2 + (x - cx) ** 2) / (2 * sigma**2)
    _paint(image, np.exp(-d2), rng.uniform(0, 1, 3))
  for _ in range(rng.integers(2, 5)):
    p, q = rng.uniform(0, size, (2, 2))
    d = (q - p) * min(1, 0.4 * size / max(1e-6, np.hypot(*(q - p))))
    t = ((y - p[0]) * d[0] + (x - p[1]) * d[1]) / (d @ d)
    t = np.clip(t, 0, 1)
    distance = np.hypot(y - p[0] - t * d[0], x - p[1] - t * d[1])
    width = size * rng.uniform(0.005, 0.012)
    _paint(image, np.clip(width + 0.5 - distance, 0, 1), rng.uniform(0, 1, 3))
  return image


def _paint(image: np.ndarray, cover: np.ndarray, color: np.ndarray) -> None:
  image += cover[..., None] * (color.astype(np.float32) - image)


def _contrasting_color(
  rng: np.random.Generator, around: np.ndarray
) -> np.ndarray:
  """Returns a random color that stands out from its surroundings."""
  candidates = rng.uniform(0, 1, (8, 3))
  distances = np.linalg.norm(candidates - around, axis=1)
  far = np.flatnonzero(distances > 0.55)
  return candidates[far[0] if far.size else np.argmax(distances)].astype(
    np.float32
  )


# Signed distances to each shape's edge, negative inside, in units of the common
# radius.
def _box(u, v, half_width, half_height):
  return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _triangle(u, v):
  directions = np.pi / 2 + 2 * np.pi / 3 * np.arange(3)
  return np.max(
    [np.cos(a) * u + np.sin(a) * v - 0.5 for a in directions], axis=0
  )


SHAPES = {
  'disc': lambda u, v: np.hypot(u, v) - 0.9,
  'ring': lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.22,
  'square': lambda u, v: _box(u, v, 0.75, 0.75),
  'triangle': _triangle,
  'cross': lambda u, v: np.minimum(
    _box(u, v, 1.0, 0.25), _box(u, v, 0.25, 1.0)
  ),
  'bars': lambda u, v: np.minimum(
    _box(u - 0.55, v, 0.22, 0.9), _box(u + 0.55, v, 0.22, 0.9)
  ),
}
