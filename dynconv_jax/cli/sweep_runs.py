"""Commands of a sweep for each run, which produce its row of the table.

Arguments are plain values that can be sent to another machine. This module does
not import JAX, which would waste memory while a run trains.
"""

from __future__ import annotations

import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Generator, Mapping
from typing import Any

from dynconv_jax.files import write_atomic

TABLE = 'results.csv'
TRAINED = 'trained.json'
SPLIT = 'test'
_DENSE_TIMES = ('dense_ms', 'native_dense_ms')

Row = dict[str, Any]
Commands = Generator[list[str], None, Row]


def train_and_evaluate(
  folder: pathlib.Path,
  flags: str,
  checkpoint: str,
  columns: Mapping[str, str],
) -> Commands:
  """Yields the commands that train a run, if necessary, and evaluate it.

  Args:
    folder: workdir of the run. Its name is the name of the run.
    flags: the whole configuration, as the text of a flag file.
    checkpoint: checkpoint to evaluate, 'best' or 'latest'.
    columns: additional columns of the row.

  Returns:
    The run's row of the table.
  """
  marker = folder / TRAINED
  if not marker.exists():
    folder.mkdir(parents=True, exist_ok=True)
    flagfile = folder / 'sweep.flags'
    write_atomic(flagfile, flags)
    yield _command('train', flagfile=flagfile, workdir=folder)
    write_atomic(marker, json.dumps({'commit': _commit()}) + '\n')
  # Use a separate table. Only the sweep's process writes the common one.
  own = folder / TABLE
  own.unlink(missing_ok=True)  # May be of another checkpoint.
  yield _command(
    'evaluate', workdir=folder, split=SPLIT, checkpoint=checkpoint, results=own
  )
  return {
    **read_rows(own)[folder.name],
    **columns,
    'training_seconds': _training_seconds(folder),
    **json.loads(marker.read_text()),
  }


def measure_latency(
  folder: pathlib.Path, gated: bool, checkpoint: str, batch_size: int
) -> Commands:
  """Yields the command that measures the latency of a run.

  Args:
    folder: workdir of a trained run. Its name is the name of the run.
    gated: whether the network has masks and would use sparse execution.
    checkpoint: 'best' or 'latest'.
    batch_size: number of images in a batch.

  Returns:
    The latency columns of the run's row, in ms.
  """
  output = folder / 'latency'
  yield _command(
    'benchmark',
    workdir=folder,
    split=SPLIT,
    checkpoint=checkpoint,
    batch_size=batch_size,
    runtimes='none',
    output=output,
  )
  measured = json.loads((output / 'benchmark.json').read_text())
  sparse = measured.get('sparse_ms')
  # The fastest dense form, because sparse execution uses the same kernels.
  dense = min(measured[k] for k in _DENSE_TIMES if k in measured)
  return {
    'run': folder.name,
    'split': SPLIT,
    # The latency in use: sparse if there are masks.
    'latency_ms': round(sparse if gated else dense, 4),
    'latency_dense_ms': round(dense, 4),
    'latency_sparse_ms': '' if sparse is None else round(sparse, 4),
    'latency_batch_size': measured['batch_size'],
    'latency_machine': measured['cpu'],
  }


def read_rows(table: pathlib.Path) -> dict[str, dict[str, str]]:
  """Returns the rows of the test split by run.

  Args:
    table: path of the CSV file. If it does not exist, there are no rows.
  """
  from dynconv_jax.plotting.results import read_results

  rows = read_results(table) if table.exists() else []
  return {row['run']: row for row in rows if row.get('split') == SPLIT}


def _command(name: str, **values: Any) -> list[str]:
  flags_ = [f'--{flag}={value}' for flag, value in values.items()]
  return [sys.executable, '-m', f'dynconv_jax.cli.{name}', *flags_]


def _training_seconds(folder: pathlib.Path) -> int | str:
  from dynconv_jax.training.workdir import read_metrics

  metrics = read_metrics(folder)
  seconds = [row['seconds'] for row in metrics if 'seconds' in row]
  return round(seconds[-1]) if seconds else ''


def _commit() -> str:
  """Returns the commit of the code, with '-dirty' if files were changed."""
  root = pathlib.Path(__file__).parents[2]
  git = functools.partial(
    subprocess.run, cwd=root, capture_output=True, text=True
  )
  if not (root / '.git').exists():  # Not a checkout.
    return 'unknown'
  try:
    head = git(['git', 'rev-parse', 'HEAD'])
    code = ['dynconv_jax', 'experiments']
    changed = git(['git', 'diff', '--quiet', 'HEAD', '--', *code])
  except OSError:  # Git is not installed.
    return 'unknown'
  if head.returncode:
    return 'unknown'
  return head.stdout.strip() + ('-dirty' if changed.returncode else '')
