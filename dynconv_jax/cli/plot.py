r"""Plots results, gains, or learning curves.

Accuracy against GMACs, and against latency if it was measured, next to the
table, as in `dynconv sweep`:
dynconv plot --results=results/NAME/results.csv \
  [--series=recipe] [--split=test] [--chance=0.167]

One figure, accuracy against GMACs or against another column:
dynconv plot --results=results/NAME/results.csv --output=FIG.png \
  [--x=latency_sparse_ms] [--series=recipe] [--chance=0.167]

Accuracy against latency relative to the fastest dense runtime, as measured by
`dynconv benchmark --workdir=DIR` with a batch size of 8:
dynconv plot --results=results/NAME/results.csv --output=FIG.png \
  --latency=FILE.json,... --x=latency_ratio_batch_8

Gains from `dynconv compare` against the fraction of the image that the object
covers:
dynconv plot --gains=FILE.csv [--output=FIG.png] [--against=NAME]

The learning curves of a run:
dynconv plot --workdir=DIR [--output=FIG.png]
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from dynconv_jax.cli import program
from dynconv_jax.plotting import style
from dynconv_jax.plotting.curves import plot_learning_curves
from dynconv_jax.plotting.gains import plot_gains
from dynconv_jax.plotting.latency import add_latency, read_benchmark
from dynconv_jax.plotting.results import read_results
from dynconv_jax.plotting.tradeoff import (
  plot_accuracy_against_macs,
  plot_results,
)
from dynconv_jax.training import workdir

_RESULTS = flags.DEFINE_list(
  'results',
  None,
  'One or more results.csv to plot together, separated by commas.',
)
_LATENCY = flags.DEFINE_list(
  'latency',
  [],
  'One or more benchmark.json of runs in --results. Adds the columns '
  'latency_ratio_batch_N.',
)
_GAINS = flags.DEFINE_string('gains', None, 'A gains table to plot.')
_AGAINST = flags.DEFINE_string(
  'against', '', 'Name of the baseline of --gains, for the title.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Workdir of a run to plot.')
_OUTPUT = flags.DEFINE_string(
  'output',
  None,
  'The figure, written as .png and .svg. By default, next to the table or in '
  'the workdir of the run.',
)
_X = flags.DEFINE_string(
  'x', 'gmacs_mean', 'Column of --results for the x axis.'
)
_SERIES = flags.DEFINE_string(
  'series', None, 'Column of --results that separates curves.'
)
_SPLIT = flags.DEFINE_string(
  'split', None, 'Draw only rows of --results of this split, such as test.'
)
_CHANCE = flags.DEFINE_float(
  'chance', None, 'Chance accuracy in [0, 1], drawn as a line for --results.'
)


def main(argv: Sequence[str]) -> None:
  """Draws the figures and prints their file names."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  inputs = [_RESULTS.value, _GAINS.value, _WORKDIR.value]
  if inputs.count(None) != 2:
    raise ValueError(
      'set one of --results=FILE.csv, --gains=FILE.csv, and --workdir=DIR'
    )
  if _AGAINST.value and _GAINS.value is None:
    raise ValueError('--against needs --gains')
  if _RESULTS.value is None:
    for name in ('latency', 'x', 'series', 'split', 'chance'):
      if flags.FLAGS[name].present:
        raise ValueError(f'--{name} needs --results')
  if _RESULTS.value is not None:
    if not _RESULTS.value:
      raise ValueError('--results names no file')
    paths = [pathlib.Path(path).expanduser() for path in _RESULTS.value]
    rows = [row for path in paths for row in read_results(path)]
    # Tables may differ in columns, such as `recipe`.
    columns = dict.fromkeys(name for row in rows for name in row)
    rows = [{name: row.get(name, '') for name in columns} for row in rows]
    if _SPLIT.value is not None:
      splits = sorted({row.get('split', '') for row in rows} - {''})
      rows = [row for row in rows if row.get('split') == _SPLIT.value]
      if not rows:
        raise ValueError(
          f'--split must be one of {", ".join(splits) or "none"} in --results; '
          f'got {_SPLIT.value!r}'
        )
    if _LATENCY.value:
      files = [pathlib.Path(path).expanduser() for path in _LATENCY.value]
      rows = add_latency(rows, list(map(read_benchmark, files)))
    if _OUTPUT.value is None:
      if flags.FLAGS['x'].present:
        raise ValueError('--x needs --output=FIG.png')
      figures = plot_results(
        rows, paths[0].parent, _SERIES.value, _CHANCE.value
      )
      for written in figures:
        print('wrote ' + ' and '.join(map(str, written)))
      return
    output = pathlib.Path(_OUTPUT.value).expanduser()
    style.figure_paths(output)
    plot_accuracy_against_macs(
      rows, output, _X.value, _SERIES.value, _CHANCE.value
    )
  elif _GAINS.value is not None:
    table = pathlib.Path(_GAINS.value).expanduser()
    output = table.with_suffix('.png')
    if _OUTPUT.value is not None:
      output = pathlib.Path(_OUTPUT.value).expanduser()
    plot_gains(read_results(table), output, against=_AGAINST.value)
  else:
    folder = pathlib.Path(_WORKDIR.value).expanduser()
    output = folder / 'learning_curves.png'
    if _OUTPUT.value is not None:
      output = pathlib.Path(_OUTPUT.value).expanduser()
    style.figure_paths(output)
    rows = workdir.read_metrics(folder)
    if not rows:
      raise FileNotFoundError(
        f'{folder} is not the workdir of a run that has trained for an epoch: '
        f'{folder / workdir.METRICS_FILE} is missing or has no rows'
      )
    plot_learning_curves(rows, output)
  print('wrote ' + ' and '.join(map(str, style.figure_paths(output))))


if __name__ == '__main__':
  program.run(main)
