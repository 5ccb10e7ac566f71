import tarfile

import pytest

from dynconv_jax.data import folders


@pytest.fixture
def files(tmp_path):
  """A folder a/b.txt, c.txt and an archive of it."""
  root = tmp_path / 'root'
  (root / 'a').mkdir(parents=True)
  (root / 'a' / 'b.txt').write_text('b')
  (root / 'c.txt').write_text('c')
  with tarfile.open(tmp_path / 'root.tar.gz', 'w:gz') as tar:
    tar.add(root, 'root')
  return root


def test_folder_and_archive_hold_the_same(files):
  names = ['c.txt', 'a/b.txt']
  read = list(folders.read_files(files, names))
  assert read == [('c.txt', b'c'), ('a/b.txt', b'b')]
  archive = files.with_suffix('.tar.gz')
  assert sorted(folders.read_files(archive, names)) == sorted(read)


def test_the_same_file_in_two_groups(files):
  (files / 'd.txt').symlink_to('c.txt')
  (files / 'e.txt').hardlink_to(files / 'c.txt')
  key = folders.check_files(files, [['c.txt', 'd.txt', 'e.txt']], source='x')
  assert len(key) == 12
  for twin in ('d.txt', 'e.txt'):
    with pytest.raises(
      ValueError, match=f'in two classes or splits: c.txt and {twin}$'
    ):
      folders.check_files(files, [['c.txt'], [twin]], source='x')


def test_a_folder_is_no_file(files):
  with pytest.raises(FileNotFoundError, match='x names files .*root: a$'):
    folders.check_files(files, [['c.txt', 'a']], source='x')


def test_some():
  assert folders.some(['a', 'b', 'c']) == 'a, b, c'
  assert folders.some(list('abcde')) == 'a, b, c, ... (5 in all)'
