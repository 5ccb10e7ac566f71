"""The figure of many runs: accuracy against what computing it costs."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dynconv_jax.plotting import style

# Name, colour and marker of a method: the same in every figure.
_METHODS = {
  'dense': ('dense', style.BLACK, 's'),
  'dynconv': ('DynConv', style.VERMILION, 'o'),
  'convnet_aig': ('ConvNet-AIG', style.BLUE, '^'),
  'skipnet': ('SkipNet', style.GREEN, 'v'),
  'sact': ('SACT', style.PURPLE, 'D'),
  'act': ('ACT', style.ORANGE, 'P'),
}
_LINE_STYLES = ('-', '--', ':', '-.')
_X_LABELS = {
  'gmacs_mean': 'GMACs per image (mean)',
  'gmacs_p50': 'GMACs per image (median)',
  'gmacs_p95': 'GMACs per image (95th percentile)',
  'executed_fraction': 'executed / dense MACs',
}
# Columns of text, or that name a setting: no axis.
_NOT_X = ('model', 'method', 'seed')


@dataclasses.dataclass(frozen=True)
class Point:
  """One setting of a curve.

  Attributes:
    x: in the unit of its column, the mean over seeds.
    accuracy: in [0, 1], the mean over seeds.
    below: how far the error bar reaches below `accuracy`.
    above: how far it reaches above.
    seeds: runs in the mean.
    label: what is written beside the point: the budget, or a dense model.
  """

  x: float
  accuracy: float
  below: float
  above: float
  seeds: int
  label: str


@style.styled()
def plot_accuracy_against_macs(
  rows: Sequence[Mapping[str, object]],
  path: str | os.PathLike,
  x: str = 'gmacs_mean',
  series: str | None = None,
  chance: float | None = None,
) -> Figure:
  """Draws accuracy against GMACs, or against any other numeric column.

  One curve a model and method, its points in order of x and labelled with their
  budgets; dense networks of a family (ResNet-18, -34, ...) are one curve,
  labelled with their depths. Runs that differ by nothing but the seed are
  averaged, with the standard deviation over the seeds as error bar; a single
  run has its 95 % interval, from `accuracy_low` to `accuracy_high`, where the
  row has one. A row with no value of x is left out.

  Args:
    rows: of a results.csv, cells as text or numbers: 'model', 'method',
      'accuracy' in [0, 1] and the column of x; optionally 'budget', 'seed',
      'accuracy_low' and 'accuracy_high'.
    path: the figure is written as PNG and SVG; see `style.figure_paths`.
    x: the column of the horizontal axis, such as 'latency_sparse_ms'.
    series: a further column that tells curves apart, such as 'recipe'.
    chance: accuracy of guessing, in [0, 1], drawn as a line where given.

  Returns:
    The figure; `lines` of its axes are the curves, in order of the rows.

  Raises:
    ValueError: if there are no rows, columns are missing, x is not a numeric
      column, a cell is not a number or an accuracy not in [0, 1], or two rows
      are the same run.
  """
  if chance is not None and not 0 <= chance <= 1:
    raise ValueError(f'chance must be in [0, 1]; got {chance}')
  curves = accuracy_curves(rows, x, series)
  figure = style.new_figure(5.4, 3.8)
  ax = figure.add_subplot()
  for (name, method, rank), points in curves.items():
    _draw_curve(ax, name, method, rank, points)
  ax.margins(0.08, 0.1)
  ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=''))
  ax.set_ylabel('accuracy (%)')
  ax.set_xlabel(_X_LABELS.get(x) or _unit_label(x))
  if chance is not None:
    _draw_chance(ax, chance)
  ax.legend(loc='best')
  note = _error_bar_note([p for points in curves.values() for p in points])
  if note:
    style.footnote(figure, note)
  style.save_figure(figure, path)
  return figure


def accuracy_curves(
  rows: Sequence[Mapping[str, object]], x: str, series: str | None = None
) -> dict[tuple[str, str, int], list[Point]]:
  """Returns {(name, method, rank among the method's curves): points by x}.

  Args:
    rows: as in `plot_accuracy_against_macs`, and so are x and series.

  Raises:
    ValueError: as `plot_accuracy_against_macs`.
  """
  _check_columns(rows, x, series)
  runs = {}
  for number, row in enumerate(rows, 1):
    at = _number(row, x, number, optional=True)
    if at is None:
      logging.warning('row %d has no %s; left out', number, x)
      continue
    accuracy = _accuracy(row, 'accuracy', number)
    low = _accuracy(row, 'accuracy_low', number, optional=True)
    high = _accuracy(row, 'accuracy_high', number, optional=True)
    below = 0.0 if low is None else accuracy - low
    above = 0.0 if high is None else high - accuracy
    if min(below, above) < 0:
      raise ValueError(
        f'row {number}: accuracy {accuracy} is outside its interval, '
        f'{low} to {high}'
      )
    model, method = str(row['model']), str(row['method'])
    kind = str(row.get(series, '')) if series else ''
    dense = method == 'dense'
    curve = (_family(model) if dense else model, method, kind)
    budget = _number(row, 'budget', number, optional=True)
    setting = (model, None if dense else budget)
    label = _depth(model) if dense else '' if budget is None else f'{budget:g}'
    run = (
      number,
      row.get('seed', ''),
      Point(at, accuracy, below, above, 1, label),
    )
    runs.setdefault(curve, {}).setdefault(setting, []).append(run)
  if not runs:
    raise ValueError(f'no row has a value in the column {x!r}')

  curves, ranks = {}, {}
  for (model, method, kind), settings in runs.items():
    points = [p for runs in settings.values() for p in _average(runs, method)]
    rank = ranks[method] = ranks.get(method, -1) + 1
    title = _METHODS.get(method, (method,))[0]
    if method == 'dense' and len(settings) == 1:
      ((model, _),) = settings
    name = f'{title} {_display(model)}' + (f', {kind}' if kind else '')
    curves[name, method, rank] = sorted(points, key=lambda p: (p.x, p.accuracy))
  return curves


def _average(runs: list[tuple[int, object, Point]], method: str) -> list[Point]:
  """Returns one point for the seeds of a setting, or each run's own point."""
  if len(runs) == 1:
    return [runs[0][2]]
  by_seed = {}
  for number, seed, point in runs:
    other = by_seed.setdefault(str(seed), number)
    if other != number:
      # Without budgets nothing says that the runs are of one setting: points
      # of a curve that another knob than the budget moves along.
      if not point.label or method == 'dense':
        return [point for _, _, point in runs]
      raise ValueError(
        f'rows {other} and {number} have the same model, method, budget and '
        'seed; name a column that tells them apart as series'
      )
  points = [point for _, _, point in runs]
  accuracies = [point.accuracy for point in points]
  deviation = float(np.std(accuracies, ddof=1))
  return [
    Point(
      x=float(np.mean([point.x for point in points])),
      accuracy=float(np.mean(accuracies)),
      below=deviation,
      above=deviation,
      seeds=len(points),
      label=points[0].label,
    )
  ]


def _check_columns(
  rows: Sequence[Mapping[str, object]], x: str, series: str | None
) -> None:
  if not rows:
    raise ValueError('there are no results to plot: not a single row')
  given = list(rows[0])
  required = ['model', 'method', 'accuracy']
  missing = [name for name in required if name not in given]
  if missing:
    raise ValueError(
      f'results need the columns {", ".join(required)} and that of x; missing: '
      f'{", ".join(missing)}; given: {", ".join(given)}'
    )
  numeric = [
    name
    for name in given
    if name not in _NOT_X and any(_is_number(row.get(name)) for row in rows)
  ]
  if x not in given:
    raise ValueError(
      f'x must be one of the numeric columns {", ".join(numeric)}; got {x!r}'
    )
  if series is not None and series not in given:
    raise ValueError(
      f'series must be one of the columns {", ".join(given)}; got {series!r}'
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
  return re.sub(r'\d+$', '', model)


def _depth(model: str) -> str:
  return model.removeprefix(_family(model)) or model


def _display(model: str) -> str:
  """Returns 'CIFAR ResNet-32' for 'cifar_resnet32'; others as they are."""
  match = re.fullmatch(r'(cifar_)?resnet(\d*)', model)
  if not match:
    return model
  cifar, depth = match.groups()
  return ('CIFAR ' if cifar else '') + 'ResNet' + (f'-{depth}' if depth else '')


def _unit_label(column: str) -> str:
  """Returns 'latency sparse (ms)' for 'latency_sparse_ms'."""
  name, _, unit = column.rpartition('_')
  if name and unit in ('ms', 's', 'mb', 'gib', 'mib', 'gb'):
    return f'{name.replace("_", " ")} ({unit})'
  return column.replace('_', ' ')


def _draw_curve(
  ax: Axes, name: str, method: str, rank: int, points: list[Point]
) -> None:
  _, color, marker = _METHODS.get(method, (method, style.SKY_BLUE, 'X'))
  bars = np.array([[p.below for p in points], [p.above for p in points]])
  ax.errorbar(
    [p.x for p in points],
    [p.accuracy for p in points],
    yerr=bars if bars.any() else None,
    color=color,
    marker=marker,
    linestyle=_LINE_STYLES[rank % len(_LINE_STYLES)],
    markerfacecolor=color if rank == 0 else 'white',
    elinewidth=1,
    capsize=2.5,
    label=name,
  )
  for point in points:
    ax.annotate(
      point.label,
      (point.x, point.accuracy),
      xytext=(5, -4),
      textcoords='offset points',
      va='top',
      fontsize=7,
      color=color,
    )


def _draw_chance(ax: Axes, chance: float) -> None:
  ax.axhline(chance, linestyle=':', color=style.GREY, linewidth=1)
  ax.annotate(
    f'chance {100 * chance:.1f} %',
    (1, chance),
    xycoords=('axes fraction', 'data'),
    xytext=(0, 3),
    textcoords='offset points',
    ha='right',
    fontsize=7,
    color=style.GREY,
  )


def _error_bar_note(points: list[Point]) -> str:
  """Returns what the error bars of these points stand for."""
  seeds = sorted({point.seeds for point in points if point.seeds > 1})
  notes = []
  if seeds:
    count = str(seeds[0]) if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]}'
    notes.append(f'standard deviation over {count} seeds')
  if any(p.seeds == 1 and p.below + p.above > 0 for p in points):
    notes.append(
      '95 % binomial interval' + (' of single runs' if seeds else '')
    )
  if any(p.label and not p.label.isdigit() for p in points):
    label = '; numbers: computational budget'
  else:
    label = ''
  return ('error bars: ' + ', '.join(notes) if notes else '') + label
