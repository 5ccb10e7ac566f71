"""Checks of a sweep's runs against their sources and earlier results."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from dynconv_jax.cli.grid import Run
from dynconv_jax.training import workdir as workdir_lib
from dynconv_jax.training.config import (
  Config,
  all_options,
  operational_options,
  to_flags,
)


def check_starts(runs: Sequence[Run], root: pathlib.Path) -> list[str]:
  """Returns an error for each folder to start from that is not a run's.

  Runs that have started, and folders of runs of the sweep, are not checked.

  Args:
    runs: runs of the sweep.
    root: folder of their workdirs.
  """
  places, errors = {place(root / run.name) for run in runs}, {}
  for run in runs:
    if (root / run.name / workdir_lib.FLAGS_FILE).exists():
      continue
    for name in ('init_from', 'distill_from'):
      source = getattr(run.config.optimization, name)
      if source and place(source) not in places:
        try:
          workdir_lib.read_texts(source)
        except (FileNotFoundError, ValueError) as error:
          errors.setdefault(f'{name}: {error}', run.name)
  return [f'{error} ({name})' for error, name in errors.items()]


def check_kept(run: Run, results: pathlib.Path) -> None:
  """Raises ValueError if the results have a run of this name that differs.

  Epochs and locations of files may differ.

  Args:
    run: a run of the sweep.
    results: folder of the table, with `flags/` of earlier runs.
  """
  kept = kept_flags(results, run)
  if not kept.exists():
    return
  # The kept flags lack locations of files.
  known, mine = all_options(), run.config.flat()
  places = {
    n: option.default for n, option in known.items() if option.operational
  }
  places |= {n: mine[n] for n in operational_options(run.config)}
  try:
    other = Config.from_flags(to_flags(places) + kept.read_text())
  except ValueError as error:
    raise ValueError(f'{kept}: {error}. Choose another --results') from error
  config = run.config
  if config.data.normalization == 'auto':
    config = config.replace(normalization=other.data.normalization)
  if differing := _comparable(config).differing(_comparable(other)):
    raise ValueError(
      f'{results} has another run {run.name}; given, not in the results: '
      f'{"; ".join(differing)}. Choose another --results, or add a --grid of '
      'what differs, which names the runs'
    )


def kept_flags(results: pathlib.Path, run: Run) -> pathlib.Path:
  """Returns the file that keeps the flags of a run next to the table."""
  return results / 'flags' / f'{run.name}.flags'


def _comparable(config: Config) -> Config:
  """Returns the configuration without epochs and the folders of runs."""
  start = config.optimization
  names = {
    name: os.path.basename(getattr(start, name).rstrip('/'))
    for name in ('init_from', 'distill_from', 'pretrained')
  }
  return config.replace(epochs=1, **names)


def place(folder: str | os.PathLike) -> str:
  """Returns the path of a workdir, by which runs are compared."""
  return os.path.realpath(os.path.expanduser(folder))
