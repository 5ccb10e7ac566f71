"""Data sources by name, and the splits of an opened data set."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from dynconv_jax import extras, references
from dynconv_jax.data import splits as splits_lib
from dynconv_jax.data.source import Common, Dataset, DataSource

DATASETS = ('spots', 'food101', 'cifar10', 'imagenet2012', 'image_folder')


class Splits(NamedTuple):
  """A data set's sources by role; None if there is no such split."""

  train: ImageSource | None
  validation: ImageSource | None
  test: ImageSource | None


def load_source(name: str) -> DataSource:
  """Returns a data source.

  Args:
    name: one of DATASETS, or package.module:NAME.

  Raises:
    ValueError: the source does not exist.
    ImportError: a package that reads data sets is missing.
  """
  if name in DATASETS:
    extras.require('train', 'array_record', 'requests', 'tensorflow_datasets')
    name = f'{__package__}.{name}:SOURCE'
  if ':' not in name:
    raise ValueError(
      f'unknown dataset {name!r}; allowed: {", ".join(DATASETS)}, or your own '
      'as package.module:NAME'
    )
  return references.load(name, DataSource, 'dataset')


def open_source(
  source: DataSource | str, split: str, options: Any, common: Common
) -> ImageSource | None:
  """Returns the source of one split; prepares the data set if needed.

  Args:
    source: the data source, or its name.
    split: the split in TFDS's notation, such as 'train[:90%]'.
    options: an instance of the source's `options`; None for the defaults.
    common: options that all sources share.

  Returns:
    The source; None if `split` is '' or 'none'.

  Raises:
    ValueError: see `open_splits`.
  """
  if splits_lib.is_none(split):
    return None
  opened = _Opened(source, options, common)
  return opened.source(
    splits_lib.resolve_split(split, opened.sizes, opened.aliases)
  )


def open_splits(
  source: DataSource | str,
  options: Any,
  common: Common,
  *,
  train: str | None = None,
  validation: str | None = None,
  test: str | None = None,
) -> Splits:
  """Returns the sources of disjoint splits.

  Args:
    source: the data source, or its name.
    options: an instance of the source's `options`; None for the defaults.
    common: options that all sources share.
    train: the training split in TFDS's notation; '' or 'none' for no split.
      None for the whole train split if the data set has a separate validation
      split, and for its first 90 % otherwise.
    validation: like `train`. None for the data set's validation split or, if it
      has none, the last 10 % of its train split.
    test: like `train`. None for the data set's test split, if it has one.

  Raises:
    ValueError: an argument is not allowed, files have the wrong format, or a
      split is empty, unknown, or overlaps another.
    FileNotFoundError: folders or files are missing.
    ConnectionError: the download failed.
    OSError: the disk is full.
  """
  opened = _Opened(source, options, common)
  given = {'train': train, 'validation': validation, 'test': test}
  expressions = {
    role: default if given[role] is None else given[role]
    for role, default in opened.default_splits().items()
  }
  resolved = splits_lib.check_splits(expressions, opened.sizes, opened.aliases)
  return Splits(
    **{
      role: None if slices is None else opened.source(slices)
      for role, slices in resolved.items()
    }
  )


class _Opened:
  """A data set reduced to the chosen classes.

  Splits are resolved afterwards, so percentages refer to examples of these
  classes.
  """

  def __init__(self, source: DataSource | str, options: Any, common: Common):
    if isinstance(source, str):
      source = load_source(source)
    _check_list(common.classes)
    dataset = source.open(options or source.options(), common)
    self._name, self._dataset = source.name, dataset
    self.aliases = dataset.aliases
    self.class_names = tuple(common.classes) or tuple(dataset.class_names)
    check_classes(self.class_names, dataset.class_names, source.name)
    if len(self.class_names) < 2:
      raise ValueError(
        f'{source.name} has one class, {self.class_names[0]!r}; a classifier '
        'needs two or more'
      )
    # The examples of these classes by split, and their labels.
    number = np.full(len(dataset.class_names), -1, np.int32)
    for label, name in enumerate(self.class_names):
      number[dataset.class_names.index(name)] = label
    self._members, self._labels = {}, {}
    for split, examples in dataset.splits.items():
      labels = _labels(examples, dataset, f'split {split!r} of {source.name}')
      self._members[split] = np.flatnonzero(number[labels] >= 0)
      self._labels[split] = number[labels[self._members[split]]]
    self.sizes = {split: len(m) for split, m in self._members.items()}

  def default_splits(self) -> dict[str, str]:
    """Returns the default split of each role, in TFDS's notation."""
    own = {role: self.aliases.get(role, role) for role in Splits._fields}
    test = own['test'] if own['test'] in self.sizes else ''
    if own['validation'] in self.sizes and own['validation'] != test:
      return own | {'test': test}
    train = own['train']
    return {
      'train': f'{train}[:90%]',
      'validation': f'{train}[90%:]',
      'test': test,
    }

  def source(self, slices: splits_lib.Slices) -> ImageSource:
    """Returns the source of a split's examples, in order."""
    return ImageSource(
      parts=[
        (self._dataset.splits[name], self._members[name][start:stop])
        for name, start, stop in slices
      ],
      labels=np.concatenate(
        [self._labels[name][start:stop] for name, start, stop in slices]
      ),
      class_names=self.class_names,
      description=f'{self._name}:'
      + '+'.join(f'{name}[{a}:{b}]' for name, a, b in slices),
    )


