"""Food-101 (Bossard, Guillaumin, and Van Gool, ECCV 2014).

Features, splits, and order equal those of TFDS's `food101`. The images come
from a download, an unpacked archive, or any folder with the archive's layout.
TensorFlow is not needed.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable

from etils import epy

from dynconv_jax.data import folders
from dynconv_jax.data.prepare import download, prepare
from dynconv_jax.data.source import Common, Dataset, DataSource, option

# Imported lazily because it is slow.
with epy.lazy_imports():
  import tensorflow_datasets as tfds

_OPTION = 'food101_dir'
# The version of TFDS's examples that include their name.
_VERSION = '2.1.0'
# TFDS checks the SHA-256 of the file at this address.
URL = 'http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz'

# TFDS calls the published test split 'validation'.
_ALIASES = {'test': 'validation'}
_META = {'train': 'meta/train.json', 'validation': 'meta/test.json'}


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the source."""

  food101_dir: str = option(
    '',
    'Folder of the unpacked Food-101 archive, or any folder with its layout; '
    'empty: download.',
    operational=True,
  )


def open_food101(options: Options, common: Common) -> Dataset:
  """Returns Food-101, from a given folder or from a download.

  Raises:
    FileNotFoundError: the folder, its meta files, or images are missing.
    ValueError: a meta file has the wrong format, or an image is empty.
    ConnectionError: the download fails.
  """
  # Classes in TFDS's order, followed by unknown ones.
  known = tfds.core.tfds_path('image_classification/food-101_classes.txt')
  class_names = tuple(known.read_text().split())
  if options.food101_dir:
    path = pathlib.Path(options.food101_dir).expanduser()
    names, key = scan_folder(path, common.classes, common.skip_corrupt)
    used = {name.split('/')[0] for group in names.values() for name in group}
    class_names = tuple(c for c in class_names if c in used)
    class_names += tuple(sorted(used - set(class_names)))
  else:
    path, names, key = None, None, ''

  def examples(dl_manager):
    files = path or download(dl_manager, URL, _OPTION)
    return {
      split: _examples(files, group)
      for split, group in (names or _read_meta(files)).items()
    }

  return prepare(
    SOURCE.name,
    _VERSION,
    examples,
    class_names,
    common.data_dir,
    key=key,
    aliases=_ALIASES,
  )


SOURCE = DataSource('food101', Options, open_food101)


def _examples(path: pathlib.Path, names: Iterable[str]):
  files = [f'images/{name}.jpg' for name in names]
  for file, content in folders.read_files(path, files):
    name = file.removeprefix('images/').removesuffix('.jpg')
    yield {'image': content, 'label': name.split('/')[0], 'name': name}


def scan_folder(
  directory: pathlib.Path,
  classes: Iterable[str] = (),
  allow_empty_files: bool = False,
) -> tuple[dict[str, list[str]], str]:
  """Returns the images' names by TFDS's splits, and a hash of the content.

  Args:
    directory: contains `images/CLASS/ID.jpg` and `meta/{train,test}.json`.
    classes: the classes to keep; empty for all. Other classes in the meta files
      need no folder of images.
    allow_empty_files: whether zero-byte images are allowed.

  Raises:
    FileNotFoundError: the folder, its meta files, or images are missing.
    ValueError: a meta file has the wrong format, or an image is empty.
  """
  folders.check_directory(directory, _OPTION)
  names = _read_meta(directory)
  kept = set(classes)
  if kept:
    # Folders of other classes may be missing.
    named = {name.split('/')[0] for group in names.values() for name in group}
    absent = {
      c for c in named - kept if not (directory / 'images' / c).is_dir()
    }
    names = {
      split: [n for n in group if n.split('/')[0] not in absent]
      for split, group in names.items()
    }
  both = sorted(set(names['train']) & set(names['validation']))
  if both:
    raise ValueError(
      f'{directory}/meta: {folders.some(both)} in both train.json and test.json'
    )
  key = folders.check_files(
    directory / 'images',
    [[f'{name}.jpg' for name in group] for group in names.values()],
    source=f'{directory}/meta',
    allow_empty=allow_empty_files,
    salt=json.dumps(names),
  )
  return names, key


def _read_meta(path: pathlib.Path) -> dict[str, list[str]]:
  """Returns the images' names by TFDS's splits, from a folder or an archive."""
  for file in _META.values():
    if path.is_dir() and not (path / file).is_file():
      raise FileNotFoundError(
        f'{_OPTION}: {path / file} is missing; the folder must have the layout '
        "of Food-101's archive, images/CLASS/ID.jpg and "
        'meta/{train,test}.json'
      )
  contents = dict(folders.read_files(path, _META.values()))
  names = {}
  for split, file in _META.items():
    try:
      classes = json.loads(contents[file])
      names[split] = [name for group in classes.values() for name in group]
      wrong = [n for c in classes for n in classes[c] if n.split('/')[0] != c]
    except (ValueError, AttributeError, TypeError) as error:
      raise ValueError(
        f'{path / file} must be a JSON object of lists of names by class; '
        f'{error}'
      ) from error
    if wrong:
      raise ValueError(
        f'{path / file}: {folders.some(wrong)} listed under another class'
      )
    if not names[split]:
      raise ValueError(f'{path / file} lists no image')
  return names
