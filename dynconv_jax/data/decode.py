"""Decodes and resamples images with Pillow."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, ImageOps

# ImageNet's own protocol: short side 256, central 224.
RESIZE_RATIO = 256 / 224

# Largest side of a network's input and of drawn images, in pixels. It catches
# typing errors before they cost hours.
MAX_IMAGE_SIZE = 4096

# (left, top, right, bottom) in pixels, fractions allowed.
Box = tuple[float, float, float, float]

_FORMATS = ('JPEG', 'PNG', 'WEBP')


class CorruptImageError(ValueError):
  """An image that cannot be decoded, and the reason.

  Attributes:
    name: the image's name in its data set, or its path.
    reason: what is wrong with it.
  """

  def __init__(self, name: str, reason: str):
    # Both go to `args`, so that the error can be pickled by a worker process.
    super().__init__(name, reason)
    self.name = name
    self.reason = reason

  def __str__(self) -> str:
    return f'cannot decode the image {self.name!r}: {self.reason}'


def decode_image(data: bytes, name: str = '(unnamed)') -> np.ndarray:
  """Returns uint8[H, W, 3], the picture upright, in RGB, over white.

  Args:
    data: a JPEG, PNG, or WebP file of any color mode, bit depth, or orientation
      tag. The first frame of an animation is used.
    name: what to call the image in an error.

  Raises:
    CorruptImageError: the data are empty, cut off, damaged, or of another
      format. JPEG and WebP have no checksums, so only damage that breaks the
      decoder is noticed.
  """
  return np.asarray(_load(_open(data, name), name))


def decode_resized(
  data: bytes,
  name: str,
  image_size: int,
  box_fn: Callable[[int, int], Box],
  *,
  reducing_gap: float | None = None,
) -> np.ndarray:
  """Returns uint8[image_size, image_size, 3]: a box of the image, resampled.

  Args:
    data: a JPEG, PNG, or WebP file.
    name: what to call the image in an error.
    image_size: side of the result, in pixels.
    box_fn: returns the box to resample, given the upright image's
      (width, height).
    reducing_gap: let the JPEG decoder itself shrink the image by 2, 4, or 8
      (several times faster) while the box keeps at least this many pixels per
      pixel of the result. None decodes at full size, which is exact.

  Raises:
    CorruptImageError: see `decode_image`.
  """
  image = _open(data, name)
  size = _upright_size(image)
  box = np.asarray(box_fn(*size), np.float64)
  if reducing_gap is not None:
    side = min(box[2] - box[0], box[3] - box[1])
    scale = min(1.0, reducing_gap * image_size / side)
    image.draft(None, [math.ceil(scale * length) for length in image.size])
  image = _load(image, name)
  box *= np.tile(np.divide(image.size, size), 2)
  return np.asarray(_resize(image, image_size, box, Image.Resampling.BILINEAR))


def decode_mask(
  data: bytes, name: str, image_size: int, resize_ratio: float = RESIZE_RATIO
) -> np.ndarray:
  """Returns bool[image_size, image_size]: an object mask in evaluation's crop.

  Args:
    data: an image file, bright (128 and above) where the object is.
    name: what to call the mask in an error.
    image_size: side of the result, in pixels.
    resize_ratio: see `evaluation_box`.

  Raises:
    CorruptImageError: see `decode_image`.
  """
  mask = _load(_open(data, name), name).convert('L')
  box = evaluation_box(*mask.size, image_size, resize_ratio)
  mask = _resize(mask, image_size, box, Image.Resampling.NEAREST)
  return np.asarray(mask) >= 128


def preprocess_image(
  image: np.ndarray, image_size: int, resize_ratio: float = RESIZE_RATIO
) -> np.ndarray:
  """Returns uint8[image_size, image_size, 3]: resized, then the center cut out.

  Args:
    image: uint8[H, W, 3], as `decode_image` returns it.
    image_size: side of the result, in pixels.
    resize_ratio: see `evaluation_box`.
  """
  box = evaluation_box(image.shape[1], image.shape[0], image_size, resize_ratio)
  image = Image.fromarray(image)
  return np.asarray(_resize(image, image_size, box, Image.Resampling.BILINEAR))


def resize_ratio_of(crop: str) -> float:
  """Returns evaluation's ratio of the resized short side to the crop.

  If training sees whole images, so does evaluation.

  Args:
    crop: `crop` of the augmentation.
  """
  return RESIZE_RATIO if crop == 'resized' else 1.0


def evaluation_box(
  width: int,
  height: int,
  image_size: int,
  resize_ratio: float = RESIZE_RATIO,
) -> Box:
  """Returns the box that resizing the short side and a center crop keep.

  Sizes and offsets are rounded as by torchvision's Resize and CenterCrop.
  Only the box has to be resampled then, not the whole image.

  Args:
    width: of the image, in pixels.
    height: of the image, in pixels.
    image_size: side of the crop, in pixels.
    resize_ratio: short side of the resized image over that of the crop.
  """
  if resize_ratio < 1:
    raise ValueError(f'resize_ratio must be at least 1; got {resize_ratio}')
  short = round(image_size * resize_ratio)
  starts, stops = [], []
  for length in (width, height):
    resized = int(short * length / min(width, height))
    start = round((resized - image_size) / 2)
    starts.append(start * length / resized)
    stops.append((start + image_size) * length / resized)
  return (*starts, *stops)


def to_png(array: np.ndarray) -> bytes:
  """Returns an image, uint8[h, w, 3] or bool[h, w], as a PNG file."""
  if array.dtype == np.bool_:
    array = array.astype(np.uint8) * 255
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, 'png', compress_level=3)
  return buffer.getvalue()


def whole_image(width: int, height: int) -> Box:
  """Returns the box of the whole image."""
  return (0, 0, width, height)


def _resize(image, image_size: int, box: Box, resample) -> Image.Image:
  # Rounding may put a box slightly outside the image, which Pillow refuses.
  limits = np.tile(image.size, 2)
  box = tuple(float(x) for x in np.clip(box, 0, limits))
  return image.resize((image_size, image_size), resample, box=box)


def _open(data: bytes, name: str) -> Image.Image:
  if not data:
    raise CorruptImageError(name, 'the file is empty (0 bytes)')
  with _naming(name):
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.format == 'PNG':
      # Checks the checksums, which decoding does not; the object is used up.
      image.verify()
      image = Image.open(io.BytesIO(data), formats=_FORMATS)
    return image


def _upright_size(image: Image.Image) -> tuple[int, int]:
  """Returns the width and height that `_load` will give."""
  with contextlib.suppress(Exception):  # Damaged metadata.
    if 5 <= image.getexif().get(ExifTags.Base.Orientation, 1) <= 8:
      return image.size[::-1]
  return image.size


def _load(image: Image.Image, name: str) -> Image.Image:
  with _naming(name):
    image.load()
  # In place it turns the pixels first, so damaged metadata around sound pixels
  # does not matter.
  with contextlib.suppress(Exception):
    ImageOps.exif_transpose(image, in_place=True)
  with _naming(name):
    return _to_rgb(image)


@contextlib.contextmanager
def _naming(name: str):
  """Turns every error of a decoder into a CorruptImageError."""
  try:
    yield
  except Image.UnidentifiedImageError as error:
    raise CorruptImageError(name, 'not a JPEG, PNG, or WebP image') from error
  except Exception as error:
    # Pillow's decoders meet damaged files with OSError, SyntaxError,
    # struct.error, zlib.error and more.
    raise CorruptImageError(name, str(error) or repr(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith('I'):  # 16 bits: Pillow's convert() would clip
    image = np.asarray(image).astype(np.uint32)
    image = Image.fromarray(((image + 128) // 257).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return image.convert('RGB')
