"""Progress display of a sweep."""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

import tqdm
from absl import logging

from dynconv_jax.training import workdir as workdir_lib
from dynconv_jax.training.config import Config


class Progress:
  """Display of finished runs, running runs, and the remaining time.

  Shows a status line on a terminal and writes log lines elsewhere.
  """

  # Seconds between polls of the runs, and between log lines.
  look, interval = 1.0, 60.0

  def __init__(
    self,
    what: str,
    runs: Mapping[pathlib.Path | str, Config | None],
    before: int,
  ):
    """Initializes the display.

    Args:
      what: what is done with each run, such as 'trained'.
      runs: the remaining runs: configurations by workdir, or None by name if
        the progress within runs is unknown.
      before: number of runs that were already done.
    """
    self._what, self._before = what, before
    self._runs = {
      pathlib.Path(path).name: (path, c) for path, c in runs.items()
    }
    self._start = self._logged = time.monotonic()
    self._looked, self._ended = float('-inf'), -1
    self._first = {name: self._epochs(name) for name in self._runs}
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=before + len(runs),
        initial=before,
        bar_format='{n_fmt}/{total_fmt} |{bar:20}| {desc}',
        dynamic_ncols=True,
      )

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *unused) -> None:
    if self._bar is not None:
      self._bar.close()

  def show(self, running: Sequence[str], ended: Mapping[str, str]) -> None:
    """Updates the display, at a limited rate.

    Args:
      running: names of the running runs.
      ended: errors of the ended runs by name; '' for success.
    """
    now, news = time.monotonic(), len(ended) != self._ended
    if not news and now - self._looked < self.look:
      return
    self._looked, self._ended = now, len(ended)
    due = news or now - self._logged >= self.interval
    if self._bar is None and not due:
      return
    text = self.line(running, ended, now - self._start)
    if self._bar is not None:
      self._bar.n = self._before + len(ended)
      self._bar.set_description_str(text.split(', ', 1)[1])
    else:
      self._logged = now
      logging.info('%s', text)

  def line(
    self, running: Sequence[str], ended: Mapping[str, str], seconds: float
  ) -> str:
    """Returns '3/18 trained, 1 failed, running: NAME (epoch 2/28), 9 min left'.

    Args:
      running: names of the running runs.
      ended: errors of the ended runs by name; '' for success.
      seconds: seconds since the start.
    """
    failed = sum(map(bool, ended.values()))
    done = self._before + len(ended) - failed
    parts = [f'{done}/{self._before + len(self._runs)} {self._what}']
    parts.append(f'{failed} failed')
    names, left = [], {name: self._left(name) for name in self._runs}
    whole = sum(left.values())
    left |= dict.fromkeys(ended, 0.0)
    for name in running:
      _, config = self._runs[name]
      if config is None:
        names.append(name)
        continue
      epochs = self._epochs(name)
      names.append(f'{name} (epoch {epochs}/{config.optimization.epochs})')
      left[name] = min(left[name], 1 - epochs / config.optimization.epochs)
    if names:
      parts.append(f'running: {", ".join(names)}')
    done = whole - sum(left.values())
    if names and done:
      parts.append(f'{_duration(seconds * sum(left.values()) / done)} left')
    return ', '.join(parts)

  def _left(self, name: str) -> float:
    """Returns the fraction of a run that remained at the start."""
    _, config = self._runs[name]
    return 1 - self._first[name] / config.optimization.epochs if config else 1.0

  def _epochs(self, name: str) -> int:
    """Returns the number of epochs that a run has done."""
    path, config = self._runs[name]
    if config is None:
      return 0
    rows = workdir_lib.read_metrics(pathlib.Path(path))
    return max((row.get('epoch', 0) for row in rows), default=0)


def _duration(seconds: float) -> str:
  """Returns a duration as '2 h 05 min', '12 min', or '40 s'."""
  minutes = round(seconds / 60)
  if seconds < 99:
    return f'{seconds:.0f} s'
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes:02} min' if hours else f'{minutes} min'
