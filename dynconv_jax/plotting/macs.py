"""Figure of the cost of each layer of a network."""

from __future__ import annotations

import os
import pathlib

from matplotlib.ticker import EngFormatter

from dynconv_jax.macs import Report
from dynconv_jax.plotting import style


@style.styled()
def plot_layers(
  report: Report, path: str | os.PathLike, sort: str = 'order'
) -> tuple[pathlib.Path, pathlib.Path]:
  """Plots the cost of each layer as a bar, colored by kind.

  Args:
    report: the report to plot.
    path: path of the figure, written as PNG and SVG; see `style.figure_paths`.
    sort: row order, as in `Report.rows`. The first row is at the top.

  Returns:
    The paths of the PNG and the SVG file.
  """
  rows = report.rows(sort)
  colors = dict(
    zip(
      dict.fromkeys(row['kind'] for row in rows),
      (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE, style.VERMILION)
      + (style.SKY_BLUE, style.GREY),
      strict=False,
    )
  )
  figure = style.new_figure(6.5, 1 + 0.16 * max(len(rows), 1))
  axes = figure.subplots()
  for kind, color in colors.items():
    chosen = [i for i, row in enumerate(rows) if row['kind'] == kind]
    axes.barh(
      chosen, [rows[i]['macs'] for i in chosen], color=color, label=kind
    )
  axes.set_yticks(range(len(rows)), [row['name'] for row in rows], fontsize=6)
  axes.set_ylim(len(rows) - 0.4, -0.6)
  axes.grid(axis='y', visible=False)
  axes.grid(axis='x', visible=True)
  unit = report.convention.unit
  axes.xaxis.set_major_formatter(EngFormatter(places=None, sep=' '))
  axes.set_xlabel(f'{unit} ({report.convention.name})')
  axes.set_title(f'{report.total:,} {unit}')
  if len(colors) > 1:
    axes.legend(loc='lower right')
  return style.save_figure(figure, path)
