"""Tests of decoding and evaluation geometry, against Pillow and NumPy."""

import io
import pickle
import struct
import zlib

import numpy as np
from absl.testing import absltest, parameterized
from PIL import Image, ImageOps

from dynconv_jax.data import decode

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3


def encode(image, fmt='PNG', **options):
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  buffer = io.BytesIO()
  image.save(buffer, fmt, **options)
  return buffer.getvalue()


def noise(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (height, width, 3), np.uint8)


def smooth(height, width):
  """A gradient, which JPEG and resampling hardly change."""
  y, x = np.mgrid[:height, :width]
  image = np.stack([255 * x / width, 255 * y / height, x * 0 + 100], axis=-1)
  return image.astype(np.uint8)


def png_chunks(header, rows, **chunks):
  """Builds a PNG file by hand, for features that Pillow does not write."""
  body = b'\x89PNG\r\n\x1a\n'
  parts = [('IHDR', header), *chunks.items(), ('IDAT', zlib.compress(rows))]
  for kind, data in [*parts, ('IEND', b'')]:
    kind = kind.encode()
    crc = struct.pack('>I', zlib.crc32(kind + data))
    body += struct.pack('>I', len(data)) + kind + data + crc
  return body


class DecodeImageTest(parameterized.TestCase):
  @parameterized.parameters('PNG', 'WEBP')
  def test_lossless_formats_are_exact(self, fmt):
    image = noise(7, 5)
    decoded = decode.decode_image(encode(image, fmt, lossless=True), 'a')
    np.testing.assert_array_equal(decoded, image)
    self.assertEqual(decoded.dtype, np.uint8)

  def test_jpeg_is_close(self):
    image = smooth(40, 56)
    decoded = decode.decode_image(encode(image, 'JPEG', quality=95), 'a')
    np.testing.assert_allclose(decoded, image, atol=6)

  # What a viewer does for each tag, in NumPy, on the stored image.
  @parameterized.parameters(
    (1, lambda a: a),
    (2, lambda a: a[:, ::-1]),
    (3, lambda a: a[::-1, ::-1]),
    (4, lambda a: a[::-1]),
    (5, lambda a: a.transpose(1, 0, 2)),
    (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
    (8, lambda a: np.rot90(a)),
  )
  def test_exif_orientation(self, tag, upright):
    image = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = tag
    data = encode(image, exif=exif)
    np.testing.assert_array_equal(decode.decode_image(data), upright(image))
    # decode_resized must know the upright size before decoding.
    sizes = []
    resized = decode.decode_resized(
      data, 'a', 4, lambda w, h: sizes.append((w, h)) or (0, 0, 4, 4)
    )
    self.assertEqual(sizes, [upright(image).shape[1::-1]])
    np.testing.assert_array_equal(resized, upright(image)[:4, :4])

  def test_orientation_beside_damaged_metadata(self):
    image, exif = noise(6, 4), Image.Exif()
    exif[0x0112] = 6
    exif[0x8825] = {2: (1.0, 2.0, 3.0)}  # GPS
    # A latitude as text, which Pillow reads but cannot write back.
    exif = exif.tobytes().replace(b'\0\x02\0\x05', b'\0\x02\0\x02')
    data = encode(image, exif=exif)
    with self.assertRaises(TypeError):
      ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(
      decode.decode_image(data), np.rot90(image, -1)
    )

  def test_damaged_exif_is_ignored(self):
    data = encode(smooth(8, 8), 'JPEG', exif=b'Exif\x00\x00damaged beyond use')
    self.assertEqual(decode.decode_image(data).shape, (8, 8, 3))

  @parameterized.parameters(0, 9)
  def test_unknown_orientation_is_ignored(self, tag):
    image, exif = noise(6, 4), Image.Exif()
    exif[0x0112] = tag
    decoded = decode.decode_image(encode(image, exif=exif))
    np.testing.assert_array_equal(decoded, image)

  def test_gray_and_bilevel(self):
    gray = noise(5, 6)[..., 0]
    decoded = decode.decode_image(encode(gray))
    np.testing.assert_array_equal(decoded, np.stack([gray] * 3, axis=-1))
    bits = gray > 127
    decoded = decode.decode_image(encode(Image.fromarray(bits)))
    np.testing.assert_array_equal(decoded[..., 1], 255 * bits)

  def test_sixteen_bit_gray_is_scaled_not_clipped(self):
    gray = np.array([[0, 257, 30000], [256 * 128, 65278, 65535]], np.uint16)
    decoded = decode.decode_image(encode(gray))
    expected = np.round(gray / 65535 * 255).astype(np.uint8)
    np.testing.assert_array_equal(decoded[..., 0], expected)

  def test_sixteen_bit_color(self):
    pixels = np.array([[[65535, 0, 257 * 7]]], '>u2')
    header = struct.pack('>IIBBBBB', 1, 1, 16, 2, 0, 0, 0)
    data = png_chunks(header, b'\0' + pixels.tobytes())
    np.testing.assert_array_equal(decode.decode_image(data), [[[255, 0, 7]]])

  @parameterized.parameters('RGBA', 'LA')
  def test_transparency_is_over_white(self, mode):
    image = Image.new(mode, (3, 1), (0,) * len(mode))
    for x, alpha in enumerate((0, 128, 255)):
      image.putpixel((x, 0), (0,) * (len(mode) - 1) + (alpha,))
    decoded = decode.decode_image(encode(image))
    expected = [[[255] * 3, [127] * 3, [0] * 3]]
    np.testing.assert_allclose(decoded, expected, atol=1)

  @parameterized.parameters(1, b'\xff\x00')
  def test_palette_with_transparency(self, transparency):
    image = Image.new('P', (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    decoded = decode.decode_image(encode(image, transparency=transparency))
    np.testing.assert_array_equal(decoded, [[RED, WHITE]])

  def test_transparent_color_of_an_rgb_image(self):
    image = np.array([[RED, BLUE]], np.uint8)
    decoded = decode.decode_image(encode(image, transparency=BLUE))
    np.testing.assert_array_equal(decoded, [[RED, WHITE]])

  def test_cmyk_jpeg(self):
    image = Image.new('CMYK', (8, 8), (0, 255, 255, 0))  # red ink
    decoded = decode.decode_image(encode(image, 'JPEG', quality=95))
    np.testing.assert_allclose(decoded, np.full((8, 8, 3), RED), atol=4)

  def test_first_frame_of_an_animation(self):
    frames = [Image.new('RGB', (4, 4), color) for color in (RED, BLUE)]
    data = encode(
      frames[0], 'WEBP', save_all=True, append_images=frames[1:], lossless=True
    )
    np.testing.assert_array_equal(decode.decode_image(data)[0, 0], RED)

  def test_first_picture_of_a_phones_jpeg(self):
    frames = [Image.new('RGB', (8, 8), color) for color in (RED, BLUE)]
    data = encode(frames[0], 'MPO', save_all=True, append_images=frames[1:])
    decoded = decode.decode_image(data)
    np.testing.assert_allclose(decoded, np.full((8, 8, 3), RED), atol=4)


class ToPngTest(parameterized.TestCase):
  def test_round_trip(self):
    image = noise(5, 7)
    for array in (image, image[..., 0] > 128):
      decoded = Image.open(io.BytesIO(decode.to_png(array)))
      np.testing.assert_array_equal(
        decoded, 255 * array if array.dtype == bool else array
      )


class CorruptImageTest(parameterized.TestCase):
  def assert_corrupt(self, data, reason):
    with self.assertRaisesRegex(
      decode.CorruptImageError,
      rf"cannot decode the image 'cats/1\.jpg': .*{reason}",
    ):
      decode.decode_image(data, 'cats/1.jpg')
    with self.assertRaises(decode.CorruptImageError):
      decode.decode_resized(data, 'a', 8, decode.whole_image, reducing_gap=2)
    with self.assertRaises(decode.CorruptImageError):
      decode.decode_mask(data, 'a', 8)

  def test_empty(self):
    self.assert_corrupt(b'', r'the file is empty \(0 bytes\)')

  @parameterized.parameters(b'not an image at all', b'\xff\xd8\xff', b'\0' * 99)
  def test_other_content(self, data):
    self.assert_corrupt(data, 'not a JPEG, PNG, or WebP image')

  def test_other_format(self):
    self.assert_corrupt(encode(noise(4, 4), 'BMP'), 'not a JPEG, PNG, or WebP')

  @parameterized.product(fmt=('JPEG', 'PNG', 'WEBP'), share=(0.3, 0.9))
  def test_truncated(self, fmt, share):
    data = encode(noise(64, 64), fmt)
    self.assert_corrupt(data[: int(share * len(data))], '')

  def test_damaged_png(self):
    data = bytearray(encode(noise(64, 64)))
    data[len(data) // 2] ^= 0xFF
    self.assert_corrupt(bytes(data), 'checksum')

  def test_survives_pickling(self):
    error = pickle.loads(pickle.dumps(decode.CorruptImageError('a', 'why')))
    self.assertEqual((error.name, error.reason), ('a', 'why'))
    self.assertEqual(str(error), "cannot decode the image 'a': why")


class GeometryTest(parameterized.TestCase):
  @parameterized.parameters(
    (256, 341, 224, 256 / 224),
    (300, 200, 64, 256 / 224),
    (500, 500, 64, 1.0),
    (70, 513, 96, 1.3),
    (40, 30, 64, 1.2),  # enlarged
  )
  def test_preprocess_is_resize_then_center_crop(self, h, w, size, ratio):
    image = noise(h, w)
    short = round(size * ratio)
    # torchvision's Resize(short) and CenterCrop(size).
    resized = (
      (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    )
    whole = np.asarray(
      Image.fromarray(image).resize(resized, Image.Resampling.BILINEAR)
    )
    top = round((whole.shape[0] - size) / 2)
    left = round((whole.shape[1] - size) / 2)
    expected = whole[top : top + size, left : left + size].astype(int)
    actual = decode.preprocess_image(image, size, ratio)
    self.assertEqual(actual.dtype, np.uint8)
    # Not bit for bit: Pillow rounds the box to float32.
    np.testing.assert_allclose(actual, expected, atol=1)
    self.assertGreater(np.mean(actual == expected), 0.95)
    # The host's reader follows the same path from bytes.
    read = decode.decode_resized(
      encode(image),
      'a',
      size,
      lambda w, h: decode.evaluation_box(w, h, size, ratio),
    )
    np.testing.assert_array_equal(read, actual)

  def test_same_size_and_ratio_one_is_the_identity(self):
    image = noise(32, 32)
    actual = decode.preprocess_image(image, 32, 1.0)
    np.testing.assert_array_equal(actual, image)

  def test_center_of_a_wide_image(self):
    image = noise(32, 64)
    actual = decode.preprocess_image(image, 32, 1.0)
    np.testing.assert_array_equal(actual, image[:, 16:48])

  def test_resize_ratio_below_one(self):
    with self.assertRaisesRegex(ValueError, 'resize_ratio must be .*; got 0.9'):
      decode.evaluation_box(10, 10, 8, 0.9)

  @parameterized.parameters(((10, 20, 74, 84),), ((0, 0, 600, 400),))
  def test_reduced_decoding_keeps_the_picture(self, box):
    image = smooth(400, 600)
    data = encode(image, 'JPEG', quality=95)
    exact = decode.decode_resized(data, 'a', 32, lambda w, h: box)
    fast = decode.decode_resized(
      data, 'a', 32, lambda w, h: box, reducing_gap=2
    )
    np.testing.assert_allclose(
      fast.astype(int), exact.astype(int), atol=6, rtol=0
    )
    left, top, right, bottom = box
    reference = Image.fromarray(image[top:bottom, left:right])
    reference = reference.resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(
      exact.astype(int), np.asarray(reference, int), atol=6, rtol=0
    )

  @parameterized.parameters((90, 120, 64), (64, 64, 64), (200, 150, 48))
  def test_mask_follows_the_image(self, h, w, size):
    image, mask = np.zeros((h, w, 3), np.uint8), np.zeros((h, w), np.uint8)
    rows, columns = slice(h // 3, h // 2), slice(w // 2, w // 2 + w // 5)
    image[rows, columns], mask[rows, columns] = 255, 255
    actual = decode.decode_mask(encode(mask), 'a', size)
    self.assertEqual(actual.dtype, bool)
    bright = decode.preprocess_image(image, size)[..., 0]
    # Resampled brightness is exact away from the border of the square.
    self.assertTrue(actual[bright == 255].all())
    self.assertFalse(actual[bright == 0].any())
    self.assertAlmostEqual(actual.mean(), bright.mean() / 255, delta=0.02)
    self.assertGreater(np.sum(bright == 255), 50)


if __name__ == '__main__':
  absltest.main()
