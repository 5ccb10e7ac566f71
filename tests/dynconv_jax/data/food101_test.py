import json
import re
import shutil

import pytest

from dynconv_jax.data import food101


def test_what_a_folder_holds(food101_dir):
  folder = food101.scan_folder(food101_dir)
  # TFDS's order, not the alphabet's: cheesecake comes before cheese_plate.
  assert folder.class_names == ('apple_pie', 'cheesecake', 'cheese_plate')
  assert {s: len(n) for s, n in folder.examples.items()} == {
    'train': 5 + 8 + 6,
    'validation': 3 + 4 + 4,
  }
  assert 'apple_pie/1000' in folder.examples['train']


def test_key_tells_folders_apart(food101_dir, tmp_path):
  key = food101.scan_folder(food101_dir).key
  assert food101.scan_folder(food101_dir).key == key
  copy = tmp_path / 'copy'
  shutil.copytree(food101_dir, copy)
  assert food101.scan_folder(copy).key == key
  image = copy / 'images' / 'apple_pie' / '1000.jpg'
  image.write_bytes(image.read_bytes() + b'\0')
  assert food101.scan_folder(copy).key != key
  shutil.rmtree(copy)
  shutil.copytree(food101_dir, copy)
  meta = copy / 'meta' / 'train.json'
  classes = json.loads(meta.read_text())
  classes['apple_pie'].pop()
  meta.write_text(json.dumps(classes))
  assert food101.scan_folder(copy).key != key


def test_unwanted_classes_need_no_folder(food101_dir):
  shutil.rmtree(food101_dir / 'images' / 'cheesecake')
  with pytest.raises(FileNotFoundError, match=r'cheesecake.*\(12 in all\)'):
    food101.scan_folder(food101_dir)
  folder = food101.scan_folder(food101_dir, classes=['apple_pie'])
  assert folder.class_names == ('apple_pie', 'cheese_plate')


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
    (_remove_all, FileNotFoundError, '--food101_dir: .* does not exist'),
    (_empty, FileNotFoundError, '--food101_dir: .* is empty'),
    (_make_file, NotADirectoryError, '--food101_dir: .* is not a folder'),
    (_remove_meta, FileNotFoundError, 'meta/test.json is missing'),
    (
      _remove_images,
      FileNotFoundError,
      'meta names files that are absent from .*images: apple_pie/1000.jpg, '
      r'apple_pie/1001.jpg, apple_pie/1002.jpg, ... \(4 in all\)',
    ),
    (
      _zero_bytes,
      ValueError,
      'zero-byte files: cheesecake/1003.jpg. .*--skip_corrupt',
    ),
    (_damage_meta, ValueError, 'train.json must be a JSON object of lists'),
    (_list_meta, ValueError, 'train.json must be a JSON object of lists'),
    (_mix_meta, ValueError, 'cheesecake/1 under another class'),
    (_no_names, ValueError, 'train.json names no image'),
    (_leak, ValueError, r'\(19 in all\) in both train.json and test.json'),
  ],
)
def test_errors(food101_dir, break_folder, error, message):
  break_folder(food101_dir)
  with pytest.raises(error, match=message) as raised:
    food101.scan_folder(food101_dir)
  assert str(food101_dir) in re.sub(r'\s', '', str(raised.value))


def test_zero_bytes_are_let_through_when_asked(food101_dir):
  _zero_bytes(food101_dir)
  folder = food101.scan_folder(food101_dir, allow_empty_files=True)
  assert len(folder.examples['train']) == 19
