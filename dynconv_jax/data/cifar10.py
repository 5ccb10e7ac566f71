"""CIFAR-10 (Krizhevsky, 2009), from its published binary files.

TFDS's own builder needs TensorFlow to encode arrays as images. This one stores
PNG files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator

import numpy as np

from dynconv_jax.data import decode, folders
from dynconv_jax.data.prepare import download, prepare
from dynconv_jax.data.source import Common, Dataset, DataSource, option

_OPTION = 'cifar10_dir'
# TFDS checks the SHA-256 of the file at this address.
URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
# Published on https://www.cs.toronto.edu/~kriz/cifar.html.
MD5 = 'c32a1d4ab5d03f1284b67883e8d87530'
ARCHIVE = 'cifar-10-binary.tar.gz'

# fmt: off
CLASS_NAMES = (
  'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse',
  'ship', 'truck',
)
# fmt: on
_FILES = {
  'train': tuple(f'data_batch_{i}.bin' for i in range(1, 6)),
  'test': ('test_batch.bin',),
}
_SIDE = 32
# One byte for the label, then the red, green, and blue planes, row by row.
_RECORD_BYTES = 1 + 3 * _SIDE * _SIDE


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the source."""

  cifar10_dir: str = option(
    '',
    "Folder or archive of CIFAR-10's binary files; empty: download.",
    operational=True,
  )


def open_cifar10(options: Options, common: Common) -> Dataset:
  """Returns CIFAR-10, from a given folder or archive or from a download.

  Raises:
    FileNotFoundError: the folder or files are missing.
    ValueError: files have the wrong format.
    ConnectionError: the download fails.
  """
  path, key = None, ''
  if options.cifar10_dir:
    path, key = check_directory(options.cifar10_dir)

  def examples(dl_manager):
    files = path or download(dl_manager, URL, _OPTION)
    return {split: _examples(files, split) for split in _FILES}

  return prepare(
    SOURCE.name, '3.1.0', examples, CLASS_NAMES, common.data_dir, key=key
  )


SOURCE = DataSource('cifar10', Options, open_cifar10)


def _examples(path: pathlib.Path, split: str):
  index = 0
  for file_name, content in folders.read_files(path, _FILES[split]):
    for image, label in parse(content, file_name):
      yield {
        'image': decode.to_png(image),
        'label': CLASS_NAMES[label],
        'name': f'{split}/{index:05d}',
      }
      index += 1


def parse(content: bytes, name: str) -> Iterator[tuple[np.ndarray, int]]:
  """Yields the images of a binary file, uint8[32, 32, 3], and their labels.

  Raises:
    ValueError: the content ends inside a record, or a label is out of range.
  """
  if not content or len(content) % _RECORD_BYTES:
    raise ValueError(
      f'CIFAR-10: {name} must be one or more records of {_RECORD_BYTES} bytes; '
      f'got {len(content)} bytes'
    )
  records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD_BYTES)
  largest = int(records[:, 0].max())
  if largest >= len(CLASS_NAMES):
    raise ValueError(
      f'CIFAR-10: {name} has the label {largest}; labels are 0 to '
      f'{len(CLASS_NAMES) - 1}'
    )
  for record in records:
    planes = record[1:].reshape(3, _SIDE, _SIDE)
    yield np.ascontiguousarray(planes.transpose(1, 2, 0)), int(record[0])


def check_directory(path: str | pathlib.Path) -> tuple[pathlib.Path, str]:
  """Returns the folder or archive of the binary files, and a short hash.

  Args:
    path: a folder with the unpacked files, a folder with their subfolder
      cifar-10-batches-bin, or the archive, whose hash is checked.

  Raises:
    FileNotFoundError: the folder or files are missing.
    ValueError: files are empty, or the archive is not the published one.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_file():
    with path.open('rb') as f:
      digest = hashlib.file_digest(f, 'md5').hexdigest()
    if digest != MD5:
      raise ValueError(
        f'{_OPTION}: {path} is not the published {ARCHIVE}: its MD5 is '
        f'{digest} instead of {MD5}'
      )
    return path, digest[:12]
  folders.check_directory(path, _OPTION)
  if (path / 'cifar-10-batches-bin').is_dir():
    path = path / 'cifar-10-batches-bin'
  names = [name for group in _FILES.values() for name in group]
  return path, folders.check_files(path, [names], source='CIFAR-10')
