"""The look of every figure, and how a figure reaches the disk."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import matplotlib
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from dynconv_jax.files import replacing

# Okabe and Ito, Color Universal Design (2008): told apart by readers with any
# of the common colour-vision deficiencies.
BLACK = '#000000'
ORANGE = '#e69f00'
SKY_BLUE = '#56b4e9'
GREEN = '#009e73'
BLUE = '#0072b2'
VERMILION = '#d55e00'
PURPLE = '#cc79a7'

# By name, as methods choose theirs.
PALETTE = {
  'black': BLACK,
  'orange': ORANGE,
  'sky_blue': SKY_BLUE,
  'green': GREEN,
  'blue': BLUE,
  'vermilion': VERMILION,
  'purple': PURPLE,
}

INK = '#333333'
GREY = '#767676'
LIGHT_GREY = '#e6e6e6'

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
  'figure.facecolor': 'white',
  'savefig.facecolor': 'white',
}

# Decorates a plotting function: its artists are made in the house style, and
# the settings of the process are as before when it returns.
styled = functools.partial(matplotlib.rc_context, _RC)


def new_figure(width: float, height: float) -> Figure:
  """Returns an empty figure of the given inches that pyplot knows nothing of.

  Args:
    width: in inches.
    height: in inches.
  """
  return Figure(figsize=(width, height), layout='constrained')


def figure_paths(path: str | os.PathLike) -> tuple[Path, Path]:
  """Returns the PNG and the SVG file that a figure called `path` is written to.

  Args:
    path: with the suffix .png, .svg or none; a dot within the name, as in
      'budget_0.5', is not taken for a suffix.

  Raises:
    ValueError: if the suffix is that of another format.
  """
  path = Path(path)
  suffix = path.suffix.lower()
  if suffix in ('.png', '.svg'):
    path = path.with_suffix('')
  elif suffix[1:] in FigureCanvasBase.get_supported_filetypes():
    raise ValueError(f'a figure is written as .png and .svg; got {str(path)!r}')
  return path.with_name(path.name + '.png'), path.with_name(path.name + '.svg')


def save_figure(figure: Figure, path: str | os.PathLike) -> tuple[Path, Path]:
  """Writes a figure as PNG and SVG and returns their paths.

  The same figure gives the same bytes: no dates, no random identifiers. A file
  is renamed into place when it is whole, so that none is ever half-written.

  Args:
    figure: what to write.
    path: as in `figure_paths`; missing folders are made.

  Raises:
    ValueError: if the suffix of `path` is that of another format.
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
  return png, svg


def footnote(figure: Figure, text: str) -> None:
  """Writes a small grey line below a figure: what its marks stand for."""
  figure.supxlabel(text, x=0.01, ha='left', fontsize=7, color=GREY)
