"""Files written whole or not at all; folders held by one process."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import socket
import tempfile
from collections.abc import Iterator

from absl import logging

# What file systems without locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Yields a path to write to; the file becomes `path` when the block ends.

  Readers see the old file or the whole new one, also after a crash. If the
  block raises, `path` stays as it was. Folders are made as needed.

  Args:
    path: the file to write or replace.

  Raises:
    OSError: of the block, or of the file; names it.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    yield partial
    with partial.open('rb') as f:
      os.fsync(f.fileno())  # Else a crash may leave an empty file.
    os.replace(partial, path)
  except OSError as error:
    if error.errno and not error.filename:  # A full disk has no name.
      raise OSError(error.errno, error.strerror, str(path)) from error
    raise
  finally:
    partial.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
  """Writes a file whole or not at all.

  Args:
    path: the file to write or replace.
    content: text is written as UTF-8.

  Raises:
    OSError: the file cannot be written; an old one stays.
  """
  with replacing(path) as partial:
    partial.write_bytes(
      content.encode() if isinstance(content, str) else content
    )


def check_folder(folder: str | os.PathLike[str]) -> None:
  """Checks that files can be written to a folder, before there is a result.

  Args:
    folder: is made.

  Raises:
    OSError: it cannot be made or written to.
  """
  try:
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise OSError(
      f'cannot write to the folder {folder}: {error.strerror}'
    ) from error


@contextlib.contextmanager
def locked(
  folder: str | os.PathLike[str], work: str, *, wait: bool = False
) -> Iterator[int]:
  """Holds a folder for this process and the children that keep it open.

  The system lets go of it when the last of them ends, however that ends.

  Args:
    folder: is made.
    work: what is done there; others are told.
    wait: until others let go, rather than raise.

  Yields:
    The file descriptor of the lock, for children to keep open.

  Raises:
    OSError: others hold it; names their process and host. Or the folder cannot
      be made or written to.
  """
  import fcntl  # Here: Windows has none, and needs no lock to count MACs.

  folder = pathlib.Path(folder)
  check_folder(folder)
  with (folder / '.lock').open('ab+', buffering=0) as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      file.seek(0)
      holder = file.read().decode().strip() or 'another process'
      raise OSError(
        f'{folder} is in use by {holder}, or by a process that it started'
      ) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      logging.warning('%s is not locked: %s', folder, error.strerror)
    file.truncate(0)
    holder = f'process {os.getpid()} on {socket.gethostname()} ({work})\n'
    with contextlib.suppress(OSError):  # It is held on a full disk, too.
      file.write(holder.encode())
    yield file.fileno()
