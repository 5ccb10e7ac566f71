"""Tables of `dynconv compare`, as CSV and Markdown."""

from __future__ import annotations

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dynconv_jax.files import write_atomic


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes rows with the same columns; floats have six digits."""
  text = io.StringIO(newline='')
  writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
  writer.writeheader()
  for row in rows:
    writer.writerow(
      {k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()}
    )
  write_atomic(path, text.getvalue())


def to_markdown(
  rows: Sequence[Mapping[str, Any]],
  *,
  baseline: str,
  num_examples: int,
  resamples: int,
) -> str:
  """Returns groups of runs and their differences from a baseline as Markdown.

  Args:
    rows: one per group: group, runs (their number), accuracy (a fraction),
      gmacs_mean (per image, or None), and, except for the baseline, difference
      (in points) and p. Accuracy and difference have columns _low and _high.
    baseline: name of the group that the others are compared with.
    num_examples: number of examples that all groups share.
    resamples: number of resamples of the bootstrap.
  """
  lines = [
    '| | runs | accuracy, % | GMACs | '
    f'difference from {baseline}, points | p |',
    '|---|---|---|---|---|---|',
  ]
  for row in rows:
    compared = 'difference' in row
    cells = (
      row['group'],
      row['runs'],
      accuracy_text(row),
      gmacs_text(row),
      difference_text(row) if compared else '',
      p_text(row['p']) if compared else '',
    )
    lines.append(f'| {" | ".join(map(str, cells))} |')
  return '\n'.join(
    [
      *lines,
      '',
      f'{num_examples} examples. Brackets are 95 % intervals of a paired '
      f'bootstrap with {resamples} resamples of examples and seeds. '
      'Intervals of a single run apply to that network only. p is not '
      'corrected for the number of rows.',
      '',
    ]
  )


def accuracy_text(row: Mapping[str, Any]) -> str:
  """Returns the accuracy and its interval in percent."""
  mean, low, high = (100 * row[f'accuracy{e}'] for e in ('', '_low', '_high'))
  return f'{mean:.1f} [{low:.1f}, {high:.1f}]'


def difference_text(row: Mapping[str, Any]) -> str:
  """Returns the difference and its interval in points."""
  mean, low, high = (row[f'difference{e}'] for e in ('', '_low', '_high'))
  return f'{mean:+.1f} [{low:+.1f}, {high:+.1f}]'


def gmacs_text(row: Mapping[str, Any]) -> str:
  """Returns the mean GMACs per image; empty if they are not known."""
  mean = row['gmacs_mean']
  return '' if mean is None else f'{mean:.4f}'


def p_text(p: float) -> str:
  """Returns a p-value with two digits."""
  return f'{p:.2g}' if p < 0.1 else f'{p:.2f}'
