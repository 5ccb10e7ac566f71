"""Weight files of PyTorch (read without running code) and safetensors."""

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
  """Raises ValueError if a path does not end in one of SUFFIXES."""
  if not str(path).endswith(SUFFIXES):
    raise ValueError(
      f'a weight file must end in {", ".join(SUFFIXES)}; got {path}'
    )


def read_state_dict(path: str | os.PathLike) -> Mapping[str, Any]:
  """Returns the contents of a weight file, as tensors or arrays by name.

  PyTorch files are read with `weights_only`, so malicious pickles cannot run
  code. They may contain a whole training checkpoint, in which
  `load_torch_state_dict` finds the weights. Safetensors files do not require
  PyTorch.

  Args:
    path: path of the file, ending in one of SUFFIXES.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: the suffix is wrong, the file is damaged, it contains more than
      weights and plain values, or it needs PyTorch, which is not installed.
  """
  path = pathlib.Path(path).expanduser()
  check_suffix(path)
  if not path.is_file():
    raise FileNotFoundError(f'no file {path}')
  if path.suffix == '.safetensors':
    return _read_safetensors(path)
  return _read_torch(path)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
  """Returns the metadata in the header of a safetensors file.

  Args:
    path: path of the file.

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
    # Raised for types that NumPy lacks, such as float8_e4m3fn.
    raise ValueError(
      f'{path} contains entries of an unsupported type: {error}'
    ) from error


def _read_torch(path: pathlib.Path) -> Mapping[str, Any]:
  try:
    import torch
  except ModuleNotFoundError as error:
    raise ValueError(
      f'reading {path} needs PyTorch: pip install '
      "'dynconv-jax[torch]' installs it. .safetensors files do not need it"
    ) from error
  with path.open('rb') as file:
    start = file.read(2)
  # A zip file, or a pickle from before PyTorch 1.6.
  if start != b'PK' and start[:1] != b'\x80':
    raise ValueError(
      f'cannot read {path}: torch.save did not write it; it '
      + (f'starts with {start!r}' if start else 'is empty')
    )
  _check_sums(path)
  # Training scripts save their arguments. A Namespace cannot run code.
  allowed = torch.serialization.safe_globals([argparse.Namespace])
  try:
    with allowed:
      loaded = torch.load(path, map_location='cpu', weights_only=True)
  except pickle.UnpicklingError as error:
    reason = str(error).split('Please file an issue')[0]
    raise ValueError(
      f'{path} contains more than weights, and reading it could run code. If '
      'you trust it, save its state_dict to a separate file and use that. '
      f'PyTorch reports: {" ".join(reason.split())}'
    ) from error
  # The error of a damaged file depends on where it is damaged.
  except (EOFError, KeyError, OSError, RuntimeError, TypeError) as error:
    raise ValueError(f'cannot read {path}: {error}') from error
  if not isinstance(loaded, Mapping):
    raise ValueError(
      f'{path} must contain a mapping of names to tensors; got '
      f'{type(loaded).__name__}'
    )
  return loaded


def _check_sums(path: pathlib.Path) -> None:
  """Raises ValueError if a part of a zip file does not match its checksum.

  PyTorch does not verify checksums. Files from before PyTorch 1.6 have none.
  """
  if not zipfile.is_zipfile(path):
    return
  try:
    with zipfile.ZipFile(path) as archive:
      damaged = archive.testzip()
  # The error of a damaged file depends on where it is damaged.
  except (NotImplementedError, OSError, RuntimeError, zipfile.BadZipFile) as e:
    raise ValueError(f'cannot read {path}: {e}') from e
  if damaged:
    raise ValueError(
      f'{path} is damaged: {damaged} does not match its checksum. Download the '
      'file again (if it was saved without checksums, load and save it with '
      'PyTorch)'
    )


def write_safetensors(
  path: str | os.PathLike,
  state_dict: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Atomically writes arrays to a safetensors file.

  Args:
    path: path of the file, ending in .safetensors. Its folder is created if
      necessary.
    state_dict: arrays by name, such as those of `to_torch_state_dict`.
    metadata: text to store in the file's header, by name.

  Raises:
    ValueError: the suffix is wrong.
    OSError: the file cannot be written.
  """
  path = pathlib.Path(path).expanduser()
  if path.suffix != '.safetensors':
    raise ValueError(f'the file must end in .safetensors; got {path}')
  # safetensors writes the memory of an array and ignores its strides.
  arrays = {k: np.ascontiguousarray(v) for k, v in state_dict.items()}
  # Readers of PyTorch weights require this entry.
  metadata = {'format': 'pt', **(metadata or {})}
  content = safetensors.numpy.save(arrays, metadata)
  # The library writes metadata in random order. Rewrite the header in a fixed
  # order, so that equal weights give equal files and hashes.
  size = int.from_bytes(content[:8], 'little')
  header = json.loads(content[8 : 8 + size])
  header['__metadata__'] = metadata
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # Arrays start at multiples of 8 bytes.
  parts = (len(text).to_bytes(8, 'little'), text, content[8 + size :])
  write_atomic(path, b''.join(parts))
