"""Common style of figures, and writing them to files."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import matplotlib
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from dynconv_jax.files import replacing

# Okabe and Ito, Color Universal Design (2008): distinguishable with all common
# color vision deficiencies.
BLACK = '#000000'
ORANGE = '#e69f00'
SKY_BLUE = '#56b4e9'
GREEN = '#009e73'
BLUE = '#0072b2'
VERMILION = '#d55e00'
PURPLE = '#cc79a7'

# Colors by the names that methods use.
PALETTE = {
  'black': BLACK,
  'orange': ORANGE,
  'sky_blue': SKY_BLUE,
  'green': GREEN,
  'blue': BLUE,
  'vermilion': VERMILION,
  'purple': PURPLE,
}

WHITE = '#ffffff'
INK = '#333333'
GREY = '#767676'
LIGHT_GREY = '#e6e6e6'

# Colors of SVG files where the reader prefers a dark theme. Other colors are
# legible on both backgrounds.
DARK = {
  WHITE: '#14171c',
  LIGHT_GREY: '#34383f',
  GREY: '#9a9a9a',
  INK: '#e0e0e0',
  BLACK: '#f2f2f2',
}

_RC = {
  'font.family': 'DejaVu Sans',
  'font.size': 9,
  'text.color': INK,
  'axes.titlesize': 10,
  'axes.titlelocation': 'left',
  'axes.labelsize': 9,
  'axes.labelcolor': INK,
  'axes.edgecolor': GREY,
  'axes.linewidth': 0.8,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.grid.axis': 'y',
  'axes.axisbelow': True,
  'grid.color': LIGHT_GREY,
  'grid.linewidth': 0.8,
  'xtick.color': GREY,
  'ytick.color': GREY,
  'xtick.labelcolor': INK,
  'ytick.labelcolor': INK,
  'xtick.labelsize': 8,
  'ytick.labelsize': 8,
  'lines.linewidth': 1.6,
  'lines.markersize': 5,
  'lines.solid_capstyle': 'round',
  'legend.frameon': False,
  'legend.fontsize': 8,
  'figure.facecolor': WHITE,
  'savefig.facecolor': WHITE,
}

# Decorator that applies the style within a plotting function only.
styled = functools.partial(matplotlib.rc_context, _RC)


def new_figure(width: float, height: float) -> Figure:
  """Returns an empty figure that is not registered with pyplot.

  Args:
    width: width in inches.
    height: height in inches.
  """
  return Figure(figsize=(width, height), layout='constrained')


def figure_paths(path: str | os.PathLike) -> tuple[Path, Path]:
  """Returns the paths of the PNG and the SVG file of a figure.

  Args:
    path: path with the suffix .png, .svg, or none. Other dots, as in
      'budget_0.5', are part of the name.

  Raises:
    ValueError: the suffix is that of another format.
  """
  path = Path(path)
  suffix = path.suffix.lower()
  if suffix in ('.png', '.svg'):
    path = path.with_suffix('')
  elif suffix[1:] in FigureCanvasBase.get_supported_filetypes():
    raise ValueError(f'figures are written as .png and .svg; got {str(path)!r}')
  return path.with_name(path.name + '.png'), path.with_name(path.name + '.svg')


def save_figure(figure: Figure, path: str | os.PathLike) -> tuple[Path, Path]:
  """Writes a figure as PNG and SVG and returns their paths.

  Files are written atomically and contain no dates or random identifiers, so
  the same figure results in the same bytes. The SVG file follows the light or
  dark theme of its reader.

  Args:
    figure: the figure to write.
    path: as in `figure_paths`. Missing folders are created.

  Raises:
    ValueError: the suffix of `path` is that of another format.
  """
  png, svg = figure_paths(path)
  with matplotlib.rc_context({'svg.hashsalt': 'dynconv_jax'}):
    for file, metadata in (
      (png, {'Software': None}),
      (svg, {'Date': None, 'Creator': None}),
    ):
      with replacing(file) as partial:
        figure.savefig(
          partial, format=file.suffix[1:], dpi=200, metadata=metadata
        )
        if file is svg:
          partial.write_text(_with_dark_theme(partial.read_text()))
  return png, svg


def _with_dark_theme(svg: str) -> str:
  """Adds colors for readers who prefer a dark theme to a Matplotlib SVG."""
  # Matplotlib omits the fill of black shapes, which then inherit it.
  rules = [f':root {{fill: {DARK[BLACK]}}}']
  for light, dark in DARK.items():
    for kind in ('fill', 'stroke'):
      rule = f'{{{kind}: {dark} !important}}'
      rules.append(f'[style*="{kind}: {light}"] {rule}')
  style = '\n'.join(['@media (prefers-color-scheme: dark) {', *rules, '}'])
  end = svg.index('>', svg.index('<svg')) + 1
  return f'{svg[:end]}\n<style>{style}</style>{svg[end:]}'


def footnote(figure: Figure, text: str) -> None:
  """Adds a small gray explanation below a figure."""
  figure.supxlabel(text, x=0.01, ha='left', fontsize=7, color=GREY)
