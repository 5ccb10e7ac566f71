"""A table of runs, such as results/NAME/results.csv."""

from __future__ import annotations

import csv
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from dynconv_jax.plotting.results import read_results


def check_table(path: str | os.PathLike) -> None:
  """Checks that `write_result` can add to a file, before there is a result.

  Raises:
    ValueError, OSError: as `write_result`.
  """
  _read(pathlib.Path(path))


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
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{path.name}.partial')
  try:
    with partial.open('w', newline='', encoding='utf-8') as file:
      writer = csv.DictWriter(file, columns, restval='', lineterminator='\n')
      writer.writeheader()
      writer.writerows(rows)
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def _read(path: pathlib.Path) -> list[dict[str, str]]:
  return read_results(path) if path.exists() else []


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
  """Returns what names a row: its run and split."""
  return str(row.get('run', '')), str(row.get('split', ''))
