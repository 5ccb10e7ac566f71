"""CSV files of predictions, with one row per example."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from dynconv_jax.files import write_atomic
from dynconv_jax.plotting.results import read_results
from dynconv_jax.training import workdir
from dynconv_jax.training.config import read_flags
from dynconv_jax.training.evaluation import Evaluation

_NUMBERS = ('macs', 'object_share')
# Characters of splits that file names and globs do not allow everywhere.
_FILE_NAMES = str.maketrans({'[': '_', ':': '..', '%': 'pct', ']': '', ' ': ''})


@dataclasses.dataclass(frozen=True)
class Predictions:
  """The contents of a prediction file that `compare` needs.

  Attributes:
    path: path of the file.
    labels: label (class name) by example name.
    correct: bool[n], in the order of `labels`.
    macs: float[n], or None if the file has no MACs.
    object_share: float[n], fraction of the image that the object covers, or
      None if the file has no object shares.
  """

  path: pathlib.Path
  labels: dict[str, str]
  correct: np.ndarray
  macs: np.ndarray | None
  object_share: np.ndarray | None


def split_stem(split: str, stochastic: bool = False) -> str:
  """Returns the part of file names that identifies a split.

  It differs for each split: 'test[:10%]' gives 'test_..10pct'.

  Args:
    split: a split, such as 'test' or 'train[:3]'.
    stochastic: whether gates sampled their decisions.
  """
  stem = split.translate(_FILE_NAMES)
  stem = ''.join(c if c.isalnum() or c in '_.+-' else '_' for c in stem)
  return stem + '_stochastic' * stochastic


def predictions_file(split: str) -> str:
  """Returns the name of a split's prediction file in a workdir.

  Args:
    split: a split or its `split_stem`.
  """
  return f'predictions_{split_stem(split)}.csv'


def keep_predictions(
  folder: pathlib.Path, split: str, results: pathlib.Path
) -> None:
  """Copies a run's predictions to a results folder.

  The copy is predictions/RUN.csv.gz. `compare` reads it without the workdir.

  Args:
    folder: workdir of the run. Its name is the name of the run.
    split: split of the predictions.
    results: folder of the results table.

  Raises:
    OSError: the predictions do not exist, or the copy cannot be written.
  """
  content = (folder / predictions_file(split)).read_bytes()
  copy = results / 'predictions' / f'{folder.name}.csv.gz'
  # Without a time, the same predictions give the same file.
  write_atomic(copy, gzip.compress(content, mtime=0))


def read_seed(path: pathlib.Path) -> int | None:
  """Returns the seed of the run that a prediction file belongs to, or None."""
  try:
    run = path.name.removesuffix('.gz').removesuffix('.csv')
    flags = path.parent.parent / 'flags' / f'{run}.flags'
    if flags.exists():  # The file is in a results folder.
      return int(read_flags(flags.read_text())['seed'])
    return int(workdir.read_texts(path.parent)['seed'])
  except (FileNotFoundError, KeyError):
    return None


def write_predictions(
  path: str | os.PathLike,
  result: Evaluation,
  names: Sequence[str],
  class_names: Sequence[str],
) -> None:
  """Writes a prediction file with one row per example.

  The columns are name, label and prediction (class names), correct (0 or 1),
  and cross_entropy. If known, there are also macs, object_share, and
  `Evaluation.localization`. Cells are empty for images without a visible
  object or background.

  Args:
    path: path of the CSV file.
    result: the evaluation.
    names: names of all examples, including skipped ones.
    class_names: class names in label order.

  Raises:
    OSError: the file cannot be written. An existing file is kept.
  """
  columns = {
    'name': [names[i] for i in result.index],
    'label': [class_names[i] for i in result.label],
    'prediction': [class_names[i] for i in result.prediction],
    'correct': result.correct.astype(int),
    'cross_entropy': [f'{value:.6g}' for value in result.cross_entropy],
  }
  if result.macs.size:
    columns['macs'] = [f'{value:.0f}' for value in result.macs]
  recall, background = result.localization
  for name, values in (
    ('object_share', result.object_share),
    ('object_recall', recall),
    ('background_density', background),
  ):
    if values.size:
      columns[name] = ['' if np.isnan(v) else f'{v:.6g}' for v in values]
  text = io.StringIO(newline='')
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(columns)
  writer.writerows(zip(*columns.values(), strict=True))
  write_atomic(path, text.getvalue())


def read_predictions(path: str | os.PathLike) -> Predictions:
  """Reads a prediction file.

  Args:
    path: path of the CSV file.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: it is not a prediction file, or it lists an example twice.
  """
  path = pathlib.Path(path)
  rows = read_results(path)
  needed = ('name', 'label', 'correct')
  if missing := [name for name in needed if name not in rows[0]]:
    raise ValueError(
      f'{path} is not a prediction file: it lacks {", ".join(missing)}'
    )
  labels = {row['name']: row['label'] for row in rows}
  if len(labels) < len(rows):
    names = [row['name'] for row in rows]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'{path} lists the example {twice!r} twice')
  if wrong := {row['correct'] for row in rows} - {'0', '1'}:
    raise ValueError(f'{path}: correct must be 0 or 1; got {min(wrong)!r}')
  numbers = {}
  for name in _NUMBERS:
    try:
      values = [float(row.get(name) or 'nan') for row in rows]
    except ValueError as error:
      raise ValueError(f'{path}, column {name!r}: {error}') from error
    numbers[name] = None if np.isnan(values).any() else np.array(values)
  correct = np.array([row['correct'] == '1' for row in rows])
  return Predictions(path, labels, correct, **numbers)
