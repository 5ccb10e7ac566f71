"""Preparation of TFDS builders into array_record, once, whole and quietly."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable

import tensorflow_datasets as tfds
from absl import logging
from array_record.python import array_record_module
from google.protobuf import json_format

FILE_FORMAT = 'array_record'

# TFDS writes it last.
_INFO_FILE = 'dataset_info.json'

# A preparation that was killed leaves its folder behind. One that is older
# than this belongs to no living process.
_STALE_SECONDS = 24 * 3600


def prepare(
  make_builder: Callable[..., tfds.core.DatasetBuilder],
  data_dir: str | os.PathLike[str],
) -> tfds.core.DatasetBuilder:
  """Returns a reader of a prepared dataset, preparing it where need be.

  TFDS writes into a folder of another name and renames it when all is done, so
  a preparation that fails or is killed is never taken for whole.

  Args:
    make_builder: a builder's class; called with `data_dir` and `file_format`.
    data_dir: the folder under which the builder prepares.

  Raises:
    OSError: the disk is full; nothing half-written is kept.
    ValueError: the prepared files are damaged or of another format.
  """
  try:
    builder = make_builder(data_dir=data_dir, file_format=FILE_FORMAT)
  except (
    ValueError,
    json_format.ParseError,
    tfds.core.dataset_info.DatasetInfoFileError,
  ) as error:
    raise ValueError(
      f'a prepared dataset in {data_dir} cannot be read: {_first_line(error)}. '
      'Delete it to prepare it again, or choose another folder by --data_dir'
    ) from error
  directory = pathlib.Path(builder.data_dir)
  if not (directory / _INFO_FILE).exists():
    if directory.exists():
      raise _damaged(directory, f'{_INFO_FILE} is missing')
    _remove_stale(directory.parent)
    logging.info('Preparing %s in %s.', builder.name, directory)
    try:
      with _quiet():
        builder.download_and_prepare()
    except (OSError, RuntimeError) as error:
      # Another process may have prepared the same dataset in the meantime.
      if not _is_occupied(error) or not (directory / _INFO_FILE).exists():
        _raise_if_full(error, builder.name, directory)
        raise
  # Read anew: it then refers to nothing but the prepared files.
  builder = tfds.builder_from_directory(directory)
  _check_files(builder.info, directory)
  return builder


def _damaged(directory: pathlib.Path, what: str) -> ValueError:
  return ValueError(
    f'the prepared dataset in {directory} is damaged: {what}. Delete that '
    'folder to prepare it again'
  )


def _check_files(info: tfds.core.DatasetInfo, directory: pathlib.Path) -> None:
  """Raises ValueError unless each file holds as many records as it should."""
  if info.file_format.value != FILE_FORMAT:
    raise ValueError(
      f'the prepared dataset in {directory} is of the format '
      f'{info.file_format.value}, not {FILE_FORMAT}; choose another folder by '
      '--data_dir'
    )
  for split in info.splits.values():
    for path, expected in zip(
      split.filepaths, split.shard_lengths, strict=True
    ):
      try:
        reader = array_record_module.ArrayRecordReader(os.fspath(path))
        found = reader.num_records()
        reader.close()
      except (RuntimeError, ValueError, OSError) as error:
        raise _damaged(
          directory, f'{path.name} cannot be read ({_first_line(error)})'
        ) from error
      if found != expected:
        raise _damaged(
          directory, f'{path.name} holds {found} of {expected} examples'
        )


def _is_occupied(error: BaseException) -> bool:
  return isinstance(error, FileExistsError) or (
    getattr(error, 'errno', None) == errno.ENOTEMPTY
  )


def _raise_if_full(
  error: BaseException, name: str, directory: pathlib.Path
) -> None:
  """Raises one clear OSError where a disk or a quota is full."""
  # The array_record writer reports a full disk as a RuntimeError.
  causes = (errno.ENOSPC, errno.EDQUOT)
  code = getattr(error, 'errno', None)
  if code is None:
    text = str(error)
    code = next((c for c in causes if os.strerror(c) in text), None)
  if code in causes:
    raise OSError(
      code,
      f'no space left while preparing {name} in {directory}; nothing '
      'half-written was kept. Free some space or choose another folder by '
      '--data_dir',
    ) from error


def _remove_stale(parent: pathlib.Path) -> None:
  """Removes what killed preparations left in `parent` more than a day ago."""
  for path in parent.glob(f'{tfds.core.constants.INCOMPLETE_PREFIX}*'):
    with contextlib.suppress(OSError):
      if time.time() - path.stat().st_mtime > _STALE_SECONDS:
        shutil.rmtree(path)


@contextlib.contextmanager
def _quiet():
  """Keeps TFDS from printing, and from drawing bars without a terminal."""
  tfds.display_progress_bar(sys.stderr.isatty())
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.display_progress_bar(True)


def _first_line(error: BaseException) -> str:
  return str(error).strip().split('\n')[0]
