"""RandAugment (Cubuk et al., NeurIPS 2020), by Pillow on the host.

Operations and their ranges are those of the paper, which takes them from
AutoAugment (Cubuk et al., CVPR 2019, table 6), with the paper's scale: at
strength 10 an operation is at the end of its range. As in timm and torchvision,
strength leads away from the image itself: factors of color go from 1 to 0.1 or
1.9, and what has a direction goes either way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_STRENGTH = 10.0

# What comes into view; timm's and TensorFlow's choice.
_FILL = (128, 128, 128)

# An operation of (image, share): of its range, in [-1, 1].
_Operation = Callable[[Image.Image, float], Image.Image]


def _affine(matrix: Callable[..., tuple[float, ...]]) -> _Operation:
  """Returns the operation of an inverse affine map, by share and size."""
  return lambda image, share: image.transform(
    image.size,
    Image.Transform.AFFINE,
    matrix(share, *image.size),
    Image.Resampling.BILINEAR,
    fillcolor=_FILL,
  )


def _enhance(kind: type) -> _Operation:
  return lambda image, share: kind(image).enhance(1 + 0.9 * share)


OPERATIONS: dict[str, _Operation] = {
  'identity': lambda image, share: image,
  'autocontrast': lambda image, share: ImageOps.autocontrast(image),
  'equalize': lambda image, share: ImageOps.equalize(image),
  'rotate': lambda image, share: image.rotate(
    30 * share, Image.Resampling.BILINEAR, fillcolor=_FILL
  ),
  'solarize': lambda image, share: ImageOps.solarize(
    image, round(256 * (1 - abs(share)))
  ),
  'posterize': lambda image, share: ImageOps.posterize(
    image, 8 - round(4 * abs(share))
  ),
  'color': _enhance(ImageEnhance.Color),
  'contrast': _enhance(ImageEnhance.Contrast),
  'brightness': _enhance(ImageEnhance.Brightness),
  'sharpness': _enhance(ImageEnhance.Sharpness),
  'shear_x': _affine(lambda share, w, h: (1, 0.3 * share, 0, 0, 1, 0)),
  'shear_y': _affine(lambda share, w, h: (1, 0, 0, 0.3 * share, 1, 0)),
  # 150 of 331 pixels in AutoAugment.
  'translate_x': _affine(lambda share, w, h: (1, 0, share * w * 0.45, 0, 1, 0)),
  'translate_y': _affine(lambda share, w, h: (1, 0, 0, 0, 1, share * h * 0.45)),
}


def randaugment(
  image: np.ndarray, uniform: np.ndarray, strength: float
) -> np.ndarray:
  """Returns an image after operations drawn from all, one after another.

  Args:
    image: uint8[H, W, 3].
    uniform: float[N, 2], random in [0, 1): which operation, which direction.
    strength: of each operation, in [0, MAX_STRENGTH].
  """
  operations = list(OPERATIONS.values())
  picture = Image.fromarray(image)
  for which, direction in uniform:
    share = strength / MAX_STRENGTH * (1 if direction < 0.5 else -1)
    picture = operations[int(which * len(operations))](picture, share)
  return np.asarray(picture)
