"""Metric writers and progress reporting."""

from __future__ import annotations

import contextlib
import json
import pathlib
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epy

from dynconv_jax import extras
from dynconv_jax.data.augment import denormalize
from dynconv_jax.files import write_atomic
from dynconv_jax.masks import ExecutionMask, resize_nearest
from dynconv_jax.training import workdir as workdir_lib
from dynconv_jax.training.config import Config

extras.require('train', 'tensorboardX', 'tqdm')

import tqdm  # noqa: E402

# Imported lazily: tensorboardX imports PyTorch if installed, which takes
# seconds.
with epy.lazy_imports():
  from tensorboardX import record_writer, summary
  from tensorboardX.proto import event_pb2


class Records:
  """Writer of metrics to metrics.jsonl, TensorBoard, and Weights & Biases.

  Events are written synchronously. The thread of tensorboardX's SummaryWriter
  would end when the disk is full, and other threads would then wait for it
  forever.
  """

  def __init__(self, workdir: pathlib.Path, step: int, *, wandb: str = ''):
    """Opens the writers and drops rows after `step`, which will be redone.

    Args:
      workdir: the run's folder; must exist.
      step: number of steps done.
      wandb: Weights & Biases project; empty: none.

    Raises:
      OSError: the disk is full, or Weights & Biases cannot be reached.
    """
    self._path = workdir / workdir_lib.METRICS_FILE
    rows = workdir_lib.read_metrics(workdir)
    write_atomic(
      self._path,
      ''.join(json.dumps(row) + '\n' for row in rows if row['step'] <= step),
    )
    folder = workdir / 'tensorboard'
    folder.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:  # Closes the writer on errors.
      self._events = record_writer.RecordWriter(
        f'{folder}/events.out.tfevents.{time.time_ns()}.{socket.gethostname()}'
      )
      stack.callback(self._events.close)
      self._add(0, file_version='brain.Event:2')
      # Makes TensorBoard drop later steps of earlier sessions too.
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._add(step + 1, session_log=start)
      self._events.flush()
      self._wandb = _WandB(workdir, wandb) if wandb else None
      stack.pop_all()

  def __enter__(self) -> Records:
    return self

  def __exit__(self, kind, *unused) -> None:
    if self._wandb is not None:
      self._wandb.finish(failed=kind is not None)
    # Every row has already been flushed or has raised an error.
    with contextlib.suppress(OSError):
      self._events.close()

  def write(self, row: Mapping[str, Any]) -> None:
    """Appends a row with 'step', 'split', and metrics.

    Raises:
      OSError: the disk is full.
    """
    with self._explained():
      line = json.dumps(row, allow_nan=False) + '\n'
      with self._path.open('a') as file:
        file.write(line)
      scalars = {}
      for name, value in row.items():
        if isinstance(value, float):
          scalars[f'{row["split"]}/{name}'] = value
        elif isinstance(value, Mapping):
          scalars |= {f'{name}/{key}': part for key, part in value.items()}
      for name, value in scalars.items():
        self._add(row['step'], summary=summary.scalar(name, value))
      self._events.flush()
    if self._wandb is not None:
      self._wandb.write(row['step'], scalars)

  def show_masks(
    self,
    step: int,
    images: jax.Array,
    masks: Sequence[ExecutionMask],
    normalization: str = 'imagenet',
  ) -> None:
    """Logs an image that shows each input next to its ponder cost.

    Args:
      step: training step.
      images: float32[N, H, W, 3], normalized.
      masks: execution masks of these images.
      normalization: normalization of the images, one of
        `augment.NORMALIZATIONS`.
    """
    if not masks:
      return
    shape = images.shape[1:3]
    cost = np.mean(
      [resize_nearest(np.asarray(m.hard), shape) for m in masks], axis=0
    )
    pictures = np.asarray(denormalize(images, normalization))
    shown = np.repeat(cost[..., None] * 255, 3, axis=-1).astype(np.uint8)
    rows = np.concatenate([pictures, shown], axis=2)
    image = rows.reshape(-1, *rows.shape[2:])
    with self._explained():
      self._add(step, summary=summary.image('masks', image, dataformats='HWC'))
      self._events.flush()
    if self._wandb is not None:
      self._wandb.write(step, {}, masks=image)

  def _add(self, step: int, **content) -> None:
    event = event_pb2.Event(wall_time=time.time(), step=step, **content)
    self._events.write(event.SerializeToString())

  @contextlib.contextmanager
  def _explained(self):
    try:
      yield
    except OSError as error:
      raise OSError(
        f'cannot write metrics to {self._path.parent} ({error}); '
        'earlier checkpoints remain'
      ) from error


