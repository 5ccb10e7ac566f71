"""Checkpoints: asynchronous, the latest and the best, self-contained."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

_managers = ocp.checkpoint_managers


class CheckpointError(RuntimeError):
  """No usable checkpoint; the message names the directory and the reasons."""


def open_manager(
  workdir: pathlib.Path, *, keep: int = 2, read_only: bool = False
) -> ocp.CheckpointManager:
  """Returns the manager of a workdir's checkpoints.

  Args:
    workdir: of the run.
    keep: latest checkpoints to keep, beside the best by validation accuracy.
    read_only: for evaluation.
  """
  options = ocp.CheckpointManagerOptions(
    read_only=read_only,
    create=not read_only,
    save_interval_steps=0 if read_only else 1,
    best_fn=_accuracy,  # Without it orbax does not store the metrics.
    best_mode='max',
    preservation_policy=_managers.AnyPreservationPolicy(
      [
        _managers.LatestN(keep),
        _managers.BestN(
          get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False
        ),
      ]
    ),
  )
  path = (workdir / 'checkpoints').expanduser().absolute()
  return ocp.CheckpointManager(path, options=options)


def _accuracy(metrics: dict[str, Any]) -> float:
  return metrics['accuracy']


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: Any,
  info: dict[str, Any],
  accuracy: float | None,
) -> None:
  """Starts to save; the state may be donated as soon as this returns.

  Args:
    manager: of the workdir.
    step: steps done.
    state: tree of arrays.
    info: fit for JSON; holds the data iterator's position and class names.
    accuracy: on the validation split, by which the best is kept.
  """
  if step in manager.all_steps():
    return
  manager.save(
    step,
    metrics=None if accuracy is None else {'accuracy': accuracy},
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info)
    ),
  )


def restore(
  manager: ocp.CheckpointManager,
  target: Any,
  *,
  best: bool = False,
) -> tuple[Any, dict[str, Any], int]:
  """Returns (state, info, step) of the newest checkpoint that can be read.

  Args:
    manager: of the workdir.
    target: tree of `jax.ShapeDtypeStruct` with shardings, or of arrays; may
      hold a part of what was saved.
    best: whether the best by validation accuracy comes first.

  Raises:
    CheckpointError: there is none, or none can be read.
  """
  steps = sorted(manager.all_steps(), reverse=True)
  if best and (step := best_step(manager)) is not None:
    steps.sort(key=lambda s: s != step)
  restored, step = _first_readable(
    manager,
    steps,
    ocp.args.Composite(
      state=ocp.args.PyTreeRestore(
        target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
      ),
      info=ocp.args.JsonRestore(),
    ),
  )
  return restored['state'], restored['info'], step


@contextlib.contextmanager
def explained(manager: ocp.CheckpointManager):
  """Turns a failure to save into an OSError that says what is left."""
  try:
    yield
  # The writers raise errors of several kinds, from threads of their own.
  except Exception as error:  # noqa: BLE001
    steps = sorted(manager.all_steps())
    raise OSError(
      f'cannot save a checkpoint in {manager.directory} '
      f'({str(error).strip().splitlines()[0][:200]}); is the disk full? '
      f'Checkpoints that stay: {steps or "none"}'
    ) from error


def _first_readable(manager, steps, args):
  """Returns (what was restored, step) of the first step that can be read."""
  failures = []
  for step in steps:
    try:
      restored = manager.restore(step, args=args)
    # A damaged file may surface as almost any error of orbax, tensorstore or
    # the JSON reader; every one means the same here.
    except Exception as error:  # noqa: BLE001
      reason = str(error).strip().splitlines() or [type(error).__name__]
      failures.append(f'step {step}: {reason[0][:200]}')
      logging.warning('cannot read the checkpoint of step %d: %s', step, error)
      continue
    if failures:
      logging.warning('fell back to the checkpoint of step %d', step)
    return restored, step
  directory = pathlib.Path(manager.directory)
  if failures:
    raise CheckpointError(
      f'no checkpoint in {directory} can be read ({"; ".join(failures)})'
    )
  raise CheckpointError(f'no checkpoint in {directory}')


def read_info(manager: ocp.CheckpointManager) -> dict[str, Any]:
  """Returns the info of the newest checkpoint that can be read.

  Raises:
    CheckpointError: there is none, or none can be read.
  """
  return _first_readable(
    manager,
    sorted(manager.all_steps(), reverse=True),
    ocp.args.Composite(info=ocp.args.JsonRestore()),
  )[0]['info']


def best_step(manager: ocp.CheckpointManager) -> int | None:
  """Returns the step of the best validation accuracy, if one was measured."""
  best = None
  for step in manager.all_steps():
    # A damaged checkpoint is no candidate; `restore` reports it.
    with contextlib.suppress(Exception):
      metrics = manager.metrics(step)
      if metrics and (best is None or metrics['accuracy'] > best[0]):
        best = metrics['accuracy'], step
  return best and best[1]


def like(tree: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
  """Returns the tree's shapes and dtypes, to restore into."""
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
  )
