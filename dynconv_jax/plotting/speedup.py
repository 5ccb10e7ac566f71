"""Figure of the speedup of sparse execution against mask density."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dynconv_jax.plotting import style

# Column, suffix of its label, line style, and marker face color.
_KINDS = (
  ('sparse_over_fastest_dense', '', '-', None),
  ('onnx_sparse_over_fastest_dense', ' in ONNX Runtime', ':', 'white'),
)
_COLORS = (style.BLUE, style.VERMILION, style.GREEN, style.PURPLE, style.ORANGE)


@style.styled()
def plot_speedup(
  runs: Sequence[Mapping[str, Any]],
  path: str | os.PathLike,
  *,
  title: str = '',
) -> Figure:
  """Plots the speedup over dense execution against mask density.

  Each batch size and mask granularity is a curve. If the exported network was
  timed, it has a second curve. A dashed line shows the MAC-proportional ideal.
  Ticks mark the break-even density at which a curve crosses 1, interpolated
  linearly. Other granularities than the first have lighter curves with square
  markers.

  Args:
    runs: results of `dynconv benchmark`, with 'batch_size', 'density',
      'sparse_over_fastest_dense', and 'mac_ideal', and optionally
      'mask_granularity' and 'onnx_sparse_over_fastest_dense'.
    path: path of the figure, written as PNG and SVG; see `style.figure_paths`.
    title: title of the figure.

  Returns:
    The figure.

  Raises:
    ValueError: there are no runs.
  """
  if not runs:
    raise ValueError('there are no runs to plot')
  figure = style.new_figure(5.4, 3.8)
  ax = figure.add_subplot()
  sizes = sorted({run['batch_size'] for run in runs})
  colors = dict(zip(sizes, itertools.cycle(_COLORS), strict=False))
  patches = list(dict.fromkeys(map(_patches, runs)))
  ideal = {
    run['density']: 1 / run['mac_ideal']
    for run in runs
    if _patches(run) == patches[0]
  }
  ax.plot(
    *zip(*sorted(ideal.items()), strict=True),
    color=style.GREY,
    linestyle='--',
    marker='.',
    label='MAC-proportional ideal',
  )
  for patch, size, (column, name, line, face) in itertools.product(
    patches, sizes, _KINDS
  ):
    points = sorted(
      (run['density'], 1 / run[column])
      for run in runs
      if (_patches(run), run['batch_size']) == (patch, size) and column in run
    )
    if not points:
      continue
    densities, speedups = map(np.array, zip(*points, strict=True))
    first = patch == patches[0]
    label = f'batch {size}{name}'
    if not first:
      label += f', patches {patch}'
    even = break_even(densities, speedups)
    if even is not None:
      label += f', break-even at {even:.2f}'
      ax.plot(even, 1, marker='|', markersize=14, color=colors[size])
    ax.plot(
      densities,
      speedups,
      color=colors[size],
      alpha=1 if first else 0.5,
      linestyle=line,
      marker='o' if first else 's',
      markerfacecolor=face or colors[size],
      label=label,
    )
  ax.axhline(1, color=style.INK, linewidth=0.8)
  ax.set_xlim(0, 1.02)
  ax.set_ylim(bottom=0)
  ax.set_xlabel('mask density')
  ax.set_ylabel('speedup over the fastest dense')
  if title:
    ax.set_title(title)
  ax.legend(loc='best')
  style.save_figure(figure, path)
  return figure


def _patches(run: Mapping[str, Any]) -> str:
  return run.get('mask_granularity') or '1'


def break_even(densities: np.ndarray, speedups: np.ndarray) -> float | None:
  """Returns the highest density at which the speedup falls below 1, or None.

  Args:
    densities: float[n], increasing.
    speedups: float[n], speedup over dense execution at each density.
  """
  for i in range(len(densities) - 1, 0, -1):
    high, low = speedups[i - 1], speedups[i]
    if high >= 1 > low:
      share = (high - 1) / (high - low)
      return float(densities[i - 1] + share * (densities[i] - densities[i - 1]))
  return None
