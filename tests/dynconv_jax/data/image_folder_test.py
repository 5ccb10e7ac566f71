import os
import shutil

import pytest
from PIL import Image

from dynconv_jax.data import image_folder, sources
from dynconv_jax.data.source import Common


def _open(root, data_dir, **common):
  return sources.open_splits(
    'image_folder', image_folder.Options(str(root)), Common(data_dir, **common)
  )


def _names(source):
  return sorted(example['name'] for example in source)


def test_what_a_folder_holds(image_folder_dir):
  class_names, found = image_folder.scan_folder(image_folder_dir)
  assert class_names == ('cat', 'dog')
  assert found['test'] == {
    'cat': ['test/cat/0.jpg', 'test/cat/1.PNG'],
    'dog': ['test/dog/0.jpg', 'test/dog/1.PNG'],
  }
  assert [len(names) for names in found['train'].values()] == [6, 6]


def test_examples_are_the_files(image_folder_dir, tmp_path):
  opened = _open(image_folder_dir, tmp_path / 'data')
  assert [len(s) for s in opened] == [11, 1, 4]
  for source in opened:
    for example in source:
      path = image_folder_dir / example['name']
      assert example['image'] == path.read_bytes()
      assert source.class_names[example['label']] == path.parent.name


def test_other_content_is_another_data_set(image_folder_dir, tmp_path):
  first = _open(image_folder_dir, tmp_path / 'data').test[0]
  path = image_folder_dir / first['name']
  Image.new('RGB', (9, 9)).save(path)
  second = _open(image_folder_dir, tmp_path / 'data').test[0]
  assert second['image'] == path.read_bytes() != first['image']
  shutil.rmtree(image_folder_dir / 'test')
  assert _open(image_folder_dir, tmp_path / 'data').test is None


@pytest.mark.parametrize('name', ['val', 'validation'])
def test_a_validation_folder_is_the_validation_split(
  image_folder_dir, tmp_path, name
):
  (image_folder_dir / 'test').rename(image_folder_dir / name)
  opened = _open(image_folder_dir, tmp_path / 'data')
  assert [len(opened.train), len(opened.validation)] == [12, 4]
  assert opened.test is None
  assert all(n.startswith(f'{name}/') for n in _names(opened.validation))
  by_role = sources.open_source(
    'image_folder',
    'validation[:2]',
    image_folder.Options(str(image_folder_dir)),
    Common(tmp_path / 'data'),
  )
  assert [e['name'] for e in by_role] == [
    opened.validation[i]['name'] for i in range(2)
  ]


def test_linked_folders_are_read_once(image_folder_dir, tmp_path):
  # The images of a class are stored elsewhere and linked twice.
  cats = image_folder_dir / 'train' / 'cat'
  shutil.move(cats, tmp_path / 'cats')
  cats.mkdir()
  (cats / 'all').symlink_to(tmp_path / 'cats')
  (cats / 'again').symlink_to(tmp_path / 'cats')
  # Two folders that link to each other, neither above the other.
  (tmp_path / 'cats' / 'more').mkdir()
  Image.new('RGB', (3, 3)).save(tmp_path / 'cats' / 'more' / 'x.png')
  (tmp_path / 'others').mkdir()
  (tmp_path / 'cats' / 'more' / 'others').symlink_to(tmp_path / 'others')
  (tmp_path / 'others' / 'more').symlink_to(tmp_path / 'cats' / 'more')
  names = image_folder.scan_folder(image_folder_dir)[1]['train']['cat']
  assert len(names) == 7
  real = {os.path.realpath(image_folder_dir / name) for name in names}
  assert len(real) == 7


@pytest.mark.parametrize(
  ('link', 'target'),
  [
    ('train/cat/loop', '..'),
    ('train/cat/self', '.'),
    ('train/emu', '..'),
    ('extra', '.'),
    ('train/cat/out', '../../..'),
  ],
)
def test_links_upward_are_refused(image_folder_dir, link, target):
  (image_folder_dir / link).symlink_to(target)
  with pytest.raises(ValueError, match=f'{link} is a link to .*, a folder abo'):
    image_folder.scan_folder(image_folder_dir)


@pytest.mark.parametrize(
  ('link', 'target'),
  [
    ('train/cat/others', '../dog'),
    ('train/cat/tests', '../../test/cat'),
    ('val', 'train'),
    ('train/cat/x.jpg', '../dog/0.jpg'),
  ],
)
def test_a_file_in_two_places(image_folder_dir, tmp_path, link, target):
  (image_folder_dir / link).symlink_to(target)
  with pytest.raises(
    ValueError, match='links to the same file in two classes or splits: '
  ):
    _open(image_folder_dir, tmp_path / 'data')


def test_copies_across_splits_are_reported(image_folder_dir, tmp_path, caplog):
  # A copy within a split is not a leak.
  for copy in ('train/cat/copy.jpg', 'test/cat/copy.jpg'):
    shutil.copy(image_folder_dir / 'train/cat/0.jpg', image_folder_dir / copy)
  with caplog.at_level('WARNING'):
    _open(image_folder_dir, tmp_path / 'data')
  (message,) = [r.getMessage() for r in caplog.records]
  assert message == (
    'image_folder: two splits contain the same images: train/cat/0.jpg of '
    'train is test/cat/copy.jpg of test, train/cat/copy.jpg of train is '
    'test/cat/copy.jpg of test'
  )


def _remove_train(root):
  shutil.rmtree(root / 'train')


def _empty_class(root):
  (root / 'train' / 'emu').mkdir()


def _no_class(root):
  shutil.rmtree(root / 'train')
  (root / 'train').mkdir()


def _unknown_class(root):
  shutil.move(root / 'test' / 'dog', root / 'test' / 'emu')


def _zero_bytes(root):
  (root / 'test' / 'dog' / '0.jpg').write_bytes(b'')


def _not_utf8(root):
  path = os.fsencode(root / 'test' / 'dog' / '0.jpg')
  os.rename(path, path.replace(b'0.jpg', b'\xff.jpg'))


def _one_class(root):
  for split in ('train', 'test'):
    shutil.rmtree(root / split / 'dog')


def _pipe(root):
  os.mkfifo(root / 'train' / 'cat' / 'pipe.jpg')


@pytest.mark.parametrize(
  ('break_folder', 'error', 'message'),
  [
    (shutil.rmtree, FileNotFoundError, 'image_folder_dir: .*not exist'),
    (_remove_train, FileNotFoundError, 'has no folder train; the layout is'),
    (_empty_class, FileNotFoundError, 'no image .* in .*train/emu'),
    (_no_class, FileNotFoundError, 'no image .* in .*train/CLASS'),
    (_unknown_class, ValueError, 'test has classes that train lacks: emu'),
    (_zero_bytes, ValueError, 'zero-byte files: test/dog/0.jpg'),
    (_not_utf8, ValueError, r"not UTF-8: 'test/dog/\\udcff.jpg'"),
    (_one_class, ValueError, "image_folder has one class, 'cat'; a classif"),
    (_pipe, FileNotFoundError, 'missing from .*: train/cat/pipe.jpg'),
  ],
)
def test_errors(image_folder_dir, tmp_path, break_folder, error, message):
  break_folder(image_folder_dir)
  # Missing files are an error even if corrupt images are skipped.
  skip_corrupt = error is FileNotFoundError
  with pytest.raises(error, match=message):
    _open(image_folder_dir, tmp_path / 'data', skip_corrupt=skip_corrupt)


def test_no_folder_is_named(tmp_path):
  with pytest.raises(ValueError, match='image_folder needs image_folder_dir'):
    _open('', tmp_path)
