"""Accuracy curves from the rows of a results.csv."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from dynconv_jax.methods.method import Method, load_method

_REQUIRED = ('model', 'method', 'accuracy')
# Columns that identify a run and cannot be an axis, even if they are numeric.
_NAMES = ('model', 'method', 'seed')


@dataclasses.dataclass(frozen=True)
class Point:
  """One setting of a curve.

  Attributes:
    x: mean over seeds, in the unit of its column.
    accuracy: mean over seeds, in [0, 1].
    below: length of the error bar below `accuracy`.
    above: length of the error bar above `accuracy`.
    seeds: number of runs in the mean.
    model: name of the model.
    budget: the target budget, or None.
    weight: weight of the compute loss for methods that have one instead of a
      budget, or the number of values of a knob that is a list. Otherwise None.
    width_multiplier: scale of the channel counts.
    image_size: side of the input in pixels, or None.
  """

  x: float
  accuracy: float
  below: float
  above: float
  seeds: int
  model: str
  budget: float | None
  weight: float | None = None
  width_multiplier: float = 1.0
  image_size: float | None = None


@dataclasses.dataclass(frozen=True)
class Curve:
  """The settings of one model and method, or the dense models of one family.

  Dense networks of one model with different widths form a separate curve.

  Attributes:
    method: name of the method, such as 'dynconv'.
    model: name of the model, such as 'resnet101', or 'resnet' for dense models
      of several depths.
    series: value of the series column, or ''.
    points: points in order of x.
    width_multiplier: width of all points, or None if they differ.
  """

  method: str
  model: str
  series: str
  points: tuple[Point, ...]
  width_multiplier: float | None = 1.0


def read_results(path: str | os.PathLike) -> list[dict[str, str]]:
  """Reads the rows of a CSV file with a header, with cells as text.

  Args:
    path: path of the CSV file, or of a gzip-compressed one that ends in .gz.

  Raises:
    FileNotFoundError: the file does not exist.
    IsADirectoryError: the path is a folder.
    ValueError: the file is not text, has no header or no rows, has duplicate
      columns, or a row has more or fewer cells than the header.
  """
  path = Path(path)
  if path.is_dir():
    raise IsADirectoryError(f'{path} is a folder; name a CSV file in it')
  if not path.is_file():
    raise FileNotFoundError(f'there is no file {str(path)!r}')
  open_file = gzip.open if path.suffix == '.gz' else open
  try:
    # Spreadsheet programs write a byte-order mark.
    with open_file(path, 'rt', encoding='utf-8-sig', newline='') as file:
      lines = [[cell.strip() for cell in line] for line in csv.reader(file)]
  except (
    UnicodeDecodeError,
    csv.Error,
    gzip.BadGzipFile,
    EOFError,
    zlib.error,
  ) as error:
    raise ValueError(f'{path} is not a CSV file: {error}') from error
  lines = [line for line in lines if any(line)]
  if not lines:
    raise ValueError(f'{path} is empty: it has no header')
  header, *rows = lines
  if len(set(header)) < len(header):
    raise ValueError(f'{path} has duplicate columns: {", ".join(header)}')
  if not rows:
    raise ValueError(f'{path} has a header but no rows')
  for number, row in enumerate(rows, 1):
    if len(row) != len(header):
      raise ValueError(
        f'{path}, row {number}: {len(row)} cells for {len(header)} columns'
      )
  return [dict(zip(header, row, strict=True)) for row in rows]


def find_method(name: str) -> Method:
  """Returns a method, or a placeholder with its name if it is not found."""
  try:
    return load_method(name)
  except ValueError:
    return Method(name)


def has_list(method: Method) -> bool:
  """Returns whether the knob of a method is a list, such as dropped blocks."""
  defaults = {f.name: f.default for f in dataclasses.fields(method.options)}
  return isinstance(defaults.get(method.knob), tuple)


def accuracy_curves(
  rows: Sequence[Mapping[str, object]],
  x: str = 'gmacs_mean',
  series: str | None = None,
) -> list[Curve]:
  """Returns the curves of a results table, in order of their first rows.

  Runs that differ only in the seed form one point, whose error bar is the
  standard deviation over seeds. The error bar of a single run is its interval.

  Args:
    rows: rows with text or numbers: 'model', 'method', 'accuracy' in [0, 1],
      and the column `x`; optionally 'budget' or the method's alternative to it
      (`Method.knob`), 'width_multiplier', 'image_size', 'seed', 'accuracy_low',
      and 'accuracy_high'. Rows without a value of `x` are skipped.
    x: numeric column by which points are sorted.
    series: additional column that separates curves, such as 'recipe'.

  Raises:
    ValueError: there are no rows, columns are missing, `x` is not a numeric
      column, a cell is not a number, an accuracy is outside [0, 1] or its
      interval, two rows are the same run, or rows are of different splits that
      `series` does not separate.
  """
  _check_columns(rows, x, series)
  parsed = []
  for number, row in enumerate(rows, 1):
    point = _parse(row, x, number)
    if point is None:
      logging.warning('skipping row %d, which has no %s', number, x)
      continue
    kind = str(row[series]) if series else ''
    parsed.append((str(row['method']), kind, number, row, point))
  if not parsed:
    raise ValueError(f'no row has a value in the column {x!r}')
  dense = [(kind, p) for method, kind, _, _, p in parsed if method == 'dense']

  settings = {}
  for method, kind, number, row, point in parsed:
    # Ignore the budget of dense rows, which is 1 or empty.
    setting = dataclasses.replace(
      point,
      x=0,
      accuracy=0,
      below=0,
      above=0,
      **({'budget': None} if method == 'dense' else {}),
    )
    width = point.width_multiplier
    curves = [(method, point.model, width, kind)]
    if method == 'dense':
      curves = _dense_curves(point, kind, [p for k, p in dense if k == kind])
    for curve in curves:
      runs = settings.setdefault(curve, {}).setdefault(
        (setting, _listed(row)), []
      )
      runs.append((number, str(row.get('seed', '')), point))

  curves = []
  for (method, family, width, kind), groups in settings.items():
    points = [point for runs in groups.values() for point in _average(runs)]
    models = {point.model for point in points}
    model = family if len(models) > 1 else models.pop()
    points.sort(key=lambda point: (point.x, point.accuracy))
    curves.append(Curve(method, model, kind, tuple(points), width))
  return curves


def _dense_curves(
  point: Point, kind: str, dense: Sequence[Point]
) -> list[tuple[str, str, float | None, str]]:
  """Returns the curves of a dense network: by depth, by width, or both."""
  width, family = point.width_multiplier, _family(point.model)
  widths = {p.width_multiplier for p in dense if p.model == point.model}
  by_depth = ('dense', family, width, kind)
  if len(widths) == 1:
    return [by_depth]
  by_width = ('dense', point.model, None, kind)
  models = {
    p.model
    for p in dense
    if _family(p.model) == family and p.width_multiplier == width
  }
  return [by_depth, by_width] if len(models) > 1 else [by_width]


def _parse(row: Mapping[str, object], x: str, number: int) -> Point | None:
  """Returns the point of a row, or None if it has no value of x."""
  at = _number(row, x, number, optional=True)
  if at is None:
    return None
  if at < 0 and x.startswith(('gmacs', 'latency')):
    raise ValueError(f'row {number}: {x} must be >= 0; got {at:g}')
  accuracy = _accuracy(row, 'accuracy', number)
  low = _accuracy(row, 'accuracy_low', number, optional=True)
  high = _accuracy(row, 'accuracy_high', number, optional=True)
  low = accuracy if low is None else low
  high = accuracy if high is None else high
  if not low <= accuracy <= high:
    raise ValueError(
      f'row {number}: accuracy {accuracy:g} is outside its interval, {low:g} '
      f'to {high:g}'
    )
  knob, weight = find_method(str(row['method'])).knob, None
  if (names := _listed(row)) is not None:
    # The cell is empty if the sweep's grid did not have the knob.
    weight = float(len(names)) if names else None
  elif knob and knob != 'budget':
    weight = _number(row, knob, number, optional=True)
  width = _number(row, 'width_multiplier', number, optional=True)
  return Point(
    x=at,
    accuracy=accuracy,
    below=accuracy - low,
    above=high - accuracy,
    seeds=1,
    model=str(row['model']),
    budget=_number(row, 'budget', number, optional=True),
    weight=weight,
    width_multiplier=1.0 if width is None else width,
    image_size=_number(row, 'image_size', number, optional=True),
  )


def _listed(row: Mapping[str, object]) -> tuple[str, ...] | None:
  """Returns the values of the method's knob, or None if it is no list."""
  method = find_method(str(row['method']))
  if not has_list(method):
    return None
  return tuple(v for v in str(row.get(method.knob, '')).split(',') if v)


