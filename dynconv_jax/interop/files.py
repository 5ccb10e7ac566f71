"""Files of weights: PyTorch's, read without running code, and safetensors."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from dynconv_jax import extras

extras.require('train', 'safetensors')

import safetensors  # noqa: E402
import safetensors.numpy  # noqa: E402

from dynconv_jax.files import write_atomic  # noqa: E402

SUFFIXES = ('.safetensors', '.pth', '.pt', '.pth.tar')


def check_suffix(path: str | os.PathLike) -> None:
  """Raises ValueError unless a path ends like a file that can be read."""
  if not str(path).endswith(SUFFIXES):
    raise ValueError(
      f'a file of weights must end in {", ".join(SUFFIXES)}; got {path}'
    )


def read_state_dict(path: str | os.PathLike) -> Mapping[str, Any]:
  """Returns what a file of weights holds: tensors, or arrays, by name.

  PyTorch's files are read with `weights_only`, so that a hostile pickle runs
  no code; they may hold a whole training checkpoint, which
  `load_torch_state_dict` looks into. A safetensors file needs no PyTorch.

  Args:
    path: ends in .safetensors, .pth, .pt or .pth.tar.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: another suffix, a file that is damaged, one that holds more
      than weights and plain values, or one of PyTorch's without PyTorch.
  """
  path = pathlib.Path(path).expanduser()
  check_suffix(path)
  if not path.is_file():
    raise FileNotFoundError(f'no file {path}')
  if path.suffix == '.safetensors':
    return _read_safetensors(path)
  return _read_torch(path)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
  """Returns what the header of a safetensors file says beside its arrays.

  Args:
    path: of the file.

  Raises:
    ValueError: the file is damaged.
  """
  try:
    with safetensors.safe_open(path, 'numpy') as file:
      return file.metadata() or {}
  except safetensors.SafetensorError as error:
    raise ValueError(f'cannot read {path}: {error}') from error


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    return safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as error:
    raise ValueError(f'cannot read {path}: {error}') from error
  except (AttributeError, KeyError, TypeError) as error:
    # So it names a type that NumPy has not, such as float8_e4m3fn.
    raise ValueError(
      f'{path} holds entries of a type that cannot be read: {error}'
    ) from error


def _read_torch(path: pathlib.Path) -> Mapping[str, Any]:
  try:
    import torch
  except ModuleNotFoundError as error:
    raise ValueError(
      f'reading {path} needs PyTorch: pip install '
      "'dynconv-jax[torch]' installs it. A .safetensors file needs none"
    ) from error
  _check_sums(path)
  # Training scripts keep their arguments; a Namespace runs no code.
  allowed = torch.serialization.safe_globals([argparse.Namespace])
  try:
    with allowed:
      loaded = torch.load(path, map_location='cpu', weights_only=True)
  except pickle.UnpicklingError as error:
    reason = str(error).split('Please file an issue')[0]
    raise ValueError(
      f'{path} holds more than weights, and reading it could run its code. '
      'Where you trust it, save its state_dict alone and give that. PyTorch '
      f'says: {" ".join(reason.split())}'
    ) from error
  # What a damaged file surfaces as depends on where it is damaged.
  except (EOFError, KeyError, OSError, RuntimeError, TypeError) as error:
    raise ValueError(f'cannot read {path}: {error}') from error
  if not isinstance(loaded, Mapping):
    raise ValueError(
      f'{path} must hold a mapping of names to tensors; got '
      f'{type(loaded).__name__}'
    )
  return loaded


def _check_sums(path: pathlib.Path) -> None:
  """Raises ValueError where a part of a zip differs from its checksum.

  PyTorch does not look at them. Files of before its version 1.6 have none.
  """
  if not zipfile.is_zipfile(path):
    return
  try:
    with zipfile.ZipFile(path) as archive:
      damaged = archive.testzip()
  # What a damaged file surfaces as depends on where it is damaged.
  except (NotImplementedError, OSError, RuntimeError, zipfile.BadZipFile) as e:
    raise ValueError(f'cannot read {path}: {e}') from e
  if damaged:
    raise ValueError(
      f'{path} is damaged: {damaged} differs from its checksum. Get the file '
      'anew (one saved without checksums can be loaded and saved by PyTorch)'
    )


def write_safetensors(
  path: str | os.PathLike,
  state_dict: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes arrays by name, whole or not at all.

  Args:
    path: ends in .safetensors; its folder is made if need be.
    state_dict: such as that of `to_torch_state_dict`.
    metadata: is kept in the file's header.

  Raises:
    ValueError: another suffix.
    OSError: the file cannot be written.
  """
  path = pathlib.Path(path).expanduser()
  if path.suffix != '.safetensors':
    raise ValueError(f'the file must end in .safetensors; got {path}')
  # safetensors writes an array's memory as it lies, whatever its strides.
  arrays = {k: np.ascontiguousarray(v) for k, v in state_dict.items()}
  # Readers of PyTorch weights ask for this mark.
  metadata = {'format': 'pt', **(metadata or {})}
  content = safetensors.numpy.save(arrays, metadata)
  # The library's header has the metadata in an order that changes from run to
  # run; in one order, the same weights are the same file, whose hash tells it.
  size = int.from_bytes(content[:8], 'little')
  header = json.loads(content[8 : 8 + size])
  header['__metadata__'] = metadata
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # Arrays begin at multiples of 8 bytes.
  parts = (len(text).to_bytes(8, 'little'), text, content[8 + size :])
  write_atomic(path, b''.join(parts))
