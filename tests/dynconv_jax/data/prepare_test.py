import concurrent.futures
import errno
import os
import shutil
import time

import numpy as np
import pytest
from array_record.python import array_record_module

from dynconv_jax.data import prepare

_SIZES = {'train': 19, 'test': 11}


def _examples(split):
  for i in range(_SIZES[split]):
    image = f'image {i} of {split}'.encode()
    yield {'image': image, 'label': 'ab'[i % 2], 'name': f'{split}/{i}'}


def _all(dl_manager):
  return {split: _examples(split) for split in _SIZES}


@pytest.fixture
def data_dir(tmp_path):
  return tmp_path / 'data'


def _prepare(data_dir, examples=_all, key='k'):
  return prepare.prepare('its', '1.0.0', examples, 'ab', data_dir, key=key)


def _read(dataset):
  return {name: [e for e in split] for name, split in dataset.splits.items()}


def _fail(dl_manager):
  raise AssertionError('prepared again')


def test_holds_what_it_was_given(data_dir):
  dataset = _prepare(data_dir)
  assert tuple(dataset.class_names) == ('a', 'b')
  for split, number in _SIZES.items():
    found = dataset.splits[split]
    assert len(found) == number
    given = [e | {'label': 'ab'.index(e['label'])} for e in _examples(split)]
    assert sorted(found, key=lambda e: e['name']) == sorted(
      given, key=lambda e: e['name']
    )
    # Shuffled as TFDS does it.
    assert [e['name'] for e in found] != [e['name'] for e in given]
    np.testing.assert_array_equal(found.labels, [e['label'] for e in found])


def test_prepares_once_a_key(data_dir):
  first = _read(_prepare(data_dir))
  assert _read(_prepare(data_dir, _fail)) == first
  with pytest.raises(AssertionError, match='prepared again'):
    _prepare(data_dir, _fail, key='other')


def test_prints_nothing(data_dir, capfd):
  _prepare(data_dir)
  out, err = capfd.readouterr()
  assert out == ''
  assert 'it/s' not in err and '%|' not in err


@pytest.mark.parametrize(
  'error,code',
  [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), errno.ENOSPC),
    # The errors that array_record reports.
    (
      RuntimeError('write() failed: No space left on device; writing x'),
      errno.ENOSPC,
    ),
    (RuntimeError('write() failed: File too large; writing x'), errno.EFBIG),
  ],
)
def test_full_disk(data_dir, monkeypatch, error, code):
  class FullWriter:
    written = 0

    def __init__(self, *args):
      self._writer = array_record_module.ArrayRecordWriter(*args)

    def write(self, record):
      FullWriter.written += 1
      if FullWriter.written == 7:
        raise error
      self._writer.write(record)

    def close(self):
      self._writer.close()

  class Module:
    ArrayRecordWriter = FullWriter

  with monkeypatch.context() as patched:
    patched.setattr(
      'tensorflow_datasets.core.file_adapters.array_record_module', Module
    )
    with pytest.raises(OSError, match='no space left while preparing') as full:
      _prepare(data_dir)
  assert FullWriter.written == 7
  assert full.value.errno == code
  assert 'data_dir' in str(full.value)
  assert not list(data_dir.rglob('dataset_info.json'))
  assert not list(data_dir.rglob('*array_record*'))
  assert len(_prepare(data_dir).splits['train']) == 19


def test_other_errors_are_kept(data_dir):
  def fail(dl_manager):
    raise RuntimeError('something else')

  with pytest.raises(RuntimeError, match='something else'):
    _prepare(data_dir, fail)
  assert not list(data_dir.rglob('dataset_info.json'))


def test_killed_preparations_are_removed(data_dir):
  _prepare(data_dir)
  folder = data_dir / 'its-k' / 'its' / '1.0.0'
  old, new = (folder.with_name(f'incomplete.{x}_1.0.0') for x in 'AB')
  folder.rename(old)
  new.mkdir()
  two_days_ago = time.time() - 2 * 24 * 3600
  os.utime(old, (two_days_ago, two_days_ago))
  _prepare(data_dir)
  assert not old.exists()
  # The folder may belong to a running process.
  assert new.exists()


