import functools
import http.server
import json
import re
import shutil
import tarfile
import threading

import pytest
from tensorflow_datasets.core.download import checksums

from dynconv_jax.data import food101, sources
from dynconv_jax.data.source import Common


def _open(directory, data_dir, **splits):
  return sources.open_splits(
    food101.SOURCE,
    food101.Options(str(directory)),
    Common(data_dir / 'data'),
    **splits,
  )


def test_what_a_folder_holds(food101_dir, tmp_path):
  names, _ = food101.scan_folder(food101_dir)
  assert {s: len(n) for s, n in names.items()} == {
    'train': 5 + 8 + 6,
    'validation': 3 + 4 + 4,
  }
  assert 'apple_pie/1000' in names['train']
  # TFDS's order, not alphabetical: cheesecake comes before cheese_plate.
  assert _open(food101_dir, tmp_path).test.class_names == (
    'apple_pie',
    'cheesecake',
    'cheese_plate',
  )


def test_key_tells_folders_apart(food101_dir, tmp_path):
  key = food101.scan_folder(food101_dir)[1]
  assert food101.scan_folder(food101_dir)[1] == key
  copy = tmp_path / 'copy'
  shutil.copytree(food101_dir, copy)
  assert food101.scan_folder(copy)[1] == key
  image = copy / 'images' / 'apple_pie' / '1000.jpg'
  image.write_bytes(image.read_bytes() + b'\0')
  assert food101.scan_folder(copy)[1] != key
  shutil.rmtree(copy)
  shutil.copytree(food101_dir, copy)
  meta = copy / 'meta' / 'train.json'
  classes = json.loads(meta.read_text())
  classes['apple_pie'].pop()
  meta.write_text(json.dumps(classes))
  assert food101.scan_folder(copy)[1] != key


def test_unwanted_classes_need_no_folder(food101_dir):
  shutil.rmtree(food101_dir / 'images' / 'cheesecake')
  with pytest.raises(FileNotFoundError, match=r'cheesecake.*\(12 in all\)'):
    food101.scan_folder(food101_dir)
  names, _ = food101.scan_folder(food101_dir, classes=['apple_pie'])
  assert [len(group) for group in names.values()] == [5 + 6, 3 + 4]


def _remove_all(root):
  shutil.rmtree(root)


def _empty(root):
  shutil.rmtree(root)
  root.mkdir()


def _make_file(root):
  shutil.rmtree(root)
  root.write_text('')


def _remove_meta(root):
  (root / 'meta' / 'test.json').unlink()


def _remove_images(root):
  for i in range(4):
    (root / 'images' / 'apple_pie' / f'{1000 + i}.jpg').unlink()


def _zero_bytes(root):
  (root / 'images' / 'cheesecake' / '1003.jpg').write_bytes(b'')


def _damage_meta(root):
  (root / 'meta' / 'train.json').write_text('{"apple_pie": [')


def _list_meta(root):
  (root / 'meta' / 'train.json').write_text('["apple_pie/1000"]')


def _mix_meta(root):
  (root / 'meta' / 'train.json').write_text('{"apple_pie": ["cheesecake/1"]}')


def _no_names(root):
  (root / 'meta' / 'train.json').write_text('{}')


def _leak(root):
  meta = root / 'meta'
  (meta / 'test.json').write_text((meta / 'train.json').read_text())


@pytest.mark.parametrize(
  ('break_folder', 'error', 'message'),
  [
    (_remove_all, FileNotFoundError, 'food101_dir: .* does not exist'),
    (_empty, FileNotFoundError, 'food101_dir: .* is empty'),
    (_make_file, NotADirectoryError, 'food101_dir: .* is not a folder'),
    (_remove_meta, FileNotFoundError, 'meta/test.json is missing'),
    (
      _remove_images,
      FileNotFoundError,
      'meta names files that are missing from .*images: apple_pie/1000.jpg, '
      r'apple_pie/1001.jpg, apple_pie/1002.jpg, ... \(4 in all\)',
    ),
    (
      _zero_bytes,
      ValueError,
      'zero-byte files: cheesecake/1003.jpg. .*skip_corrupt',
    ),
    (_damage_meta, ValueError, 'train.json must be a JSON object of lists'),
    (_list_meta, ValueError, 'train.json must be a JSON object of lists'),
    (_mix_meta, ValueError, 'cheesecake/1 listed under another class'),
    (_no_names, ValueError, 'train.json lists no image'),
    (_leak, ValueError, r'\(19 in all\) in both train.json and test.json'),
  ],
)
def test_errors(food101_dir, break_folder, error, message):
  break_folder(food101_dir)
  with pytest.raises(error, match=message) as raised:
    food101.scan_folder(food101_dir)
  assert str(food101_dir) in re.sub(r'\s', '', str(raised.value))


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass


@pytest.fixture
def archive_url(food101_dir, tmp_path, monkeypatch):
  """The address from which TFDS's builder gets a small Food-101 archive."""
  served = tmp_path / 'served'
  served.mkdir()
  with tarfile.open(served / 'food-101.tar.gz', 'w:gz') as tar:
    tar.add(food101_dir, 'food-101')
  server = http.server.ThreadingHTTPServer(
    ('127.0.0.1', 0), functools.partial(_QuietHandler, directory=served)
  )
  threading.Thread(target=server.serve_forever, daemon=True).start()
  url = f'http://127.0.0.1:{server.server_port}/food-101.tar.gz'
  monkeypatch.setattr(food101, 'URL', url)
  yield url
  server.shutdown()
  server.server_close()


def test_download(archive_url, food101_dir, tmp_path):
  found = _open('', tmp_path, train='train', validation='')
  # Statistics of the full data set.
  assert len(found.train.class_names) == 101
  expected = _open(food101_dir, tmp_path, train='train', validation='')
  assert [len(s) for s in expected if s] == [19, 11]
  # A folder yields the same data as the download, in the same order.
  for a, b in ((found.train, expected.train), (found.test, expected.test)):
    assert [_without_label(e) for e in a] == [_without_label(e) for e in b]
    assert [a.class_names[i] for i in a.labels] == [
      b.class_names[i] for i in b.labels
    ]


def _without_label(example):
  return {k: v for k, v in example.items() if k != 'label'}


def test_download_with_another_hash(archive_url, tmp_path, monkeypatch):
  known = checksums.get_all_url_infos()
  info = checksums.UrlInfo(size=1, checksum='0' * 64, filename='x.tar.gz')
  monkeypatch.setattr(
    checksums, 'get_all_url_infos', lambda: {**known, archive_url: info}
  )
  with pytest.raises(ConnectionError, match='cannot download .*checksum'):
    _open('', tmp_path)


def test_published_hash_is_that_of_tfds():
  # TFDS rejects a download whose hash does not match the recorded one.
  assert food101.URL in checksums.get_all_url_infos()


def test_no_network(tmp_path, monkeypatch):
  monkeypatch.setattr(food101, 'URL', 'http://127.0.0.1:9/x.tar.gz')
  message = (
    'cannot download http://127.0.0.1:9/x.tar.gz: .*Without a network, set '
    'food101_dir to a local copy'
  )
  with pytest.raises(ConnectionError, match=message):
    _open('', tmp_path)
