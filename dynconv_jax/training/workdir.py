"""What lies in a workdir: flags, metrics, and the trained network."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx

from dynconv_jax.methods.dynconv import MaskUnit
from dynconv_jax.methods.skipnet import SkipGate
from dynconv_jax.models.create import create_model
from dynconv_jax.models.resnet import ResNet
from dynconv_jax.training import checkpoints
from dynconv_jax.training import state as state_lib
from dynconv_jax.training.config import Config

FLAGS_FILE = 'flags.txt'
METRICS_FILE = 'metrics.jsonl'
IMPORT_FILE = 'imported.json'
# What runs once: compiling it takes longer.
COMPILED_QUICKLY = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}


def check_flags(workdir: pathlib.Path, config: Config) -> None:
  """Checks the run's flags against those of an earlier start, if any.

  Raises:
    ValueError: the workdir is of another configuration; names the flags that
      differ. Or it holds imported weights, with no training to go on with.
  """
  if (workdir / IMPORT_FILE).exists():
    raise ValueError(
      f'{workdir} holds imported weights, no training to go on with. Choose '
      f'another --workdir, and start from them by --init_from={workdir}'
    )
  if not (workdir / FLAGS_FILE).exists():
    return
  differing = config.differing(read_config(workdir))
  if differing:
    raise ValueError(
      f'{workdir} is of another configuration; given, not there: '
      f'{"; ".join(differing)}. Choose another --workdir, or the same flags'
    )


def write_flags(workdir: pathlib.Path, config: Config) -> None:
  """Writes the full set of the run's flags, whole or not at all."""
  workdir.mkdir(parents=True, exist_ok=True)
  partial = workdir / f'{FLAGS_FILE}.partial'
  partial.write_text(config.to_flags())
  os.replace(partial, workdir / FLAGS_FILE)


def write_network(
  workdir: pathlib.Path,
  config: Config,
  model: ResNet,
  class_names: Sequence[str],
  source: str,
) -> None:
  """Makes the workdir of a network that was not trained here.

  `load_run` reads it, and so do evaluation, prediction and `init_from`.

  Args:
    workdir: is made.
    config: of a run that would train the network.
    model: its weights.
    class_names: in label order.
    source: where the weights come from, for the record.

  Raises:
    ValueError: the workdir holds a run.
  """
  if (workdir / FLAGS_FILE).exists() or checkpoints.exists(workdir):
    raise ValueError(f'{workdir} holds a run; choose another --workdir')
  write_flags(workdir, config)
  (workdir / IMPORT_FILE).write_text(json.dumps({'source': source}) + '\n')
  _, params, model_state = state_lib.split(model)
  state = {'params': params, 'model_state': model_state}
  if config.ema_decay:
    state['ema'] = (params, model_state)
  with checkpoints.open_manager(workdir) as manager:
    info = {'class_names': list(class_names)}
    checkpoints.save(manager, 0, state, info, None)


def read_config(workdir: pathlib.Path) -> Config:
  """Returns the configuration of a run.

  Raises:
    FileNotFoundError: the folder is not a run's.
  """
  path = pathlib.Path(workdir).expanduser() / FLAGS_FILE
  if not path.exists():
    raise FileNotFoundError(
      f'{workdir} is not the workdir of a run: there is no {FLAGS_FILE}'
    )
  return Config.from_flags(path.read_text())


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the rows of metrics.jsonl; none where there is no file."""
  path = workdir / METRICS_FILE
  if not path.exists():
    return []
  rows = []
  for line in path.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:  # The last line of a run that was killed.
      logging.warning('left out a damaged line of %s', path)
  return rows


def build_model(
  config: Config, num_classes: int, *, abstract: bool = False
) -> ResNet:
  """Returns the network of a run.

  Args:
    config: of the run.
    num_classes: outputs of the head.
    abstract: whether shapes and dtypes stand in for the weights; otherwise
      they are freshly initialised, compiled in one go.
  """

  def create():
    return create_model(
      config.model,
      method=config.method,
      num_classes=num_classes,
      width_multiplier=config.width_multiplier,
      mask_kernel_size=config.mask_kernel_size,
      mask_granularity=config.mask_granularity,
      target_rates=(
        config.block_target_rates() if config.method == 'convnet_aig' else None
      ),
      skip_gate=config.skip_gate,
      skip_training=config.skip_training,
      dtype=jnp.dtype(config.compute_dtype),
      rngs=nnx.Rngs(config.seed),
    )

  model = nnx.eval_shape(create)
  if abstract:
    return model
  initialize = jax.jit(
    lambda: nnx.as_pure(nnx.state(create())),
    compiler_options=COMPILED_QUICKLY,
  )
  return nnx.merge(nnx.graphdef(model), initialize())


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained network and where it comes from.

  Attributes:
    config: of the run.
    model: the evaluation view, with the best or the latest weights.
    class_names: in label order.
    step: steps that had been done.
  """

  config: Config
  model: ResNet
  class_names: tuple[str, ...]
  step: int