def test_prepared_by_another_process_meanwhile(data_dir):
  def meanwhile(dl_manager):
    _prepare(data_dir)
    return _all(dl_manager)

  assert len(_prepare(data_dir, meanwhile).splits['train']) == 19
  assert not list(data_dir.rglob('incomplete.*'))


def _cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _remove(path):
  path.unlink()


def _swap(path):
  (other,) = path.parent.glob('its-test.array_record-*')
  path.write_bytes(other.read_bytes())


def _flip(path):
  content = bytearray(path.read_bytes())
  content[1000] ^= 4
  path.write_bytes(content)


def _garbage(path):
  path.write_bytes(b'\xff\xfegarbage\0')


def _empty(path):
  path.write_bytes(b'')


@pytest.mark.parametrize(
  ('name', 'damage', 'message'),
  [
    ('its-train.array_record-00000-of-00001', _cut, 'cannot be read ('),
    ('its-train.array_record-00000-of-00001', _remove, 'cannot be read ('),
    ('its-train.array_record-00000-of-00001', _flip, 'cannot be read ('),
    (
      'its-train.array_record-00000-of-00001',
      _swap,
      'contains 11 of 19 examples',
    ),
    ('dataset_info.json', _remove, 'is missing'),
    ('dataset_info.json', _cut, 'cannot be read ('),
    ('features.json', _remove, 'cannot be read ('),
    ('features.json', _garbage, 'cannot be read ('),
    ('label.labels.txt', _remove, 'cannot be read ('),
    ('label.labels.txt', _garbage, 'cannot be read ('),
    ('label.labels.txt', _cut, 'has 1 of 2 class names'),
    ('label.labels.txt', _empty, 'has 0 of 2 class names'),
  ],
)
def test_damaged_files(data_dir, name, damage, message):
  _prepare(data_dir)
  (path,) = data_dir.rglob(name)
  damage(path)
  with pytest.raises(ValueError) as raised:
    _read(_prepare(data_dir, _fail))
  text = str(raised.value)
  assert text.startswith(
    f'the prepared data set in {path.parent} is damaged: {name} {message}'
  )
  assert text.endswith('Delete that folder to prepare it again')


@pytest.mark.parametrize('damage', [_cut, _garbage, _empty, _flip])
def test_damaged_labels(data_dir, damage):
  first = _read(_prepare(data_dir))
  (path,) = data_dir.rglob('labels.npz')
  if damage is _flip:
    content = bytearray(path.read_bytes())
    content[content.index(b'NUMPY') + 200] ^= 4
    path.write_bytes(content)
  else:
    damage(path)
  with pytest.raises(ValueError, match=f'^{path} is damaged: ') as raised:
    _prepare(data_dir)
  assert str(raised.value).endswith('. Delete it; it will be created again')
  assert 'pickle' not in str(raised.value)
  path.unlink()
  assert _read(_prepare(data_dir)) == first


def test_labels_of_another_data_set(data_dir):
  _prepare(data_dir)
  (path,) = data_dir.rglob('labels.npz')
  for labels in ({'train': np.zeros(19)}, {'train': [], 'test': []}):
    np.savez(path, **labels)
    with pytest.raises(ValueError, match='labels.npz is damaged: it belongs'):
      _prepare(data_dir)


def test_labels_that_cannot_be_kept(data_dir, monkeypatch):
  def full(path, content):
    raise OSError('No space left on device')

  with monkeypatch.context() as patched:
    patched.setattr(prepare.files, 'write_atomic', full)
    first = _prepare(data_dir)
  assert not list(data_dir.rglob('labels.npz'))
  second = _prepare(data_dir)
  assert len(list(data_dir.rglob('labels.npz'))) == 1
  for name, split in first.splits.items():
    np.testing.assert_array_equal(split.labels, second.splits[name].labels)


def test_another_format(data_dir):
  _prepare(data_dir)
  (path,) = data_dir.rglob('dataset_info.json')
  path.write_text(path.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(ValueError, match='has the format tfrecord, not array_'):
    _prepare(data_dir)
  shutil.rmtree(path.parent)
  path.parent.mkdir()
  with pytest.raises(ValueError, match='dataset_info.json is missing'):
    _prepare(data_dir)


def test_threads(data_dir):
  split = _prepare(data_dir).splits['train']
  expected = list(split)
  split = _prepare(data_dir).splits['train']
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda i: split[i % len(split)], range(380)))
  assert found == expected * 20
