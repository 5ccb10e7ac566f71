r"""Trains and evaluates a grid of runs, and writes results.csv and figures.

Flags and test predictions of each run are kept next to results.csv.

dynconv sweep --flagfile=BASE.flags \
  --grid='method=dense,dynconv' --grid='budget=0.3,0.5,0.7' \
  --grid='seed=0,1,2' --results=results/NAME \
  [--workdir=workdir/NAME] [--parallel=N] [any flag of a training run]

Runs the product of all grids. Flags that do not affect a method, such as the
budget of a dense network, do not multiply its runs. --grid=METHOD:FLAG=VALUES
applies to one method: dense:width_multiplier=0.5,0.71,1 adds narrower dense
networks as a baseline, and skipnet:mask_bias=2 changes a setting of SkipNet.
Separate values that are lists by semicolons. Runs are ordered by seed, so an
interrupted sweep has complete seeds. Runs that start from or are distilled from
another run of the sweep (--grid=dynconv:distill_from=,WORKDIR/dense_seed0) wait
for it.

Each run has its own workdir with a sweep.log. The same command resumes the
sweep and skips runs that are trained and have a row in the table. With another
--checkpoint, it evaluates them again. A failed run does not end the sweep; its
error is reported at the end. Latency is measured after all training.

--engine=ray runs the sweep on a Ray cluster whose nodes share a file system. A
run whose node is lost resumes on another node.

Six classes of Food-101 (DIR: an unpacked Food-101) on two cores, starting from
the dense run workdir/food/dense, plus narrower dense networks:
dynconv sweep --food101_dir=DIR --flagfile=food101_6_resnet18_64px_from_dense \
  --grid=method=dense,dynconv,convnet_aig,skipnet,sact,act \
  --grid=budget=0.3,0.5,0.7 --grid=skip_weight=0.3,0.6,1.2 \
  --grid=skipnet:budget_warmup=0.6 --grid=sact:ponder_weight=0.01,0.05,0.2 \
  --grid=act:ponder_weight=0.02,0.1,0.2 --grid=seed=0,1 --checkpoint=latest \
  --parallel=2 --results=results/food101_6_resnet18_64px
dynconv sweep --food101_dir=DIR --flagfile=food101_6_resnet18_64px --epochs=36 \
  --grid=method=dense --grid=width_multiplier=0.55,0.71 --grid=seed=0,1 \
  --checkpoint=latest --parallel=2 --results=results/food101_6_resnet18_64px

The same start, also distilled from the dense run:
dynconv sweep --food101_dir=DIR --recipe=distilled \
  --flagfile=food101_6_resnet18_64px_from_dense \
  --grid=method=dense,dynconv --grid=budget=0.3,0.5,0.7 \
  --grid=distill_from=workdir/food/dense --grid=seed=0 --checkpoint=latest \
  --parallel=2 --results=results/food101_6_resnet18_64px

ResNet-50 at 224 pixels on a GPU, from the dense run
workdir/food101_6_resnet50_224px (benchmarks/gpu_figure.sh trains all methods):
dynconv sweep --food101_dir=DIR \
  --flagfile=food101_6_resnet50_224px_from_dense \
  --grid=method=dense,dynconv --grid=budget=0.3,0.5,0.7 --grid=seed=0,1,2 \
  --checkpoint=latest --latency_batch_size=0 \
  --results=results/food101_6_resnet50_224px

The student project's experiment, which varies MACs through the input size:
dynconv sweep --food101_dir=DIR \
  --flagfile=food101_6_resnet18_64px_from_dense --epochs=4 --cache_size=112 \
  --budget=0.5 --grid=method=dense,dynconv --grid=image_size=64,80,96 \
  --grid=seed=0 --checkpoint=latest --parallel=2 --latency_batch_size=0 \
  --results=results/food101_6_input_size

CIFAR-10 with ResNet-32 and the published recipe (DIR: CIFAR-10 binary files):
dynconv sweep --cifar10_dir=DIR --flagfile=cifar10_resnet32 \
  --grid=method=dense,dynconv --grid=budget=0.3,0.5,0.7 \
  --grid=dense:width_multiplier=0.55,0.71,0.84,1 --grid=seed=0,1,2 \
  --checkpoint=latest --results=results/cifar10_resnet32
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from absl import flags, logging

from dynconv_jax.cli import config_flags, processes, program, sweep_runs
from dynconv_jax.cli.grid import Run, make_runs
from dynconv_jax.cli.predictions import keep_predictions
from dynconv_jax.cli.results_table import check_table, write_result
from dynconv_jax.cli.sweep_checks import (
  check_kept,
  check_starts,
  kept_flags,
  place,
)
from dynconv_jax.cli.sweep_progress import Progress
from dynconv_jax.cli.sweep_runs import SPLIT, TABLE, TRAINED, read_rows
from dynconv_jax.files import locked, write_atomic
from dynconv_jax.plotting.results import read_results
from dynconv_jax.plotting.tradeoff import plot_results
from dynconv_jax.training import inputs
from dynconv_jax.training import workdir as workdir_lib
from dynconv_jax.training.config import operational_options, to_flags

_GRID = flags.DEFINE_multi_string(
  'grid',
  None,
  '[METHOD:]FLAG=VALUE,VALUE,...; repeat it for each flag.',
  required=True,
)
_RESULTS = flags.DEFINE_string(
  'results', None, 'Folder for results.csv and the figures.', required=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Folder for the workdirs of all runs; by default workdir/NAME for '
  'results/NAME.',
)
_PARALLEL = flags.DEFINE_integer(
  'parallel',
  1,
  'Number of runs at a time, each on its share of the cores.',
  lower_bound=1,
)
_ENGINE = flags.DEFINE_enum(
  'engine',
  'local',
  ['local', 'ray'],
  'Where runs execute: in local processes or on a Ray cluster.',
)
_RAY_ADDRESS = flags.DEFINE_string(
  'ray_address',
  'auto',
  'HOST:PORT of the Ray cluster. auto: RAY_ADDRESS, or else the cluster of '
  'this machine.',
)
_RAY_CPUS = flags.DEFINE_float(
  'ray_cpus', 1, 'CPUs per run on Ray.', lower_bound=0
)
_RAY_GPUS = flags.DEFINE_float(
  'ray_gpus',
  0,
  'GPUs per run on Ray; with 0.5, two runs share one.',
  lower_bound=0,
)
_RAY_RETRIES = flags.DEFINE_integer(
  'ray_retries',
  3,
  'How often a run on Ray resumes after its node was lost.',
  lower_bound=0,
)
_CHECKPOINT = flags.DEFINE_enum(
  'checkpoint', 'best', ['best', 'latest'], 'Checkpoint to evaluate.'
)
_RECIPE = flags.DEFINE_string(
  'recipe',
  '',
  'Value of the column `recipe`, which distinguishes curves of several sweeps.',
)
_LATENCY_BATCH_SIZE = flags.DEFINE_integer(
  'latency_batch_size',
  1,
  'Batch size for measuring latency; 0: do not measure it.',
  lower_bound=0,
)
config_flags.define()

# A function like `processes.run_jobs`, with the additional argument `alone`:
# whether to run jobs one at a time with nothing else.
_Engine = Callable[..., dict[str, str]]


def main(argv: Sequence[str]) -> None:
  """Runs the grid and draws the figures. Exits with 1 if a run failed."""
  if len(argv) > 1:
    raise ValueError(f'unknown arguments: {" ".join(argv[1:])}')
  logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))
  results = pathlib.Path(_RESULTS.value).expanduser()
  root = pathlib.Path(_WORKDIR.value or f'workdir/{results.absolute().name}')
  root = root.expanduser()
  table = results / TABLE
  runs = _check(results, root)
  check_table(table)
  try:
    with _engine(root) as run_jobs:
      failures = _train(runs, root, table, run_jobs)
      if _LATENCY_BATCH_SIZE.value:
        failures |= _measure(runs, root, table, run_jobs)
  except processes.Interrupted as interrupted:
    print(
      f'{interrupted}: progress is saved in {root}; the same command resumes '
      'from there',
      file=sys.stderr,
    )
    sys.exit(128 + interrupted.signal)
  if table.exists():
    print(f'wrote {table}')
    rows = read_results(table)
    rows = [row for row in rows if row.get('split') in (None, '', SPLIT)]
    for png, svg in plot_results(rows, results) if rows else ():
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
  """Returns the runs.

  Raises:
    ValueError: flags or workdirs are invalid. The message lists all errors.
  """
  errors, runs = [], []
  if _LATENCY_BATCH_SIZE.value:
    program.require_checkout(
      'measuring latency (disable it with --latency_batch_size=0)'
    )
  local = _ENGINE.value == 'local'
  for flag in (_RAY_ADDRESS, _RAY_CPUS, _RAY_GPUS, _RAY_RETRIES):
    if local and flag.present:
      errors.append(f'--{flag.name} needs --engine=ray')
  if not local and _PARALLEL.present:
    errors.append(
      '--parallel needs --engine=local; on Ray, --ray_cpus and --ray_gpus '
      'determine how many runs fit'
    )
  if results.suffix == '.csv':
    errors.append(
      f'results must be a folder, which will contain {TABLE}; got {results}'
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
      check_kept(run, results)
    except ValueError as error:
      errors.append(str(error))
  errors += check_starts(runs, root)
  if errors:
    raise ValueError('; '.join(errors))
  return runs


@contextlib.contextmanager
def _engine(root: pathlib.Path) -> Iterator[_Engine]:
  """Yields a function that runs jobs, and locks the folder of the workdirs."""
  if _ENGINE.value == 'ray':
    from dynconv_jax.cli import ray_jobs

    with (
      ray_jobs.connected(
        _RAY_ADDRESS.value,
        cpus=_RAY_CPUS.value,
        gpus=_RAY_GPUS.value,
        retries=_RAY_RETRIES.value,
      ) as cluster,
      locked(root, 'a sweep'),
    ):
      yield cluster.run_jobs
    return
  with locked(root, 'a sweep') as lock:
    yield lambda jobs, watch, alone=False: processes.run_jobs(
      jobs, 1 if alone else _PARALLEL.value, watch, pass_fds=[lock]
    )


def _train(
  runs: Sequence[Run],
  root: pathlib.Path,
  table: pathlib.Path,
  run_jobs: _Engine,
) -> dict[str, str]:
  """Trains and evaluates unfinished runs and returns the errors by run."""
  rows = read_rows(table)
  left = [run for run in runs if not _finished(run, root, rows)]
  # Processes that prepare the same dataset at the same time would conflict.
  for data in dict.fromkeys(run.config.data for run in left):
    if inputs.open_splits(data).test is None:
      raise ValueError(
        'a sweep evaluates its runs on the test split, and '
        f'{data.dataset} with test_split={data.test_split} has none; set '
        '--test_split'
      )
  for run in runs:
    row = {'run': run.name, 'split': SPLIT}
    if run not in left:
      if _RECIPE.present and _recipe(run) != rows[run.name].get('recipe', ''):
        write_result(table, {**row, 'recipe': _recipe(run)})
    elif (root / run.name / TRAINED).exists():
      # The run is measured again. If it resumes, the marker is removed last, in
      # case the sweep is interrupted here.
      if run.name in rows:
        latency = [n for n in rows[run.name] if n.startswith('latency_')]
        write_result(table, row | dict.fromkeys(latency, ''))
      if _other_epochs(run, root):
        (root / run.name / TRAINED).unlink()
  places = {place(root / run.name): run.name for run in runs}
  jobs = {}
  for run in left:
    start, folder = run.config.optimization, root / run.name
    sources = (start.init_from, start.distill_from)
    needs = {places.get(place(source)) for source in sources if source}
    columns = dict(run.settings)
    if recipe := _recipe(run):
      columns['recipe'] = recipe
    jobs[run.name] = processes.Job(
      functools.partial(
        sweep_runs.train_and_evaluate,
        folder,
        run.config.to_flags(),
        _CHECKPOINT.value,
        columns,
      ),
      folder / 'sweep.log',
      tuple(needs - {None}),
      functools.partial(_record, run, folder, table),
    )
  logging.info(
    '%d runs, %d of them already finished', len(runs), len(runs) - len(left)
  )
  configs = {root / run.name: run.config for run in left}
  with Progress('trained', configs, len(runs) - len(left)) as progress:
    ended = run_jobs(jobs, progress.show)
  return {name: error for name, error in ended.items() if error}


def _finished(
  run: Run, root: pathlib.Path, rows: Mapping[str, Mapping[str, str]]
) -> bool:
  """Returns whether a run is trained, and its row is of this checkpoint."""
  if run.name not in rows or not (root / run.name / TRAINED).exists():
    return False
  # Tables of earlier versions do not name the checkpoint.
  checkpoint = rows[run.name].get('checkpoint') or _CHECKPOINT.value
  return checkpoint == _CHECKPOINT.value and not _other_epochs(run, root)


def _other_epochs(run: Run, root: pathlib.Path) -> bool:
  """Returns whether a run is trained for another number of epochs."""
  folder = root / run.name
  return (folder / TRAINED).exists() and (
    run.config.optimization.epochs
    != workdir_lib.read_config(folder).optimization.epochs
  )


def _recipe(run: Run) -> str:
  return ', '.join(filter(None, (_RECIPE.value, run.recipe)))


def _record(
  run: Run, folder: pathlib.Path, table: pathlib.Path, row: sweep_runs.Row
) -> None:
  """Adds a run to the table, and its flags and predictions next to it.

  Raises:
    ValueError: another sweep has added a run of this name that differs.
  """
  check_kept(run, table.parent)
  # Leave out paths of this machine.
  places = operational_options(run.config)
  config = workdir_lib.resolve(run.config, folder)
  kept = {k: v for k, v in config.flat().items() if k not in places}
  write_atomic(kept_flags(table.parent, run), to_flags(kept))
  keep_predictions(folder, SPLIT, table.parent)
  write_result(table, row)


def _measure(
  runs: Sequence[Run],
  root: pathlib.Path,
  table: pathlib.Path,
  run_jobs: _Engine,
) -> dict[str, str]:
  """Measures latency, one run at a time, and returns the errors by run."""
  rows, batch_size = read_rows(table), _LATENCY_BATCH_SIZE.value
  jobs = {
    run.name: processes.Job(
      functools.partial(
        sweep_runs.measure_latency,
        root / run.name,
        run.config.method.record.gated,
        _CHECKPOINT.value,
        batch_size,
      ),
      root / run.name / 'sweep.log',
      finish=functools.partial(write_result, table),
    )
    for run in runs
    if run.name in rows
    and not (
      rows[run.name].get('latency_ms')
      and rows[run.name].get('latency_batch_size') == str(batch_size)
    )
  }
  with Progress(
    'timed', dict.fromkeys(jobs), len(runs) - len(jobs)
  ) as progress:
    ended = run_jobs(jobs, progress.show, alone=True)
  rows = read_rows(table).values()
  if len({row.get('latency_machine') for row in rows} - {None, ''}) > 1:
    logging.warning('%s mixes latencies from several machines', table)
  return {name: f'latency: {error}' for name, error in ended.items() if error}


if __name__ == '__main__':
  program.run(main)
