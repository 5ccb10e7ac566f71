"""Food-101 (Bossard, Guillaumin and Van Gool, ECCV 2014).

TFDS's builder, made to work without TensorFlow, and the same dataset from an
unpacked archive or any folder of the archive's layout.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable

import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification import food101

from dynconv_jax.data import files

# The version whose examples carry their name.
VERSION = '2.1.0'

# TFDS calls the published test split 'validation'.
ALIASES = {'test': 'validation'}
_META = {'train': 'train.json', 'validation': 'test.json'}


class Food101(food101.Food101, skip_registration=True):
  """TFDS's own builder, with an extraction that needs no TensorFlow."""

  def _split_generators(self, dl_manager):
    self._extractor = files.TarDownloader(
      dl_manager, pathlib.Path(self._data_dir_root), '--food101_dir'
    )
    return super()._split_generators(self._extractor)

  def _download_and_prepare(self, **kwargs):
    try:
      super()._download_and_prepare(**kwargs)
    finally:
      if hasattr(self, '_extractor'):
        self._extractor.clean()


@dataclasses.dataclass(frozen=True)
class Food101Folder:
  """What a folder of the archive's layout holds.

  Attributes:
    directory: the folder, which holds `images/` and `meta/`.
    class_names: in TFDS's order.
    examples: names such as 'apple_pie/1005649' by TFDS's name of the split.
    key: short hash of the names, sizes and times of all files.
  """

  directory: pathlib.Path
  class_names: tuple[str, ...]
  examples: dict[str, tuple[str, ...]]
  key: str


def scan_folder(
  directory: str | pathlib.Path,
  classes: Iterable[str] = (),
  allow_empty_files: bool = False,
) -> Food101Folder:
  """Returns what a folder of the archive's layout holds, after checking it.

  Args:
    directory: holds `images/CLASS/ID.jpg` and `meta/{train,test}.json`.
    classes: the only classes that are wanted. Others may be named by the meta
      files without having a folder of images. Empty: all are wanted.
    allow_empty_files: whether zero-byte images are let through, for a reader
      that skips what it cannot decode.

  Raises:
    FileNotFoundError: the folder, its meta files or images are missing.
    ValueError: a meta file is not what it should be, or an image is empty.
  """
  directory = pathlib.Path(directory).expanduser()
  files.check_directory(directory, '--food101_dir')
  names = {
    split: _read_meta(directory / 'meta' / f) for split, f in _META.items()
  }
  by_class = collections.defaultdict(list)
  for split_names in names.values():
    for name in split_names:
      by_class[name.split('/')[0]].append(name)
  wanted = set(classes)
  if wanted:
    # What is left out on purpose need not be there.
    absent = {
      c
      for c in set(by_class) - wanted
      if not (directory / 'images' / c).is_dir()
    }
    names = {
      split: [n for n in split_names if n.split('/')[0] not in absent]
      for split, split_names in names.items()
    }
    by_class = {c: n for c, n in by_class.items() if c not in absent}
  both = sorted(set(names['train']) & set(names['validation']))
  if both:
    raise ValueError(
      f'{directory}/meta: {files.some(both)} in both train.json and test.json'
    )
  key = files.check_files(
    directory / 'images',
    [f'{n}.jpg' for split_names in names.values() for n in split_names],
    source=f'{directory}/meta',
    allow_empty=allow_empty_files,
    salt=json.dumps(names),
  )
  return Food101Folder(
    directory=directory,
    class_names=_in_order(by_class),
    examples={split: tuple(n) for split, n in names.items()},
    key=key,
  )


class Food101FolderBuilder(
  tfds.core.GeneratorBasedBuilder, skip_registration=True
):
  """TFDS's `food101` read from a folder: same features, splits and order."""

  name = 'food101'
  VERSION = tfds.core.Version(VERSION)

  def __init__(self, folder: Food101Folder, **kwargs):
    self._folder = folder
    super().__init__(**kwargs)

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(),
          'label': tfds.features.ClassLabel(names=self._folder.class_names),
          'id': tfds.features.Text(),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage='https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/',
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {
      split: self._generate_examples(names)
      for split, names in self._folder.examples.items()
    }

  def _generate_examples(self, names):
    for name in names:
      yield (
        name,
        {
          'image': self._folder.directory / 'images' / f'{name}.jpg',
          'label': name.split('/')[0],
          'id': name,
        },
      )


def _read_meta(path: pathlib.Path) -> list[str]:
  """Returns the names in a meta file, in its order."""
  if not path.is_file():
    raise FileNotFoundError(
      f'--food101_dir: {path} is missing; the folder must have the layout of '
      "Food-101's archive, images/CLASS/ID.jpg and meta/{train,test}.json"
    )
  try:
    classes = json.loads(path.read_text())
    names = [name for group in classes.values() for name in group]
    wrong = [
      n for c, group in classes.items() for n in group if n.split('/')[0] != c
    ]
  except (ValueError, AttributeError, TypeError) as error:
    raise ValueError(
      f'{path} must be a JSON object of lists of names by class; {error}'
    ) from error
  if wrong:
    raise ValueError(f'{path}: {files.some(wrong)} under another class')
  if not names:
    raise ValueError(f'{path} names no image')
  return names


def _in_order(classes: Iterable[str]) -> tuple[str, ...]:
  """Returns classes in TFDS's order, unknown ones last."""
  path = tfds.core.tfds_path('image_classification/food-101_classes.txt')
  rank = {name: i for i, name in enumerate(path.read_text().split())}
  return tuple(sorted(classes, key=lambda c: (rank.get(c, len(rank)), c)))
