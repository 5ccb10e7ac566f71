"""Augmentation: crop boxes, and all jitted steps after the resized crop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dynconv_jax.data.decode import MAX_IMAGE_SIZE
from dynconv_jax.data.randaugment import MAX_STRENGTH

CROPS = ('resized', 'pad', 'none')

# Mean and standard deviation of each channel of images in [0, 1], as published
# weights expect them. PyTorch's weights use ImageNet's statistics; TensorFlow's
# weights use (x - 127) / 128 (efficientnet_lite_builder.py).
NORMALIZATIONS = {
  'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  'inception': ((127 / 255,) * 3, (128 / 255,) * 3),
}
# For runs that start without pretrained weights.
NORMALIZATIONS['auto'] = NORMALIZATIONS['imagenet']

# Zhong et al., 'Random Erasing Data Augmentation' (AAAI 2020), section 4.
_ERASED_AREA = (0.02, 0.33)
_ERASED_RATIO = (0.3, 1 / 0.3)

# An arbitrary upper limit; the paper tries up to 4.
_MOST_OPERATIONS = 100

# Hue jitter has a quarter of the strength of other color jitter: Chen et al.,
# 'SimCLR' (ICML 2020), appendix A.
_HUE_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Augmentation of training images and labels. The default crops and flips.

  Attributes:
    crop: 'resized' for a resized box of random area and aspect ratio (Szegedy
      et al., CVPR 2015, section 6); 'pad' for a random crop after padding by
      `crop_padding` (CIFAR); or 'none' for the crop of evaluation.
    crop_scale: range of the box's area, as a fraction of the image's area
      ('resized').
    crop_ratio: range of the box's width divided by its height ('resized').
    crop_padding: number of black pixels on each side ('pad').
    flip: whether to mirror images horizontally with probability 1/2.
    randaugment: (n, strength) for n RandAugment operations after the crop, each
      with a strength in [0, 10], on the host (see `randaugment`); () for none.
    color_jitter: strength s in [0, 1]. Scales brightness, contrast, and
      saturation by factors in [1 - s, 1 + s], and rotates the hue by up to
      s / 4 of the circle.
    mixup: alpha of the Beta(alpha, alpha) weight for blending each image and
      label with another's (Zhang et al., ICLR 2018); 0 for none.
    cutmix: alpha of the area distribution for pasting a box of another image
      into each image (Yun et al., ICCV 2019); 0 for none. If mixup is also
      enabled, each image gets one of the two.
    random_erasing: probability of blanking a box of an image.
    label_smoothing: fraction of the label that is spread over all classes.
  """

  crop: str = 'resized'
  crop_scale: tuple[float, float] = (0.25, 1.0)
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
  crop_padding: int = 4
  flip: bool = True
  randaugment: tuple[float, ...] = ()
  color_jitter: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0
  random_erasing: float = 0.0
  label_smoothing: float = 0.0

  def __post_init__(self):
    # Flags are lists, which are not hashable.
    object.__setattr__(self, 'crop_scale', tuple(self.crop_scale))
    object.__setattr__(self, 'crop_ratio', tuple(self.crop_ratio))
    object.__setattr__(self, 'randaugment', tuple(self.randaugment))
    for name in ('crop_scale', 'crop_ratio'):
      if len(getattr(self, name)) != 2:
        raise ValueError(
          f'{name} must be two numbers, low and high; got {getattr(self, name)}'
        )
    (low, high), (narrow, wide) = self.crop_scale, self.crop_ratio
    errors = [
      f'{name} must be {allowed}; got {getattr(self, name)!r}'
      for name, holds, allowed in (
        ('crop', self.crop in CROPS, f'one of {CROPS}'),
        ('crop_scale', 0 < low <= high <= 1, '0 < low <= high <= 1'),
        ('crop_ratio', 0 < narrow <= wide < math.inf, '0 < low <= high'),
        (
          'crop_padding',
          0 <= self.crop_padding <= MAX_IMAGE_SIZE,
          f'in [0, {MAX_IMAGE_SIZE}]',
        ),
        (
          'randaugment',
          not self.randaugment or _is_randaugment(*self.randaugment),
          f'N,M (a number of operations from 1 to {_MOST_OPERATIONS}, and a '
          f'strength from 0 to {MAX_STRENGTH:g}), or empty',
        ),
        ('color_jitter', 0 <= self.color_jitter <= 1, 'in [0, 1]'),
        ('random_erasing', 0 <= self.random_erasing <= 1, 'in [0, 1]'),
        ('mixup', self.mixup >= 0, '>= 0'),
        ('mixup', self.mixup != math.inf, 'finite'),
        ('cutmix', self.cutmix >= 0, '>= 0'),
        ('cutmix', self.cutmix != math.inf, 'finite'),
        ('label_smoothing', 0 <= self.label_smoothing < 1, 'in [0, 1)'),
      )
      if not holds
    ]
    if errors:
      raise ValueError('; '.join(errors))

  def check_cache(
    self, cache: str, cache_size: int | None, size: int, name: str
  ) -> None:
    """Raises ValueError if a cache or a size does not fit the augmentation.

    Args:
      cache: 'none' or 'device'.
      cache_size: side of the cached images, in pixels; None for the default.
      size: side of the crops, in pixels.
      name: name of the option that sets `size`, for errors.
    """
    if self.randaugment and cache == 'device':
      raise ValueError(
        'randaugment runs on the host after decoding, so it needs cache=none; '
        f'got cache={cache}'
      )
    if self.crop == 'pad' and self.crop_padding >= size:
      raise ValueError(
        f'crop_padding must be less than {name}, {size}; got '
        f'{self.crop_padding}'
      )
    if cache_size is None:
      return
    if cache != 'device' or self.crop != 'resized':
      raise ValueError(
        'cache_size needs cache=device and crop=resized; got cache='
        f'{cache}, crop={self.crop}'
      )
    if not size <= cache_size <= MAX_IMAGE_SIZE:
      raise ValueError(
        f'cache_size must be in [{size}, {MAX_IMAGE_SIZE}], at least {name}; '
        f'got {cache_size}'
      )


