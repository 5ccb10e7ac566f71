"""Tests of the zoo's index, its search path, and its errors."""

import hashlib
import io
import json
import re

import pytest

from dynconv_jax.interop import (
  check_found,
  check_pretrained,
  find_pretrained,
  source_model,
  source_normalization,
  source_options,
  write_safetensors,
  zoo,
)
from dynconv_jax.models import registry
from dynconv_jax.training.config import Config

_CONTENT = b'weights'
_HASH = hashlib.sha256(_CONTENT).hexdigest()


@pytest.fixture
def entry(monkeypatch, tmp_path):
  """The entry of zoo:small, which tests may change; HOME is empty."""
  values = {
    'file': 'small.safetensors',
    'sha256': _HASH,
    'url': None,
    'flags': {
      'model': 'mobilenet_v2',
      'method': 'dynconv',
      'padding': 'same',
      'normalization': 'inception',
    },
  }
  monkeypatch.setattr(zoo, 'entries', lambda: {'small': values})
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.delenv(zoo.VARIABLE, raising=False)
  return values


def _put(folder, content=_CONTENT):
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'small.safetensors'
  path.write_bytes(content)
  return path


def test_folders_in_their_order(entry, tmp_path, monkeypatch):
  data_dir = tmp_path / 'data'
  home = _put(tmp_path / 'home' / '.cache' / 'dynconv_jax' / 'zoo')
  assert find_pretrained('zoo:small', data_dir) == home
  data = _put(data_dir / 'zoo')
  assert find_pretrained('zoo:small', data_dir) == data
  monkeypatch.setenv(zoo.VARIABLE, str(tmp_path / 'mine'))
  assert find_pretrained('zoo:small', data_dir) == data
  mine = _put(tmp_path / 'mine')
  assert find_pretrained('zoo:small', data_dir) == mine
  check_found('zoo:small', data_dir)


def test_a_missing_file_says_where_to_put_it(entry, tmp_path, monkeypatch):
  place = re.escape(str(tmp_path / 'data' / 'zoo' / 'small.safetensors'))
  message = rf'not published yet: put the file \(SHA-256 {_HASH}\) at {place}'
  for find in (find_pretrained, check_found):
    with pytest.raises(FileNotFoundError, match=message):
      find('zoo:small', tmp_path / 'data')
  # Raised before any computation, with all other errors.
  config = Config.make(
    model='mobilenet_v2',
    padding='same',
    image_size=64,
    pretrained='zoo:small',
    data_dir=str(tmp_path / 'data'),
    budget=2.0,
  )
  with pytest.raises(ValueError, match=message) as error:
    config.check()
  assert 'budget must be' in str(error.value)
  with pytest.raises(ValueError, match='budget') as error:
    config.check(resumed=True)
  assert 'not published' not in str(error.value)


@pytest.mark.parametrize('place', ['by_hand', 'url'])
def test_another_file_is_an_error(entry, tmp_path, place):
  if place == 'url':
    entry['url'] = _put(tmp_path / 'server', b'other').as_uri()
  else:
    _put(tmp_path / 'zoo', b'other')
  found = hashlib.sha256(b'other').hexdigest()
  with pytest.raises(
    ValueError, match=f'its SHA-256 is {found}, expected {_HASH}'
  ):
    find_pretrained('zoo:small', tmp_path)
  if place == 'url':
    assert list((tmp_path / 'zoo').iterdir()) == []


def test_downloads_once(entry, tmp_path):
  served = _put(tmp_path / 'server')
  entry['url'] = served.as_uri()
  check_found('zoo:small', tmp_path)
  assert not (tmp_path / 'zoo').exists()
  path = find_pretrained('zoo:small', tmp_path)
  assert path == tmp_path / 'zoo' / 'small.safetensors'
  assert path.read_bytes() == _CONTENT
  served.unlink()
  assert find_pretrained('zoo:small', tmp_path) == path
  path.unlink()
  with pytest.raises(
    FileNotFoundError, match='cannot download file:.*No such file.*put the'
  ):
    find_pretrained('zoo:small', tmp_path)


@pytest.mark.parametrize('error', [ConnectionResetError, TimeoutError])
def test_a_download_that_stops(entry, tmp_path, monkeypatch, error):
  class Response(io.BytesIO):
    def read(self, size=-1):
      raise error('it stopped')

  monkeypatch.setattr(
    zoo.urllib.request, 'urlopen', lambda *_, **__: Response()
  )
  entry['url'] = 'https://example.org/small.safetensors'
  message = r'cannot download https:.* \(it stopped\).*put the file'
  with pytest.raises(FileNotFoundError, match=message):
    find_pretrained('zoo:small', tmp_path)
  assert list((tmp_path / 'zoo').iterdir()) == []


def test_an_unknown_name(entry):
  for source in ('zoo:smal', 'zoo:'):
    with pytest.raises(ValueError, match='unknown pretrained.*allowed: small'):
      check_pretrained(source)


def test_a_source_says_what_it_is_for(entry, tmp_path):
  path = tmp_path / 'own.safetensors'
  header = {'flags': json.dumps(entry['flags'])}
  write_safetensors(path, {}, header)
  for source in ('zoo:small', str(path)):
    assert source_model(source) == 'mobilenet_v2'
    assert source_options(source) == {'padding': 'same'}
    assert source_normalization(source) == 'inception'
  # Another file has no effect.
  write_safetensors(path, {})
  assert source_model(str(path)) is None
  with pytest.raises(ValueError, match='are for model=mobilenet_v2, not'):
    Config.make(model='resnet18', pretrained='zoo:small').check()


def test_the_index_of_the_package():
  for name, entry in zoo.entries().items():
    assert re.fullmatch('[0-9a-f]{64}', entry['sha256'])
    assert entry['file'] == f'{name}.safetensors'
    assert 0 < entry['accuracy'] <= 1 and entry['gmacs'] > 0
    registry.load_factory(entry['flags']['model'])
    assert entry['url'] is None or entry['url'].startswith('https://')


def test_an_entry_takes_the_place_of_its_former_one(tmp_path):
  index = tmp_path / 'zoo.json'
  zoo.write_entry('b', {'file': 'b'}, index)
  zoo.write_entry('a', {'file': 'a'}, index)
  zoo.write_entry('b', {'file': 'c'}, index)
  assert json.loads(index.read_text()) == {
    'a': {'file': 'a'},
    'b': {'file': 'c'},
  }
  assert list(json.loads(index.read_text())) == ['a', 'b']
