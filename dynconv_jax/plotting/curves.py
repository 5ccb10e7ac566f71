"""Figures of a single run: learning curves and block densities."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dynconv_jax.plotting import style

_SPLIT_COLORS = {
  'train': style.SKY_BLUE,
  'validation': style.VERMILION,
  'test': style.GREEN,
}
# Labels and colors of the terms of the training loss.
_PARTS = {
  'cross_entropy': ('cross-entropy', style.BLUE),
  'distillation': ('distillation', style.ORANGE),
  'gating': ('gating, unweighted', style.PURPLE),
}
_MOST_MARKERS = 40


@style.styled()
def plot_learning_curves(
  metrics: Sequence[Mapping], path: str | os.PathLike
) -> Figure:
  """Plots losses, accuracy, and executed fraction over the epochs of a run.

  The training loss with its terms and the cross-entropy of other splits have
  separate panels.

  Values that are missing or None are skipped. Panels without data are omitted,
  such as the executed fraction of a dense network. If a step was logged twice
  because a killed run resumed, the later row is used.

  Args:
    metrics: rows of a workdir's `metrics.jsonl`, with 'split' ('train',
      'validation', or 'test'), 'epoch' or 'step', and any of 'loss'; its terms
      'cross_entropy', 'distillation', and 'gating' in training; and 'accuracy',
      'executed_fraction', and 'budget', all in [0, 1].
    path: path of the figure, written as PNG and SVG; see `style.figure_paths`.

  Returns:
    The figure, with one axes per panel.

  Raises:
    ValueError: there are no rows, or no row can be drawn.
  """
  if not metrics:
    raise ValueError('there are no metrics to plot')
  x_key = next(
    (
      key for key in ('epoch', 'step') if all(_has(row, key) for row in metrics)
    ),
    None,
  )
  training = [row for row in metrics if row.get('split', 'train') == 'train']
  others = [row for row in metrics if row.get('split', 'train') != 'train']
  # Separate panels, because only the training loss has several terms.
  panels = {
    'training loss (nats)': (training, 'loss', _draw_parts),
    'cross-entropy (nats)': (others, 'loss', None),
    'accuracy (%)': (metrics, 'accuracy', _draw_best),
    'executed MACs, masked layers (%)': (
      metrics,
      'executed_fraction',
      _draw_budget,
    ),
  }
  panels = {
    label: panel
    for label, panel in panels.items()
    if any(_has(row, panel[1]) for row in panel[0])
  }
  if x_key is None or not panels:
    raise ValueError(
      "metrics need 'epoch' or 'step' in every row, and 'loss', 'accuracy', or "
      f"'executed_fraction' in some; got the keys "
      f'{sorted({key for row in metrics for key in row})}'
    )
  columns = 2 if len(panels) == 4 else len(panels)
  rows = -(-len(panels) // columns)
  figure = style.new_figure(3.3 * columns, 2.7 * rows)
  for i, (label, (data, key, decorate)) in enumerate(panels.items()):
    ax = figure.add_subplot(rows, columns, i + 1)
    ax.set_xlabel(x_key)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _draw_splits(ax, data, x_key, key)
    if decorate is not None:
      decorate(ax, data, x_key)
    ax.set_ylabel(label)
    if label.endswith('(%)'):
      ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=''))
    # Above the panel, so that the legend does not hide curves.
    ax.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=2)
  style.save_figure(figure, path)
  return figure


def _has(row: Mapping, key: str) -> bool:
  return row.get(key) is not None


def _series(
  rows: Iterable[Mapping], x_key: str, y_key: str
) -> tuple[list[float], list[float]]:
  """Returns x and y sorted by x, using the last row of each x."""
  points = {
    float(row[x_key]): float(row[y_key]) for row in rows if _has(row, y_key)
  }
  return list(dict(sorted(points.items()))), [points[x] for x in sorted(points)]


def _draw_splits(
  ax: Axes, metrics: Sequence[Mapping], x_key: str, y_key: str
) -> None:
  splits = dict.fromkeys(row.get('split', 'train') for row in metrics)
  for split in splits:
    rows = [row for row in metrics if row.get('split', 'train') == split]
    x, y = _series(rows, x_key, y_key)
    if not x:
      continue
    _draw(ax, x, y, _SPLIT_COLORS.get(split, style.PURPLE), split)


def _draw(
  ax: Axes, x: list[float], y: list[float], color: str, label: str
) -> None:
  marker = 'o' if len(x) <= _MOST_MARKERS else ''
  ax.plot(x, y, color=color, marker=marker, markersize=2.5, label=label)


def _draw_parts(ax: Axes, rows: Sequence[Mapping], x_key: str) -> None:
  """Draws the unweighted terms of the training loss."""
  (total,) = ax.lines
  for key, (label, color) in _PARTS.items():
    x, y = _series(rows, x_key, key)
    # Skip terms that are unused (all 0) or equal to the total.
    if any(y) and y != total.get_ydata().tolist():
      total.set_label('total')
      _draw(ax, x, y, color, label)


def _draw_best(ax: Axes, rows: Sequence[Mapping], x_key: str) -> None:
  """Marks the best validation accuracy and adds it to the legend."""
  del rows
  for line in ax.lines:
    if line.get_label() != 'validation':
      continue
    x, y = line.get_xydata().T
    if np.all(np.isnan(y)):
      return
    best = int(np.nanargmax(y))
    ax.plot(
      x[best],
      y[best],
      'o',
      mfc='none',
      mec=line.get_color(),
      markersize=8,
      label=f'best: {100 * y[best]:.1f} % in {x_key} {x[best]:g}',
    )
    return


def _draw_budget(ax: Axes, metrics: Sequence[Mapping], x_key: str) -> None:
  ax.set_ylim(0, 1.02)
  x, budgets = _series(metrics, x_key, 'budget')
  if not x:
    return
  ax.plot(x, budgets, '--', color=style.INK, linewidth=1, label='budget')
  # Put the label on the side of the line where no curve ends, if possible.
  below = min(line.get_ydata()[-1] for line in ax.lines) >= budgets[-1]
  ax.annotate(
    f'budget {100 * budgets[-1]:.3g} %',
    (x[-1], budgets[-1]),
    xytext=(0, -4 if below else 4),
    textcoords='offset points',
    ha='right',
    va='top' if below else 'bottom',
    fontsize=8,
  )


def _use_percent(ax: Axes, label: str) -> None:
  ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=''))
  ax.set_ylabel(label)


@style.styled()
def plot_block_density(
  names: Sequence[str],
  densities: np.ndarray | Sequence,
  path: str | os.PathLike,
  budget: float | None = None,
  *,
  stages: Sequence[int] | None = None,
) -> Figure:
  """Plots the fraction of active positions of each block as a bar.

  Args:
    names: names of the blocks in network order, such as 'layer2.0'.
    densities: float[B], or float[B, N] for N images. Bars are means, and
      whiskers go from the 5th to the 95th percentile over the images.
    path: path of the figure, written as PNG and SVG; see `style.figure_paths`.
    budget: budget in [0, 1] to draw as a line, or None.
    stages: stage number of each block, see `ExecutionMask.stage`. Blocks of a
      stage are grouped. None: all blocks are in one stage.

  Returns:
    The figure.

  Raises:
    ValueError: there are no blocks, names or stages do not match the densities,
      or a density or the budget is outside [0, 1].
  """
  densities = np.asarray(densities, np.float64)
  if densities.ndim not in (1, 2) or not densities.size:
    raise ValueError(
      'densities must be float[B] or float[B, N] with at least one block; got '
      f'shape {densities.shape}'
    )
  stages = [0] * len(names) if stages is None else list(stages)
  if not len(names) == len(densities) == len(stages):
    raise ValueError(
      f'names, densities, and stages must match; got {len(names)} names, '
      f'{len(densities)} densities, and {len(stages)} stages'
    )
  if not np.all((densities >= 0) & (densities <= 1)):
    raise ValueError(f'densities must be in [0, 1]; got {densities.tolist()}')
  if budget is not None and not 0 <= budget <= 1:
    raise ValueError(f'budget must be in [0, 1]; got {budget}')

  means = densities.reshape(len(names), -1).mean(axis=1)
  x, groups = _stage_positions(names, stages)
  figure = style.new_figure(max(3.6, min(1.2 + 0.34 * len(names), 9)), 2.9)
  ax = figure.add_subplot()
  ax.bar(x, means, width=0.78, color=style.BLUE)
  if densities.ndim == 2 and densities.shape[1] > 1:
    low, high = np.percentile(densities, [5, 95], axis=1)
    # The mean of a skewed distribution can be outside the percentiles.
    spread = np.maximum([means - low, high - means], 0)
    ax.errorbar(
      x, means, spread, fmt='none', ecolor=style.INK, elinewidth=1, capsize=2
    )
    images = densities.shape[1]
    style.footnote(
      figure, f'bars: mean; whiskers: 5th to 95th percentile of {images} images'
    )
  ax.set_ylim(0, 1.02)
  ax.set_xlim(x[0] - 0.7, x[-1] + 0.7)
  _use_percent(ax, 'active positions (%)')
  _label_stages(ax, x, groups)
  if budget is not None:
    ax.axhline(budget, linestyle='--', color=style.INK, linewidth=1)
    ax.annotate(
      f'budget {100 * budget:.3g} %',
      (1, budget),
      xycoords=('axes fraction', 'data'),
      xytext=(4, 0),
      textcoords='offset points',
      va='center',
      fontsize=8,
    )
  style.save_figure(figure, path)
  return figure


def _stage_positions(
  names: Sequence[str], stages: Sequence[int]
) -> tuple[list[float], list[tuple[str, list[str]]]]:
  """Returns the positions of the bars, and (label, block labels) per stage."""
  positions, groups = [], []
  blocks = zip(names, stages, strict=True)
  for _, group in itertools.groupby(blocks, lambda block: block[1]):
    members = [name for name, _ in group]
    gap = 0.6 * len(groups)
    start = len(positions)
    positions += [start + i + gap for i in range(len(members))]
    # The label of a stage is the common prefix of its blocks' names.
    shared = os.path.commonprefix(members).rpartition('.')[0]
    labels = [name.removeprefix(f'{shared}.') for name in members]
    groups.append((shared, labels))
  return positions, groups


def _label_stages(
  ax: Axes, x: list[float], groups: list[tuple[str, list[str]]]
) -> None:
  labels = [block for _, blocks in groups for block in blocks]
  longest = max(map(len, labels))
  ax.set_xticks(x, labels, rotation=90 if longest > 4 else 0)
  ax.tick_params(axis='x', length=0)
  start = 0
  for stage, blocks in groups:
    center = math.fsum(x[start : start + len(blocks)]) / len(blocks)
    start += len(blocks)
    ax.annotate(
      stage,
      (center, 0),
      xycoords=('data', 'axes fraction'),
      xytext=(0, -18),
      textcoords='offset points',
      ha='center',
      va='top',
      fontsize=8,
    )
  ax.set_xlabel('block', labelpad=16 if any(s for s, _ in groups) else 4)
