"""Decoding and resampling of images with Pillow."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, ImageOps

# ImageNet's evaluation protocol: resize the short side to 256, crop 224.
RESIZE_RATIO = 256 / 224

# Largest side of a network's input and of drawn images, in pixels. Catches
# typos before they cost hours.
MAX_IMAGE_SIZE = 4096

# (left, top, right, bottom) in pixels, fractions allowed.
Box = tuple[float, float, float, float]

_FORMATS = ('JPEG', 'PNG', 'WEBP')


class CorruptImageError(ValueError):
  """An image cannot be decoded.

  Attributes:
    name: the image's name in its data set, or its path.
    reason: what is wrong with it.
  """

  def __init__(self, name: str, reason: str):
    # Store both in `args`, so that worker processes can pickle the error.
    super().__init__(name, reason)
    self.name = name
    self.reason = reason

  def __str__(self) -> str:
    return f'cannot decode the image {self.name!r}: {self.reason}'


def decode_image(data: bytes, name: str = '(unnamed)') -> np.ndarray:
  """Decodes an image; returns uint8[H, W, 3], RGB, upright, on white.

  Args:
    data: a JPEG, PNG, or WebP file of any color mode, bit depth, or orientation
      tag. Only the first frame of an animation is used.
    name: name of the image for errors.

  Raises:
    CorruptImageError: the data are empty, truncated, damaged, or in another
      format. JPEG and WebP have no checksums, so damage is detected only if it
      breaks the decoder.
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
  """Decodes and resamples a box; returns uint8[image_size, image_size, 3].

  Args:
    data: a JPEG, PNG, or WebP file.
    name: name of the image for errors.
    image_size: side of the result, in pixels.
    box_fn: returns the box to resample, given the upright image's (width,
      height).
    reducing_gap: lets the JPEG decoder shrink the image by 2, 4, or 8, which is
      several times faster, as long as the box has at least this many pixels per
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
  """Returns an object mask in evaluation's crop, bool[image_size, image_size].

  Args:
    data: an image file, in which values of 128 and above are the object.
    name: name of the mask for errors.
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
  """Resizes and crops the center; returns uint8[image_size, image_size, 3].

  Args:
    image: uint8[H, W, 3], from `decode_image`.
    image_size: side of the result, in pixels.
    resize_ratio: see `evaluation_box`.
  """
  box = evaluation_box(image.shape[1], image.shape[0], image_size, resize_ratio)
  image = Image.fromarray(image)
  return np.asarray(_resize(image, image_size, box, Image.Resampling.BILINEAR))


def resize_ratio_of(crop: str) -> float:
  """Returns evaluation's ratio of the resized short side to the crop.

  The ratio is 1, which keeps the whole short side, unless training uses resized
  crops.

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
  """Returns the part of an image that a resize and a center crop keep.

  Only this box has to be resampled, not the whole image. Sizes and offsets are
  rounded as in torchvision's Resize and CenterCrop.

  Args:
    width: width of the image, in pixels.
    height: height of the image, in pixels.
    image_size: side of the crop, in pixels.
    resize_ratio: short side of the resized image divided by `image_size`.
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
  """Encodes an image, uint8[h, w, 3] or bool[h, w], as a PNG file."""
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
      # verify() checks the checksums, which decoding does not. The image cannot
      # be used afterwards.
      image.verify()
      image = Image.open(io.BytesIO(data), formats=_FORMATS)
    return image


def _upright_size(image: Image.Image) -> tuple[int, int]:
  """Returns the width and height of the image that `_load` returns."""
  with contextlib.suppress(Exception):  # Damaged metadata.
    if 5 <= image.getexif().get(ExifTags.Base.Orientation, 1) <= 8:
      return image.size[::-1]
  return image.size


def _load(image: Image.Image, name: str) -> Image.Image:
  with _naming(name):
    image.load()
  # In place, the pixels are rotated first, so damaged metadata does not matter.
  with contextlib.suppress(Exception):
    ImageOps.exif_transpose(image, in_place=True)
  with _naming(name):
    return _to_rgb(image)


@contextlib.contextmanager
def _naming(name: str):
  """Converts all errors of a decoder to CorruptImageError."""
  try:
    yield
  except Image.UnidentifiedImageError as error:
    raise CorruptImageError(name, 'not a JPEG, PNG, or WebP image') from error
  except Exception as error:
    # For damaged files, Pillow's decoders raise OSError, SyntaxError,
    # struct.error, zlib.error, and others.
    raise CorruptImageError(name, str(error) or repr(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith('I'):  # Pillow's convert() would clip 16 bits.
    image = np.asarray(image).astype(np.uint32)
    image = Image.fromarray(((image + 128) // 257).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return image.convert('RGB')
