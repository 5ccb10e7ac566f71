"""Readers of what a figure is drawn from: results.csv and metrics.jsonl."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

from absl import logging


def read_results(path: str | os.PathLike) -> list[dict[str, str]]:
  """Returns the rows of a CSV file with a header, cells as text.

  Args:
    path: of the CSV file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is not text, has no header or no row, names a column
      twice, or a row has more or fewer cells than the header.
  """
  lines = list(csv.reader(_read_text(path).splitlines()))
  lines = [line for line in lines if line]
  if not lines:
    raise ValueError(f'{path} is empty: it has no header')
  header, *rows = lines
  header = [name.strip() for name in header]
  if len(set(header)) < len(header):
    raise ValueError(f'{path} names a column twice: {", ".join(header)}')
  if not rows:
    raise ValueError(f'{path} has a header but no rows')
  for number, row in enumerate(rows, 1):
    if len(row) != len(header):
      raise ValueError(
        f'{path}, row {number}: {len(row)} cells for {len(header)} columns'
      )
  return [dict(zip(header, map(str.strip, row), strict=True)) for row in rows]


def read_metrics(path: str | os.PathLike) -> list[dict]:
  """Returns the rows of a JSON-lines file, such as a workdir's metrics.jsonl.

  A last line that breaks off, of a run that was killed as it wrote, is left
  out with a warning.

  Args:
    path: of the file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it has no rows, or a line is not a JSON object.
  """
  text = _read_text(path)
  lines = text.splitlines()
  rows = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      if number == len(lines) and not text.endswith('\n'):
        logging.warning('%s: the last line breaks off; left out', path)
        continue
      raise ValueError(f'{path}, line {number}: not JSON: {error}') from error
    if not isinstance(row, dict):
      raise ValueError(f'{path}, line {number}: not a JSON object: {line!r}')
    rows.append(row)
  if not rows:
    raise ValueError(f'{path} has no rows')
  return rows


def _read_text(path: str | os.PathLike) -> str:
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'there is no file {str(path)!r}')
  try:
    # Spreadsheets write CSV with a byte-order mark.
    return path.read_text('utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is not UTF-8 text: {error}') from error
