r"""Compares runs with paired tests over the examples of a split.

Run `dynconv evaluate` on each run first, which writes predictions_SPLIT.csv to
its workdir. A sweep does so for the test split, and keeps a copy for each run
in RESULTS/predictions.

To compare two settings, each with one run or several seeds:
dynconv compare --split=test \
  --runs='workdir/NAME/dynconv_budget0.5_*' --against='workdir/NAME/dense_*'

Prints both accuracies and their difference in points, with a 95 % interval and
p-value from a paired bootstrap over examples and seeds. For single runs, also
prints McNemar's exact test. The last line is JSON. Seeds are paired if both
sides have the same seeds. Several runs of one seed count as runs of one
setting, with a warning. --gains=FILE.csv adds the difference to a table for
`dynconv plot`, at the fraction of the image that the object covers. --bins=N
splits the examples into N equal groups by that fraction. Earlier rows of the
same --label are replaced; with --share, only those of that share.

To compare many settings with a baseline, as CSV and Markdown (p-values are not
corrected for multiple comparisons):
dynconv compare --split=test --baseline=dense --table=FILE.csv \
  --groups='dense=workdir/NAME/dense_*;half=workdir/NAME/dynconv_budget0.5_*'
"""

from __future__ import annotations

import glob
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from dynconv_jax import statistics
from dynconv_jax.cli import program
from dynconv_jax.cli.compare_table import (
  accuracy_text,
  difference_text,
  gmacs_text,
  p_text,
  to_markdown,
  write_csv,
)
from dynconv_jax.cli.predictions import (
  Predictions,
  predictions_file,
  read_predictions,
  read_seed,
)
from dynconv_jax.files import write_atomic
from dynconv_jax.plotting.results import read_results

_RUNS = flags.DEFINE_list(
  'runs', None, 'Workdirs or prediction files of one setting; may be globs.'
)
_AGAINST = flags.DEFINE_list(
  'against', None, 'Workdirs or prediction files to compare --runs with.'
)
_GROUPS = flags.DEFINE_string(
  'groups', None, 'NAME=RUNS;NAME=RUNS;..., with RUNS as in --runs.'
)
_BASELINE = flags.DEFINE_string(
  'baseline', None, 'Group that all others are compared with.'
)
_TABLE = flags.DEFINE_string(
  'table', None, 'CSV file for the groups; also writes a Markdown file.'
)
_SPLIT = flags.DEFINE_string(
  'split', 'test', 'Split of the predictions in a workdir, as for evaluate.'
)
_GAINS = flags.DEFINE_string(
  'gains', None, 'CSV file to add the difference to.'
)
_LABEL = flags.DEFINE_string('label', '', 'Curve that the --gains belong to.')
_BINS = flags.DEFINE_integer(
  'bins', 1, 'Number of --gains rows, by object size.', lower_bound=1
)
_SHARE = flags.DEFINE_float(
  'share',
  None,
  'Fraction of the image that the object covers, for --gains if the '
  'predictions do not contain it.',
  lower_bound=0,
  upper_bound=1,
)
_RESAMPLES = flags.DEFINE_integer(
  'resamples', statistics.RESAMPLES, 'Bootstrap resamples.', lower_bound=1
)

_GAIN_COLUMNS = (
  *('label', 'share', 'difference', 'low', 'high', 'p', 'examples'),
  *('gmacs', 'gmacs_against'),
)


class Group:
  """Runs of one setting on the same examples.

  Attributes:
    name: display name.
    runs: predictions of the runs, ordered by seed if the seeds are known.
    seeds: seeds of the runs, or None if they are unknown or not distinct.
    correct: bool[runs, n], set by `align`.
    macs: float[runs, n], set by `align`, or None if unknown for any run.
  """

  def __init__(self, name: str, patterns: Sequence[str], split: str):
    """Reads the predictions.

    Raises:
      ValueError, FileNotFoundError: a pattern matches nothing, a run is listed
        twice, or a file is not a prediction file.
    """
    self.name = name
    paths = [path for pattern in patterns for path in _files(pattern, split)]
    if not paths:
      raise ValueError(f'{name} has no runs')
    if len(set(paths)) < len(paths):
      raise ValueError(
        f'{name} lists a run twice: {", ".join(map(str, paths))}'
      )
    seeds = [read_seed(path) for path in paths]
    self.seeds = None
    if None not in seeds and len(set(seeds)) == len(seeds):
      seeds, paths = zip(*sorted(zip(seeds, paths, strict=True)), strict=True)
      self.seeds = seeds
    elif None not in seeds:
      twice = next(seed for seed in seeds if seeds.count(seed) > 1)
      same = [p for p, seed in zip(paths, seeds, strict=True) if seed == twice]
      logging.warning(
        '%s counts several runs of seed %d as runs of one setting: %s',
        *(name, twice, ', '.join(map(str, same))),
      )
    self.runs = [read_predictions(path) for path in paths]

  def align(self, first: Predictions) -> None:
    """Reorders the examples of all runs as in `first`.

    Raises:
      ValueError: a run has different examples or labels. The message names
        them.
    """
    correct, macs = [], []
    for run in self.runs:
      _check_same(first, run)
      place = {name: i for i, name in enumerate(run.labels)}
      order = [place[name] for name in first.labels]
      correct.append(run.correct[order])
      macs.append(None if run.macs is None else run.macs[order])
    self.correct = np.stack(correct)
    known = all(values is not None for values in macs)
    self.macs = np.stack(macs) if known else None

  def gmacs(self, examples: slice | np.ndarray = slice(None)) -> float | None:
    """Returns the mean over runs and examples, or None if unknown for a run."""
    if self.macs is None:
      return None
    return float(self.macs[:, examples].mean()) / 1e9

  def row(self, baseline: Group | None = None) -> dict[str, Any]:
    """Returns accuracy and cost, and the difference from a baseline."""
    accuracy = statistics.mean_interval(
      self.correct, resamples=_RESAMPLES.value
    )
    row = {
      'group': self.name,
      'runs': len(self.runs),
      'accuracy': accuracy.value,
      'accuracy_low': accuracy.low,
      'accuracy_high': accuracy.high,
      'gmacs_mean': self.gmacs(),
    }
    if baseline is None:
      return row
    return row | {
      'baseline': baseline.name,
      **difference(self, baseline, slice(None)),
    }


