"""Asynchronous, self-contained checkpoints of the latest and best weights."""

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
  """No usable checkpoint. The message names the directory and the reasons."""


@contextlib.contextmanager
def open_manager(
  workdir: pathlib.Path, *, keep: int = 2, read_only: bool = False
) -> Iterator[ocp.CheckpointManager]:
  """Yields the checkpoint manager of a workdir and waits for saves on exit.

  Args:
    workdir: the run's folder.
    keep: number of latest checkpoints to keep, in addition to the one with the
      best validation accuracy.
    read_only: whether to open existing checkpoints without writing.

  Raises:
    OSError: the disk is full. The message names the checkpoints that remain.
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
    # Report this error, not a failure of a pending save that it may cause. If
    # a process is lost, closing would wait for it forever.
    if not distributed.is_lost(error):
      with contextlib.suppress(Exception):
        manager.close()
    raise
  with _explained(manager):
    manager.close()


def _drop_damaged_metrics(folder: pathlib.Path) -> None:
  """Removes unreadable metrics, with which orbax would not start."""
  for path in folder.glob('[0-9]*/metrics/metrics'):
    try:
      _check_metrics(json.loads(path.read_text()))
    except ValueError as error:
      logging.warning('removing the damaged %s: %s', path, error)
      shutil.rmtree(path.parent)


def _accuracy(metrics: dict[str, Any]) -> float:
  return metrics['accuracy']


def _check_metrics(metrics: Any) -> None:
  """Raises ValueError if metrics are not as they were saved."""
  if not isinstance(metrics, dict) or 'accuracy' not in metrics:
    raise ValueError('it contains no accuracy')
  accuracy = metrics['accuracy']
  # Earlier versions saved no checksums.
  if metrics.get('checksum') not in (None, _checksum_json(accuracy)):
    raise ValueError('it does not match its checksum')


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
  """Returns the CRC-32 of each array of `state` by its path, and of `info`."""
  info = {name: info[name] for name in info if name != 'checksums'}
  return {'info': _checksum_json(info)} | {
    jax.tree_util.keystr(path, simple=True, separator='.'): _checksum_array(a)
    for path, a in jax.tree.leaves_with_path(state)
    if not isinstance(a, jax.ShapeDtypeStruct)
  }


def _verify(restored: Any) -> None:
  """Raises ValueError naming everything that is not as it was saved."""
  info = restored['info']
  if 'class_names' not in info:
    raise ValueError('its info lacks class_names')
  # Earlier versions saved no checksums.
  if (saved := info.get('checksums')) is not None:
    actual = _checksums(restored.get('state', {}), info)
    if differing := [
      name for name in actual if actual[name] != saved.get(name)
    ]:
      raise ValueError(f'does not match its checksum: {", ".join(differing)}')


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: Any,
  info: dict[str, Any],
  accuracy: float | None,
) -> None:
  """Starts an asynchronous save. The state may be donated once this returns.

  A checksum of each array is saved too, and verified on restore.

  Args:
    manager: the workdir's checkpoint manager.
    step: number of steps done.
    state: tree of arrays.
    info: JSON-serializable; contains the data iterator's position and the class
      names.
    accuracy: validation accuracy, which determines the best checkpoint.

  Raises:
    OSError: the disk is full, now or during the previous save. The message
      names the checkpoints that remain.
    RuntimeError: `step` is not after the latest checkpoint.
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
  # orbax silently skips a step that is not after the latest.
  if not saved:
    raise RuntimeError(f'step {step} is not after {manager.all_steps()}')


def wait(manager: ocp.CheckpointManager) -> None:
  """Waits until all pending saves are done.

  Raises:
    OSError: the disk is full. The message names the checkpoints that remain.
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
  """Deletes unreadable later checkpoints so that they can be written again.

  Args:
    manager: the workdir's checkpoint manager.
    step: step of the checkpoint that was restored.
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
  """Returns (state, info, step) of the newest readable checkpoint.

  Args:
    manager: the workdir's checkpoint manager.
    target: tree of `jax.ShapeDtypeStruct` with shardings, or of arrays. May
      contain only a part of what was saved.
    best: whether to try the best checkpoint by validation accuracy first.

  Raises:
    CheckpointError: there is no checkpoint, none can be read, or it lacks
      weights. The message names the missing weights.
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
  """Raises CheckpointError naming each weight missing from a checkpoint."""
  missing = [
    '.'.join(str(getattr(key, 'key', getattr(key, 'idx', key))) for key in path)
    for path, leaf in jax.tree.leaves_with_path(state)
    if isinstance(leaf, jax.ShapeDtypeStruct)
  ]
  if missing:
    raise CheckpointError(
      f'the checkpoint in {place} is for a different network: it lacks '
      f'{", ".join(missing)}'
    )


@contextlib.contextmanager
def _explained(manager: ocp.CheckpointManager):
  """Turns a failed save into an OSError naming the remaining checkpoints."""
  try:
    yield
  # The writer threads raise errors of several kinds.
  except Exception as error:  # noqa: BLE001
    if distributed.is_lost(error):
      raise
    steps = sorted(ocp.utils.checkpoint_steps(manager.directory))
    raise OSError(
      f'cannot save a checkpoint in {manager.directory} '
      f'({_first_line(error)}); is the disk full? '
      f'Remaining checkpoints: {steps or "none"}'
    ) from error


def _first_line(error: Exception) -> str:
  """Returns the start of a message. Those of orbax can be pages long."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:200]


def _first_readable(manager, steps, args):
  """Returns (restored values, step) of the first readable step."""
  failures = []
  for step in steps:
    try:
      with distributed.together():
        restored = manager.restore(step, args=args)
      with distributed.together():
        _verify(restored)
    # A damaged file can surface as almost any error from orbax, tensorstore, or
    # the JSON reader.
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
  """Returns the info of the newest readable checkpoint.

  Raises:
    CheckpointError: there is no checkpoint, or none can be read.
  """
  return _first_readable(
    manager,
    sorted(manager.all_steps(), reverse=True),
    ocp.args.Composite(info=ocp.args.JsonRestore()),
  )[0]['info']


def best_step(manager: ocp.CheckpointManager) -> int | None:
  """Returns the step with the best validation accuracy, or None."""
  best = None
  for step in manager.all_steps():
    # Skip damaged checkpoints. `restore` reports them.
    with contextlib.suppress(Exception):
      metrics = manager.metrics(step)
      _check_metrics(metrics)
      if best is None or metrics['accuracy'] > best[0]:
        best = metrics['accuracy'], step
  return best and best[1]


def like(tree: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
  """Returns a tree of `jax.ShapeDtypeStruct` as the target of `restore`.

  Args:
    tree: tree of arrays, or of their shapes and dtypes.
    sharding: the sharding to restore to. None: that of each array, or the first
      local device.
  """
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def described(a):
    where = sharding or getattr(a, 'sharding', None) or default
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)

  return jax.tree.map(described, tree)