class ImageSource:
  """A random-access source of encoded images, for grain or plain indexing.

  Picklable and safe to read from threads. `source[i]` is a dict of
    image: bytes, the original encoded file.
    label: int, index in `class_names`.
    name: str, such as 'apple_pie/1005649'.
    object_mask: bytes, an image file of the object's mask (not in all sources).

  Attributes:
    class_names: class names in label order.
    labels: int32[len(source)].
  """

  def __init__(
    self,
    parts: Sequence[tuple[Sequence[Mapping[str, Any]], np.ndarray]],
    labels: np.ndarray,
    class_names: tuple[str, ...],
    description: str,
  ):
    """Creates the source.

    Args:
      parts: examples of a split, and the positions in it to use, int64[n].
      labels: int32[n], labels of the examples of all parts.
      class_names: class names in label order.
      description: name of the data set and split, for `repr`.
    """
    self._parts = parts
    self._stops = np.cumsum([len(positions) for _, positions in parts])
    self._description = description
    self.labels = labels
    self.class_names = class_names

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
    index = range(len(self))[index]
    part = np.searchsorted(self._stops, index, side='right')
    examples, positions = self._parts[part]
    # A negative index, counted from the part's end.
    position = int(positions[index - self._stops[part]])
    return {**examples[position], 'label': int(self.labels[index])}

  # grain compares the repr when it restores an iterator.
  def __repr__(self) -> str:
    return (
      f'ImageSource({self._description}, {len(self)} examples, '
      f'{len(self.class_names)} classes)'
    )


def check_classes(
  classes: Sequence[str], known: Sequence[str], dataset: str
) -> None:
  """Raises ValueError with the names of all classes that `dataset` lacks."""
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


def _check_list(classes: Sequence[str]) -> None:
  """Raises ValueError if a list of classes has empty or repeated names."""
  if not all(classes):
    raise ValueError(
      f'classes has an empty name; got {",".join(classes)!r}. Omit the option '
      'for all classes'
    )
  repeated = sorted({c for c in classes if classes.count(c) > 1})
  if repeated:
    raise ValueError(f'classes names {", ".join(repeated)} more than once')


def _labels(
  examples: Sequence[Mapping[str, Any]], dataset: Dataset, what: str
) -> np.ndarray:
  """Checks the examples of a split, and returns their int32 labels."""
  if not len(examples):
    return np.zeros(0, np.int32)
  missing = sorted({'image', 'label', 'name'} - set(examples[0]))
  if missing or not isinstance(examples[0]['image'], bytes):
    raise ValueError(
      f'{what}: an example must have image (bytes), label, and name; '
      + (
        f'{", ".join(missing)} missing'
        if missing
        else f'got image of type {type(examples[0]["image"]).__name__}'
      )
    )
  labels = getattr(examples, 'labels', None)
  if labels is None:
    labels = [example['label'] for example in examples]
  labels = np.asarray(labels)
  num_classes = len(dataset.class_names)
  if labels.shape != (len(examples),) or labels.dtype.kind not in 'iu':
    raise ValueError(
      f'{what}: labels must be {len(examples)} integers; got '
      f'{labels.dtype}{list(labels.shape)}'
    )
  if labels.min() < 0 or labels.max() >= num_classes:
    raise ValueError(
      f'{what}: labels must be 0 to {num_classes - 1}; got {labels.min()} to '
      f'{labels.max()}'
    )
  return labels.astype(np.int32)
