"""Preparation of data sets as array_record files.

Uses TFDS without TensorFlow. TFDS shuffles examples by a hash of their names,
so each slice of a split mixes the classes, and writes a few large files.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pathlib
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epy

from dynconv_jax import files
from dynconv_jax.data.source import Dataset

# Imported lazily: all programs import data sources, but few open one.
with epy.lazy_imports():
  import requests
  import tensorflow_datasets as tfds
  from array_record.python import array_record_module

  from dynconv_jax.data import builder as builder_lib

FILE_FORMAT = 'array_record'

# TFDS writes this file last.
_INFO_FILE = 'dataset_info.json'
_LABELS_FILE = 'labels.npz'

# A killed preparation leaves its folder behind. Folders older than this are not
# in use.
_STALE_SECONDS = 24 * 3600
_CONNECT_SECONDS = 10


def prepare(
  name: str,
  version: str,
  examples: Callable[[Any], Mapping[str, Iterable[Mapping[str, Any]]]],
  class_names: Sequence[str],
  data_dir: str | os.PathLike[str],
  *,
  key: str = '',
  masks: bool = False,
  aliases: Mapping[str, str] | None = None,
) -> Dataset:
  """Returns a data set, prepared on first use.

  TFDS writes to a temporary folder and renames it at the end, so an incomplete
  preparation is never used.

  Args:
    name: name of the data set.
    version: version of the prepared data, such as '1.0.0'.
    examples: called only to prepare, with TFDS's download manager. Returns the
      examples to store by split name: dicts of image (an encoded file or its
      path), label (a class name or index), name (unique), and, with `masks`,
      object_mask (an encoded file).
    class_names: class names in label order.
    data_dir: folder of prepared data sets.
    key: distinguishes data sets with this name but different content.
    masks: whether examples have an object mask.
    aliases: see `Dataset`.

  Raises:
    OSError: the disk is full; incomplete files are removed.
    ConnectionError: the download failed.
    ValueError: the prepared files are damaged or have another format.
  """
  root = pathlib.Path(data_dir).expanduser()
  if key:
    root /= f'{name}-{key}'
  directory = root / name / version
  if not (directory / _INFO_FILE).exists():
    if directory.exists():
      raise _damaged(directory, f'{_INFO_FILE} is missing')
    _remove_stale(directory.parent)
    logging.info('Preparing %s in %s.', name, directory)
    masked = {'object_mask': tfds.features.Image(shape=(None, None, 1))}
    features = {
      'image': tfds.features.Image(),
      'label': tfds.features.ClassLabel(names=class_names),
      'id': tfds.features.Text(),
      **(masked if masks else {}),
    }
    # TFDS reads both from the class.
    attributes = dict(name=name, VERSION=tfds.core.Version(version))
    builder = type(
      name, (builder_lib.Builder,), attributes, skip_registration=True
    )
    try:
      with _quiet():
        builder(
          examples, features, data_dir=root, file_format=FILE_FORMAT
        ).download_and_prepare()
    except (OSError, RuntimeError) as error:
      # Another process may have prepared the same data set meanwhile.
      if not _is_occupied(error) or not (directory / _INFO_FILE).exists():
        _raise_if_full(error, name, directory)
        raise
  return _read(directory, aliases or {})


def download(
  dl_manager: tfds.download.DownloadManager, url: str, option: str
) -> pathlib.Path:
  """Downloads a file, checks its hash, and returns its path.

  Args:
    dl_manager: TFDS's download manager.
    url: address of the file.
    option: the option for a local copy, for errors.

  Raises:
    ConnectionError: the download failed.
  """
  try:
    # Check the connection first: TFDS retries for minutes if the host is
    # unreachable.
    requests.head(
      url, timeout=_CONNECT_SECONDS, allow_redirects=True
    ).raise_for_status()
    return pathlib.Path(dl_manager.download(url))
  except (
    requests.exceptions.RequestException,
    tfds.download.DownloadError,
    tfds.core.download.download_manager.NonMatchingChecksumError,
  ) as error:
    raise ConnectionError(
      f'cannot download {url}: {str(error).strip()}. Without a network, set '
      f'{option} to a local copy'
    ) from error


class _Records:
  """Examples of a prepared split; picklable and safe to read from threads."""

  def __init__(self, info: tfds.core.SplitInfo, directory: pathlib.Path, data):
    self._info, self._directory, self._data = info, directory, data

  def __len__(self) -> int:
    return self._info.num_examples

  def __getitem__(self, index: int) -> dict[str, Any]:
    index = range(len(self))[index]
    try:
      record = self._data[index]
    except RuntimeError as error:  # For example, array_record found a bad hash.
      shard = np.searchsorted(
        np.cumsum(self._info.shard_lengths), index, side='right'
      )
      raise _unreadable(
        self._directory, self._info.filepaths[shard].name, error
      ) from error
    record['name'] = record.pop('id').decode()
    return record


def _read(directory: pathlib.Path, aliases: Mapping[str, str]) -> Dataset:
  """Returns the prepared data set in a folder.

  Raises:
    ValueError: a file is missing, damaged, or in another format.
  """
  # TFDS ignores it if some of these are missing.
  contents = {}
  for name in (_INFO_FILE, 'features.json', 'label.labels.txt'):
    try:
      contents[name] = (directory / name).read_text('utf-8')
      if name.endswith('.json'):
        json.loads(contents[name])
    except (OSError, ValueError) as error:
      raise _unreadable(directory, name, error) from error
  try:
    # This uses only the prepared files.
    builder = tfds.builder_from_directory(directory)
    info, features = builder.info, builder.info.features
    class_names = tuple(features['label'].names)
    stored = json.loads(contents['features.json'])['featuresDict']['features']
    number = int(stored['label']['classLabel']['numClasses'])
    # TFDS makes up names if there are none.
    lines = contents['label.labels.txt'].split('\n')
    if (found := sum(bool(line.strip()) for line in lines)) != number:
      raise ValueError(f'label.labels.txt has {found} of {number} class names')
    decoders = {
      name: tfds.decode.SkipDecoding()
      for name in {'image', 'object_mask'} & set(features)
    }
    shards = [
      shard
      for split in info.splits.values()
      for shard in zip(split.filepaths, split.shard_lengths, strict=True)
    ]
    if info.file_format.value == FILE_FORMAT:
      splits = {
        name: _Records(
          split, directory, builder.as_data_source(name, decoders=decoders)
        )
        for name, split in info.splits.items()
      }
  except Exception as error:  # TFDS raises many kinds.
    raise _damaged(directory, _first_line(error)) from error
  if info.file_format.value != FILE_FORMAT:
    raise ValueError(
      f'the prepared data set in {directory} has the format '
      f'{info.file_format.value}, not {FILE_FORMAT}; choose another folder '
      'with data_dir'
    )
  for path, expected in shards:
    try:
      reader = array_record_module.ArrayRecordReader(os.fspath(path))
      count = reader.num_records()
      reader.close()
    except (RuntimeError, ValueError, OSError) as error:
      raise _unreadable(directory, path.name, error) from error
    if count != expected:
      raise _damaged(
        directory, f'{path.name} contains {count} of {expected} examples'
      )
  for name, labels in _read_labels(splits, directory).items():
    splits[name].labels = labels
  return Dataset(class_names, splits, aliases)


def _read_labels(
  splits: Mapping[str, _Records], directory: pathlib.Path
) -> dict[str, np.ndarray]:
  """Returns int32 labels by split, from a file next to the records."""
  path = directory / _LABELS_FILE
  if path.exists():
    try:
      # Read the bytes first, because np.load leaves a damaged file open.
      with np.load(io.BytesIO(path.read_bytes())) as stored:
        labels = dict(stored)
      shapes = {name: array.shape for name, array in labels.items()}
      if shapes != {name: (len(split),) for name, split in splits.items()}:
        raise ValueError('it belongs to another data set')
      return labels
    except (
      AttributeError,  # A bare array.
      EOFError,
      OSError,
      ValueError,
      zipfile.BadZipFile,
    ) as error:
      reason = _first_line(error)
      if 'pickle' in reason:  # NumPy assumes that garbage is a pickle.
        reason = 'it is not a NumPy archive'
      raise ValueError(
        f'{path} is damaged: {reason}. Delete it; it will be created again'
      ) from error
  labels = {
    name: np.fromiter((e['label'] for e in split), np.int32, len(split))
    for name, split in splits.items()
  }
  content = io.BytesIO()
  np.savez(content, **labels)
  # If the folder is read-only, the next start reads the labels again.
  with contextlib.suppress(OSError):
    files.write_atomic(path, content.getvalue())
  return labels


def _damaged(directory: pathlib.Path, what: str) -> ValueError:
  return ValueError(
    f'the prepared data set in {directory} is damaged: {what}. Delete that '
    'folder to prepare it again'
  )


def _unreadable(
  directory: pathlib.Path, name: str, error: BaseException
) -> ValueError:
  return _damaged(directory, f'{name} cannot be read ({_first_line(error)})')


def _is_occupied(error: BaseException) -> bool:
  return isinstance(error, FileExistsError) or (
    getattr(error, 'errno', None) == errno.ENOTEMPTY
  )


def _raise_if_full(
  error: BaseException, name: str, directory: pathlib.Path
) -> None:
  """Raises a clear OSError if the disk or quota is full."""
  # The array_record writer reports a full disk as a RuntimeError.
  causes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: by ulimit.
  code = getattr(error, 'errno', None)
  if code is None:
    text = str(error)
    code = next((c for c in causes if os.strerror(c) in text), None)
  if code in causes:
    raise OSError(
      code,
      f'no space left while preparing {name} in {directory}; incomplete '
      'files were removed. Free some space or choose another folder with '
      'data_dir',
    ) from error


def _remove_stale(parent: pathlib.Path) -> None:
  """Removes folders that killed preparations left over a day ago."""
  for path in parent.glob(f'{tfds.core.constants.INCOMPLETE_PREFIX}*'):
    with contextlib.suppress(OSError):
      if time.time() - path.stat().st_mtime > _STALE_SECONDS:
        shutil.rmtree(path)


@contextlib.contextmanager
def _quiet():
  """Silences TFDS, and disables progress bars without a terminal."""
  tfds.display_progress_bar(sys.stderr.isatty())
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.display_progress_bar(True)


def _first_line(error: BaseException) -> str:
  return str(error).strip().split('\n')[0]
