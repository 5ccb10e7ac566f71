"""Augmentation: the crop boxes, and all that follows the crop, under jit."""

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

# Mean and deviation of each channel, of images scaled to [0, 1], as published
# weights expect them. ImageNet's statistics are those of PyTorch's weights;
# TensorFlow's weights take (x - 127) / 128 (efficientnet_lite_builder.py).
NORMALIZATIONS = {
  'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  'inception': ((127 / 255,) * 3, (128 / 255,) * 3),
}
# Of a run that starts from no weights.
NORMALIZATIONS['auto'] = NORMALIZATIONS['imagenet']

# Zhong et al., 'Random Erasing Data Augmentation' (AAAI 2020), section 4.
_ERASED_AREA = (0.02, 0.33)
_ERASED_RATIO = (0.3, 1 / 0.3)

# More of them leave nothing to see; the paper tries up to 4.
_MOST_OPERATIONS = 100

# Color jitter turns the hue by a quarter of the strength of the rest: Chen
# et al., 'SimCLR' (ICML 2020), appendix A.
_HUE_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """How training images and labels are varied. The defaults crop and flip.

  Attributes:
    crop: 'resized', a box of random area and aspect ratio, resized (Szegedy
      et al., CVPR 2015, section 6); 'pad', pad by `crop_padding` and cut out
      at random (CIFAR); or 'none', the crop of evaluation.
    crop_scale: range of the box's area as a share of the image's ('resized').
    crop_ratio: range of the box's width over height ('resized').
    crop_padding: black pixels on each side ('pad').
    flip: mirror every second image, on average, left to right.
    randaugment: (n, strength): n operations of RandAugment after the crop, each
      with a strength in [0, 10], on the host (see `randaugment`); (): none.
    color_jitter: strength s in [0, 1]: brightness, contrast and saturation are
      scaled by factors in [1 - s, 1 + s], the hue turned by up to s / 4 of the
      circle.
    mixup: alpha of the Beta(alpha, alpha) share with which each image and its
      label are blended with another's (Zhang et al., ICLR 2018); 0: never.
    cutmix: alpha of the area share with which a box of another image is pasted
      into each (Yun et al., ICCV 2019); 0: never. If mixup is on as well, each
      image gets one of the two.
    random_erasing: probability that a box of an image is blanked.
    label_smoothing: share of the label that is spread over all classes.
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
    # Flags give lists, which cannot be hashed.
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
          f'N,M, a whole number of operations from 1 to {_MOST_OPERATIONS} and '
          f'their strength from 0 to {MAX_STRENGTH:g}, or empty',
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

  def check_cache(self, cache: str) -> None:
    """Raises ValueError unless a cache leaves the host what it has to do."""
    if self.randaugment and cache == 'device':
      raise ValueError(
        'randaugment runs on the host, on each image that is decoded: it needs '
        f'cache=none; got cache={cache}'
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
  """Returns float32[..., 3] with the mean taken off, over the deviation.

  Args:
    images: [..., 3], uint8 in 0 ... 255 or float in [0, 1].
    normalization: one of NORMALIZATIONS.
  """
  mean, std = map(jnp.array, NORMALIZATIONS[normalization])
  return (_to_float(jnp.asarray(images)) - mean) / std


def denormalize(
  images: jax.Array, normalization: str = 'imagenet'
) -> jax.Array:
  """Returns uint8[..., 3], what `normalize` was given, to look at.

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
  """Returns a training batch: all of the augmentation but the resized crop.

  Pure and shape-static: call it under jit. The order is padded crop, flip,
  color jitter, `place`, normalization, erasing, mixup or cutmix.

  Args:
    key: the batch's random key.
    images: [N, S, S, 3], uint8 in 0 ... 255 or float in [0, 1].
    labels: int[N].
    augmentation: what to do.
    num_classes: length of the label vectors.
    place: puts photographs, float32 in [0, 1], into larger images.
    normalization: one of NORMALIZATIONS.

  Returns:
    'image': float32[N, S, S, 3], normalized; 'label': float32[N, num_classes],
    each row of sum 1.
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
  """Returns [..., 4] of (left, top, right, bottom): boxes of random crops.

  The area's share of the image is uniform in `crop_scale`, the log of the
  aspect ratio uniform in that part of `crop_ratio` where a box of that area
  fits. In an image too elongated for any, the box is the largest of the
  nearest allowed ratio. Unlike resampling until a box fits, this draws areas
  without a bias to small ones, and always succeeds.

  Args:
    uniform: [..., 4], random in [0, 1).
    width: [...] of the images, in pixels.
    height: [...] of the images, in pixels.
    augmentation: gives `crop_scale` and `crop_ratio`.
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
  # torchvision's brightness is a factor; dm-pix's is a shift, far harsher.
  image = image * jax.random.uniform(brightness, minval=low, maxval=high)
  image = pix.random_contrast(contrast, image, low, high)
  # HSV is undefined outside the unit cube.
  image = jnp.clip(image, 0.0, 1.0)
  image = pix.random_saturation(saturation, image, low, high)
  image = pix.random_hue(hue, image, _HUE_SHARE * strength)
  return jnp.clip(image, 0.0, 1.0)


def _inside(box: jax.Array, height: int, width: int) -> jax.Array:
  """Returns bool[N, height, width] of boxes [N, 4] on the pixel grid."""
  left, top, right, bottom = (box[:, i, None] for i in range(4))
  x, y = jnp.arange(width), jnp.arange(height)
  columns = (x >= left) & (x < right)
  rows = (y >= top) & (y < bottom)
  return rows[:, :, None] & columns[:, None, :]


def _erased(key: jax.Array, shape, probability: float) -> jax.Array:
  """Returns bool[N, H, W]: the boxes to blank."""
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
  """Returns the batch mixed with itself moved on by one image."""
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
  share = jax.random.beta(share_key, alpha, alpha)  # of the image itself

  # Yun et al., equation 2: a box of area 1 - share around a uniform center,
  # cut off at the border, and the label's share corrected for that.
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
