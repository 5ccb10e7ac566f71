"""Kernels in C++ for CPUs, compiled at first use for the machine they run on."""

from __future__ import annotations

import ctypes
import hashlib
import os
import pathlib
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jaxlib
from absl import logging

# Headers that kernels share.
_HEADERS = pathlib.Path(__file__).parent
_FLAGS = ('-std=c++17', '-O3', '-march=native', '-fPIC', '-shared', '-w')


class Library(NamedTuple):
  """Kernels that are compiled and registered.

  Attributes:
    targets: the name of each at the foreign function interface.
    handle: the library itself.
  """

  targets: dict[str, str]
  handle: ctypes.CDLL


def register(
  source: pathlib.Path, names: Sequence[str], flags: Sequence[str] = ()
) -> Library | None:
  """Compiles and registers kernels; returns None where that fails.

  Args:
    source: C++ file that defines the handler dynconv_NAME for each name.
    names: of the kernels.
    flags: of the compiler, after the usual ones.
  """
  try:
    path = build(source, flags)
    library = ctypes.CDLL(str(path))
  except (OSError, subprocess.SubprocessError) as error:
    logging.warning(
      'XLA computes what kernels of this package would compute faster: they '
      'were not compiled. %s',
      getattr(error, 'stderr', None) or error,
    )
    return None
  targets = {}
  for name in names:
    # Compiled programs are cached by name: each build has names of its own.
    targets[name] = f'dynconv_{name}_{path.stem}'
    handler = jax.ffi.pycapsule(getattr(library, f'dynconv_{name}'))
    jax.ffi.register_ffi_target(targets[name], handler, platform='cpu')
  return Library(targets, library)


def build(source: pathlib.Path, flags: Sequence[str] = ()) -> pathlib.Path:
  """Compiles kernels, unless it was done before; returns the library.

  The compiler is that of the environment variable CXX, or c++. Libraries are
  kept in ~/.cache/dynconv_jax/kernels.

  Args:
    source: C++ file; it may include headers beside it and those of this
      package.
    flags: of the compiler, after the usual ones.

  Raises:
    OSError: there is no compiler, or the library cannot be written.
    subprocess.CalledProcessError: the compiler's error.
  """
  compiler = shlex.split(os.environ.get('CXX', '')) or ['c++']
  includes = [f'-I{_HEADERS}', f'-I{jax.ffi.include_dir()}']
  command = [*compiler, *_FLAGS, *flags, *includes]
  version = subprocess.run(
    [*compiler, '--version'], capture_output=True, text=True, check=True
  ).stdout
  files = [source, *source.parent.glob('*.h'), *_HEADERS.glob('*.h')]
  # The headers are jaxlib's, which may be upgraded in place.
  parts = (
    *(path.read_text() for path in sorted(files)),
    str(command),
    version,
    jaxlib.__version__,
    _processor(),
  )
  digest = hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:16]
  folder = pathlib.Path('~/.cache/dynconv_jax/kernels').expanduser()
  path = folder / f'{digest}.so'
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
      library = pathlib.Path(temporary) / path.name
      subprocess.run(
        [*command, str(source), '-o', str(library)],
        capture_output=True,
        text=True,
        check=True,
      )
      library.replace(path)  # Atomic: others may be doing the same.
  return path


def _processor() -> str:
  """What -march=native depends on: a home may be shared by machines."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.platform() + platform.processor()
  kept = ('model name', 'flags', 'Features', 'CPU part')
  return '\n'.join(sorted({x for x in lines if x.startswith(kept)}))
