"""Figure of accuracy gains against object size."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from dynconv_jax.plotting import style

_COLUMNS = ('share', 'difference', 'low', 'high')
_COSTS = ('gmacs', 'gmacs_against')
_COLORS = (style.BLUE, style.VERMILION, style.GREEN, style.PURPLE, style.ORANGE)
_MARKERS = 'osD^v'
_TICKS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1)


@style.styled()
def plot_gains(
  rows: Sequence[Mapping[str, object]],
  path: str | os.PathLike,
  *,
  against: str = '',
) -> Figure:
  """Plots accuracy differences against the object's share of the image.

  Each label is a curve. Bars are the 95 % intervals of points, and a band
  connects them. The x axis is logarithmic.

  Args:
    rows: rows with text or numbers: 'share', the fraction of the image that the
      object covers, in (0, 1]; 'difference', 'low', and 'high' in points; and
      optionally 'label', and 'gmacs' and 'gmacs_against', the mean cost of both
      sides.
    path: path of the figure, written as PNG and SVG; see `style.figure_paths`.
    against: name of the baseline, for the title.

  Returns:
    The figure. The containers of its axes are the curves, in order of the rows.

  Raises:
    ValueError: there are no rows, columns are missing, a cell is not a number,
      a share is outside (0, 1], a difference is outside its interval, or two
      rows of a label have the same share.
  """
  curves = _read_curves(rows)
  figure = style.new_figure(5.4, 3.4)
  ax = figure.add_subplot()
  ax.axhline(0, color=style.INK, linewidth=0.8)
  marks = itertools.cycle(zip(_COLORS, _MARKERS, strict=True))
  for (label, points), (color, marker) in zip(
    curves.items(), marks, strict=False
  ):
    shares, values, low, high = zip(*sorted(points), strict=True)
    ax.fill_between(shares, low, high, color=color, alpha=0.12, linewidth=0)
    below = [value - end for value, end in zip(values, low, strict=True)]
    above = [end - value for value, end in zip(values, high, strict=True)]
    ax.errorbar(
      shares,
      values,
      yerr=(below, above),
      color=color,
      marker=marker,
      elinewidth=1,
      capsize=2.5,
      label=label,
    )
  for row in rows:
    if row.get('gmacs'):
      ax.annotate(
        f'{float(row["gmacs"]):.3f}',
        (float(row['share']), float(row['difference'])),
        xytext=(4, 4),
        textcoords='offset points',
        fontsize=7,
      )
  ax.set_xscale('log')
  ax.xaxis.set_minor_locator(NullLocator())
  shares = [point[0] for points in curves.values() for point in points]
  ax.set_xlim(min(shares) / 1.15, max(shares) * 1.15)
  ticks = [tick for tick in _TICKS if min(shares) / 1.15 <= tick]
  ax.set_xticks([tick for tick in ticks if tick <= max(shares) * 1.15])
  ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{100 * v:.3g}'))
  ax.yaxis.set_major_formatter(FuncFormatter(_signed))
  ax.set_xlabel("object's share of the image (%)")
  ax.set_ylabel('difference in accuracy (points)')
  if against:
    ax.set_title(f'against {against}')
  if any(curves):
    ax.legend(loc='best')
  style.footnote(figure, '\n'.join(_notes(rows)))
  style.save_figure(figure, path)
  return figure


def _notes(rows: Sequence[Mapping[str, object]]) -> list[str]:
  notes = ['bars and band: 95 % interval of a paired bootstrap']
  if any(row.get('gmacs') for row in rows):
    given = [row['gmacs_against'] for row in rows if row.get('gmacs_against')]
    baseline = {f'{float(value):.3f}' for value in given}
    notes.append('numbers: GMACs')
    if len(baseline) == 1:
      notes[-1] += f'; baseline: {baseline.pop()}'
  return notes


def _signed(value: float, _) -> str:
  text = f'{value:+.3g}' if value else '0'
  return text.replace('-', '\N{MINUS SIGN}')


def _read_curves(rows) -> dict[str, list[tuple[float, ...]]]:
  """Returns (share, difference, low, high) of each point, by label."""
  if not rows:
    raise ValueError('there are no gains to plot')
  if missing := [name for name in _COLUMNS if name not in rows[0]]:
    raise ValueError(
      f'gains need the columns {", ".join(_COLUMNS)}; missing: '
      f'{", ".join(missing)}; given: {", ".join(rows[0])}'
    )
  curves = {}
  for number, row in enumerate(rows, 1):
    try:
      point = tuple(float(row[name]) for name in _COLUMNS)
      for name in filter(row.get, _COSTS):
        float(row[name])
    except (TypeError, ValueError) as error:
      raise ValueError(f'row {number}: {error}') from error
    share, value, low, high = point
    if not 0 < share <= 1:
      raise ValueError(f'row {number}: share must be in (0, 1]; got {share:g}')
    if not (low <= value <= high and math.isfinite(high - low)):
      raise ValueError(
        f'row {number}: difference {value:g} must be within its interval, '
        f'{low:g} to {high:g}'
      )
    points = curves.setdefault(str(row.get('label', '')), [])
    if share in [other[0] for other in points]:
      raise ValueError(
        f'row {number}: its label already has a row with the share {share:g}'
      )
    points.append(point)
  return curves
