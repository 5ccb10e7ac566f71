r"""Trains and evaluates a grid of runs: results.csv and its figures.

dynconv sweep --flagfile=BASE.flags \
  --grid='method=dense,dynconv' --grid='budget=0.3,0.5,0.7' \
  --grid='seed=0,1,2' --results=results/NAME \
  [--workdir=workdir/NAME] [--parallel=N] [any flag of a training run]

Runs the product of the grids. A flag that does not matter to a method, such as
the budget to a dense network, does not multiply its runs. --grid=METHOD:FLAG=
is for one method alone: dense:width_multiplier=0.5,0.71,1 gives the baseline of
narrower networks, skipnet:mask_bias=2 a setting of its own. Values that are
lists are separated by semicolons. Seeds come one after the other, so that a
sweep that is cut short has fewer seeds. Runs that start from, or are distilled
from, a run of the sweep (--grid=dynconv:distill_from=,WORKDIR/dense_seed0) wait
for it.

Each run has a workdir of its own, with sweep.log. Started again, the same
command goes on: what is trained and has a row is passed over. A failure does
not end the sweep; its error is told at the end. Latency is measured after all
trainings.

Six classes of Food-101 (DIR: an unpacked Food-101), two cores, from the dense
run workdir/food/dense, and narrower dense networks:
dynconv sweep --food101_dir=DIR --flagfile=food101_6_resnet18_64px_from_dense \
  --grid=method=dense,dynconv,convnet_aig,skipnet,sact,act \
  --grid=budget=0.3,0.5,0.7 --grid=skip_weight=0.3,0.6,1.2 \
  --grid=skipnet:budget_warmup=0.6 --grid=sact:ponder_weight=0.01,0.05,0.2 \
  --grid=act:ponder_weight=0.02,0.1,0.2 --grid=seed=0,1 --checkpoint=latest \
  --parallel=2 --results=results/food101_6_resnet18_64px
dynconv sweep --food101_dir=DIR --epochs=36 --flagfile=food101_6_resnet18_64px \
  --grid=method=dense --grid=width_multiplier=0.55,0.71 --grid=seed=0,1 \
  --checkpoint=latest --parallel=2 --results=results/food101_6_resnet18_64px

The same from the same start, distilled from it:
dynconv sweep --food101_dir=DIR --recipe=distilled \
  --flagfile=food101_6_resnet18_64px_from_dense \
  --grid=method=dense,dynconv --grid=budget=0.3,0.5,0.7 \
  --grid=distill_from=workdir/food/dense --grid=seed=0 --checkpoint=latest \
  --parallel=2 --results=results/food101_6_resnet18_64px

At 224 pixels with ResNet-50, from scratch, on a GPU:
dynconv sweep --food101_dir=DIR --flagfile=food101_6_resnet18_64px \
  --model=resnet50 --image_size=224 --cache_size=256 \
  --compute_dtype=bfloat16 --epochs=100 \
  --grid=method=dense,dynconv,convnet_aig,skipnet,sact,act \
  --grid=dense:model=resnet18,resnet34,resnet50 --grid=budget=0.3,0.5,0.7 \
  --grid=skip_weight=0.5,1,1.5 --grid=skipnet:mask_bias=2 \
  --grid=skipnet:budget_warmup=0.6 --grid=ponder_weight=0.001,0.003,0.01 \
  --grid=seed=0 --checkpoint=latest --results=results/food101_6_resnet50_224px

The student project's experiment, whose MACs vary by the size of the input:
dynconv sweep --food101_dir=DIR --epochs=4 --cache_size=112 \
  --flagfile=food101_6_resnet18_64px_from_dense \
  --budget=0.5 --grid=method=dense,dynconv --grid=image_size=64,80,96 \
  --grid=seed=0 --checkpoint=latest --parallel=2 --latency_batch_size=0 \
  --results=results/food101_6_input_size

CIFAR-10, ResNet-32, by the published recipe (DIR: CIFAR-10's binary files):
dynconv sweep --cifar10_dir=DIR --flagfile=cifar10_resnet32 \
  --grid=method=dense,dynconv --grid=budget=0.3,0.5,0.7 \
  --grid=dense:width_multiplier=0.55,0.71,0.84,1 --grid=seed=0,1,2 \
  --checkpoint=latest --results=results/cifar10_resnet32
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags, logging

from dynconv_jax.cli import config_flags, processes, program
from dynconv_jax.cli.grid import Run, make_runs
from dynconv_jax.cli.results_table import check_table, write_result
from dynconv_jax.cli.sweep_progress import Progress
from dynconv_jax.files import locked, write_atomic
from dynconv_jax.plotting.results import read_results
from dynconv_jax.plotting.tradeoff import plot_results
from dynconv_jax.training import inputs
from dynconv_jax.training import workdir as workdir_lib
from dynconv_jax.training.config import operational_options, to_flags

_GRID = flags.DEFINE_multi_string(
  'grid', None, '[METHOD:]FLAG=VALUE,VALUE,...; once a flag.', required=True
)
_RESULTS = flags.DEFINE_string(
  'results', None, 'Folder of results.csv and the figures.', required=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  "Folder of the runs' workdirs; by default workdir/NAME for results/NAME.",
)
_PARALLEL = flags.DEFINE_integer(
  'parallel',
  1,
  'Runs at a time, each on its share of the cores.',
  lower_bound=1,
)
_CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'best', ['best', 'latest'], 'What is evaluated.'
)
_RECIPE = flags.DEFINE_string(
  'recipe', '', "The rows' column `recipe`, to tell curves of sweeps apart."
)
_LATENCY_BATCH_SIZE = flags.DEFINE_integer(
  'latency_batch_size',
  1,
  'Images a batch in the measurement of latency; 0: not measured.',
  lower_bound=0,
)
config_flags.define()

_TABLE = 'results.csv'
_TRAINED = 'trained.json'
_SPLIT = 'test'
_DENSE_TIMES = ('dense_ms', 'native_dense_ms')


def main(argv: Sequence[str]) -> None:
  """Runs the grid, then draws the figures; status 1 if a run failed."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))
  results = pathlib.Path(_RESULTS.value).expanduser()
  root = pathlib.Path(_WORKDIR.value or f'workdir/{results.absolute().name}')
  root = root.expanduser()
  table = results / _TABLE
  runs = _check(results, root)
  check_table(table)
  try:
    with locked(root, 'a sweep') as lock:
      failures = _train(runs, root, table, lock)
      if _LATENCY_BATCH_SIZE.value:
        failures |= _measure(runs, root, table, lock)
  except processes.Interrupted as interrupted:
    print(
      f'{interrupted}: what is trained is saved in {root}; the same command '
      'goes on from there',
      file=sys.stderr,
    )
    sys.exit(128 + interrupted.signal)
  if table.exists():
    print(f'wrote {table}')
    for png, svg in plot_results(read_results(table), results):
      print(f'wrote {png} and {svg}')
  if failures:
    for name, error in failures.items():
      print(f'{name} failed: {error}', file=sys.stderr)
    print(
      f'{len(failures)} of {len(runs)} runs failed; their output is in '
      f'{root}/RUN/sweep.log',
      file=sys.stderr,
    )
    sys.exit(1)


