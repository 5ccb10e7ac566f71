"""Folders and archives that datasets are prepared from."""

from __future__ import annotations

import hashlib
import pathlib
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Sequence

import requests
import tensorflow_datasets as tfds

_CONNECT_SECONDS = 10


def check_directory(directory: pathlib.Path, flag: str) -> None:
  """Raises FileNotFoundError unless `directory` is a folder and not empty."""
  if not directory.exists():
    raise FileNotFoundError(f'{flag}: {directory} does not exist')
  if not directory.is_dir():
    raise NotADirectoryError(f'{flag}: {directory} is not a folder')
  if not any(directory.iterdir()):
    raise FileNotFoundError(f'{flag}: {directory} is empty')


def check_files(
  directory: pathlib.Path,
  names: Iterable[str],
  *,
  source: str,
  allow_empty: bool = False,
  salt: str = '',
) -> str:
  """Returns a short hash of files' names, sizes and times of modification.

  Args:
    directory: the folder that `names` are relative to.
    names: paths of the files.
    source: what names them, for the error.
    allow_empty: whether zero-byte files are let through.
    salt: what else the hash depends on.

  Raises:
    FileNotFoundError: files are absent.
    ValueError: files are empty.
  """
  digest = hashlib.sha256(salt.encode())
  absent, empty = [], []
  for name in names:
    try:
      stat = (directory / name).stat()
    except OSError:
      absent.append(name)
      continue
    if not stat.st_size:
      empty.append(name)
    digest.update(f'{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n'.encode())
  if absent:
    raise FileNotFoundError(
      f'{source} names files that are absent from {directory}: {some(absent)}'
    )
  if empty and not allow_empty:
    raise ValueError(
      f'{directory} holds zero-byte files: {some(empty)}. Remove or replace '
      'them, or go on without them by --skip_corrupt'
    )
  return digest.hexdigest()[:12]


def some(names: Sequence[str], limit: int = 3) -> str:
  """Returns the first few of `names` and how many there are."""
  text = ', '.join(names[:limit])
  if len(names) > limit:
    text += f', ... ({len(names)} in all)'
  return text


class TarDownloader:
  """Does what a TFDS download manager does, without TensorFlow.

  TFDS checks the archive's hash while downloading; only its extraction of
  archives calls TensorFlow, so that is done here.
  """

  def __init__(
    self,
    dl_manager: tfds.download.DownloadManager,
    directory: pathlib.Path,
    flag: str,
  ):
    """
    Args:
      dl_manager: downloads.
      directory: where archives are unpacked, until `clean`.
      flag: names a local copy, for the error where there is no network.
    """
    self._dl_manager = dl_manager
    self._directory = directory
    self._flag = flag
    self._unpacked = []

  def download(self, url: str) -> pathlib.Path:
    """Returns the downloaded file; ConnectionError where there is none."""
    try:
      # TFDS tries again for minutes where a host cannot be reached at all.
      requests.head(
        url, timeout=_CONNECT_SECONDS, allow_redirects=True
      ).raise_for_status()
      return pathlib.Path(self._dl_manager.download(url))
    except (
      requests.exceptions.RequestException,
      tfds.download.DownloadError,
      tfds.core.download.download_manager.NonMatchingChecksumError,
    ) as error:
      raise ConnectionError(
        f'cannot download {url}: {str(error).strip()}. Where there is no '
        f'network, name a local copy by {self._flag}'
      ) from error

  def download_and_extract(self, url: str) -> pathlib.Path:
    """Returns a folder with what the downloaded archive holds."""
    archive = self.download(url)
    folder = tempfile.mkdtemp(prefix='unpacked.', dir=self._directory)
    self._unpacked.append(folder)
    with tarfile.open(archive) as tar:
      tar.extractall(folder, filter='data')
    return pathlib.Path(folder)

  def clean(self) -> None:
    """Removes what was unpacked."""
    for folder in self._unpacked:
      shutil.rmtree(folder, ignore_errors=True)
