import hashlib
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from dynconv_jax.data import cifar10, sources
from dynconv_jax.data.source import Common


def _record(label, seed):
  rng = np.random.default_rng(seed)
  return bytes([label]) + rng.integers(0, 256, 3072, np.uint8).tobytes()


@pytest.fixture
def cifar10_dir(tmp_path):
  """Binary files of two records each; labels count up."""
  root = tmp_path / 'cifar-10-batches-bin'
  root.mkdir()
  names = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']
  for i, name in enumerate(names):
    content = _record(2 * i % 10, 2 * i) + _record((2 * i + 1) % 10, 2 * i + 1)
    (root / name).write_bytes(content)
  return root


def test_images_labels_and_names(cifar10_dir, tmp_path):
  opened = sources.open_splits(
    'cifar10',
    cifar10.Options(str(cifar10_dir.parent)),
    Common(tmp_path / 'data'),
    train='train',
    validation='none',
  )
  assert (len(opened.train), len(opened.test)) == (10, 2)
  assert opened.train.class_names[:2] == ('airplane', 'automobile')
  for source, first in ((opened.train, 0), (opened.test, 10)):
    for i in range(len(source)):
      example = source[i]
      index = int(example['name'].split('/')[1])
      assert example['label'] == (first + index) % 10
      pixels = np.asarray(Image.open(io.BytesIO(example['image'])))
      record = _record(0, first + index)
      # Pixel by pixel: plane, row, column.
      for channel, row, column in ((0, 0, 0), (1, 3, 5), (2, 31, 30)):
        at = 1 + 1024 * channel + 32 * row + column
        assert pixels[row, column, channel] == record[at]


def test_archive(cifar10_dir, tmp_path, monkeypatch):
  archive = tmp_path / 'archive.tar.gz'
  with tarfile.open(archive, 'w:gz') as tar:
    tar.add(cifar10_dir, 'cifar-10-batches-bin')
  given = cifar10.Options(str(archive)), Common(tmp_path / 'data')
  with pytest.raises(ValueError, match='not the published .* MD5 is .* inst'):
    sources.open_source('cifar10', 'train', *given)
  md5 = hashlib.md5(archive.read_bytes()).hexdigest()
  monkeypatch.setattr(cifar10, 'MD5', md5)
  found = sources.open_source('cifar10', 'train', *given)
  unpacked = cifar10.Options(str(cifar10_dir))
  expected = sources.open_source('cifar10', 'train', unpacked, given[1])
  assert [found[i] for i in range(10)] == [expected[i] for i in range(10)]


def test_published_hash_is_that_of_tfds():
  # TFDS rejects a download whose hash does not match the recorded one.
  from tensorflow_datasets.core.download import checksums

  assert cifar10.URL in checksums.get_all_url_infos()


def test_missing_file(cifar10_dir, tmp_path):
  (cifar10_dir / 'data_batch_4.bin').unlink()
  with pytest.raises(FileNotFoundError, match='missing .*: data_batch_4.bin'):
    cifar10.check_directory(cifar10_dir)
  with pytest.raises(FileNotFoundError, match='cifar10_dir: .* not exist'):
    cifar10.check_directory(tmp_path / 'nothing')


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (_record(3, 0)[:-1], 'x.bin must be .* of 3073 bytes; got 3072'),
    (b'', 'x.bin must be .*; got 0 bytes'),
    (_record(10, 0), 'x.bin has the label 10; labels are 0 to 9'),
  ],
)
def test_damaged_file(content, message):
  with pytest.raises(ValueError, match=message):
    list(cifar10.parse(content, 'x.bin'))
