"""Tables of runs, such as results/NAME/results.csv."""

from __future__ import annotations

import csv
import io
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from dynconv_jax.files import check_folder, write_atomic
from dynconv_jax.plotting.results import read_results


def check_table(path: str | os.PathLike) -> None:
  """Checks in advance that `write_result` can write to a file.

  Raises:
    ValueError, OSError: as `write_result`.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    raise ValueError(f'{path} is a folder; specify a CSV file')
  check_folder(path.parent)
  _read(path)


def write_result(path: str | os.PathLike, row: Mapping[str, Any]) -> None:
  """Adds a run's row to a table of runs or updates it.

  When a row is updated, columns that the new row lacks are kept, such as a
  latency measured elsewhere or a note. The file is replaced atomically.

  Args:
    path: path of the CSV file, created if necessary.
    row: values by column. 'run' and 'split' identify the row.

  Raises:
    ValueError: the existing file is not a table of runs.
    OSError: the file cannot be written. An existing file is kept.
  """
  path = pathlib.Path(path)
  rows = _read(path)
  columns = list(dict.fromkeys([*(rows[0] if rows else ()), *row]))
  key = _key(row)
  new = {}
  for old in rows:
    if _key(old) == key:
      new |= old
  new |= {name: str(value) for name, value in row.items()}
  rows = [old for old in rows if _key(old) != key] + [new]
  rows.sort(key=_key)
  text = io.StringIO(newline='')
  writer = csv.DictWriter(text, columns, restval='', lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  write_atomic(path, text.getvalue())


def _read(path: pathlib.Path) -> list[dict[str, str]]:
  return read_results(path) if path.exists() else []


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
  """Returns the key of a row: its run and split."""
  return str(row.get('run', '')), str(row.get('split', ''))
