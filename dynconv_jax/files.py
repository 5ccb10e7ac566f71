"""Atomic file writes and folder locks."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import socket
import tempfile
from collections.abc import Iterator

from absl import logging

# Errors raised by file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
# NFS cannot lock what is open for reading only, as folders are.
_NO_FOLDER_LOCKS = (*_NO_LOCKS, errno.EBADF)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Yields a temporary path that replaces `path` when the block ends.

  Readers see the old file or the complete new one, even after a crash. If the
  block raises an error, `path` does not change. Creates missing folders.

  Args:
    path: the file to write or replace.

  Raises:
    OSError: the block raised an OSError or the file cannot be written; the
      message names the file.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    yield partial
    with partial.open('rb') as f:
      os.fsync(f.fileno())  # Without this, a crash may leave an empty file.
    os.replace(partial, path)
  except OSError as error:
    if error.errno and not error.filename:  # For example, a full disk.
      raise OSError(error.errno, error.strerror, str(path)) from error
    raise
  finally:
    partial.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
  """Writes a file atomically.

  Args:
    path: the file to write or replace.
    content: the content; text is encoded as UTF-8.

  Raises:
    OSError: the file cannot be written. An existing file does not change.
  """
  with replacing(path) as partial:
    partial.write_bytes(
      content.encode() if isinstance(content, str) else content
    )


def check_folder(folder: str | os.PathLike[str]) -> None:
  """Checks that files can be written to a folder.

  Args:
    folder: the folder; created if it does not exist.

  Raises:
    OSError: the folder cannot be created or written to.
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
def exclusive(folder: str | os.PathLike[str]) -> Iterator[None]:
  """Waits until no other process or thread is in this block for a folder.

  Use it to read and replace a file. Unlike `locked`, it leaves no file behind.
  It cannot be nested. On file systems without locks for folders, such as NFS,
  it has no effect.

  Args:
    folder: an existing folder.
  """
  import fcntl

  descriptor = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
      if error.errno not in _NO_FOLDER_LOCKS:
        raise
    yield
  finally:
    os.close(descriptor)  # Releases the lock.


@contextlib.contextmanager
def locked(
  folder: str | os.PathLike[str], work: str, *, wait: bool = False
) -> Iterator[int]:
  """Locks a folder for this process and for children that keep the lock open.

  The operating system releases the lock when the last of these processes ends.

  Args:
    folder: the folder; created if it does not exist.
    work: description of this process's work, shown in the errors of other
      processes.
    wait: whether to wait for other processes instead of raising an error.

  Yields:
    The file descriptor of the lock, for children to keep open.

  Raises:
    BlockingIOError: another process holds the lock; the message names the
      process and its host.
    OSError: the folder cannot be created or written to.
  """
  # Imported here because Windows lacks it, and counting MACs needs no lock.
  import fcntl

  folder = pathlib.Path(folder)
  check_folder(folder)
  with (folder / '.lock').open('ab+', buffering=0) as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      file.seek(0)
      holder = file.read().decode().strip() or 'another process'
      raise BlockingIOError(
        f'{folder} is in use by {holder}, or by a process that it started'
      ) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      logging.warning('%s is not locked: %s', folder, error.strerror)
    file.truncate(0)
    holder = f'process {os.getpid()} on {socket.gethostname()} ({work})\n'
    with contextlib.suppress(OSError):  # The lock works even on a full disk.
      file.write(holder.encode())
    yield file.fileno()
