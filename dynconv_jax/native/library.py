"""Compiled libraries of kernels, kept in the user's cache."""

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
  """Compiles kernels, unless it was done before; returns the library.

  The compiler is that of the environment variable CXX, or c++. Libraries are
  kept in dynconv_jax/kernels of the user's cache: $XDG_CACHE_HOME, or ~/.cache.
  Each is named by what it was compiled of and by its own hash. One that is
  damaged, or that others may have written, is compiled anew.

  Args:
    source: C++ file; it may include headers beside it and those of this
      package.
    flags: of the compiler, after the usual ones.

  Raises:
    OSError: there is no compiler, the library cannot be written, or the folder
      belongs to another user.
    subprocess.CalledProcessError: the compiler's error.
  """
  compiler = shlex.split(os.environ.get('CXX', '')) or ['c++']
  includes = [f'-I{_HEADERS}', f'-I{jax.ffi.include_dir()}']
  command = [*compiler, *_FLAGS, *flags, *includes]
  version = subprocess.run(
    [*compiler, '--version'], capture_output=True, text=True, check=True
  ).stdout
  files = [source, *source.parent.glob('*.h'), *_HEADERS.glob('*.h')]
  # Other headers are jaxlib's, which may be upgraded in place.
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
    for left in folder.glob('tmp*'):  # By a process that was killed.
      shutil.rmtree(left, ignore_errors=True)
    if path := _sound(folder, digest):
      return path
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
      library = pathlib.Path(temporary, 'kernels.so')
      subprocess.run(
        [*command, str(source), '-o', str(library)],
        capture_output=True,
        text=True,
        check=True,
        pass_fds=[lock],  # A compiler may outlive this process.
      )
      library.chmod(0o700)
      path = folder / f'{digest}-{_digest(library.read_bytes())}.so'
      library.replace(path)
  return path


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:16]


def _folder() -> pathlib.Path:
  """Returns the folder of libraries, which only this user can write to."""
  cache = os.environ.get('XDG_CACHE_HOME', '')
  if not os.path.isabs(cache):  # As the XDG specification has it.
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
  """Returns a library as it was compiled; deletes others of its name."""
  for path in folder.glob(f'{digest}-*.so'):
    status = path.lstat()
    if (
      stat.S_ISREG(status.st_mode)
      and status.st_uid == os.geteuid()
      and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
      and path.stem == f'{digest}-{_digest(path.read_bytes())}'
    ):
      return path
    logging.warning('%s is damaged, or not of this user; compiling anew', path)
    path.unlink(missing_ok=True)
  return None


def _processor() -> str:
  """What -march=native depends on: a home may be shared by machines."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.platform() + platform.processor()
  kept = ('model name', 'flags', 'Features', 'CPU part')
  return '\n'.join(sorted({x for x in lines if x.startswith(kept)}))
