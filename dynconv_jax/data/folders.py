"""Checks of the folders from which data sets are prepared."""

from __future__ import annotations

import hashlib
import pathlib
import stat
import tarfile
from collections.abc import Iterable, Iterator, Sequence


def check_directory(directory: pathlib.Path, option: str) -> None:
  """Raises OSError unless `directory` is a non-empty folder.

  Args:
    directory: the folder.
    option: the option that specified the folder, for errors.
  """
  if not directory.exists():
    raise FileNotFoundError(f'{option}: {directory} does not exist')
  if not directory.is_dir():
    raise NotADirectoryError(f'{option}: {directory} is not a folder')
  if not any(directory.iterdir()):
    raise FileNotFoundError(f'{option}: {directory} is empty')


def check_files(
  directory: pathlib.Path,
  groups: Iterable[Iterable[str]],
  *,
  source: str,
  allow_empty: bool = False,
  salt: str = '',
) -> str:
  """Returns a short hash of the names, sizes, and modification times of files.

  Args:
    directory: the folder that names are relative to.
    groups: names of the files by group, such as split or class. No file may be
      in two groups; a link counts as its target.
    source: where the names come from, for errors.
    allow_empty: whether zero-byte files are allowed.
    salt: additional content to hash.

  Raises:
    FileNotFoundError: files are missing.
    ValueError: files are empty or in two groups, or a name is not UTF-8.
  """
  digest = hashlib.sha256(salt.encode())
  odd, absent, empty, twice, seen = [], [], [], [], {}
  for number, names in enumerate(groups):
    for name in names:
      try:
        status = (directory / name).stat()
        line = f'{name}\0{status.st_size}\0{status.st_mtime_ns}\n'.encode()
      except OSError:
        absent.append(name)
      except UnicodeEncodeError:
        odd.append(ascii(name))
      else:
        digest.update(line)
        if not stat.S_ISREG(status.st_mode):
          absent.append(name)
        elif not status.st_size:
          empty.append(name)
        first = seen.setdefault((status.st_dev, status.st_ino), (number, name))
        if first[0] != number:
          twice.append(f'{first[1]} and {name}')
  if absent:
    raise FileNotFoundError(
      f'{source} names files that are missing from {directory}: {some(absent)}'
    )
  for wrong, what in (
    (odd, 'names that are not UTF-8: {}'),
    (
      [] if allow_empty else empty,
      'zero-byte files: {}. Remove or replace them, or skip them with '
      'skip_corrupt',
    ),
    (twice, 'links to the same file in two classes or splits: {}'),
  ):
    if wrong:
      raise ValueError(f'{directory} contains {what.format(some(wrong))}')
  return digest.hexdigest()[:12]


def read_files(
  path: pathlib.Path, names: Iterable[str]
) -> Iterator[tuple[str, bytes]]:
  """Yields the names and contents of files.

  Files of an archive are yielded in the archive's order.

  Args:
    path: a folder, or a tar archive that contains a single folder.
    names: paths of the files, relative to the folder.
  """
  if path.is_dir():
    yield from ((name, (path / name).read_bytes()) for name in names)
    return
  names = set(names)
  with tarfile.open(path) as tar:
    for member in tar:
      name = member.name.removeprefix('./').partition('/')[2]
      if name in names:
        yield name, tar.extractfile(member).read()


def some(names: Sequence[str], limit: int = 3) -> str:
  """Formats the first few names, and the number of names if there are more."""
  text = ', '.join(names[:limit])
  if len(names) > limit:
    text += f', ... ({len(names)} in all)'
  return text
