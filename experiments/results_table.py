"""A table of runs, such as results/NAME/results.csv."""

from __future__ import annotations

import csv
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from dynconv_jax.plotting.results import read_results


def write_result(path: str | os.PathLike, row: Mapping[str, Any]) -> None:
  """Puts a run's row into a table of runs, in place of its former row.

  The file is replaced whole, so that none is ever half-written.

  Args:
    path: of the CSV file; made where there is none.
    row: has 'run' and 'split', which name it, beside its values.

  Raises:
    ValueError: there is a file that is no table of runs.
  """
  path = pathlib.Path(path)
  rows = read_results(path) if path.exists() else []
  key = (str(row['run']), str(row['split']))
  rows = [old for old in rows if (old.get('run'), old.get('split')) != key]
  rows.append({name: str(value) for name, value in row.items()})
  rows.sort(key=lambda row: (row.get('run', ''), row.get('split', '')))
  columns = list(dict.fromkeys(name for row in rows for name in row))
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{path.name}.partial')
  with partial.open('w', newline='') as file:
    writer = csv.DictWriter(file, columns, restval='', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
  os.replace(partial, path)
