"""Networks trained with this package, by name: --pretrained=zoo:NAME.

`zoo.json` lists them: file, SHA-256, what they are, what they reach, and a URL
once there is one. A file's own header says all that is needed to use it.
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
# Names a folder that is looked into first.
VARIABLE = 'DYNCONV_ZOO'
FOLDER = '~/.cache/dynconv_jax'


@functools.cache
def entries() -> Mapping[str, dict[str, Any]]:
  """Returns the networks of the index by name.

  An entry has 'file', 'sha256', 'bytes', 'url' (a string or None), 'flags'
  (which network, which images; text by name), 'dataset', 'classes', 'split',
  'accuracy' there, and 'gmacs', the mean of an image.
  """
  return _read(INDEX)


def _read(index: pathlib.Path) -> dict[str, dict[str, Any]]:
  return json.loads(index.read_text(encoding='utf-8'))


def entry(source: str) -> dict[str, Any]:
  """Returns the entry of 'zoo:NAME'.

  Raises:
    ValueError: there is no such network; names those that there are.
  """
  name = source.removeprefix(PREFIX)
  check_choice('pretrained', name, entries())
  return entries()[name]


def find_zoo(source: str, folder: str | os.PathLike = FOLDER) -> pathlib.Path:
  """Returns the file of a network, downloaded where it has a URL.

  It is looked for in the folder that the variable DYNCONV_ZOO names, then in
  FOLDER/zoo, where downloads go, and in ~/.cache/dynconv_jax/zoo.

  Args:
    source: 'zoo:NAME'.
    folder: such as that of --data_dir.

  Raises:
    ValueError: there is no such network, or a file is another one.
    FileNotFoundError: there is no file and no URL, or it cannot be downloaded;
      says where to put the file by hand.
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
      f'{source} is not here and is not published yet: {advice}. Looked in '
      f'{", ".join(map(str, dict.fromkeys(folders)))}; {VARIABLE} names another'
    )
  try:
    with replacing(path) as partial:
      with (
        urllib.request.urlopen(known['url'], timeout=60) as response,
        partial.open('wb') as file,
      ):
        shutil.copyfileobj(response, file)
      check_hash(partial, known['sha256'], known['url'])
  except urllib.error.URLError as error:
    raise FileNotFoundError(
      f'cannot download {known["url"]} ({error.reason}). Without a network, '
      f'{advice}'
    ) from error
  return path


def check_hash(
  path: pathlib.Path, sha256: str, place: str | os.PathLike | None = None
) -> None:
  """Raises ValueError unless a file has a SHA-256.

  Args:
    path: of the file.
    sha256: 64 hexadecimal digits.
    place: of the file, for the error; None: the path.
  """
  with path.open('rb') as file:
    found = hashlib.file_digest(file, 'sha256').hexdigest()
  if found != sha256:
    raise ValueError(
      f'{place or path} is damaged or another file: its SHA-256 is {found}, '
      f'expected {sha256}'
    )


def source_flags(source: str) -> Mapping[str, str]:
  """Returns the flags, text by name, of a network of this package.

  Args:
    source: of weights: 'zoo:NAME', or a .safetensors file whose header has
      them; for others there are none.
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
  """Puts an entry into an index, in place of its former one.

  Args:
    name: of the network.
    values: see `entries`.
    index: the file; made where there is none.
  """
  path = pathlib.Path(index)
  known = _read(path) if path.exists() else {}
  known = dict(sorted({**known, name: dict(values)}.items()))
  write_atomic(path, json.dumps(known, indent=2) + '\n')
