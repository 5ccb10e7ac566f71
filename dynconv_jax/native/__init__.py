"""Kernels in C++ for CPUs, compiled at first use for this machine."""

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
    # Template errors go on for pages.
    told = getattr(error, 'stderr', None) or str(error)
    logging.warning(
      'XLA computes what kernels of this package would compute faster: they '
      'were not compiled. %s',
      next((line for line in told.splitlines() if 'error:' in line), told),
    )
    return None
  targets = {}
  for name in names:
    # Compiled programs are cached by name: each build has names of its own.
    targets[name] = f'dynconv_{name}_{path.stem.partition("-")[0]}'
    handler = jax.ffi.pycapsule(getattr(library, f'dynconv_{name}'))
    jax.ffi.register_ffi_target(targets[name], handler, platform='cpu')
  return Library(targets, library)