def _check(results: pathlib.Path, root: pathlib.Path) -> list[Run]:
  """Returns the runs; raises ValueError naming all that is wrong."""
  errors, runs = [], []
  if _LATENCY_BATCH_SIZE.value:
    program.require_checkout('latency (else --latency_batch_size=0)')
  if results.suffix == '.csv':
    errors.append(
      f'results must be a folder, in which {_TABLE} is written; got {results}'
    )
  if results.exists() and not results.is_dir():
    errors.append(f'results must be a folder; {results} is a file')
  try:
    runs = make_runs(config_flags.values(), _GRID.value)
  except ValueError as error:
    errors.append(str(error))
  for run in runs:
    try:
      workdir_lib.check_flags(root / run.name, run.config)
    except ValueError as error:
      errors.append(str(error))
  if errors:
    raise ValueError('; '.join(errors))
  return runs


def _train(
  runs: Sequence[Run], root: pathlib.Path, table: pathlib.Path, lock: int
) -> dict[str, str]:
  """Trains and evaluates what is not yet; returns the errors by run."""
  rows = _rows(table)
  for run in runs:
    folder, epochs = root / run.name, run.config.optimization.epochs
    if (folder / _TRAINED).exists() and (
      epochs != workdir_lib.read_config(folder).optimization.epochs
    ):
      (folder / _TRAINED).unlink()  # It goes on, to be measured anew.
      if run.name in rows:
        again = {'run': run.name, 'split': _SPLIT, 'latency_ms': ''}
        write_result(table, again)
  left = [
    run
    for run in runs
    if run.name not in rows or not (root / run.name / _TRAINED).exists()
  ]
  places = {_place(root / run.name): run.name for run in runs}
  jobs = {}
  for run in left:
    start = run.config.optimization
    sources = (start.init_from, start.distill_from)
    needs = {places.get(_place(source)) for source in sources if source}
    jobs[run.name] = processes.Job(
      _commands(run, root / run.name, table),
      root / run.name / 'sweep.log',
      tuple(needs - {None}),
    )
  logging.info(
    '%d runs, %d of them finished before; %d at a time',
    *(len(runs), len(runs) - len(left), _PARALLEL.value),
  )
  if _PARALLEL.value > 1:
    # Processes that prepare the same dataset at once get in each other's way.
    parts = [run.config.data for run in left]
    for data in {part.dataset: part for part in parts}.values():
      inputs.open_splits(data)
  configs = {root / run.name: run.config for run in left}
  with Progress('trained', configs, len(runs) - len(left)) as progress:
    ended = processes.run_jobs(
      jobs, _PARALLEL.value, progress.show, pass_fds=[lock]
    )
  return {name: error for name, error in ended.items() if error}


def _place(folder: str | os.PathLike) -> str:
  return os.path.realpath(os.path.expanduser(folder))


