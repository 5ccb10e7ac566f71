"""RandAugment (Cubuk et al., NeurIPS 2020), with Pillow on the host.

Operations and ranges are those of the paper, which takes them from AutoAugment
(Cubuk et al., CVPR 2019, table 6). As in the paper, strength 10 is the end of
an operation's range. As in timm and torchvision, operations are stronger the
farther they are from the identity: color factors go from 1 to 0.1 or 1.9, and
geometric operations go in either direction.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_STRENGTH = 10.0

# Color outside the image, as in timm and TensorFlow.
_FILL = (128, 128, 128)

# (image, share) -> image, where the share of the operation's range is in
# [-1, 1].
_Operation = Callable[[Image.Image, float], Image.Image]


def _affine(matrix: Callable[..., tuple[float, ...]]) -> _Operation:
  """Returns an affine operation; `matrix` maps (share, w, h) to its inverse."""
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
  # AutoAugment translates by up to 150 of 331 pixels.
  'translate_x': _affine(lambda share, w, h: (1, 0, share * w * 0.45, 0, 1, 0)),
  'translate_y': _affine(lambda share, w, h: (1, 0, 0, 0, 1, share * h * 0.45)),
}


def randaugment(
  image: np.ndarray, uniform: np.ndarray, strength: float
) -> np.ndarray:
  """Applies N random operations to an image.

  Args:
    image: uint8[H, W, 3].
    uniform: float[N, 2], random values in [0, 1) that choose each operation and
      its direction.
    strength: strength of each operation, in [0, MAX_STRENGTH].
  """
  operations = list(OPERATIONS.values())
  picture = Image.fromarray(image)
  for which, direction in uniform:
    share = strength / MAX_STRENGTH * (1 if direction < 0.5 else -1)
    picture = operations[int(which * len(operations))](picture, share)
  return np.asarray(picture)
