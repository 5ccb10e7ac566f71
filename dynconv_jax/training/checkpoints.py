"""Checkpoints: asynchronous, the latest and the best, self-contained."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from dynconv_jax import distributed

_managers = ocp.checkpoint_managers


class CheckpointError(RuntimeError):
  """No usable checkpoint; the message names the directory and the reasons."""


@contextlib.contextmanager
def open_manager(
  workdir: pathlib.Path, *, keep: int = 2, read_only: bool = False
) -> Iterator[ocp.CheckpointManager]:
  """Yields the manager of a workdir's checkpoints; waits for saves at the end.

  Args:
    workdir: of the run.
    keep: latest checkpoints to keep, beside the best by validation accuracy.
    read_only: for evaluation.

  Raises:
    OSError: the disk is full; names the checkpoints that stay.
  """
  path = (workdir / 'checkpoints').expanduser().absolute()
  if not read_only:
    if distributed.is_main():
      _drop_damaged_metrics(path)
    distributed.wait()
  options = ocp.CheckpointManagerOptions(
    read_only=read_only,
    lightweight_initialize=read_only,  # Reads no metrics yet.
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
  manager = ocp.CheckpointManager(path, options=options)
  try:
    yield manager
  except BaseException as error:
    # What went wrong first is told; a save under way may fail for it, too. It
    # would wait for a process that is lost.
    if not distributed.is_lost(error):
      with contextlib.suppress(Exception):
        manager.close()
    raise
  with _explained(manager):
    manager.close()


def _drop_damaged_metrics(folder: pathlib.Path) -> None:
  """Removes metrics that cannot be read: orbax would not even start."""
  for path in folder.glob('[0-9]*/metrics/metrics'):
    try:
      _check_metrics(json.loads(path.read_text()))
    except ValueError as error:
      logging.warning('leaving out the damaged %s: %s', path, error)
      shutil.rmtree(path.parent)


def _accuracy(metrics: dict[str, Any]) -> float:
  return metrics['accuracy']


def _check_metrics(metrics: Any) -> None:
  """Raises ValueError unless metrics are as they were saved."""
  if not isinstance(metrics, dict) or 'accuracy' not in metrics:
    raise ValueError('it holds no accuracy')
  accuracy = metrics['accuracy']
  # Earlier versions saved no checksums.
  if metrics.get('checksum') not in (None, _checksum_json(accuracy)):
    raise ValueError('it differs from its checksum')


def _checksum_json(value: Any) -> str:
  return f'{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}'


def _checksum_array(array: jax.Array) -> str:
  if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
    array = jax.random.key_data(array)
  content = (
    np.ascontiguousarray(distributed.fetch(array)).reshape(-1).view(np.uint8)
  )
  return f'{zlib.crc32(content):08x}'


def _checksums(state: Any, info: dict[str, Any]) -> dict[str, str]:
  """Returns CRC-32s: of each array of a state by its path, and of an info."""
  info = {name: info[name] for name in info if name != 'checksums'}
  return {'info': _checksum_json(info)} | {
    jax.tree_util.keystr(path, simple=True, separator='.'): _checksum_array(a)
    for path, a in jax.tree.leaves_with_path(state)
    if not isinstance(a, jax.ShapeDtypeStruct)
  }


def _verify(restored: Any) -> None:
  """Raises ValueError naming what is not as it was saved."""
  info = restored['info']
  if 'class_names' not in info:
    raise ValueError('its info lacks class_names')
  # Earlier versions saved no checksums.
  if (saved := info.get('checksums')) is not None:
    found = _checksums(restored.get('state', {}), info)
    if differing := [name for name in found if found[name] != saved.get(name)]:
      raise ValueError(f'differing from its checksum: {", ".join(differing)}')


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: Any,
  info: dict[str, Any],
  accuracy: float | None,
) -> None:
  """Starts to save; the state may be donated as soon as this returns.

  A checksum of each array is saved with it, and verified when it is restored.

  Args:
    manager: of the workdir.
    step: steps done.
    state: tree of arrays.
    info: fit for JSON; holds the data iterator's position and class names.
    accuracy: on the validation split, by which the best is kept.

  Raises:
    OSError: the disk is full, now or at the save before; names the
      checkpoints that stay.
  """
  metrics = None
  if accuracy is not None:
    metrics = {'accuracy': accuracy, 'checksum': _checksum_json(accuracy)}
  info = {**info, 'checksums': _checksums(state, info)}
  with _explained(manager):
    saved = manager.save(
      step,
      metrics=metrics,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(state), info=ocp.args.JsonSave(info)
      ),
    )
  # orbax passes over a step that is not past the latest.
  if not saved:
    raise RuntimeError(f'step {step} is not after {manager.all_steps()}')


def wait(manager: ocp.CheckpointManager) -> None:
  """Returns once all is saved.

  Raises:
    OSError: the disk is full; names the checkpoints that stay.
  """
  with _explained(manager):
    manager.wait_until_finished()


def saved_steps(workdir: pathlib.Path) -> list[int]:
  """Returns the steps of a workdir's checkpoints, damaged or not."""
  path = workdir / 'checkpoints'
  return ocp.utils.checkpoint_steps(path) if path.is_dir() else []


