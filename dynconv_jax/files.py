"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Yields a path to write to; the file becomes `path` when the block ends.

  Readers see the old file or the whole new one, also after a crash. If the
  block raises, `path` stays as it was. Folders are made as needed.

  Args:
    path: the file to write or replace.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    yield partial
    with partial.open('rb') as f:
      os.fsync(f.fileno())  # Else a crash may leave an empty file.
    os.replace(partial, path)
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
