"""Random-access sources of encoded images, one interface for all datasets."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds

from dynconv_jax.data import cifar10, food101, image_folder, spots
from dynconv_jax.data import prepare as prepare_lib
from dynconv_jax.data import splits as splits_lib

DATASETS = ('spots', 'food101', 'cifar10', 'image_folder')

# The names and sizes of a dataset's splits are those of TFDS where it has it.
_ALIASES = {'food101': food101.ALIASES}


class Splits(NamedTuple):
  """A dataset's sources by role; None where there is no such split."""

  train: ImageSource | None
  validation: ImageSource | None
  test: ImageSource | None


def default_splits(dataset: str) -> tuple[str, str, str]:
  """Returns the splits to train, validate and test on, in TFDS's notation."""
  _check_dataset(dataset)
  test = _ALIASES.get(dataset, {}).get('test', 'test')
  return 'train[:90%]', 'train[90%:]', test


def open_source(dataset: str, split: str, **options) -> ImageSource | None:
  """Returns the source of one split, preparing the dataset where need be.

  Args:
    dataset: one of DATASETS.
    split: in TFDS's notation, such as 'train[:90%]'.
    **options: of `Dataset`.

  Returns:
    The source; None where `split` is '' or 'none'.

  Raises:
    ValueError: the split is empty or unknown, and as `Dataset`.
  """
  if splits_lib.is_none(split):
    return None
  opened = Dataset(dataset, **options)
  return opened.source(
    splits_lib.resolve_split(split, opened.split_sizes, opened.aliases)
  )


def open_splits(
  dataset: str,
  train: str | None = None,
  validation: str | None = None,
  test: str | None = None,
  **options,
) -> Splits:
  """Returns the sources of splits that share no example.

  Args:
    dataset: one of DATASETS.
    train: in TFDS's notation; '' or 'none': no such split; None: the default.
    validation: as `train`.
    test: as `train`. By default None where the dataset has no test split.
    **options: of `Dataset`.

  Raises:
    ValueError: a split is empty, unknown or overlaps another.
  """
  opened = Dataset(dataset, **options)
  defaults = default_splits(dataset)
  if defaults[2] not in opened.split_sizes:
    defaults = (*defaults[:2], '')
  given = (train, validation, test)
  expressions = {
    role: default if expression is None else expression
    for role, expression, default in zip(
      Splits._fields, given, defaults, strict=True
    )
  }
  resolved = splits_lib.check_splits(
    expressions, opened.split_sizes, opened.aliases
  )
  return Splits(
    **{
      role: None if slices is None else opened.source(slices)
      for role, slices in resolved.items()
    }
  )


class Dataset:
  """A prepared dataset, of which `source` opens splits.

  Attributes:
    class_names: in label order.
    split_sizes: number of examples by name of split, of those classes.
    aliases: other names of splits.
    directory: where it is prepared.
  """

  def __init__(
    self,
    dataset: str,
    *,
    data_dir: str | os.PathLike[str],
    food101_dir: str | os.PathLike[str] | None = None,
    cifar10_dir: str | os.PathLike[str] | None = None,
    image_folder_dir: str | os.PathLike[str] | None = None,
    spots_size: int = 32,
    spots_train: int = 3000,
    spots_test: int = 1000,
    spots_seed: int = 0,
    classes: Sequence[str] = (),
    skip_corrupt: bool = False,
  ):
    """Prepares the dataset, unless it has been prepared before.

    Args:
      dataset: one of DATASETS.
      data_dir: where prepared datasets are kept.
      food101_dir: an unpacked archive of Food-101, or any folder of its
        layout; otherwise Food-101 is downloaded.
      cifar10_dir: a folder with CIFAR-10's binary files, or their archive;
        otherwise CIFAR-10 is downloaded.
      image_folder_dir: holds `train/CLASS/*.jpg`, `test/CLASS/*.jpg`.
      spots_size: height and width of drawn images, in pixels.
      spots_train: number of drawn images to train on.
      spots_test: number of drawn images to test on.
      spots_seed: of the drawn images.
      classes: the only classes to keep, numbered in the order given. Splits
        are taken after that: percents are of these classes' examples. The
        examples of a split are the same as if no other class had been there.
      skip_corrupt: whether zero-byte files are let through, for a reader that
        skips what it cannot decode.

    Raises:
      ValueError: an argument is not allowed, or files are not what they
        should be.
      FileNotFoundError: folders or files are missing.
      ConnectionError: there is nothing to download from.
      OSError: the disk is full.
    """
    _check_dataset(dataset)
    classes = tuple(classes)
    repeated = sorted({c for c in classes if classes.count(c) > 1})
    if repeated:
      raise ValueError(f'--classes names {", ".join(repeated)} more than once')
    make, key = {
      'spots': lambda: _spots(spots_size, spots_train, spots_test, spots_seed),
      'food101': lambda: _food101(food101_dir, classes, skip_corrupt),
      'cifar10': lambda: _cifar10(cifar10_dir),
      'image_folder': lambda: _image_folder(image_folder_dir, skip_corrupt),
    }[dataset]()
    data_dir = pathlib.Path(data_dir).expanduser()
    self._builder = prepare_lib.prepare(
      make, data_dir / f'{dataset}-{key}' if key else data_dir
    )
    self.name = dataset
    self.aliases = _ALIASES.get(dataset, {})
    self.directory = pathlib.Path(self._builder.data_dir)
    all_names = tuple(self._builder.info.features['label'].names)
    self.class_names = classes or all_names
    _check_classes(self.class_names, all_names, dataset)
    # The records of these classes by split, and their labels.
    number = np.full(len(all_names), -1, np.int32)
    for label, name in enumerate(self.class_names):
      number[all_names.index(name)] = label
    self._members, self._labels = {}, {}
    for name, labels in _read_labels(self._builder, self.directory).items():
      self._members[name] = np.flatnonzero(number[labels] >= 0)
      self._labels[name] = number[labels[self._members[name]]]
    self.split_sizes = {name: len(m) for name, m in self._members.items()}

  def source(self, slices: splits_lib.Slices) -> ImageSource:
    """Returns the source of a split's examples, in order."""
    names = list(dict.fromkeys(name for name, _, _ in slices))
    offsets, total = {}, 0
    for name in names:
      offsets[name] = total
      total += self._builder.info.splits[name].num_examples
    parts = [(name, slice(start, stop)) for name, start, stop in slices]
    return ImageSource(
      records=_records(self._builder, '+'.join(names)),
      positions=np.concatenate(
        [offsets[name] + self._members[name][part] for name, part in parts]
      ),
      labels=np.concatenate([self._labels[name][part] for name, part in parts]),
      class_names=self.class_names,
      description=f'{self.name}:'
      + '+'.join(f'{name}[{a}:{b}]' for name, a, b in slices),
    )


