"""Any folder of images by split and class: `train/CLASS/*.jpg`.

It is prepared into array_record like every other dataset, not read in place:
then the splits' notation, the mixing of classes (`train[:90%]` of a sorted
listing would leave whole classes out), names and resuming work as elsewhere,
and epochs read few large files.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re

import tensorflow_datasets as tfds

from dynconv_jax.data import files

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')


@dataclasses.dataclass(frozen=True)
class ImageFolder:
  """What a folder of images holds.

  Attributes:
    directory: the folder.
    class_names: sorted.
    examples: paths such as 'train/cat/1.jpg' by split.
    key: short hash of the paths, sizes and times of all files.
  """

  directory: pathlib.Path
  class_names: tuple[str, ...]
  examples: dict[str, tuple[str, ...]]
  key: str


def scan_folder(
  directory: str | pathlib.Path, allow_empty_files: bool = False
) -> ImageFolder:
  """Returns what a folder of images holds, after checking it.

  Args:
    directory: holds `train/CLASS/` and, where there are such splits,
      `test/CLASS/` and others, with images anywhere below a class's folder.
      Hidden files and files of other types are passed over.
    allow_empty_files: whether zero-byte images are let through, for a reader
      that skips what it cannot decode.

  Raises:
    FileNotFoundError: the folder, its train folder or images are missing.
    ValueError: an image is empty, or a split holds a class that train lacks.
  """
  directory = pathlib.Path(directory).expanduser()
  files.check_directory(directory, '--image_folder_dir')
  if not (directory / 'train').is_dir():
    raise FileNotFoundError(
      f'--image_folder_dir: {directory} has no folder train; the layout is '
      'train/CLASS/*.jpg and test/CLASS/*.jpg (also .jpeg, .png, .webp)'
    )
  examples, classes = {}, {}
  for split in _subfolders(directory):
    if not re.fullmatch(r'[A-Za-z_]\w*', split):
      continue
    folder = directory / split
    classes[split] = _subfolders(folder)
    examples[split] = tuple(
      name for c in classes[split] for name in _images(directory, folder / c)
    )
    bare = [c for c in classes[split] if not _images(directory, folder / c)]
    if split == 'train' and (bare or not examples[split]):
      raise FileNotFoundError(
        f'--image_folder_dir: no image (.jpg, .jpeg, .png, .webp) in '
        f'{files.some([f"{folder}/{c}" for c in bare]) or f"{folder}/CLASS"}'
      )
  examples = {split: names for split, names in examples.items() if names}
  for split in examples:
    unknown = sorted(set(classes[split]) - set(classes['train']))
    if unknown:
      raise ValueError(
        f'--image_folder_dir: {directory / split} holds classes that train '
        f'lacks: {files.some(unknown)}'
      )
  key = files.check_files(
    directory,
    [name for names in examples.values() for name in names],
    source='--image_folder_dir',
    allow_empty=allow_empty_files,
  )
  return ImageFolder(directory, tuple(classes['train']), examples, key)


class ImageFolderBuilder(
  tfds.core.GeneratorBasedBuilder, skip_registration=True
):
  """Stores a folder's images, unchanged, with their paths as names."""

  name = 'image_folder'
  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, folder: ImageFolder, **kwargs):
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
          'image': self._folder.directory / name,
          'label': name.split('/')[1],
          'id': name,
        },
      )


def _subfolders(directory: pathlib.Path) -> list[str]:
  return sorted(
    p.name
    for p in directory.iterdir()
    if p.is_dir() and not p.name.startswith('.')
  )


def _images(root: pathlib.Path, folder: pathlib.Path) -> list[str]:
  """Returns the sorted paths of the images below a folder."""
  found = []
  for path, _, names in os.walk(folder, followlinks=True):
    relative = pathlib.Path(path).relative_to(root).as_posix()
    found += [
      f'{relative}/{name}'
      for name in names
      if name.lower().endswith(SUFFIXES) and not name.startswith('.')
    ]
  return sorted(found)
