"""Zoo of networks trained with this package, used as --pretrained=zoo:NAME.

`zoo.json` lists their files, SHA-256, configurations, results, and URLs if
published. The header of a file contains all information needed to use it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from dynconv_jax.checks import check_choice
from dynconv_jax.files import replacing, write_atomic
from dynconv_jax.interop.files import read_metadata

PREFIX = 'zoo:'
INDEX = pathlib.Path(__file__).with_name('zoo.json')
# Environment variable with the folder that is searched first.
VARIABLE = 'DYNCONV_ZOO'
FOLDER = '~/.cache/dynconv_jax'


@functools.cache
def entries() -> Mapping[str, dict[str, Any]]:
  """Returns the entries of the index by name.

  An entry has 'file', 'sha256', 'bytes', 'url' (text or None), 'flags' (of the
  network and its images, as text by name), 'dataset', 'classes' (their number),
  'split', 'accuracy' on the split, and 'gmacs', the mean per image.
  """
  return _read(INDEX)


def _read(index: pathlib.Path) -> dict[str, dict[str, Any]]:
  return json.loads(index.read_text(encoding='utf-8'))


def entry(source: str) -> dict[str, Any]:
  """Returns the entry of 'zoo:NAME'.

  Raises:
    ValueError: the network does not exist. The message lists all names.
  """
  name = source.removeprefix(PREFIX)
  check_choice('pretrained', name, entries())
  return entries()[name]


def find_zoo(source: str, folder: str | os.PathLike = FOLDER) -> pathlib.Path:
  """Returns the file of a network, downloading it if necessary.

  Searches the folder in the environment variable DYNCONV_ZOO, then
  `folder`/zoo, then ~/.cache/dynconv_jax/zoo. Downloads go to the first of
  these folders that is set.

  Args:
    source: 'zoo:NAME'.
    folder: a folder, such as that of --data_dir.

  Raises:
    ValueError: the network does not exist, or a file has the wrong SHA-256.
    FileNotFoundError: there is no file, and it has no URL or cannot be
      downloaded. The message says where to put the file.
  """
  known = entry(source)
  folders = [
    pathlib.Path(place).expanduser()
    for place in (
      os.environ.get(VARIABLE),
      pathlib.Path(folder) / 'zoo',
      pathlib.Path(FOLDER) / 'zoo',
    )
    if place
  ]
  for place in folders:
    path = place / known['file']
    if path.is_file():
      check_hash(path, known['sha256'])
      return path
  path = folders[0] / known['file']
  advice = f'put the file (SHA-256 {known["sha256"]}) at {path}'
  if not known['url']:
    raise FileNotFoundError(
      f'{source} was not found and is not published yet: {advice}. Searched '
      f'{", ".join(map(str, dict.fromkeys(folders)))}; set {VARIABLE} to add a '
      'folder'
    )
  try:
    with replacing(path) as partial:
      with (
        urllib.request.urlopen(known['url'], timeout=60) as response,
        partial.open('wb') as file,
      ):
        shutil.copyfileobj(response, file)
      check_hash(partial, known['sha256'], known['url'])
  # The second and third are raised if a download stops.
  except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
    reason = getattr(error, 'reason', error)
    raise FileNotFoundError(
      f'cannot download {known["url"]} ({reason}). Without a network, {advice}'
    ) from error
  return path


def check_hash(
  path: pathlib.Path, sha256: str, place: str | os.PathLike | None = None
) -> None:
  """Raises ValueError if a file does not have the given SHA-256.

  Args:
    path: path of the file.
    sha256: 64 hexadecimal digits.
    place: name of the file in the error; None: the path.
  """
  with path.open('rb') as file:
    actual = hashlib.file_digest(file, 'sha256').hexdigest()
  if actual != sha256:
    raise ValueError(
      f'{place or path} is damaged or another file: its SHA-256 is {actual}, '
      f'expected {sha256}'
    )


def source_flags(source: str) -> Mapping[str, str]:
  """Returns the flags of a network trained with this package, as text by name.

  Args:
    source: 'zoo:NAME' or a .safetensors file with flags in its header. Other
      sources have no flags.
  """
  if source.startswith(PREFIX):
    known = source.removeprefix(PREFIX)
    return entries()[known]['flags'] if known in entries() else {}
  path = pathlib.Path(source).expanduser()
  if path.suffix == '.safetensors' and path.is_file():
    return json.loads(read_metadata(path).get('flags', '{}'))
  return {}


def write_entry(
  name: str, values: Mapping[str, Any], index: str | os.PathLike = INDEX
) -> None:
  """Adds an entry to an index or replaces it.

  Args:
    name: name of the network.
    values: the entry, see `entries`.
    index: the index file, created if necessary.
  """
  path = pathlib.Path(index)
  known = _read(path) if path.exists() else {}
  known = dict(sorted({**known, name: dict(values)}.items()))
  write_atomic(path, json.dumps(known, indent=2) + '\n')
