import shutil

import pytest
from PIL import Image

from dynconv_jax.data import image_folder


def test_what_a_folder_holds(image_folder_dir):
  folder = image_folder.scan_folder(image_folder_dir)
  assert folder.class_names == ('cat', 'dog')
  assert folder.examples['test'] == (
    'test/cat/0.jpg',
    'test/cat/1.PNG',
    'test/dog/0.jpg',
    'test/dog/1.PNG',
  )
  assert len(folder.examples['train']) == 12


def test_key_follows_the_content(image_folder_dir):
  key = image_folder.scan_folder(image_folder_dir).key
  assert image_folder.scan_folder(image_folder_dir).key == key
  path = image_folder_dir / 'train' / 'dog' / '0.jpg'
  Image.new('RGB', (9, 9)).save(path)
  assert image_folder.scan_folder(image_folder_dir).key != key


def test_a_test_folder_is_not_needed(image_folder_dir):
  shutil.rmtree(image_folder_dir / 'test')
  assert set(image_folder.scan_folder(image_folder_dir).examples) == {'train'}


def _remove_train(root):
  shutil.rmtree(root / 'train')


def _empty_class(root):
  (root / 'train' / 'emu').mkdir()


def _no_class(root):
  shutil.rmtree(root / 'train')
  (root / 'train').mkdir()


def _unknown_class(root):
  shutil.copytree(root / 'test' / 'dog', root / 'test' / 'emu')


def _zero_bytes(root):
  (root / 'test' / 'dog' / '0.jpg').write_bytes(b'')


@pytest.mark.parametrize(
  ('break_folder', 'error', 'message'),
  [
    (shutil.rmtree, FileNotFoundError, '--image_folder_dir: .*not exist'),
    (_remove_train, FileNotFoundError, 'has no folder train; the layout is'),
    (_empty_class, FileNotFoundError, 'no image .* in .*train/emu'),
    (_no_class, FileNotFoundError, 'no image .* in .*train/CLASS'),
    (_unknown_class, ValueError, 'test holds classes that train lacks: emu'),
    (_zero_bytes, ValueError, 'zero-byte files: test/dog/0.jpg'),
  ],
)
def test_errors(image_folder_dir, break_folder, error, message):
  break_folder(image_folder_dir)
  with pytest.raises(error, match=message):
    image_folder.scan_folder(image_folder_dir)
