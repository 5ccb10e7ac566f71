import os

import pytest

from dynconv_jax import files


@pytest.mark.parametrize('content', ['naïve\n', b'\xff\0'])
def test_writes_and_replaces(tmp_path, content):
  path = tmp_path / 'new' / 'file'
  for _ in range(2):
    files.write_atomic(path, content)
    expected = content.encode() if isinstance(content, str) else content
    assert path.read_bytes() == expected
    path.write_bytes(b'old')
  assert os.listdir(path.parent) == ['file']


def test_an_error_leaves_the_old_file(tmp_path):
  path = tmp_path / 'file'
  path.write_text('old')
  with pytest.raises(OSError, match='full'), files.replacing(path) as partial:
    partial.write_text('ne')
    raise OSError('full')
  assert path.read_text() == 'old'
  assert os.listdir(tmp_path) == ['file']


def test_nobody_sees_half_a_file(tmp_path):
  path = tmp_path / 'file'
  path.write_text('old')
  with files.replacing(path) as partial:
    partial.write_text('new')
    assert path.read_text() == 'old'
  assert path.read_text() == 'new'
