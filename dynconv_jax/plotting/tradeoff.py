"""Figures of many runs: accuracy against computational cost."""

from __future__ import annotations

import functools
import itertools
import os
import pathlib
import re
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.ticker import PercentFormatter

from dynconv_jax.models import registry
from dynconv_jax.plotting import latency, style
from dynconv_jax.plotting.results import (
  Curve,
  Point,
  accuracy_curves,
  find_method,
  has_list,
)

_LINE_STYLES = ('-', '--', ':', '-.')
_X_LABELS = {
  'gmacs_mean': 'GMACs per image (mean)',
  'gmacs_p50': 'GMACs per image (median)',
  'gmacs_p95': 'GMACs per image (95th percentile)',
  'executed_fraction': 'executed / dense MACs of the masked layers',
  'latency_ms': 'latency of a batch (ms)',
}
# Number of curves above which the legend is outside of the axes.
_MAX_INSIDE = 4
# Characters per line of the notes below a figure.
_NOTE_WIDTH = 92
# Characters per line of a legend with one column.
_LEGEND_WIDTH = 70
_UNITS = ('us', 'ms', 's', 'mb', 'mib', 'gb', 'gib')


@style.styled()
def plot_accuracy_against_macs(
  rows: Sequence[Mapping[str, object]],
  path: str | os.PathLike,
  x: str = 'gmacs_mean',
  series: str | None = None,
  chance: float | None = None,
) -> Figure:
  """Plots accuracy against GMACs or another numeric column.

  Each model and method is a curve, with points labeled by budget or by the
  weight that replaces it. Dense networks of a family (ResNet-18, -34, ...) form
  one curve, labeled by depth. Dense networks of one model with different widths
  form another, labeled by width. Error bars are the standard deviation over the
  seeds of a setting or, for a single run, its 95 % interval (`accuracy_low` to
  `accuracy_high`) if it has one. A note below the figure explains them.

  Args:
    rows: rows of a results.csv; see `results.accuracy_curves`.
    path: path of the figure, written as PNG and SVG; see `style.figure_paths`.
    x: column of the x axis, such as 'latency_sparse_ms'.
    series: additional column that separates curves, such as 'recipe'.
    chance: chance accuracy in [0, 1] to draw as a line, or None.

  Returns:
    The figure. The containers of its axes are the curves, in order of the rows.

  Raises:
    ValueError: chance is outside [0, 1], or as `results.accuracy_curves`.
  """
  if chance is not None and not 0 <= chance <= 1:
    raise ValueError(f'chance must be in [0, 1]; got {chance}')
  curves = accuracy_curves(rows, x, series)
  figure = style.new_figure(5.4, 3.8)
  ax = figure.add_subplot()
  models = {registry.title(curve.model) for curve in curves}
  if len(models) == 1:
    ax.set_title(*models)
  ranks, labels = {}, []
  for curve in curves:
    rank = ranks[curve.method] = ranks.get(curve.method, -1) + 1
    name = _name(curve, with_model=len(models) > 1)
    labels += _draw_curve(ax, curve, rank, name)
  ax.margins(0.08, 0.1)
  ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=''))
  ax.set_ylabel('accuracy (%)')
  ax.set_xlabel(_X_LABELS.get(x) or _unit_label(x))
  if chance is not None:
    _draw_chance(ax, chance)
  if len(curves) > _MAX_INSIDE:
    legend = _outside_legend(ax)
  else:
    legend = ax.legend(loc='best')
  notes = _notes(curves)
  if x.startswith('latency'):
    notes += _latency_notes(rows)
  if notes:
    wrapped = [textwrap.fill(note, _NOTE_WIDTH) for note in notes]
    style.footnote(figure, '\n'.join(wrapped))
  _separate(ax, labels, curves, legend)
  style.save_figure(figure, path)
  return figure


