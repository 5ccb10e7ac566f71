"""Tests of the decoding benchmark."""

import io
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks import decoding
from dynconv_jax.data import decode, readers


def test_each_photograph_is_cropped_and_resized_once():
  pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'JPEG')
  shapes, gaps = [], []
  original = decode.decode_resized

  def spy(*args, reducing_gap):
    image = original(*args, reducing_gap=reducing_gap)
    shapes.append(image.shape)
    gaps.append(reducing_gap)
    return image

  with (
    mock.patch.object(decode, 'decode_resized', spy),
    mock.patch.object(decoding.time, 'process_time', side_effect=[1.0, 1.5]),
  ):
    rate = decoding.rate([file.getvalue()] * 3, 16, readers.REDUCING_GAP)
  assert rate == 6
  assert shapes == [(16, 16, 3)] * 3 and gaps == [readers.REDUCING_GAP] * 3
