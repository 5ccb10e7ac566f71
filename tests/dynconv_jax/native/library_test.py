"""Tests of where the compiled library is stored and when it is recompiled."""

import concurrent.futures
import hashlib
import os
import pathlib
import stat
from unittest import mock

import pytest

from dynconv_jax.native import library

_SOURCE = pathlib.Path(__file__)
_COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo 1.0 && exit
echo compiled >> {log}
sleep 0.2
while [ "$1" != -o ]; do shift; done
echo what is compiled > "$2"
"""


@pytest.fixture
def log(tmp_path, monkeypatch):
  """A file with one line per compilation, written by a fake compiler."""
  compiler, log = tmp_path / 'compiler', tmp_path / 'log'
  compiler.write_text(_COMPILER.format(log=log))
  compiler.chmod(0o700)
  monkeypatch.setenv('CXX', str(compiler))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return log


def _count(log):
  return len(log.read_text().splitlines())


def test_a_library_is_compiled_once_into_the_users_own_folder(log, tmp_path):
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    paths = {
      f.result() for f in [pool.submit(library.build, _SOURCE) for _ in 'abc']
    }
  (path,) = paths
  assert library.build(_SOURCE) == path
  assert _count(log) == 1
  assert path.parent == tmp_path / 'cache' / 'dynconv_jax' / 'kernels'
  assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
  assert path.read_text() == 'what is compiled\n'
  content = hashlib.sha256(b'what is compiled\n').hexdigest()
  assert path.stem.partition('-')[2] == content[:16]
  # Different flags make a different library.
  assert library.build(_SOURCE, ('-O1',)) != path
  assert _count(log) == 2


def _link(path):
  path.rename(path.with_name('elsewhere'))
  path.symlink_to(path.with_name('elsewhere'))


@pytest.mark.parametrize(
  'damage',
  [
    lambda path: path.write_bytes(b''),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.write_bytes(b'garbage'),
    lambda path: path.chmod(0o722),
    lambda path: path.unlink(),
    _link,
    pytest.param(
      lambda path: os.chown(path, 12345, 12345),
      marks=pytest.mark.skipif(os.geteuid() != 0, reason='needs root'),
    ),
  ],
  ids=['empty', 'cut', 'garbage', 'writable', 'gone', 'link', 'owner'],
)
def test_a_library_that_is_not_as_it_was_is_compiled_anew(log, damage):
  path = library.build(_SOURCE)
  damage(path)
  with mock.patch.object(library.logging, 'warning'):
    assert library.build(_SOURCE) == path
  assert _count(log) == 2
  assert path.read_text() == 'what is compiled\n'
  assert path.stat().st_uid == os.geteuid() and not path.is_symlink()
  assert not path.stat().st_mode & 0o022
  assert library.build(_SOURCE) == path
  assert _count(log) == 2


def test_what_a_killed_process_left_is_cleared_away(log):
  path = library.build(_SOURCE)
  left = path.parent / 'tmp12345'
  left.mkdir()
  (left / 'kernels.so').write_text('half')
  path.unlink()
  library.build(_SOURCE)
  assert {p.name for p in path.parent.iterdir()} == {'.lock', path.name}


def test_a_folder_that_others_can_write_to(log, tmp_path):
  folder = tmp_path / 'cache' / 'dynconv_jax' / 'kernels'
  folder.mkdir(parents=True)
  folder.chmod(0o777)
  library.build(_SOURCE)
  assert stat.S_IMODE(folder.stat().st_mode) == 0o700
  with (
    mock.patch.object(os, 'geteuid', return_value=os.geteuid() + 1),
    pytest.raises(OSError, match='kernels belongs to another user'),
  ):
    library.build(_SOURCE)


def test_the_cache_is_in_the_home_folder_otherwise(log, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  for value in ('', 'relative'):
    monkeypatch.setenv('XDG_CACHE_HOME', value)
    assert library.build(_SOURCE).is_relative_to(tmp_path / 'home' / '.cache')
  assert _count(log) == 1
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
  with pytest.raises(OSError, match='set HOME or XDG_CACHE_HOME'):
    library.build(_SOURCE)
