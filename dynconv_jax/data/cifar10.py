"""CIFAR-10 (Krizhevsky, 2009) from its published binary files.

TFDS's own builder hands NumPy arrays to an image feature, which takes
TensorFlow to encode; this one stores PNG files.
"""

from __future__ import annotations

import hashlib
import pathlib
import tarfile
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from dynconv_jax.data import files, spots

# TFDS knows the SHA-256 of what is published under this address and checks it.
URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
# Published on https://www.cs.toronto.edu/~kriz/cifar.html.
MD5 = 'c32a1d4ab5d03f1284b67883e8d87530'
ARCHIVE = 'cifar-10-binary.tar.gz'

CLASS_NAMES = (
  'airplane',
  'automobile',
  'bird',
  'cat',
  'deer',
  'dog',
  'frog',
  'horse',
  'ship',
  'truck',
)
_FILES = {
  'train': tuple(f'data_batch_{i}.bin' for i in range(1, 6)),
  'test': ('test_batch.bin',),
}
_SIDE = 32
# One byte of label, then the red, green and blue planes, row by row.
_RECORD_BYTES = 1 + 3 * _SIDE * _SIDE


class Cifar10Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """CIFAR-10 as PNG files."""

  name = 'cifar10'
  VERSION = tfds.core.Version('3.1.0')

  def __init__(self, directory: pathlib.Path | None = None, **kwargs):
    """
    Args:
      directory: folder of the unpacked files, or the archive; None: download.
      **kwargs: of the base class.
    """
    self._directory = directory
    super().__init__(**kwargs)

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(
            shape=(_SIDE, _SIDE, 3), encoding_format='png'
          ),
          'label': tfds.features.ClassLabel(names=CLASS_NAMES),
          'id': tfds.features.Text(),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage='https://www.cs.toronto.edu/~kriz/cifar.html',
    )

  def _split_generators(self, dl_manager):
    path = self._directory or files.TarDownloader(
      dl_manager, pathlib.Path(self._data_dir_root), '--cifar10_dir'
    ).download(URL)
    return {split: self._generate_examples(path, split) for split in _FILES}

  def _generate_examples(self, path, split):
    index = 0
    for file_name, content in _read_files(path, _FILES[split]):
      for image, label in parse(content, file_name):
        name = f'{split}/{index:05d}'
        index += 1
        yield (
          name,
          {
            'image': spots.to_png(image),
            'label': CLASS_NAMES[label],
            'id': name,
          },
        )


def parse(content: bytes, name: str) -> Iterator[tuple[np.ndarray, int]]:
  """Yields the images of a binary file, uint8[32, 32, 3], and their labels.

  Raises:
    ValueError: the content is not whole records, or a label is not a class.
  """
  if not content or len(content) % _RECORD_BYTES:
    raise ValueError(
      f'CIFAR-10: {name} has {len(content)} bytes, which is not one or more '
      f'records of {_RECORD_BYTES}'
    )
  records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD_BYTES)
  largest = int(records[:, 0].max())
  if largest >= len(CLASS_NAMES):
    raise ValueError(
      f'CIFAR-10: {name} has a label of {largest}; labels are 0 to '
      f'{len(CLASS_NAMES) - 1}'
    )
  for record in records:
    planes = record[1:].reshape(3, _SIDE, _SIDE)
    yield np.ascontiguousarray(planes.transpose(1, 2, 0)), int(record[0])


def check_directory(path: str | pathlib.Path) -> tuple[pathlib.Path, str]:
  """Returns what holds the binary files, and a short hash that names it.

  Args:
    path: folder with the unpacked files, or whose only folder holds them, or
      the archive itself, whose hash is checked.

  Raises:
    FileNotFoundError: the folder or files are missing.
    ValueError: files are empty, or the archive is not the published one.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_file():
    with path.open('rb') as f:
      found = hashlib.file_digest(f, 'md5').hexdigest()
    if found != MD5:
      raise ValueError(
        f'--cifar10_dir: {path} is not the published {ARCHIVE}: its MD5 is '
        f'{found} instead of {MD5}'
      )
    return path, found[:12]
  files.check_directory(path, '--cifar10_dir')
  if (path / 'cifar-10-batches-bin').is_dir():
    path = path / 'cifar-10-batches-bin'
  names = [name for group in _FILES.values() for name in group]
  key = files.check_files(path, names, source='CIFAR-10')
  return path, key


def _read_files(path, names):
  """Yields the name and content of files in a folder or an archive."""
  if pathlib.Path(path).is_dir():
    for name in names:
      yield name, (pathlib.Path(path) / name).read_bytes()
    return
  with tarfile.open(path) as tar:
    for member in tar:
      name = pathlib.PurePosixPath(member.name).name
      if name in names:
        yield name, tar.extractfile(member).read()
