"""Compilation of kernel libraries, cached in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence

import jax
import jaxlib
from absl import logging

from dynconv_jax.files import locked

# Headers that kernels share.
_HEADERS = pathlib.Path(__file__).parent
_FLAGS = ('-std=c++17', '-O3', '-march=native', '-fPIC', '-shared', '-w')


def build(source: pathlib.Path, flags: Sequence[str] = ()) -> pathlib.Path:
  """Compiles kernels unless they are cached, and returns the library.

  Uses the compiler in the environment variable CXX, or c++. Libraries are
  cached in dynconv_jax/kernels in $XDG_CACHE_HOME or ~/.cache. The name of a
  library contains a hash of its inputs and a hash of its content. A library
  that is damaged, or that another user could have written, is recompiled.

  Args:
    source: C++ file; may include headers in its folder and in this package.
    flags: additional compiler flags.

  Raises:
    OSError: there is no compiler, the library cannot be written, or the folder
      belongs to another user.
    subprocess.CalledProcessError: the compiler failed.
  """
  compiler = shlex.split(os.environ.get('CXX', '')) or ['c++']
  includes = [f'-I{_HEADERS}', f'-I{jax.ffi.include_dir()}']
  command = [*compiler, *_FLAGS, *flags, *includes]
  version = subprocess.run(
    [*compiler, '--version'], capture_output=True, text=True, check=True
  ).stdout
  files = [source, *source.parent.glob('*.h'), *_HEADERS.glob('*.h')]
  # All other headers are from jaxlib, which may be upgraded in place.
  parts = (
    *(path.read_text() for path in sorted(files)),
    str(command),
    version,
    jaxlib.__version__,
    _processor(),
  )
  digest = _digest('\0'.join(parts).encode())
  folder = _folder()
  if path := _sound(folder, digest):
    return path
  # Several processes may start at once.
  with locked(folder, 'compilation of kernels', wait=True) as lock:
    for stale in folder.glob('tmp*'):  # Left by a process that was killed.
      shutil.rmtree(stale, ignore_errors=True)
    if path := _sound(folder, digest):
      return path
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
      library = pathlib.Path(temporary, 'kernels.so')
      subprocess.run(
        [*command, str(source), '-o', str(library)],
        capture_output=True,
        text=True,
        check=True,
        pass_fds=[lock],  # The compiler may outlive this process.
      )
      library.chmod(0o700)
      path = folder / f'{digest}-{_digest(library.read_bytes())}.so'
      library.replace(path)
  return path


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:16]


def _folder() -> pathlib.Path:
  """Returns the folder of libraries, writable only by this user."""
  cache = os.environ.get('XDG_CACHE_HOME', '')
  if not os.path.isabs(cache):  # As in the XDG specification.
    cache = os.path.expanduser('~/.cache')
  if not os.path.isabs(cache):
    raise OSError('there is no home folder: set HOME or XDG_CACHE_HOME')
  folder = pathlib.Path(cache, 'dynconv_jax', 'kernels')
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  status = folder.stat()
  if status.st_uid != os.geteuid():
    raise OSError(f'{folder} belongs to another user')
  if status.st_mode & 0o077:
    folder.chmod(0o700)
  return folder


def _sound(folder: pathlib.Path, digest: str) -> pathlib.Path | None:
  """Returns an intact library or None, and deletes damaged ones."""
  for path in folder.glob(f'{digest}-*.so'):
    status = path.lstat()
    if (
      stat.S_ISREG(status.st_mode)
      and status.st_uid == os.geteuid()
      and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
      and path.stem == f'{digest}-{_digest(path.read_bytes())}'
    ):
      return path
    logging.warning(
      '%s is damaged or writable by other users; recompiling', path
    )
    path.unlink(missing_ok=True)
  return None


def _processor() -> str:
  """Returns what -march=native depends on; machines may share a home folder."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.platform() + platform.processor()
  kept = ('model name', 'flags', 'Features', 'CPU part')
  return '\n'.join(sorted({x for x in lines if x.startswith(kept)}))
