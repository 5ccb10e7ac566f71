"""Folders of images by split and class: `train/CLASS/*.jpg`.

Like every other data set, the folder is prepared into array_record files.
Splits, names, and resuming then work as usual, epochs read a few large files,
and slices mix the classes. In a sorted listing, `train[:90%]` would omit whole
classes.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re

from dynconv_jax.data import folders
from dynconv_jax.data.prepare import prepare
from dynconv_jax.data.source import Common, Dataset, DataSource, option

_OPTION = 'image_folder_dir'
SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the source."""

  image_folder_dir: str = option(
    '',
    'Folder that contains train/CLASS/*.jpg and, optionally, val/CLASS/*.jpg '
    'and test/CLASS/*.jpg.',
    operational=True,
  )


def open_folder(options: Options, common: Common) -> Dataset:
  """Returns the data set of a folder of images.

  A folder `val` or `validation` is the validation split.

  Raises:
    FileNotFoundError: the folder, its train folder, or images are missing.
    ValueError: no folder is given, an image is empty or in two places, a link
      points to a folder above it, or a split has a class that train lacks.
  """
  if not options.image_folder_dir:
    raise ValueError(f'the dataset image_folder needs {_OPTION}')
  directory = pathlib.Path(options.image_folder_dir).expanduser()
  class_names, splits = scan_folder(directory)
  key = folders.check_files(
    directory,
    (names for classes in splits.values() for names in classes.values()),
    source=f'{_OPTION}',
    allow_empty=common.skip_corrupt,
  )
  has_val = 'val' in splits and 'validation' not in splits
  return prepare(
    SOURCE.name,
    '1.0.0',
    lambda _: {
      split: (
        {'image': directory / name, 'label': label, 'name': name}
        for label, names in classes.items()
        for name in names
      )
      for split, classes in splits.items()
    },
    class_names,
    common.data_dir,
    key=key,
    aliases={'validation': 'val'} if has_val else {},
  )


SOURCE = DataSource('image_folder', Options, open_folder)


def scan_folder(
  directory: pathlib.Path,
) -> tuple[tuple[str, ...], dict[str, dict[str, list[str]]]]:
  """Returns the class names, and the images' paths by split and class.

  Args:
    directory: contains `train/CLASS/` and, for other splits, folders such as
      `test/CLASS/`, with images anywhere below a class's folder. Hidden files
      and other file types are ignored. Links to folders are followed; each
      folder is read once.

  Raises:
    FileNotFoundError: the folder, its train folder, or images are missing.
    ValueError: a link points to a folder above it, or a split has a class that
      train lacks.
  """
  folders.check_directory(directory, _OPTION)
  if not (directory / 'train').is_dir():
    raise FileNotFoundError(
      f'{_OPTION}: {directory} has no folder train; the layout is '
      'train/CLASS/*.jpg, val/CLASS/*.jpg, and test/CLASS/*.jpg (or .jpeg, '
      '.png, .webp)'
    )
  found = {
    split: {
      label: _images(directory, directory / split / label)
      for label in _subfolders(directory / split)
    }
    for split in _subfolders(directory)
    if re.fullmatch(r'[A-Za-z_]\w*', split)
  }
  train = directory / 'train'
  bare = [f'{train}/{c}' for c, names in found['train'].items() if not names]
  if bare or not found['train']:
    raise FileNotFoundError(
      f'{_OPTION}: no image (.jpg, .jpeg, .png, .webp) in '
      f'{folders.some(bare) or f"{train}/CLASS"}'
    )
  found = {s: classes for s, classes in found.items() if any(classes.values())}
  for split, classes in found.items():
    unknown = sorted(set(classes) - set(found['train']))
    if unknown:
      raise ValueError(
        f'{_OPTION}: {directory / split} has classes that train lacks: '
        f'{folders.some(unknown)}'
      )
  return tuple(found['train']), found


def _subfolders(directory: pathlib.Path) -> list[str]:
  """Returns the sorted names of subfolders, including links."""
  names = sorted(
    p.name
    for p in directory.iterdir()
    if p.is_dir() and not p.name.startswith('.')
  )
  for name in names:
    _check_link(directory / name)
  return names


def _images(root: pathlib.Path, folder: pathlib.Path) -> list[str]:
  """Returns the sorted paths of the images below a folder."""
  found, visited = [], {os.path.realpath(folder)}
  for path, subfolders, names in os.walk(folder, followlinks=True):
    relative = pathlib.Path(path).relative_to(root).as_posix()
    found += [
      f'{relative}/{name}'
      for name in names
      if name.lower().endswith(SUFFIXES) and not name.startswith('.')
    ]
    subfolders.sort()
    for name in subfolders[:]:
      _check_link(pathlib.Path(path, name))
      real = os.path.realpath(os.path.join(path, name))
      if real in visited:
        subfolders.remove(name)
      visited.add(real)
  return sorted(found)


def _check_link(path: pathlib.Path) -> None:
  """Raises ValueError if a folder is a link to a folder above it."""
  target, here = os.path.realpath(path), os.path.realpath(path.parent)
  if os.path.commonpath([target, here]) == target:
    raise ValueError(
      f'{_OPTION}: {path} is a link to {target}, a folder above it. Remove the '
      'link, which would count images twice, in another class'
    )