def _average(runs: Sequence[tuple[int, str, Point]]) -> list[Point]:
  """Returns one point for the seeds of a setting, or each run's own point."""
  points = [point for _, _, point in runs]
  rows_of_seed = {}
  for number, seed, _ in runs:
    rows_of_seed.setdefault(seed, []).append(number)
  for seed, numbers in rows_of_seed.items():
    if len(numbers) == 1:
      continue
    # Without a budget or weight, the runs may differ in another setting. They
    # are then separate points of a curve.
    if points[0].budget is None and points[0].weight is None:
      return points
    raise ValueError(
      f'rows {", ".join(map(str, numbers))} have the same model, method, '
      f'budget, and seed ({seed or "none"}); set series to a column in which '
      'they differ'
    )
  if len(points) == 1:
    return points
  accuracies = [point.accuracy for point in points]
  deviation = float(np.std(accuracies, ddof=1))
  return [
    dataclasses.replace(
      points[0],
      x=float(np.mean([point.x for point in points])),
      accuracy=float(np.mean(accuracies)),
      below=deviation,
      above=deviation,
      seeds=len(points),
    )
  ]


def _check_columns(
  rows: Sequence[Mapping[str, object]], x: str, series: str | None
) -> None:
  if not rows:
    raise ValueError('there are no results to plot')
  columns = list(rows[0])
  missing = [name for name in _REQUIRED if name not in columns]
  if missing:
    raise ValueError(
      f'results need the columns {", ".join(_REQUIRED)} and that of x; '
      f'missing: {", ".join(missing)}; given: {", ".join(columns)}'
    )
  numeric = [
    name
    for name in columns
    if name not in _NAMES and any(_is_number(row.get(name)) for row in rows)
  ]
  if x not in columns or x in _NAMES:
    raise ValueError(
      f'x must be one of the numeric columns {", ".join(numeric)}; got {x!r}'
    )
  if series is not None and series not in columns:
    raise ValueError(
      f'series must be one of the columns {", ".join(columns)}; got {series!r}'
    )
  splits = {str(row.get('split') or '') for row in rows} - {''}
  if len(splits) > 1 and series != 'split':
    raise ValueError(
      f'the rows are of the splits {", ".join(sorted(splits))}; keep those of '
      'one split, as with `dynconv plot --split=NAME`'
    )


def _is_number(cell: object) -> bool:
  try:
    return math.isfinite(float(cell))
  except (TypeError, ValueError):
    return False


def _number(
  row: Mapping[str, object], column: str, number: int, optional: bool = False
) -> float | None:
  cell = row.get(column)
  if optional and (cell is None or str(cell).strip() == ''):
    return None
  if not _is_number(cell):
    raise ValueError(
      f'row {number}, column {column!r}: {cell!r} is not a finite number'
    )
  return float(cell)


def _accuracy(
  row: Mapping[str, object], column: str, number: int, optional: bool = False
) -> float | None:
  value = _number(row, column, number, optional)
  if value is not None and not 0 <= value <= 1:
    raise ValueError(
      f'row {number}, column {column!r}: an accuracy must be in [0, 1]; got '
      f'{value:g}'
    )
  return value


def _family(model: str) -> str:
  """Returns a model's name without its depth: 'resnet' for 'resnet50'."""
  return re.sub(r'\d+$', '', model) or model