def exists(workdir: pathlib.Path) -> bool:
  """Returns whether a workdir has a checkpoint, damaged or not."""
  return bool(saved_steps(workdir))


def drop_after(manager: ocp.CheckpointManager, step: int) -> None:
  """Deletes checkpoints that could not be read, so that they can come anew.

  Args:
    manager: of the workdir.
    step: of the checkpoint that was fallen back to.
  """
  for later in [s for s in manager.all_steps() if s > step]:
    logging.warning('deleting the damaged checkpoint of step %d', later)
    manager.delete(later)


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
    CheckpointError: there is none, none can be read, or it lacks weights; names
      them.
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
  _check_complete(restored['state'], f'{manager.directory}, step {step}')
  return restored['state'], restored['info'], step


def _check_complete(state: Any, place: str) -> None:
  """Raises CheckpointError naming each weight that a checkpoint lacks."""
  missing = [
    '.'.join(str(getattr(key, 'key', getattr(key, 'idx', key))) for key in path)
    for path, leaf in jax.tree.leaves_with_path(state)
    if isinstance(leaf, jax.ShapeDtypeStruct)
  ]
  if missing:
    raise CheckpointError(
      f'the checkpoint in {place} is of another network: it lacks '
      f'{", ".join(missing)}'
    )


@contextlib.contextmanager
def _explained(manager: ocp.CheckpointManager):
  """Turns a failure to save into an OSError that says what is left."""
  try:
    yield
  # The writers raise errors of several kinds, from threads of their own.
  except Exception as error:  # noqa: BLE001
    if distributed.is_lost(error):
      raise
    steps = sorted(ocp.utils.checkpoint_steps(manager.directory))
    raise OSError(
      f'cannot save a checkpoint in {manager.directory} '
      f'({_first_line(error)}); is the disk full? '
      f'Checkpoints that stay: {steps or "none"}'
    ) from error


def _first_line(error: Exception) -> str:
  """Returns the start of a message; orbax's run to pages."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:200]


def _first_readable(manager, steps, args):
  """Returns (what was restored, step) of the first step that can be read."""
  failures = []
  for step in steps:
    try:
      with distributed.together():
        restored = manager.restore(step, args=args)
      with distributed.together():
        _verify(restored)
    # A damaged file may surface as almost any error of orbax, tensorstore or
    # the JSON reader; every one means the same here.
    except Exception as error:  # noqa: BLE001
      if distributed.is_lost(error):
        raise
      failures.append(f'step {step}: {_first_line(error)}')
      logging.warning('cannot read the checkpoint of %s', failures[-1])
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
      _check_metrics(metrics)
      if best is None or metrics['accuracy'] > best[0]:
        best = metrics['accuracy'], step
  return best and best[1]


def like(tree: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
  """Returns the tree's shapes and dtypes, to restore into.

  Args:
    tree: of arrays, or of their shapes and dtypes.
    sharding: where to; None: where each array is, or the default device.
  """
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def described(a):
    where = sharding or getattr(a, 'sharding', None) or default
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)

  return jax.tree.map(described, tree)