def difference(a: Group, b: Group, examples) -> dict[str, Any]:
  """Returns accuracy(a) - accuracy(b) in points, its 95 % interval, and p.

  Args:
    a: a group.
    b: the group to compare with, on the same examples.
    examples: index of the examples to use.
  """
  paired = a.seeds is not None and a.seeds == b.seeds
  estimate = statistics.paired_bootstrap(
    a.correct[:, examples],
    b.correct[:, examples],
    paired_seeds=paired,
    resamples=_RESAMPLES.value,
  )
  return {
    'difference': 100 * estimate.value,
    'difference_low': 100 * estimate.low,
    'difference_high': 100 * estimate.high,
    'p': estimate.p,
    'paired_seeds': paired,
  }


def main(argv: Sequence[str]) -> None:
  """Compares two settings, or many settings with a baseline."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  pair = (_RUNS.value, _AGAINST.value)
  many = (_GROUPS.value, _BASELINE.value, _TABLE.value)
  if not (all(pair) and not any(many)) and not (all(many) and not any(pair)):
    raise ValueError(
      'give --runs and --against, or --groups, --baseline, and --table'
    )
  if _GAINS.value and not all(pair):
    raise ValueError('--gains needs --runs and --against')
  for name in ('label', 'bins', 'share'):
    if flags.FLAGS[name].present and not _GAINS.value:
      raise ValueError(f'--{name} needs --gains=FILE.csv')
  if all(pair):
    _compare_pair(*(_aligned({'runs': pair[0], 'against': pair[1]})))
  else:
    _compare_many(_parse_groups(_GROUPS.value), _BASELINE.value)


def _compare_pair(runs: Group, against: Group) -> None:
  gains = _gain_rows(runs, against) if _GAINS.value else []
  result = {
    'num_examples': runs.correct.shape[1],
    'runs': runs.row(),
    'against': against.row(),
    **difference(runs, against, slice(None)),
  }
  print(f'{"":10} {"runs":>4}  {"accuracy (95 % interval)":26} {"GMACs":>8}')
  for group in ('runs', 'against'):
    row = result[group]
    print(
      f'{group:10} {row["runs"]:4}  {accuracy_text(row):26} '
      f'{gmacs_text(row):>8}'
    )
  resampled = (
    f'{_RESAMPLES.value} resamples of {result["num_examples"]} examples'
  )
  if len(runs.runs) + len(against.runs) > 2:
    resampled += ' and ' + 'paired ' * result['paired_seeds'] + 'seeds'
  print(
    f'difference {difference_text(result)} points, p = {p_text(result["p"])} '
    f'({resampled})'
  )
  if len(runs.runs) == len(against.runs) == 1:
    test = statistics.mcnemar(runs.correct[0], against.correct[0])
    result['mcnemar'] = {
      'only_runs': test.only_a,
      'only_against': test.only_b,
      'p': test.p,
    }
    print(
      f'McNemar    {test.only_a} right only in runs, {test.only_b} only in '
      f'against, exact p = {p_text(test.p)}; other seeds may differ by more'
    )
  if gains:
    path = pathlib.Path(_GAINS.value).expanduser()
    old = read_results(path) if path.exists() else []
    kept = [row for row in old if not _replaced(row)]
    write_csv(path, kept + gains)
    print(f'wrote {path}')
  print(json.dumps(result))


def _gain_rows(runs: Group, against: Group) -> list[dict[str, Any]]:
  """Returns the rows of a gains table, by object size."""
  path = pathlib.Path(_GAINS.value).expanduser()
  if path.exists() and set(read_results(path)[0]) != set(_GAIN_COLUMNS):
    raise ValueError(
      f'{path} is not a gains table with columns {", ".join(_GAIN_COLUMNS)}'
    )
  n = runs.correct.shape[1]
  shares = runs.runs[0].object_share
  if _SHARE.value is not None:
    shares = np.full(n, _SHARE.value)
    if _BINS.value > 1:
      raise ValueError('--share cannot be combined with --bins')
  if shares is None:
    raise ValueError(
      f'{runs.runs[0].path} does not contain the fraction of an image that its '
      'object covers; set --share'
    )
  if n < 2 * _BINS.value:
    raise ValueError(f'--bins={_BINS.value} is too many for {n} examples')
  rows = []
  order = np.argsort(shares, kind='stable')
  for examples in np.array_split(order, _BINS.value):
    result = difference(runs, against, examples)
    values = (
      _LABEL.value,
      float(shares[examples].mean()),
      *(result[f'difference{end}'] for end in ('', '_low', '_high')),
      result['p'],
      len(examples),
      runs.gmacs(examples),
      against.gmacs(examples),
    )
    rows.append(dict(zip(_GAIN_COLUMNS, values, strict=True)))
  return rows


def _replaced(row: Mapping[str, str]) -> bool:
  """Returns whether a row of a gains table has the given label and share."""
  share = _SHARE.value
  return row['label'] == _LABEL.value and (
    share is None or row['share'] == f'{share:.6g}'
  )


def _compare_many(patterns: Mapping[str, Sequence[str]], name: str) -> None:
  if name not in patterns:
    raise ValueError(
      f'--baseline must be one of {", ".join(patterns)}; got {name!r}'
    )
  path = pathlib.Path(_TABLE.value).expanduser()
  if path.suffix != '.csv':
    raise ValueError(f'--table must end in .csv; got {path}')
  if path.exists() and 'group' not in read_results(path)[0]:
    raise ValueError(f'{path} is not a table of groups; choose another --table')
  groups = _aligned(patterns)
  baseline = next(group for group in groups if group.name == name)
  rows = [g.row(None if g is baseline else baseline) for g in groups]
  columns = max((list(row) for row in rows), key=len)
  write_csv(path, [{c: row.get(c) for c in columns} for row in rows])
  markdown = to_markdown(
    rows,
    baseline=name,
    num_examples=baseline.correct.shape[1],
    resamples=_RESAMPLES.value,
  )
  write_atomic(path.with_suffix('.md'), markdown)
  print(markdown)
  print(f'wrote {path} and {path.with_suffix(".md")}')
  print(json.dumps({'baseline': name, 'groups': rows}))


def _aligned(patterns: Mapping[str, Sequence[str]]) -> list[Group]:
  """Returns the groups, with the same examples in the same order."""
  groups = [Group(name, p, _SPLIT.value) for name, p in patterns.items()]
  for group in groups:
    group.align(groups[0].runs[0])
  return groups


def _parse_groups(text: str) -> dict[str, list[str]]:
  """Returns the patterns of each group of NAME=A,B;NAME=C."""
  groups = {}
  for part in filter(None, map(str.strip, text.split(';'))):
    name, equals, patterns = part.partition('=')
    if not (name and equals and patterns):
      raise ValueError(f'--groups must be NAME=RUNS;...; got {part!r}')
    if name in groups:
      raise ValueError(f'--groups lists {name} twice')
    groups[name] = patterns.split(',')
  return groups


def _files(pattern: str, split: str) -> list[pathlib.Path]:
  """Returns the prediction files of a workdir, a file, or a glob."""
  found = sorted(glob.glob(str(pathlib.Path(pattern).expanduser())))
  if not found:
    raise FileNotFoundError(f'there is no {pattern}')
  paths = []
  for path in map(pathlib.Path, found):
    if path.is_dir():
      path /= predictions_file(split)
      if not path.exists():
        raise FileNotFoundError(
          f'there is no {path}; write it with `dynconv evaluate '
          f'--workdir={path.parent} --split={split}`'
        )
    paths.append(path)
  return paths


def _check_same(first: Predictions, other: Predictions) -> None:
  """Raises ValueError if the two have different examples or labels."""
  a, b = first.labels, other.labels
  parts = [
    f'{len(names)} only in {run.path}, such as {min(names)!r}'
    for run, names in ((first, a.keys() - b), (other, b.keys() - a))
    if names
  ]
  if not parts:
    wrong = [name for name in a if a[name] != b[name]]
    if not wrong:
      return
    name = wrong[0]
    parts = [
      f'{len(wrong)} differ in label, such as {name!r}: {a[name]} in '
      f'{first.path}, {b[name]} in {other.path}'
    ]
  raise ValueError(f'runs must have the same examples: {"; ".join(parts)}')


if __name__ == '__main__':
  program.run(main)
