"""Small image folders in the layouts of the supported datasets."""

import io
import json

import numpy as np
import pytest
from PIL import Image

CLASSES = {'cheesecake': 12, 'cheese_plate': 10, 'apple_pie': 8}


def _jpeg(seed: int) -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, 'jpeg')
  return buffer.getvalue()


@pytest.fixture
def food101_dir(tmp_path):
  """A folder in Food-101's layout, two thirds of each class for training."""
  root = tmp_path / 'food-101'
  meta = {'train': {}, 'test': {}}
  seed = 0
  for name, number in CLASSES.items():
    (root / 'images' / name).mkdir(parents=True)
    ids = [f'{name}/{1000 + i}' for i in range(number)]
    for image_id in ids:
      (root / 'images' / f'{image_id}.jpg').write_bytes(_jpeg(seed))
      seed += 1
    meta['train'][name] = ids[: 2 * number // 3]
    meta['test'][name] = ids[2 * number // 3 :]
  (root / 'meta').mkdir()
  for split, names in meta.items():
    (root / 'meta' / f'{split}.json').write_text(json.dumps(names))
  return root


@pytest.fixture
def image_folder_dir(tmp_path):
  """train/{cat,dog} with jpg, png and webp files, test/{cat,dog}."""
  root = tmp_path / 'pets'
  for split, number in (('train', 6), ('test', 2)):
    for name in ('cat', 'dog'):
      (root / split / name).mkdir(parents=True)
      for i in range(number):
        suffix = ('jpg', 'PNG', 'webp')[i % 3]
        shade = 10 * i + 100 * (name == 'dog') + 60 * (split == 'test')
        pixels = np.full((4, 5, 3), shade, np.uint8)
        Image.fromarray(pixels).save(root / split / name / f'{i}.{suffix}')
  (root / 'train' / 'cat' / 'notes.txt').write_text('not an image')
  (root / 'train' / 'cat' / '.hidden.jpg').write_bytes(b'')
  return root
