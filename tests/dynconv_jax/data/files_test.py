import functools
import http.server
import tarfile
import threading

import pytest
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.image_classification import food101 as tfds_food101

from dynconv_jax.data import sources


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass


@pytest.fixture
def archive_url(food101_dir, tmp_path, monkeypatch):
  """Address from which TFDS's builder gets a small archive of Food-101."""
  served = tmp_path / 'served'
  served.mkdir()
  with tarfile.open(served / 'food-101.tar.gz', 'w:gz') as tar:
    tar.add(food101_dir, 'food-101')
  server = http.server.ThreadingHTTPServer(
    ('127.0.0.1', 0), functools.partial(_QuietHandler, directory=served)
  )
  threading.Thread(target=server.serve_forever, daemon=True).start()
  url = f'http://127.0.0.1:{server.server_port}/food-101.tar.gz'
  monkeypatch.setattr(tfds_food101, '_BASE_URL', url)
  yield url
  server.shutdown()
  server.server_close()


def test_download(archive_url, food101_dir, tmp_path):
  data_dir = tmp_path / 'data'
  opened = sources.open_splits(
    'food101', train='train', validation='', data_dir=data_dir
  )
  # TFDS's own builder knows all classes.
  assert len(opened.train.class_names) == 101
  assert (len(opened.train), len(opened.test)) == (19, 11)
  folder = sources.open_splits(
    'food101',
    train='train',
    validation='',
    data_dir=data_dir,
    food101_dir=food101_dir,
  )
  for found, expected in zip(opened, folder, strict=True):
    if expected is None:
      continue
    # A folder gives what the download gives, in the same order.
    for i in range(len(expected)):
      a, b = found[i], expected[i]
      assert (a['name'], a['image']) == (b['name'], b['image'])
      assert found.class_names[a['label']] == expected.class_names[b['label']]
  assert not list(data_dir.glob('unpacked.*'))


def test_download_with_another_hash(archive_url, tmp_path, monkeypatch):
  known = checksums.get_all_url_infos()
  info = checksums.UrlInfo(size=1, checksum='0' * 64, filename='x.tar.gz')
  monkeypatch.setattr(
    checksums, 'get_all_url_infos', lambda: {**known, archive_url: info}
  )
  with pytest.raises(ConnectionError, match='cannot download .*checksum'):
    sources.open_source('food101', 'train', data_dir=tmp_path / 'data')


def test_no_network(tmp_path, monkeypatch):
  monkeypatch.setattr(tfds_food101, '_BASE_URL', 'http://127.0.0.1:9/x.tar.gz')
  message = (
    'cannot download http://127.0.0.1:9/x.tar.gz: .*Where there is no network, '
    'name a local copy by --food101_dir'
  )
  with pytest.raises(ConnectionError, match=message):
    sources.open_source('food101', 'train', data_dir=tmp_path)