class Muted:
  """No-op replacement for `Records` and `Progress` in secondary processes."""

  def __init__(self, *unused, **options):
    pass

  def __enter__(self) -> Muted:
    return self

  def __exit__(self, *unused) -> None:
    pass

  def __getattr__(self, name):
    return lambda *unused: None


class _WandB:
  """A Weights & Biases run, which is continued when training resumes."""

  def __init__(self, workdir: pathlib.Path, project: str):
    import wandb  # Optional extra; `Config.check` requires it.

    id_file = workdir / 'wandb_id.txt'
    if not id_file.exists():
      write_atomic(id_file, secrets.token_hex(8))
    self._image = wandb.Image
    try:
      self._run = wandb.init(
        project=project,
        name=workdir.resolve().name,
        id=id_file.read_text(),
        resume='allow',
        dir=workdir,
        config=workdir_lib.read_texts(workdir),
      )
    except wandb.Error as error:
      raise OSError(f'wandb={project}: {error}') from error
    # Redone steps are logged twice, but W&B's own step can only increase.
    self._run.define_metric('*', step_metric='step')

  def write(self, step: int, scalars: Mapping[str, float], **images) -> None:
    shown = {name: self._image(image) for name, image in images.items()}
    self._run.log({**scalars, **shown, 'step': step})

  def finish(self, *, failed: bool) -> None:
    self._run.finish(exit_code=int(failed))


class Progress:
  """Progress bar on a terminal, log lines elsewhere."""

  # Seconds between log lines.
  interval = 30.0

  def __init__(self, config: Config, steps_per_epoch: int, step: int):
    """Initializes the display.

    Args:
      config: the run's configuration.
      steps_per_epoch: number of steps per epoch.
      step: step at which this session starts.
    """
    self._config = config
    self._steps_per_epoch = steps_per_epoch
    self._total = config.optimization.epochs * steps_per_epoch
    self._first = self._last = step
    self._start = self._shown = time.monotonic()
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=self._total, initial=step, unit='step', dynamic_ncols=True
      )

  def update(self, step: int, metrics: Mapping[str, float]) -> None:
    """Shows the current step and metrics.

    Args:
      step: number of steps done.
      metrics: means over the current epoch so far.
    """
    elapsed = time.monotonic() - self._start
    rate = (step - self._first) / max(elapsed, 1e-9)
    parts = [
      f'{rate * self._config.optimization.batch_size:.0f} images/s',
      f'loss {metrics["loss"]:.3f}',
      f'accuracy {metrics["accuracy"]:.3f}',
    ]
    if 'executed_fraction' in metrics:
      text = f'executed {metrics["executed_fraction"]:.3f}'
      # During warmup, the current target.
      target = self._config.method.target(step / self._total)
      if target is not None:
        text += f' of budget {float(target):.3g}'
      parts.append(text)
    if self._bar is not None:
      self._bar.set_postfix_str(', '.join(parts), refresh=False)
      self._bar.update(step - self._last)
    elif time.monotonic() - self._shown >= self.interval or step == self._total:
      self._shown = time.monotonic()
      left = (self._total - step) / max(rate, 1e-9)
      logging.info(
        'step %d/%d, %s, %.0f s left',
        step,
        self._total,
        ', '.join(parts),
        left,
      )
    self._last = step

  def validated(self, epoch: int, summary: Mapping[str, Any]) -> None:
    """Shows the validation metrics of an epoch."""
    text = f'epoch {epoch}: validation accuracy {summary["accuracy"]:.3f}'
    if 'executed_fraction' in summary:
      text += f', executed fraction {summary["executed_fraction"]:.3f}'
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    else:
      logging.info('%s', text)

  def close(self) -> None:
    """Closes the progress bar."""
    if self._bar is not None:
      self._bar.close()
