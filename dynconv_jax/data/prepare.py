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

import tensorflow_datasets as tfds
from absl import logging
from array_record.python import array_record_module

FILE_FORMAT = 'array_record'

# TFDS writes it last.
_INFO_FILE = 'dataset_info.json'

# A preparation that was killed leaves its folder behind. One that is older
# than this belongs to no living process.
_STALE_SECONDS = 24 * 3600


def prepare(builder: tfds.core.DatasetBuilder) -> pathlib.Path:
  """Returns the folder of a prepared dataset, preparing it where need be.

  TFDS writes into a folder of another name and renames it when all is done, so
  a preparation that fails or is killed is never taken for whole.

  Args:
    builder: a builder that was made with `file_format=FILE_FORMAT`.

  Returns:
    The folder that holds the array_record files.

  Raises:
    OSError: the disk is full; nothing half-written is kept.
    ValueError: the prepared files are damaged or of another format.
  """
  directory = pathlib.Path(builder.data_dir)
  if not (directory / _INFO_FILE).exists():
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
  _check_files(directory)
  return directory


def _check_files(directory: pathlib.Path) -> None:
  """Raises ValueError unless each file holds as many records as it should."""
  info = tfds.builder_from_directory(directory).info
  for split in info.splits.values():
    for path, expected in zip(
      split.filepaths, split.shard_lengths, strict=True
    ):
      try:
        reader = array_record_module.ArrayRecordReader(os.fspath(path))
        found = reader.num_records()
        reader.close()
      except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
          f'the prepared dataset in {directory} is damaged: {path.name} '
          f'cannot be read ({_first_line(error)}). Delete that folder to '
          'prepare it again.'
        ) from error
      if found != expected:
        raise ValueError(
          f'the prepared dataset in {directory} is damaged: {path.name} holds '
          f'{found} examples instead of {expected}. Delete that folder to '
          'prepare it again.'
        )


def _is_occupied(error: BaseException) -> bool:
  return isinstance(error, OSError) and error.errno in (
    errno.ENOTEMPTY,
    errno.EEXIST,
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