def plot_results(
  rows: Sequence[Mapping[str, object]],
  folder: str | os.PathLike,
  series: str | None = None,
  chance: float | None = None,
) -> list[tuple[pathlib.Path, pathlib.Path]]:
  """Plots a results table against GMACs and, if measured, against latency.

  Args:
    rows: as in `plot_accuracy_against_macs`. Latency is plotted if a row has
      'latency_ms'.
    folder: folder for accuracy_against_macs and accuracy_against_latency, each
      as .png and .svg.
    series: column that separates curves. None: 'recipe' if a row has one.
    chance: chance accuracy in [0, 1] to draw as a line, or None.

  Returns:
    The PNG and SVG paths of each figure.

  Raises:
    ValueError: as `plot_accuracy_against_macs`.
  """
  if series is None and any(row.get('recipe') for row in rows):
    series = 'recipe'
  figures = {'accuracy_against_macs': 'gmacs_mean'}
  if any(row.get('latency_ms') for row in rows):
    figures['accuracy_against_latency'] = 'latency_ms'
  written = []
  for name, x in figures.items():
    path = pathlib.Path(folder) / f'{name}.png'
    plot_accuracy_against_macs(rows, path, x, series, chance)
    written.append(style.figure_paths(path))
  return written


def _draw_curve(ax: Axes, curve: Curve, rank: int, name: str) -> list[Text]:
  """Draws a curve, the `rank`-th of its method, and returns its labels."""
  method = find_method(curve.method)
  color = style.PALETTE.get(method.color, method.color)
  points = curve.points
  bars = np.array([[p.below for p in points], [p.above for p in points]])
  ax.errorbar(
    [point.x for point in points],
    [point.accuracy for point in points],
    yerr=bars if bars.any() else None,
    color=color,
    marker=method.marker,
    linestyle=_LINE_STYLES[rank % len(_LINE_STYLES)],
    markerfacecolor=color if rank == 0 else 'white',
    elinewidth=1,
    capsize=2.5,
    label=name,
  )
  return [
    ax.text(point.x, point.accuracy, label, fontsize=7, color=color)
    for point in points
    if (label := _point_label(curve, point))
  ]


def _separate(
  ax: Axes, labels: Sequence[Text], curves: Sequence[Curve], legend: Legend
) -> None:
  """Moves labels away from each other, the points, bars, and the legend."""
  if not labels:
    return
  # Imports pyplot.
  from adjustText import adjust_text

  figure = ax.figure
  # Settle the layout, because labels are placed in pixels.
  figure.draw_without_rendering()
  figure.set_layout_engine('none')
  # Points on all lines and error bars, which labels must not cover.
  lines = [np.linspace(*ends, 25) for curve in curves for ends in _lines(curve)]
  xs, ys = np.concatenate(lines).T
  adjust_text(
    labels,
    xs,
    ys,
    objects=[legend],
    ax=ax,
    iter_lim=200,
    expand=(1.15, 1.3),
    force_text=(0.2, 0.4),
    force_static=(0.2, 0.4),
  )


def _lines(curve: Curve) -> list[tuple]:
  """Returns the (start, end) of a curve's lines and error bars."""
  bars = [
    ((p.x, p.accuracy - p.below), (p.x, p.accuracy + p.above))
    for p in curve.points
  ]
  return [
    *itertools.pairwise((p.x, p.accuracy) for p in curve.points),
    *bars,
  ]


def _name(curve: Curve, with_model: bool) -> str:
  """Returns the legend label of a curve."""
  method, width = find_method(curve.method), curve.width_multiplier
  name = method.label or method.name
  if with_model:
    name += f' {registry.title(curve.model)}'
  if width is None:
    name += ', by width'
  elif width != 1:
    name += f' \N{MULTIPLICATION SIGN}{width:g}'
  return name + (f', {curve.series}' if curve.series else '')


