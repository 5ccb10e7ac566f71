"""A table of runs, such as results/NAME/results.csv."""

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
  """Checks that `write_result` can add to a file, before there is a result.

  Raises:
    ValueError, OSError: as `write_result`.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    raise ValueError(f'{path} is a folder; name a CSV file, which may be in it')
  check_folder(path.parent)
  _read(path)


def write_result(path: str | os.PathLike, row: Mapping[str, Any]) -> None:
  """Puts a run's row into a table of runs, in place of its former row.

  Of the former row, the columns that the new one lacks are kept: a latency
  measured elsewhere, a note. The file is replaced whole, so that none is ever
  half-written.

  Args:
    path: of the CSV file; made where there is none.
    row: has 'run' and 'split', which name it, beside its values.

  Raises:
    ValueError: there is a file that is no table of runs.
    OSError: the file cannot be written; a former one stays as it was.
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
  """Returns what names a row: its run and split."""
  return str(row.get('run', '')), str(row.get('split', ''))
