"""Tests of miniature ImageNet archives: nested, out of order, damaged."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from dynconv_jax.data import imagenet, imagenet2012, sources
from dynconv_jax.data.source import Common


def _jpeg(color):
  content = io.BytesIO()
  Image.new('RGB', (9, 7), color).save(content, 'JPEG')
  return content.getvalue()


def _tar(files):
  content = io.BytesIO()
  with tarfile.open(fileobj=content, mode='w') as tar:
    for name, data in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  return content.getvalue()


@pytest.fixture
def classes(monkeypatch):
  """Only the first and the last class of ImageNet."""
  real = imagenet2012._read
  names = [real('labels.txt')[0], real('labels.txt')[-1]]
  monkeypatch.setattr(
    imagenet2012,
    '_read',
    {'labels.txt': names, 'validation_labels.txt': names[::-1] * 2}.get,
  )
  return names


@pytest.fixture
def archives(classes, tmp_path):
  """Two training images per class; four validation images, in reverse order."""
  folder = tmp_path / 'archives'
  folder.mkdir()
  train = {
    f'{name}.tar': _tar(
      {f'{name}_{i}.JPEG': _jpeg((100 * label, 100 * i, 0)) for i in range(2)}
    )
    for label, name in enumerate(classes)
  }
  validation = {
    f'ILSVRC2012_val_{i:08d}.JPEG': _jpeg((0, 0, 50 * i)) for i in (4, 3, 2, 1)
  }
  (folder / 'ILSVRC2012_img_train.tar').write_bytes(_tar(train))
  (folder / 'ILSVRC2012_img_val.tar').write_bytes(_tar(validation))
  return folder


def _open(folder, tmp_path):
  options = imagenet2012.Options(str(folder or ''))
  common = Common(data_dir=str(tmp_path / 'data'))
  return imagenet2012.open_imagenet2012(options, common)


def test_archives_become_splits_with_labels(archives, classes, tmp_path):
  dataset = _open(archives, tmp_path)
  assert dataset.class_names == imagenet.class_names()
  found = {
    split: {row['name']: row for row in examples}
    for split, examples in dataset.splits.items()
  }
  assert {n: row['label'] for n, row in found['train'].items()} == {
    f'{name}_{i}.JPEG': label
    for label, name in enumerate(classes)
    for i in range(2)
  }
  # Labels of the file, in the order of the names.
  labels = {n: row['label'] for n, row in found['validation'].items()}
  assert [labels[n] for n in sorted(labels)] == [1, 0, 1, 0]
  image = Image.open(
    io.BytesIO(found['train'][f'{classes[1]}_1.JPEG']['image'])
  )
  np.testing.assert_allclose(np.asarray(image)[3, 3], (100, 100, 0), atol=4)
  # Once prepared, it needs no archives; 'test' is the validation split.
  splits = sources.open_splits(
    imagenet2012.SOURCE,
    imagenet2012.Options(),
    Common(data_dir=str(tmp_path / 'data')),
    train='train',
    validation='none',
  )
  assert len(splits.train) == len(splits.test) == 4


def test_the_real_lists_are_in_the_order_of_the_class_names():
  labels = imagenet2012._read('labels.txt')
  assert labels == sorted(labels) and len(labels) == len(imagenet.class_names())
  # From WordNet: n01440764 is the tench, n02123045 the tabby.
  for wordnet_id, name in (('n01440764', 'tench'), ('n02123045', 'tabby')):
    assert imagenet.class_names()[labels.index(wordnet_id)] == name
  validation = imagenet2012._read('validation_labels.txt')
  assert np.unique(validation, return_counts=True)[1].tolist() == [50] * 1000


def test_what_is_missing_or_damaged_is_named(archives, classes, tmp_path):
  with pytest.raises(FileNotFoundError, match="imagenet2012_dir='' has no"):
    _open(None, tmp_path)
  with pytest.raises(FileNotFoundError, match='has no ILSVRC2012_img_train'):
    _open(tmp_path, tmp_path)
  train = archives / 'ILSVRC2012_img_train.tar'
  validation = archives / 'ILSVRC2012_img_val.tar'
  whole = train.read_bytes()
  for content, message in (
    (whole[:1000], 'is damaged: unexpected end of data'),
    (_tar({'n1.tar': b''}), 'contains n1.tar, which is not an'),
    (_tar({f'{classes[0]}.tar': _tar({})}), f'lacks the classes {classes[1]}'),
  ):
    train.write_bytes(content)
    with pytest.raises(ValueError, match=message):
      _open(archives, tmp_path)
  train.write_bytes(whole)
  for files, message in (
    ({'val_1.JPEG': _jpeg((0, 0, 0))}, 'contains 1 of 4 images'),
    ({'val_5.JPEG': b''}, 'contains val_5.JPEG, which is not an'),
    ({'val_0.JPEG': b''}, 'contains val_0.JPEG, which is not an'),
  ):
    validation.write_bytes(_tar(files))
    with pytest.raises(ValueError, match=message):
      _open(archives, tmp_path)
