"""Training of a network, from data and model to the training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging
from flax import nnx

from dynconv_jax import distributed, interop
from dynconv_jax.data import sources
from dynconv_jax.data.source import DataSource
from dynconv_jax.models import registry
from dynconv_jax.training import (
  checkpoints,
  initialization,
  inputs,
  schedules,
  selection,
)
from dynconv_jax.training import evaluation as evaluation_lib
from dynconv_jax.training import state as state_lib
from dynconv_jax.training import workdir as workdir_lib
from dynconv_jax.training.config import Config
from dynconv_jax.training.records import Muted, Progress, Records


class Interrupted(Exception):
  """A signal ended the run. The state is saved.

  Attributes:
    signal: the signal number.
  """

  def __init__(self, received: signal.Signals, message: str):
    super().__init__(f'{received.name}: {message}')
    self.signal = int(received)


def train(
  config: Config,
  workdir: str | os.PathLike,
  *,
  model: registry.Factory | None = None,
  data: DataSource | sources.Splits | None = None,
  masks: Callable[[state_lib.Batch], Mapping[str, jax.Array]] | None = None,
) -> dict[str, Any]:
  """Trains a network, resuming from the last checkpoint if there is one.

  After `distributed.start` has connected several processes, each of them must
  call this function with the same arguments. They then train together.

  Args:
    config: configuration of the run.
    workdir: the run's folder, created if necessary. It contains flags.txt,
      metrics.jsonl, checkpoints/, and TensorBoard events.
    model: factory of the network (see `models.registry`) that replaces
      `config.model.model`.
    data: data source or opened splits that replace `config.data.dataset`.
    masks: function from a batch to masks by block name that replace the
      decisions of the gates in training, but not in evaluation. Batches of
      scenes have an 'object_mask'.

  Returns:
    A summary: 'step', the metrics 'train' and (with a validation split)
    'validation' of the last epoch, 'best_step', 'best_accuracy', the 'seconds'
    of this session, and the number of 'skipped' images.

  Raises:
    ValueError: an option is out of range, the workdir or a run to start from
      has a different configuration, the workdir has already done more epochs,
      or the processes have different options.
    ConnectionError: another process of the run ended.
    FloatingPointError: a loss, gradient, weight, or batch statistic is not
      finite. The message names the first one and its step. The last good
      checkpoint remains.
    Interrupted: the process received SIGTERM, SIGINT, or SIGHUP. The state is
      saved.
    OSError: the disk is full (earlier checkpoints remain), another process is
      training in the workdir, or the processes of the run do not share it.
  """
  start = time.monotonic()
  workdir = pathlib.Path(workdir).expanduser()
  if model is not None:
    config = _with_model(config, model)
  with distributed.ending_together(passing=Interrupted):
    config.check(
      len(jax.devices()), factory=model, resumed=checkpoints.exists(workdir)
    )
    config = workdir_lib.resolve(config, workdir)
    workdir_lib.check_flags(workdir, config)
    distributed.check_same(config.to_flags(places=False))
    with distributed.held(workdir, 'training'):
      return _train(config, workdir, model, data, masks, start)


def _train(config, workdir, model, data, masks, start) -> dict[str, Any]:
  """Trains in a locked workdir."""
  method, main = config.method, distributed.is_main()
  mesh = distributed.make_mesh(config.run.fsdp)
  split = distributed.batch_sharding(mesh)

  # Data.
  splits = data
  if not isinstance(data, sources.Splits):
    if main:  # Prepares the dataset if necessary.
      splits = inputs.open_splits(config.data, data)
    distributed.wait()
    if not main:
      splits = inputs.open_splits(config.data, data)
  if splits.train is None:
    raise ValueError('train_split must name examples; got none')
  class_names = splits.train.class_names

  # Model.
  resumed = bool(distributed.gather(checkpoints.exists(workdir))[0])
  network = workdir_lib.build_model(
    config, len(class_names), seed=config.run.seed, factory=model
  )
  start_from = config.optimization
  selection.check_patterns(
    network,
    {
      'frozen': start_from.frozen,
      'frozen_statistics': start_from.frozen_statistics,
      'learning_rate_factors': [
        pattern
        for pattern in start_from.factors
        if pattern not in start_from.frozen
      ],
    },
  )
  initialization.open_gates(network, method)
  if start_from.init_from and not resumed:
    source = workdir_lib.load_run(start_from.init_from, factory=model)
    names = source.class_names
    if names != class_names and len(names) == len(class_names):
      logging.warning(
        'init_from %s has a classifier of as many other classes, which is '
        'kept: %s, not %s',
        *(start_from.init_from, ', '.join(names), ', '.join(class_names)),
      )
    initialization.initialize_from(network, source.model)
  if start_from.pretrained and not resumed:
    path = interop.find_pretrained(start_from.pretrained, config.data.data_dir)
    interop.load_pretrained(network, interop.read_state_dict(path))
  initialization.start_gates(network, method)
  teacher = None
  if start_from.distill_from:
    teacher = workdir_lib.load_teacher(
      config, class_names, distributed.replicated(split)
    )

  # Batches, which may decode the whole dataset.
  batches = inputs.train_batches(config, splits.train, split)
  validation = None
  if splits.validation is not None:
    validation = inputs.eval_batches(
      config.data,
      splits.validation,
      split,
      image_size=config.model.image_size,
      batch_size=config.run.eval_batch_size,
    )
    shown = next(iter(validation))['image'][:8]
  steps_per_epoch = batches.steps_per_epoch
  total_steps = config.optimization.epochs * steps_per_epoch

  # Optimizer.
  schedule = schedules.learning_rate(config.optimization, steps_per_epoch)
  tx = schedules.optimizer(config.optimization, schedule)
  view = nnx.view(network, deterministic=True, use_running_average=True)
  predict = evaluation_lib.make_predict(state_lib.split(view)[0])
  selection.freeze_statistics(
    network, (*start_from.frozen, *start_from.frozen_statistics)
  )
  state = state_lib.create_state(network, tx, config)
  shardings = distributed.weight_shardings(state, mesh)
  state = distributed.spread(state, shardings)
  train_step = state_lib.make_train_step(
    state_lib.split(network)[0],
    tx,
    config,
    steps_per_epoch,
    teacher,
    shardings if config.run.fsdp > 1 else None,
    masks,
  )

  # State: from the last checkpoint, or else from the weights above.
  if main:
    workdir_lib.write_flags(workdir, config)
  keep = config.run.keep_checkpoints
  with checkpoints.open_manager(workdir, keep=keep) as manager:
    step, seconds_before = 0, 0.0
    if resumed:
      state, info, step = checkpoints.restore(manager, checkpoints.like(state))
      checkpoints.drop_after(manager, step)
      batches.set_state(info['batches'])
      seconds_before = info.get('seconds', 0.0)
      logging.info('resumed %s at step %d of %d', workdir, step, total_steps)

    # Loop.
    record, show = (Records, Progress) if main else (Muted, Muted)
    alone = jax.process_count() == 1
    began = time.monotonic() - seconds_before
    with (
      record(workdir, step, wandb=config.run.wandb) as records,
      contextlib.closing(show(config, steps_per_epoch, step)) as progress,
      contextlib.closing(batches),
      _signals() as received,
    ):
      stop = 0
      while step < total_steps and not stop:
        state = train_step(state, next(batches))
        step += 1
        epoch, in_epoch = divmod(step, steps_per_epoch)
        ended = in_epoch == 0
        shows = ended or step % config.run.log_every_steps == 0
        if shows or alone:
          stop = max(distributed.gather(received[0] if received else 0))
        if shows or stop:
          metrics = _epoch_metrics(state, in_epoch or steps_per_epoch)
          progress.update(step, metrics)
        accuracy = None
        if ended:
          row = {'step': step, 'epoch': epoch}
          row['seconds'] = time.monotonic() - began  # Over all sessions.
          extra = {'learning_rate': float(schedule(step - 1))}
          target = method.target(step / total_steps)
          if target is not None:
            extra['budget'] = float(target)
          records.write({**row, 'split': 'train', **metrics, **extra})
          if validation is not None:
            weights = state.evaluated()
            summary = evaluation_lib.evaluate(
              functools.partial(predict, *weights), validation
            ).summary()
            records.write({**row, 'split': 'validation', **summary})
            progress.validated(epoch, summary)
            accuracy = summary['accuracy']
            pictures = distributed.fetch((shown, predict(*weights, shown)[1]))
            records.show_masks(step, *pictures, config.data.normalization)
        due = ended and epoch % config.run.checkpoint_every_epochs == 0
        if due or stop or step == total_steps:
          info = {'batches': batches.get_state(), 'class_names': class_names}
          info['seconds'] = time.monotonic() - began
          checkpoints.save(manager, step, state, info, accuracy)
      checkpoints.wait(manager)
    best = checkpoints.best_step(manager)
    best_accuracy = best and manager.metrics(best)['accuracy']

  if step < total_steps:
    raise Interrupted(
      signal.Signals(stop),
      f'saved step {step} of {total_steps} in {workdir}; the same command '
      'resumes from there',
    )
  rows = workdir_lib.read_metrics(workdir)
  last = {row['split']: row for row in rows}
  return {
    'step': step,
    'best_step': best,
    'best_accuracy': best_accuracy,
    'seconds': time.monotonic() - start,
    'skipped': batches.num_skipped
    + int(
      distributed.gather(validation.num_skipped if validation else 0).sum()
    ),
    **last,
  }


def _with_model(config: Config, factory: registry.Factory) -> Config:
  """Returns the configuration with the network replaced by a factory."""
  kind, options = registry.options_type(factory), config.model.options
  if not isinstance(options, kind):
    options = kind()
  network = dataclasses.replace(
    config.model, model=registry.reference(factory), options=options
  )
  return dataclasses.replace(config, model=network)


def _epoch_metrics(state: state_lib.TrainState, steps: int) -> dict[str, float]:
  """Returns means over the steps of this epoch.

  Raises:
    FloatingPointError: a quantity of a step is not finite.
  """
  sums, (bad_step, quantity) = jax.device_get((state.sums, state.first_bad))
  if bad_step >= 0:
    raise FloatingPointError(
      f'{state_lib.CHECKED[quantity]} is not finite at step {bad_step + 1}; '
      'the last good checkpoint remains. Try a lower learning_rate or '
      'gradient_clip'
    )
  means = {name: float(total) / steps for name, total in sums.items()}
  means['accuracy'] = means.pop('correct')
  return means


@contextlib.contextmanager
def _signals():
  """Yields a list that collects the termination signals received."""
  received: list[signal.Signals] = []
  kinds = [signal.SIGTERM, signal.SIGINT]
  # nohup makes the process ignore it.
  hangup = getattr(signal, 'SIGHUP', None)
  if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:
    kinds.append(hangup)

  def handle(number, frame):
    del frame
    received.append(signal.Signals(number))

  try:
    old = {kind: signal.signal(kind, handle) for kind in kinds}
  except ValueError:  # Only the main thread can set signal handlers.
    old = {}
  try:
    yield received
  finally:
    for kind, handler in old.items():
      signal.signal(kind, handler)