def _is_randaugment(n: float, strength: float = -1, *more: float) -> bool:
  return (
    not more
    and n in range(1, _MOST_OPERATIONS + 1)
    and 0 <= strength <= MAX_STRENGTH
  )


def normalize(
  images: jax.Array | np.ndarray, normalization: str = 'imagenet'
) -> jax.Array:
  """Normalizes images by channel; returns float32[..., 3].

  Args:
    images: [..., 3], uint8 in [0, 255] or float in [0, 1].
    normalization: one of NORMALIZATIONS.
  """
  mean, std = map(jnp.array, NORMALIZATIONS[normalization])
  return (_to_float(jnp.asarray(images)) - mean) / std


def denormalize(
  images: jax.Array, normalization: str = 'imagenet'
) -> jax.Array:
  """Inverts `normalize` for display; returns uint8[..., 3].

  Args:
    images: float32[..., 3], normalized.
    normalization: one of NORMALIZATIONS.
  """
  mean, std = map(jnp.array, NORMALIZATIONS[normalization])
  images = images * std + mean
  return jnp.round(jnp.clip(images, 0, 1) * 255).astype(jnp.uint8)


def augment(
  key: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  *,
  augmentation: Augmentation,
  num_classes: int,
  place: Callable[[jax.Array], jax.Array] | None = None,
  normalization: str = 'imagenet',
) -> dict[str, jax.Array]:
  """Returns a training batch, augmented except for the resized crop.

  The function is pure and has static shapes; call it under jit. The order is
  padded crop, flip, color jitter, `place`, normalization, erasing, and mixup or
  cutmix.

  Args:
    key: the batch's random key.
    images: [N, S, S, 3], uint8 in [0, 255] or float in [0, 1].
    labels: int[N].
    augmentation: the augmentation.
    num_classes: number of classes.
    place: places photographs, float32 in [0, 1], into larger images.
    normalization: one of NORMALIZATIONS.

  Returns:
    'image': normalized float32[N, S, S, 3]; 'label': float32[N, num_classes],
    rows of sum 1.
  """
  keys = dict(zip(('crop', 'flip', 'color', 'erase', 'mix'),
                  jax.random.split(key, 5), strict=True))  # fmt: skip
  n = images.shape[0]
  if augmentation.crop == 'pad' and augmentation.crop_padding:
    images = _pad_crop(keys['crop'], images, augmentation.crop_padding)
  if augmentation.flip:
    flipped = jax.random.bernoulli(keys['flip'], shape=(n, 1, 1, 1))
    images = jnp.where(flipped, images[:, :, ::-1], images)
  images = _to_float(images)
  if augmentation.color_jitter:
    images = jax.vmap(_jitter, (0, 0, None))(
      jax.random.split(keys['color'], n), images, augmentation.color_jitter
    )
  if place is not None:
    images = place(images)
  images = normalize(images, normalization)
  if augmentation.random_erasing:
    erased = _erased(keys['erase'], images.shape, augmentation.random_erasing)
    images = jnp.where(erased[..., None], 0.0, images)
  labels = optax.smooth_labels(
    jax.nn.one_hot(labels, num_classes), augmentation.label_smoothing
  )
  if augmentation.mixup or augmentation.cutmix:
    images, labels = _mix(keys['mix'], images, labels, augmentation)
  return {'image': images, 'label': labels}


