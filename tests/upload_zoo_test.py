"""Tests of uploading the zoo, with a `gh` that only records its arguments."""

import hashlib
import importlib.util
import json
import pathlib
import subprocess

import pytest

_PATH = pathlib.Path(__file__).parents[1] / '.github/upload_zoo.py'
_GH = """#!/bin/sh
echo "$@" >> {log}
case "$1 $2" in
  'repo view') echo '{{"url": "https://example.org/me/mine"}}' ;;
  'release list') echo '{tags}' ;;
  'release upload') exit {status} ;;
esac
"""


@pytest.fixture
def upload():
  spec = importlib.util.spec_from_file_location('upload_zoo', _PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.upload


@pytest.fixture
def index(tmp_path):
  """An index of two networks. The folder zoo contains the first."""
  (tmp_path / 'zoo').mkdir()
  (tmp_path / 'zoo/a.safetensors').write_bytes(b'weights')
  (tmp_path / 'zoo/a.md').write_text('card')
  digest = hashlib.sha256(b'weights').hexdigest()
  entries = {
    name: {'file': f'{name}.safetensors', 'sha256': digest, 'url': None}
    for name in 'ab'
  }
  path = tmp_path / 'index.json'
  path.write_text(json.dumps(entries))
  return path


def _install(tmp_path, monkeypatch, tags='[]', status=0):
  """Puts a `gh` on the path; returns the file of its arguments."""
  log, gh = tmp_path / 'log', tmp_path / 'bin/gh'
  gh.parent.mkdir()
  gh.write_text(_GH.format(log=log, tags=tags, status=status))
  gh.chmod(0o755)
  monkeypatch.setenv('PATH', str(gh.parent), prepend=':')
  return log


@pytest.mark.parametrize('exists', [False, True])
def test_networks_are_uploaded_and_found(
  upload, index, tmp_path, monkeypatch, exists
):
  tags = json.dumps([{'tagName': 'v1'}] + [{'tagName': 'zoo'}] * exists)
  log = _install(tmp_path, monkeypatch, tags)
  zoo = tmp_path / 'zoo'
  assert upload(zoo, index=index) == ['a']
  calls = log.read_text().splitlines()
  assert ('release create zoo' in '\n'.join(calls)) == (not exists)
  assert calls[-1] == (
    f'release upload zoo --clobber {zoo / "a.safetensors"} {zoo / "a.md"}'
  )
  entries = json.loads(index.read_text())
  release = 'https://example.org/me/mine/releases/download/zoo'
  assert entries['a']['url'] == f'{release}/a.safetensors'
  assert entries['b']['url'] is None


def test_nothing_is_uploaded_after_an_error(
  upload, index, tmp_path, monkeypatch
):
  log, zoo = _install(tmp_path, monkeypatch), tmp_path / 'zoo'
  with pytest.raises(ValueError, match='contains none of a, b'):
    upload(tmp_path, index=index)
  (zoo / 'a.md').rename(zoo / 'other.md')
  with pytest.raises(FileNotFoundError, match='no model card .*a.md'):
    upload(zoo, index=index)
  (zoo / 'a.safetensors').write_bytes(b'other')
  with pytest.raises(ValueError, match='its SHA-256 is'):
    upload(zoo, index=index)
  assert not log.exists()


def test_a_failed_upload_leaves_the_index(upload, index, tmp_path, monkeypatch):
  _install(tmp_path, monkeypatch, status=1)
  before = index.read_text()
  with pytest.raises(subprocess.CalledProcessError, match='upload'):
    upload(tmp_path / 'zoo', index=index)
  assert index.read_text() == before