def load_run(workdir: str | os.PathLike, *, best: bool = True) -> Run:
  """Returns the trained network of a workdir.

  Args:
    workdir: of the run.
    best: whether the checkpoint of the best validation accuracy is preferred
      to the latest; a run without validation has only the latest.

  Raises:
    FileNotFoundError: the folder is not a run's.
    CheckpointError: no checkpoint can be read.
  """
  workdir = pathlib.Path(workdir).expanduser()
  config = read_config(workdir)
  if not (workdir / 'checkpoints').is_dir():
    raise checkpoints.CheckpointError(f'no checkpoint in {workdir}')
  with checkpoints.open_manager(workdir, read_only=True) as manager:
    class_names = tuple(checkpoints.read_info(manager)['class_names'])
    model = build_model(config, len(class_names), abstract=True)
    graphdef, params, model_state = state_lib.split(model)
    if config.ema_decay:
      target = {'ema': (params, model_state)}
    else:
      target = {'params': params, 'model_state': model_state}
    restored, _, step = checkpoints.restore(
      manager, checkpoints.like(target), best=best
    )
  if config.ema_decay:
    params, model_state = restored['ema']
  else:
    params, model_state = restored['params'], restored['model_state']
  model = nnx.merge(graphdef, params, model_state)
  view = nnx.view(model, deterministic=True, use_running_average=True)
  return Run(config, view, class_names, step)


def load_teacher(
  config: Config,
  class_names: tuple[str, ...],
  sharding: jax.sharding.Sharding,
) -> ResNet:
  """Returns the evaluation view of the network that `distill_from` names.

  Args:
    config: of the student.
    class_names: of the student, in label order.
    sharding: of the weights, where the student's are.

  Raises:
    ValueError: it was trained on other classes.
  """
  run = load_run(config.distill_from)
  if run.class_names != class_names:
    raise ValueError(
      f'distill_from {config.distill_from} was trained on the classes '
      f'{run.class_names}; this run has {class_names}'
    )
  graphdef, weights = nnx.split(run.model)
  return nnx.merge(graphdef, jax.device_put(weights, sharding))


def initialize_from(model: ResNet, source: ResNet) -> list[str]:
  """Copies every weight and statistic that both networks have.

  Args:
    model: is changed; what the source lacks (mask units, a classifier of
      another size) stays as initialised.
    source: such as a dense network of the same architecture.

  Returns:
    The paths that stay as initialised.

  Raises:
    ValueError: the networks are not of one architecture; names every weight
      whose shape differs or that one of them lacks.
  """
  theirs = dict(nnx.to_flat_state(nnx.state(source)))
  ours = dict(nnx.to_flat_state(nnx.state(model)))
  kept, fresh, differing = {}, [], []
  for path in dict.fromkeys([*ours, *theirs]):
    name = '.'.join(map(str, path))
    mine, other = (
      networks[path].shape if path in networks else None
      for networks in (ours, theirs)
    )
    if mine == other:
      kept[path] = jnp.copy(theirs[path][...])
    elif path[0] != 'fc' and not ('masker' in path and None in (mine, other)):
      differing.append(f'{name}: {mine or "none"} from {other or "none"}')
    elif mine:
      fresh.append(name)
  if differing:
    raise ValueError(
      'cannot start from a network of another architecture; shapes that '
      f'differ: {"; ".join(differing)}'
    )
  nnx.update(model, nnx.from_flat_state(kept))
  if fresh:
    logging.info('initialised afresh: %s', ', '.join(fresh))
  return fresh


def open_masks(model: ResNet, bias: float) -> None:
  """Sets the opening logit of every mask unit, or gate of SkipNet.

  Args:
    model: is changed: squeeze weights, or those of a gate's last layer, become
      0, the logits' bias `bias`.
    bias: above 0 opens the masks.
  """
  for block in model.blocks:
    if isinstance(block.masker, SkipGate):
      block.masker.open(bias)
    if not isinstance(block.masker, MaskUnit):
      continue
    unit = block.masker.maskconv
    unit.fc.kernel[...] = jnp.zeros_like(unit.fc.kernel[...])
    unit.fc.bias[...] = jnp.zeros_like(unit.fc.bias[...])
    unit.conv.bias[...] = jnp.full_like(unit.conv.bias[...], bias)


def sharpen_gates(model: ResNet, temperature: float) -> None:
  """Divides the logits of SkipNet's gates by a temperature, for good.

  Args:
    model: is changed.
    temperature: below 1 brings samples near to decisions.
  """
  for block in model.blocks:
    if isinstance(block.masker, SkipGate):
      block.masker.sharpen(temperature)