def _commands(
  run: Run, folder: pathlib.Path, table: pathlib.Path
) -> Iterator[list[str]]:
  """Yields the commands of a run; afterwards its row is in the table."""
  marker = folder / _TRAINED
  if not marker.exists():
    folder.mkdir(parents=True, exist_ok=True)
    flagfile = folder / 'sweep.flags'
    flagfile.write_text(run.config.to_flags())
    yield _command('train', flagfile=flagfile, workdir=folder)
    write_atomic(marker, json.dumps({'commit': _commit()}) + '\n')
  # A table of its own: only this process writes the common one.
  own = folder / _TABLE
  yield _command(
    'evaluate',
    workdir=folder,
    split=_SPLIT,
    checkpoint=_CHECKPOINT.value,
    results=own,
  )
  row = {**_rows(own)[run.name], **run.settings}
  if recipe := ', '.join(filter(None, (_RECIPE.value, run.recipe))):
    row['recipe'] = recipe
  row['training_seconds'] = _training_seconds(folder)
  row |= json.loads(marker.read_text())
  # What makes the run again, without the places of one machine.
  places = operational_options(run.config)
  kept = {k: v for k, v in run.config.flat().items() if k not in places}
  write_atomic(table.parent / 'flags' / f'{run.name}.flags', to_flags(kept))
  write_result(table, row)


def _measure(
  runs: Sequence[Run], root: pathlib.Path, table: pathlib.Path, lock: int
) -> dict[str, str]:
  """Measures latency, one run after the other; returns the errors by run."""
  rows, batch_size = _rows(table), str(_LATENCY_BATCH_SIZE.value)
  jobs = {
    run.name: processes.Job(
      _latency_commands(run, root / run.name, table),
      root / run.name / 'sweep.log',
    )
    for run in runs
    if run.name in rows
    and not (
      rows[run.name].get('latency_ms')
      and rows[run.name].get('latency_batch_size') == batch_size
    )
  }
  with Progress(
    'timed', dict.fromkeys(jobs), len(runs) - len(jobs)
  ) as progress:
    ended = processes.run_jobs(jobs, 1, progress.show, pass_fds=[lock])
  machines = {row.get('latency_machine') for row in _rows(table).values()}
  if len(machines - {None, ''}) > 1:
    logging.warning('%s has latencies of several machines', table)
  return {name: f'latency: {error}' for name, error in ended.items() if error}


def _latency_commands(
  run: Run, folder: pathlib.Path, table: pathlib.Path
) -> Iterator[list[str]]:
  """Yields the command that times a run; afterwards its row has the times."""
  output = folder / 'latency'
  yield _command(
    'benchmark',
    workdir=folder,
    split=_SPLIT,
    checkpoint=_CHECKPOINT.value,
    batch_size=_LATENCY_BATCH_SIZE.value,
    peers='none',
    output=output,
  )
  measured = json.loads((output / 'benchmark.json').read_text())
  sparse = measured.get('sparse_ms')
  # The faster form: gated networks are executed by the same kernels.
  dense = min(measured[k] for k in _DENSE_TIMES if k in measured)
  own = sparse if run.config.method.record.gated else dense
  row = {
    'run': run.name,
    'split': _SPLIT,
    # As it would be used: the sparse one, where there are masks.
    'latency_ms': round(own, 4),
    'latency_dense_ms': round(dense, 4),
    'latency_sparse_ms': '' if sparse is None else round(sparse, 4),
    'latency_batch_size': measured['batch_size'],
    'latency_machine': measured['cpu'],
  }
  write_result(table, row)


def _command(name: str, **values: Any) -> list[str]:
  flags_ = [f'--{flag}={value}' for flag, value in values.items()]
  return [sys.executable, '-m', f'dynconv_jax.cli.{name}', *flags_]


def _rows(table: pathlib.Path) -> dict[str, dict[str, str]]:
  """Returns the rows of the test split by run."""
  rows = read_results(table) if table.exists() else []
  return {row['run']: row for row in rows if row.get('split') == _SPLIT}


def _training_seconds(folder: pathlib.Path) -> int | str:
  rows = workdir_lib.read_metrics(folder)
  seconds = [row['seconds'] for row in rows if 'seconds' in row]
  return round(seconds[-1]) if seconds else ''


def _commit() -> str:
  """Returns the commit of the code, '-dirty' if it was changed since."""
  root = pathlib.Path(workdir_lib.__file__).parents[2]
  git = functools.partial(
    subprocess.run, cwd=root, capture_output=True, text=True
  )
  if not (root / '.git').exists():  # It is installed.
    return 'unknown'
  try:
    head = git(['git', 'rev-parse', 'HEAD'])
    code = ['dynconv_jax', 'experiments']
    changed = git(['git', 'diff', '--quiet', 'HEAD', '--', *code])
  except OSError:  # There is no git.
    return 'unknown'
  if head.returncode:
    return 'unknown'
  return head.stdout.strip() + ('-dirty' if changed.returncode else '')


if __name__ == '__main__':
  program.run(main)
