"""C++ kernels for CPUs, compiled for this machine on first use."""

from __future__ import annotations

import ctypes
import pathlib
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import jax
from absl import logging

from dynconv_jax.native.library import build

__all__ = ['Library', 'register']


class Library(NamedTuple):
  """A compiled library with registered kernels.

  Attributes:
    targets: kernel name -> name of its foreign function interface target.
    handle: handle of the library.
  """

  targets: dict[str, str]
  handle: ctypes.CDLL


def register(
  source: pathlib.Path, names: Sequence[str], flags: Sequence[str] = ()
) -> Library | None:
  """Compiles and registers kernels; returns None if that fails.

  Args:
    source: C++ file that defines a handler dynconv_NAME for each name.
    names: names of the kernels.
    flags: additional compiler flags.
  """
  try:
    path = build(source, flags)
    library = ctypes.CDLL(str(path))
  except (OSError, subprocess.SubprocessError) as error:
    # Log only one line, because template errors are long.
    output = getattr(error, 'stderr', None) or str(error)
    logging.warning(
      'Using XLA instead of the faster custom kernels, which failed to '
      'compile. %s',
      next((line for line in output.splitlines() if 'error:' in line), output),
    )
    return None
  targets = {}
  for name in names:
    # JAX caches compiled programs by name, so each build needs unique names.
    targets[name] = f'dynconv_{name}_{path.stem.partition("-")[0]}'
    handler = jax.ffi.pycapsule(getattr(library, f'dynconv_{name}'))
    jax.ffi.register_ffi_target(targets[name], handler, platform='cpu')
  return Library(targets, library)
