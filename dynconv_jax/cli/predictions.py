"""What a run said of each example: a CSV file of one row an example."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from dynconv_jax.files import write_atomic
from dynconv_jax.plotting.results import read_results
from dynconv_jax.training.evaluation import Evaluation

_NUMBERS = ('macs', 'object_share')


@dataclasses.dataclass(frozen=True)
class Predictions:
  """What `compare` needs of a file of predictions.

  Attributes:
    path: of the file.
    labels: class name by the example's name.
    correct: bool[n], in order of `labels`.
    macs: float[n]; None where the file has none.
    object_share: float[n], share of the image that the object covers; None
      where the file has none.
  """

  path: pathlib.Path
  labels: dict[str, str]
  correct: np.ndarray
  macs: np.ndarray | None
  object_share: np.ndarray | None


def split_stem(split: str, stochastic: bool = False) -> str:
  """Returns the part of a file's name that says which split it is of.

  Args:
    split: such as 'test' or 'train[:3]'.
    stochastic: whether gates sampled.
  """
  stem = ''.join(c if c.isalnum() else '_' for c in split)
  return stem + '_stochastic' * stochastic


def predictions_file(split: str) -> str:
  """Returns the name of a split's file in a workdir.

  Args:
    split: as of `split_stem`.
  """
  return f'predictions_{split_stem(split)}.csv'


def write_predictions(
  path: str | os.PathLike,
  result: Evaluation,
  names: Sequence[str],
  class_names: Sequence[str],
) -> None:
  """Writes one row an example, whole or not at all.

  Columns: name, label and prediction (class names), correct (0 or 1),
  cross_entropy, and where known macs, object_share, and the means over blocks
  of object_recall and background_density, empty where no object is seen.

  Args:
    path: of the CSV file.
    result: of the evaluation.
    names: of all examples, those that were left out included.
    class_names: in label order.

  Raises:
    OSError: the file cannot be written; a former one stays as it was.
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
  for name in ('object_share', 'object_recall', 'background_density'):
    values = getattr(result, name)
    if values.size:
      means = values.reshape(len(values), -1).mean(1)
      columns[name] = ['' if np.isnan(v) else f'{v:.6g}' for v in means]
  text = io.StringIO(newline='')
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(columns)
  writer.writerows(zip(*columns.values(), strict=True))
  write_atomic(path, text.getvalue())


def read_predictions(path: str | os.PathLike) -> Predictions:
  """Returns the predictions of a file.

  Args:
    path: of the file.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is not a file of predictions, or names an example twice.
  """
  path = pathlib.Path(path)
  rows = read_results(path)
  needed = ('name', 'label', 'correct')
  if missing := [name for name in needed if name not in rows[0]]:
    raise ValueError(
      f'{path} is no file of predictions: it lacks {", ".join(missing)}'
    )
  labels = {row['name']: row['label'] for row in rows}
  if len(labels) < len(rows):
    names = [row['name'] for row in rows]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f'{path} names the example {twice!r} twice')
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