def crop_boxes(uniform, width, height, augmentation: Augmentation, xp=np):
  """Returns random crop boxes, [..., 4] of (left, top, right, bottom).

  The box's area, as a fraction of the image's, is uniform in `crop_scale`. The
  logarithm of its aspect ratio is uniform in the part of `crop_ratio` in which
  a box of this area fits. If none fits because the image is too elongated, the
  box is the largest one with the nearest allowed ratio. Unlike rejection
  sampling, this always succeeds and is not biased toward small areas.

  Args:
    uniform: [..., 4], random values in [0, 1).
    width: [...], width of the images in pixels.
    height: [...], height of the images in pixels.
    augmentation: its `crop_scale` and `crop_ratio` are used.
    xp: numpy, or jax.numpy under jit.
  """
  low, high = augmentation.crop_scale
  area = low + (high - low) * uniform[..., 0]
  aspect = width / height
  low = xp.log(xp.clip(area * aspect, *augmentation.crop_ratio))
  high = xp.log(xp.clip(aspect / area, *augmentation.crop_ratio))
  ratio = xp.exp(low + (high - low) * uniform[..., 1])
  box_width = xp.sqrt(area * width * height * ratio)
  box_height = box_width / ratio
  shrink = xp.minimum(1.0, xp.minimum(width / box_width, height / box_height))
  box_width, box_height = shrink * box_width, shrink * box_height
  left = uniform[..., 2] * (width - box_width)
  top = uniform[..., 3] * (height - box_height)
  return xp.stack([left, top, left + box_width, top + box_height], axis=-1)


def _to_float(images: jax.Array) -> jax.Array:
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 255
  return images.astype(jnp.float32)


def _pad_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
  pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  padded = jnp.pad(images, pads)
  starts = jax.random.randint(key, (images.shape[0], 2), 0, 2 * padding + 1)
  return jax.vmap(
    lambda image, start: jax.lax.dynamic_slice(
      image, (start[0], start[1], 0), images.shape[1:]
    )
  )(padded, starts)


def _jitter(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
  brightness, contrast, saturation, hue = jax.random.split(key, 4)
  low, high = 1 - strength, 1 + strength
  # As in torchvision, brightness is a factor. dm-pix's additive brightness is
  # far harsher.
  image = image * jax.random.uniform(brightness, minval=low, maxval=high)
  image = pix.random_contrast(contrast, image, low, high)
  # HSV is undefined outside the unit cube.
  image = jnp.clip(image, 0.0, 1.0)
  image = pix.random_saturation(saturation, image, low, high)
  image = pix.random_hue(hue, image, _HUE_SHARE * strength)
  return jnp.clip(image, 0.0, 1.0)


def _inside(box: jax.Array, height: int, width: int) -> jax.Array:
  """Returns bool[N, height, width], true inside the boxes [N, 4]."""
  left, top, right, bottom = (box[:, i, None] for i in range(4))
  x, y = jnp.arange(width), jnp.arange(height)
  columns = (x >= left) & (x < right)
  rows = (y >= top) & (y < bottom)
  return rows[:, :, None] & columns[:, None, :]


def _erased(key: jax.Array, shape, probability: float) -> jax.Array:
  """Returns bool[N, H, W], true in boxes to blank."""
  n, height, width, _ = shape
  box_key, chosen_key = jax.random.split(key)
  shape_of_boxes = Augmentation(
    crop_scale=_ERASED_AREA, crop_ratio=_ERASED_RATIO
  )
  uniform = jax.random.uniform(box_key, (n, 4))
  boxes = crop_boxes(uniform, width, height, shape_of_boxes, jnp)
  chosen = jax.random.bernoulli(chosen_key, probability, (n, 1, 1))
  return _inside(jnp.round(boxes), height, width) & chosen


def _mix(key, images, labels, augmentation: Augmentation):
  """Returns the batch mixed with itself, shifted by one image."""
  n, height, width, _ = images.shape
  share_key, choice_key, box_key = jax.random.split(key, 3)
  others, other_labels = (
    jnp.roll(images, 1, axis=0),
    jnp.roll(labels, 1, axis=0),
  )

  if augmentation.mixup and augmentation.cutmix:
    use_cutmix = jax.random.bernoulli(choice_key, shape=(n,))
  else:
    use_cutmix = jnp.full((n,), bool(augmentation.cutmix))
  alpha = jnp.where(use_cutmix, augmentation.cutmix, augmentation.mixup)
  # The weight of the image itself.
  share = jax.random.beta(share_key, alpha, alpha)

  # Yun et al., equation 2: a box of area 1 - share around a uniform center,
  # cropped at the border. The label's share is corrected for the crop.
  side = jnp.sqrt(1 - share)
  half = jnp.stack([width * side, height * side], axis=1) / 2
  center = jax.random.uniform(box_key, (n, 2)) * jnp.array([width, height])
  limits = jnp.array([width, height])
  boxes = jnp.concatenate(
    [
      jnp.clip(jnp.round(center - half), 0, limits),
      jnp.clip(jnp.round(center + half), 0, limits),
    ],
    axis=1,
  )
  pasted = _inside(boxes, height, width)
  share = jnp.where(use_cutmix, 1 - pasted.mean(axis=(1, 2)), share)
  weight = jnp.where(use_cutmix[:, None, None], ~pasted, share[:, None, None])[
    ..., None
  ]
  images = weight * images + (1 - weight) * others
  labels = share[:, None] * labels + (1 - share[:, None]) * other_labels
  return images, labels