def _point_label(curve: Curve, point: Point) -> str:
  """Returns a label that distinguishes a point from others of its curve."""
  parts = []
  if curve.method == 'dense':
    parts.append(point.model.removeprefix(curve.model))
    if curve.width_multiplier is None:
      parts.append(f'\N{MULTIPLICATION SIGN}{point.width_multiplier:g}')
  else:
    knob = point.weight if point.budget is None else point.budget
    parts.append('' if knob is None else f'{knob:g}')
  if len(_sizes(curve)) > 1:
    parts.append(f'{point.image_size:g} px')
  return ', '.join(filter(None, parts))


def _outside_legend(ax: Axes) -> Legend:
  """Adds a legend above the axes, in two columns if they fit."""
  figure = ax.get_figure()
  handles, labels = ax.get_legend_handles_labels()
  columns = 2
  place = functools.partial(figure.legend, handles, loc='outside upper left')
  legend = place(labels, ncols=columns)
  if legend.get_window_extent().width > figure.bbox.width:
    legend.remove()
    columns, labels = 1, [textwrap.fill(n, _LEGEND_WIDTH) for n in labels]
    legend = place(labels, ncols=columns)
  lines = sum(1 + label.count('\n') for label in labels)
  figure.set_figheight(figure.get_figheight() + 0.2 * -(-lines // columns))
  return legend


def _sizes(curve: Curve) -> set[float]:
  return {p.image_size for p in curve.points if p.image_size is not None}


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


def _unit_label(column: str) -> str:
  """Returns a label, such as 'latency sparse (ms)' for 'latency_sparse_ms'."""
  name, _, unit = column.rpartition('_')
  if match := re.fullmatch(latency.COLUMN.format(r'(\d+)'), column):
    images = 'one image' if match[1] == '1' else f'{match[1]} images'
    return f'latency of {images} / that of the fastest dense runtime'
  if name and unit in _UNITS:
    return f'{name.replace("_", " ")} ({unit})'
  return column.replace('_', ' ')


def _notes(curves: Sequence[Curve]) -> list[str]:
  """Returns explanations of the error bars and numbers in a figure."""
  points = [point for curve in curves for point in curve.points]
  seeds = sorted({point.seeds for point in points if point.seeds > 1})
  bars = []
  if seeds:
    count = '-'.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    bars.append(f'standard deviation over {count} seeds')
  if any(p.seeds == 1 and p.below + p.above > 0 for p in points):
    bars.append('95 % binomial interval' + (' of a single run' * bool(seeds)))
  notes = ['error bars: ' + '; '.join(bars)] if bars else []
  gated = [curve for curve in curves if curve.method != 'dense']
  numbers = []
  if any(p.budget is not None for curve in gated for p in curve.points):
    numbers.append('computational budget')
  weighted = [
    find_method(curve.method)
    for curve in gated
    if any(p.budget is None and p.weight for p in curve.points)
  ]
  lists = {method.knob for method in weighted if has_list(method)}
  numbers += [f'number of {name.replace("_", " ")}' for name in sorted(lists)]
  if not all(map(has_list, weighted)):
    numbers.append('weight of the compute loss (methods without a budget)')
  if any(p.model != c.model for c in curves for p in c.points):
    numbers.append('depth of a dense network')
  if any(curve.width_multiplier is None for curve in curves):
    numbers.append('\N{MULTIPLICATION SIGN} width of a dense network')
  if any(len(_sizes(curve)) > 1 for curve in curves):
    numbers.append('side of the input')
  if numbers:
    notes.append('numbers: ' + '; '.join(numbers))
  return notes


def _latency_notes(rows: Sequence[Mapping[str, object]]) -> list[str]:
  """Returns a note with the batch size and machine of latencies, if known."""
  batches, machines = (
    sorted({str(row[name]) for row in rows if row.get(name)})
    for name in ('latency_batch_size', 'latency_machine')
  )
  parts = [f'batch of {" or ".join(batches)}'] if batches else []
  return [', '.join(parts + [' or '.join(machines)] * bool(machines))] * bool(
    parts or machines
  )