class ImageSource:
  """A random-access source of encoded images, for grain or plain indexing.

  Picklable and safe to read from threads. `source[i]` is a dict of
    image: bytes, the encoded file as it was.
    label: int, position in `class_names`.
    name: str, such as 'apple_pie/1005649'.
    object_mask: bytes, a PNG file of the object's mask (spots only).

  Attributes:
    class_names: in label order.
    labels: int32[len(source)].
  """

  def __init__(
    self,
    records: Sequence[Mapping[str, Any]],
    positions: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...],
    description: str,
  ):
    """
    Args:
      records: TFDS's data source, images not decoded.
      positions: int64[n], where the examples lie in `records`.
      labels: int32[n].
      class_names: in label order.
      description: names the data set and split, in `repr`.
    """
    self._records = records
    self._positions = positions
    self._description = description
    self.labels = labels
    self.class_names = class_names

  def __len__(self) -> int:
    return len(self._positions)

  def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
    index = range(len(self))[index]
    record = self._records[int(self._positions[index])]
    example = {
      'image': record['image'],
      'label': int(self.labels[index]),
      'name': record['id'].decode(),
    }
    if 'object_mask' in record:
      example['object_mask'] = record['object_mask']
    return example

  # grain compares this when it restores an iterator.
  def __repr__(self) -> str:
    return (
      f'ImageSource({self._description}, {len(self)} examples, '
      f'{len(self.class_names)} classes)'
    )


def _check_dataset(dataset: str) -> None:
  if dataset not in DATASETS:
    raise ValueError(
      f'unknown dataset {dataset!r}; there are {", ".join(DATASETS)}'
    )


def _check_classes(
  classes: Sequence[str], known: Sequence[str], dataset: str
) -> None:
  """Raises ValueError naming all classes that `dataset` lacks."""
  unknown = [c for c in classes if c not in known]
  if unknown:
    close = [
      match for c in unknown for match in difflib.get_close_matches(c, known)
    ]
    ordered = list(dict.fromkeys([*close, *known]))
    raise ValueError(
      f'unknown class {", ".join(map(repr, unknown))}; {dataset} has '
      f'{", ".join(ordered)}'
    )


def _spots(size, train, test, seed):
  config = spots.SpotsConfig(size, train, test, seed)
  return functools.partial(spots.SpotsBuilder, config), config.key


def _food101(directory, classes, skip_corrupt):
  if directory is None:
    return functools.partial(food101.Food101, version=food101.VERSION), ''
  folder = food101.scan_folder(directory, classes, skip_corrupt)
  _check_classes(classes, folder.class_names, str(directory))
  return functools.partial(food101.Food101FolderBuilder, folder), folder.key


def _cifar10(directory):
  if directory is None:
    return cifar10.Cifar10Builder, ''
  path, key = cifar10.check_directory(directory)
  return functools.partial(cifar10.Cifar10Builder, path), key


def _image_folder(directory, skip_corrupt):
  if directory is None:
    raise ValueError('the dataset image_folder needs --image_folder_dir')
  folder = image_folder.scan_folder(directory, skip_corrupt)
  return functools.partial(image_folder.ImageFolderBuilder, folder), folder.key


def _records(
  builder: tfds.core.DatasetBuilder, split: str
) -> Sequence[Mapping[str, Any]]:
  """Returns TFDS's data source of a split, images not decoded."""
  images = {'image', 'object_mask'} & set(builder.info.features)
  return builder.as_data_source(
    split, decoders={name: tfds.decode.SkipDecoding() for name in images}
  )


def _read_labels(
  builder: tfds.core.DatasetBuilder, directory: pathlib.Path
) -> dict[str, np.ndarray]:
  """Returns int32 labels by split, from a file kept beside the records."""
  path = directory / 'labels.npz'
  if path.exists():
    with np.load(path) as stored:
      return dict(stored)
  labels = {}
  for split, info in builder.info.splits.items():
    records = _records(builder, split)
    labels[split] = np.fromiter(
      (record['label'] for record in records), np.int32, info.num_examples
    )
  # A folder that cannot be written to is read again at the next start.
  written = directory / f'labels.{os.getpid()}.tmp'
  with contextlib.suppress(OSError):
    try:
      with written.open('wb') as f:
        np.savez(f, **labels)
      written.replace(path)
    finally:
      written.unlink(missing_ok=True)
  return labels
