"""Tables of runs, such as results/NAME/results.csv."""

from __future__ import annotations

import csv
import io
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from dynconv_jax.files import check_folder, exclusive, write_atomic
from dynconv_jax.plotting.results import read_results

# Columns whose values stay when a row is updated.
_SAME = (
  *('model', 'method', 'budget', 'width_multiplier', 'image_size', 'seed'),
  *('checkpoint', 'convention', 'stochastic_gates'),
)


def check_table(
  path: str | os.PathLike, row: Mapping[str, Any] | None = None
) -> None:
  """Checks in advance that `write_result` can write to a file.

  Args:
    path: path of the CSV file.
    row: values of the row, as far as they are known.

  Raises:
    ValueError, OSError: as `write_result`.
    ValueError: the table has a row of the same run and split for another
      network or another kind of evaluation. The message lists the differences.
      Empty cells do not differ.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    raise ValueError(f'{path} is a folder; specify a CSV file')
  check_folder(path.parent)
  for old in _read(path):
    if row is None or _key(old) != _key(row):
      continue
    differing = [
      f'{name}: {row[name]}, not {old[name]}'
      for name in _SAME
      if not _agree(str(row.get(name, '')), old.get(name, ''))
    ]
    if differing:
      raise ValueError(
        f'{path} has another row for the run {row["run"]} and the split '
        f'{row["split"]}; given, not in the table: {"; ".join(differing)}. '
        'Choose another table, or rename the folder of the run'
      )


def write_result(path: str | os.PathLike, row: Mapping[str, Any]) -> None:
  """Adds a run's row to a table of runs or updates it.

  When a row is updated, columns that the new row lacks are kept, such as a
  latency measured elsewhere or a note. The file is replaced atomically. Several
  processes may write to one table.

  Args:
    path: path of the CSV file, created if necessary.
    row: values by column. 'run' and 'split' identify the row.

  Raises:
    ValueError: the existing file is not a table of runs.
    OSError: the file cannot be written. An existing file is kept.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with exclusive(path.parent):  # Several sweeps may share a table.
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


def _agree(a: str, b: str) -> bool:
  """Returns whether two cells are equal, such as 1 and 1.0, or one is empty."""
  try:
    return float(a) == float(b)
  except ValueError:
    return a == b or '' in (a, b)


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
  """Returns the key of a row: its run and split."""
  return str(row.get('run', '')), str(row.get('split', ''))
