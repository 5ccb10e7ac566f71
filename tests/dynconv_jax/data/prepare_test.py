import concurrent.futures
import errno
import os
import time

import pytest
from array_record.python import array_record_module

from dynconv_jax.data import food101, sources


def _open(food101_dir, data_dir):
  return sources.open_source(
    'food101', 'train', data_dir=data_dir, food101_dir=food101_dir
  )


def _info_files(data_dir):
  return list(data_dir.rglob('dataset_info.json'))


@pytest.fixture
def data_dir(tmp_path):
  return tmp_path / 'data'


def test_prepares_once(food101_dir, data_dir, monkeypatch):
  first = _open(food101_dir, data_dir)
  examples = [first[i] for i in range(len(first))]

  def fail(self, names):
    raise AssertionError('prepared again')

  monkeypatch.setattr(food101.Food101FolderBuilder, '_generate_examples', fail)
  second = _open(food101_dir, data_dir)
  assert [second[i] for i in range(len(second))] == examples
  # Other content is another dataset.
  (food101_dir / 'images/apple_pie/1000.jpg').write_bytes(b'other')
  with pytest.raises(AssertionError, match='prepared again'):
    _open(food101_dir, data_dir)


def test_prints_nothing(food101_dir, data_dir, capfd):
  _open(food101_dir, data_dir)
  out, err = capfd.readouterr()
  assert out == ''
  assert 'it/s' not in err and '%|' not in err


@pytest.mark.parametrize(
  'error',
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    # As array_record reports it.
    RuntimeError('write() failed: No space left on device; writing x'),
  ],
)
def test_full_disk(food101_dir, data_dir, monkeypatch, error):
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
      _open(food101_dir, data_dir)
  assert FullWriter.written == 7
  assert full.value.errno == errno.ENOSPC
  assert '--data_dir' in str(full.value)
  assert not _info_files(data_dir)
  assert not list(data_dir.rglob('*array_record*'))
  assert len(_open(food101_dir, data_dir)) == 19


def test_other_errors_are_kept(food101_dir, data_dir, monkeypatch):
  def fail(self, names):
    raise RuntimeError('something else')

  monkeypatch.setattr(food101.Food101FolderBuilder, '_generate_examples', fail)
  with pytest.raises(RuntimeError, match='something else'):
    _open(food101_dir, data_dir)
  assert not _info_files(data_dir)


def test_killed_preparations_are_removed(food101_dir, data_dir):
  _open(food101_dir, data_dir)
  (info,) = _info_files(data_dir)
  parent = info.parent.parent
  old, new = parent / 'incomplete.AAAAAA_2.1.0', parent / 'incomplete.B_2.1.0'
  info.unlink()
  for path in (old, new):
    path.mkdir()
  info.parent.rename(old / 'part')
  two_days_ago = time.time() - 2 * 24 * 3600
  os.utime(old, (two_days_ago, two_days_ago))
  assert len(_open(food101_dir, data_dir)) == 19
  assert not old.exists()
  # It may belong to a process that is at work.
  assert new.exists()


def test_prepared_by_another_process_meanwhile(
  food101_dir, data_dir, monkeypatch
):
  builder = food101.Food101FolderBuilder
  generate = builder._generate_examples

  def prepare_meanwhile(self, names):
    with monkeypatch.context() as patched:
      patched.setattr(builder, '_generate_examples', generate)
      _open(food101_dir, data_dir)
    yield from generate(self, names)

  monkeypatch.setattr(builder, '_generate_examples', prepare_meanwhile)
  assert len(_open(food101_dir, data_dir)) == 19
  assert not list(data_dir.rglob('incomplete.*'))


@pytest.mark.parametrize('damage', ['truncated', 'removed', 'swapped'])
def test_damaged_files(food101_dir, data_dir, damage):
  _open(food101_dir, data_dir)
  train, validation = sorted(data_dir.rglob('*.array_record-*'))
  if damage == 'truncated':
    train.write_bytes(train.read_bytes()[: train.stat().st_size // 2])
  elif damage == 'removed':
    train.unlink()
  else:
    train.write_bytes(validation.read_bytes())
  with pytest.raises(ValueError, match='is damaged: food101-train.* Delete'):
    _open(food101_dir, data_dir)


def test_folder_without_info(food101_dir, data_dir):
  _open(food101_dir, data_dir)
  (info,) = _info_files(data_dir)
  info.unlink()
  with pytest.raises(ValueError, match='damaged: dataset_info.json is miss'):
    _open(food101_dir, data_dir)


def test_threads(food101_dir, data_dir):
  source = _open(food101_dir, data_dir)
  expected = [source[i] for i in range(len(source))]
  source = _open(food101_dir, data_dir)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda i: source[i % len(source)], range(380)))
  assert found == expected * 20
