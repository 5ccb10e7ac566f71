"""Latencies of trained networks, joined to a table of their runs."""

from __future__ import annotations

import collections
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Column of the latency of a batch, by its size.
COLUMN = 'latency_ratio_batch_{}'


def read_benchmark(path: str | os.PathLike) -> dict[str, Any]:
  """Reads the benchmark.json of a trained network.

  Args:
    path: path of a file that `dynconv benchmark --workdir=DIR` wrote.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: the file is not the benchmark of a trained network.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'there is no file {str(path)!r}')
  try:
    summary = json.loads(path.read_text(encoding='utf-8'))
    missing = {'workdir', 'model', 'image_size', 'cpu'} - set(summary)
    for run in summary.get('runs', [summary]):
      missing |= {'batch_size', 'sparse_ms', 'runtimes'} - set(run)
      missing |= {'sparse_over_fastest_dense'} - set(run)
  except (ValueError, TypeError, AttributeError) as error:
    raise ValueError(f'{path} is not a benchmark: {error}') from error
  if missing:
    raise ValueError(
      f'{path} must be the benchmark.json of `dynconv benchmark --workdir=DIR` '
      f'with sparse execution; missing: {", ".join(sorted(missing))}'
    )
  return summary


def add_latency(
  rows: Sequence[Mapping[str, object]],
  benchmarks: Sequence[Mapping[str, Any]],
) -> list[dict[str, object]]:
  """Returns rows with the latency of their networks, relative to dense ones.

  The latency of a network is that of its fastest execution: by this library or
  by a runtime that skips what the network skips. It is divided by that of the
  dense network in the fastest runtime of the same benchmark. All seeds of a
  setting get the latency of the one that was timed, dense networks get 1.

  Args:
    rows: rows of a results.csv with the column 'run'.
    benchmarks: as from `read_benchmark`, at most one of a setting and batch
      size. Their networks have the same dense network.

  Returns:
    Copies of the rows. Those with a latency have a column `COLUMN` for each
    batch size, and 'latency_machine'.

  Raises:
    ValueError: benchmarks are of different dense networks, of runs that the
      rows lack or have twice, or of the same setting and batch size.
  """
  networks = {(b['model'], float(b['image_size'])) for b in benchmarks}
  if len(networks) != 1:
    named = ', '.join(f'{m} at {s:g} pixels' for m, s in sorted(networks))
    raise ValueError(
      f'benchmarks must be of one model and image size; got {named or "none"}'
    )
  runs = collections.Counter(str(row.get('run', '')) for row in rows)
  settings = {_setting(run) for run in runs if run}
  latencies = {}
  for benchmark in benchmarks:
    setting = _setting(benchmark['workdir'])
    if setting not in settings:
      raise ValueError(
        f'no row is a seed of the benchmarked run {benchmark["workdir"]!r}; '
        f'runs without seeds: {", ".join(sorted(settings))}'
      )
    twice = [r for r, n in runs.items() if n > 1 and _setting(r) == setting]
    if twice:
      raise ValueError(
        f'the rows have {twice[0]} twice; specify only the table whose run was '
        'benchmarked'
      )
    columns = latencies.setdefault(setting, {})
    for run in benchmark.get('runs', [benchmark]):
      column = COLUMN.format(run['batch_size'])
      if column in columns:
        raise ValueError(
          f'{setting} was benchmarked twice with batch size '
          f'{run["batch_size"]}; specify one of the benchmarks'
        )
      columns[column] = _ratio(run)
    columns['latency_machine'] = benchmark['cpu']
  dense = {c: 1.0 for columns in latencies.values() for c in columns}
  dense['latency_machine'] = ' or '.join(
    dict.fromkeys(str(b['cpu']) for b in benchmarks)
  )
  result = []
  for row in rows:
    own = latencies.get(_setting(row.get('run', '')), {})
    if row.get('method') == 'dense' and _network(row) in networks:
      own = dense
    result.append(dict(row) | own)
  names = dict.fromkeys(name for row in result for name in row)
  return [{name: row.get(name, '') for name in names} for row in result]


def _setting(run: object) -> str:
  """Returns the name of a run without its seed."""
  return re.sub(r'_seed\d+$', '', str(run))


def _network(row: Mapping[str, object]) -> tuple[str, float] | None:
  """Returns model and image size of a row, or None if it is not full width."""
  if float(row.get('width_multiplier') or 1) != 1 or not row.get('image_size'):
    return None
  return str(row['model']), float(row['image_size'])


def _ratio(run: Mapping[str, Any]) -> float:
  """Returns the time of the network's fastest execution over dense."""
  dense = run['sparse_ms'] / run['sparse_over_fastest_dense']
  skipping = [t for k, t in run['runtimes'].items() if k.endswith('_sparse')]
  return min([run['sparse_ms'], *skipping]) / dense
