"""Contents of a workdir: flags, metrics, and the trained network."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx

from dynconv_jax import distributed, interop
from dynconv_jax import options as options_lib
from dynconv_jax.data.decode import resize_ratio_of
from dynconv_jax.files import locked, write_atomic
from dynconv_jax.models import registry
from dynconv_jax.models.create import assemble
from dynconv_jax.training import checkpoints
from dynconv_jax.training import config as config_lib
from dynconv_jax.training import state as state_lib
from dynconv_jax.training.config import (
  Config,
  DataConfig,
  MethodConfig,
  ModelConfig,
)

FLAGS_FILE = 'flags.txt'
METRICS_FILE = 'metrics.jsonl'
IMPORT_FILE = 'imported.json'
# For functions that run once, where compilation takes longer than execution.
COMPILED_QUICKLY = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}


def resolve(
  config: Config, workdir: pathlib.Path, source: str | None = None
) -> Config:
  """Returns the configuration with normalization=auto resolved.

  In order of precedence, it is the normalization of the workdir's existing run,
  of the runs to start from, of the pretrained weights, or else 'imagenet'.

  Args:
    config: the run's configuration.
    workdir: the run's folder.
    source: source of the weights. None: `pretrained` of the configuration.

  Raises:
    FileNotFoundError: a run to start from does not exist.
    ValueError: a run to start from has a different normalization. The message
      names each.
  """
  normalization, start = config.data.normalization, config.optimization
  if (workdir / FLAGS_FILE).exists():
    runs = {f'{workdir}': workdir} if normalization == 'auto' else {}
  else:
    names = ('init_from', 'distill_from')
    runs = {
      f'{name} {run}': run for name in names if (run := getattr(start, name))
    }
  runs = {name: _normalization(read_texts(run)) for name, run in runs.items()}
  source = start.pretrained if source is None else source
  weights = interop.source_normalization(source)
  if normalization == 'auto':
    normalization = next(iter(runs.values()), weights or 'imagenet')
  if any(other != normalization for other in runs.values()):
    others = ', '.join(f'{name} has {value}' for name, value in runs.items())
    raise ValueError(
      'normalization must be the same as in the runs to start from; got '
      f'{normalization}, {others}'
    )
  if weights not in (None, normalization):
    logging.warning(
      '%s expects the normalization %s; got %s', source, weights, normalization
    )
  data = dataclasses.replace(config.data, normalization=normalization)
  return dataclasses.replace(config, data=data)


def _normalization(texts: Mapping[str, str]) -> str:
  """Returns the normalization of a run's images."""
  known = options_lib.options_of(DataConfig)['normalization']
  return texts.get(known.name, known.before)


def check_flags(workdir: pathlib.Path, config: Config) -> None:
  """Checks the configuration against that of the workdir's run, if any.

  The number of epochs may differ: the run resumes at its step and follows the
  schedules of the new total.

  Raises:
    ValueError: the workdir has a different configuration (the message lists the
      options that differ), has already done more epochs, or contains imported
      weights instead of a run.
  """
  if (workdir / IMPORT_FILE).exists():
    raise ValueError(
      f'{workdir} contains imported weights, not a run to resume. Choose '
      f'another workdir and start from these weights with init_from={workdir}'
    )
  if not (workdir / FLAGS_FILE).exists():
    return
  existing, config = read_config(workdir), resolve(config, workdir)
  before, epochs = existing.optimization.epochs, config.optimization.epochs
  differing = config.differing(existing.replace(epochs=epochs))
  if differing:
    raise ValueError(
      f'{workdir} has a different configuration; given, not in the workdir: '
      f'{"; ".join(differing)}. Choose another workdir or the same options'
    )
  if epochs != before:
    if epochs < (done := _epochs_done(workdir)):
      raise ValueError(
        f'epochs must be at least {math.ceil(done)}, because {workdir} has '
        f'done {done:.4g}; got {epochs}'
      )
    logging.info(
      '%s resumes with epochs=%d, previously %d; from here on, schedules '
      'follow the new total',
      *(workdir, epochs, before),
    )


def _epochs_done(workdir: pathlib.Path) -> float:
  """Returns the number of epochs done at a run's latest checkpoint."""
  rows = [row for row in read_metrics(workdir) if row.get('epoch')]
  steps = checkpoints.saved_steps(workdir)
  if not (rows and steps):
    return 0.0  # Still in the first epoch.
  return max(steps) * rows[0]['epoch'] / rows[0]['step']


def write_flags(workdir: pathlib.Path, config: Config) -> None:
  """Atomically writes all flags of the run."""
  write_atomic(workdir / FLAGS_FILE, config.to_flags())


def write_network(
  workdir: pathlib.Path,
  config: Config,
  model: nnx.Module,
  class_names: Sequence[str],
  source: str,
) -> None:
  """Creates a workdir for a network with imported weights.

  `load_run`, evaluation, prediction, and `init_from` can read it.

  Args:
    workdir: the folder to create.
    config: configuration of a run that would train the network.
    model: the network with its weights.
    class_names: class names in label order.
    source: origin of the weights, recorded in the workdir.

  Raises:
    ValueError: the workdir already contains a run.
    OSError: the workdir cannot be written to or is in use by another process.
  """
  with locked(workdir, 'import of weights'):
    _write_network(workdir, config, model, class_names, source)


def _write_network(workdir, config, model, class_names, source) -> None:
  if (workdir / FLAGS_FILE).exists() or checkpoints.exists(workdir):
    raise ValueError(f'{workdir} contains a run; choose another workdir')
  write_flags(workdir, resolve(config, workdir, source))
  (workdir / IMPORT_FILE).write_text(json.dumps({'source': source}) + '\n')
  _, params, model_state = state_lib.split(model)
  state = {'params': params, 'model_state': model_state}
  if config.optimization.ema_decay:
    state['ema'] = (params, model_state)
  with checkpoints.open_manager(workdir) as manager:
    info = {'class_names': list(class_names)}
    checkpoints.save(manager, 0, state, info, None)


def read_config(workdir: pathlib.Path) -> Config:
  """Returns the configuration of a run.

  Raises:
    FileNotFoundError: the folder is not the workdir of a run.
    ValueError: the flag file is damaged. The message names what is missing.
  """
  return _named(workdir, Config.from_flags, _read_flags(workdir))


def read_texts(workdir: str | os.PathLike) -> dict[str, str]:
  """Returns the text of each value of a run's configuration, by name.

  Raises:
    FileNotFoundError: the folder is not the workdir of a run.
    ValueError: the flag file is damaged.
  """
  return _named(workdir, config_lib.read_flags, _read_flags(workdir))


def read_part(
  workdir: str | os.PathLike,
  kind: type,
  changes: Mapping[str, str] | None = None,
) -> Any:
  """Returns one part of a run's configuration without reading the others.

  Args:
    workdir: the run's folder.
    kind: type of the part, such as DataConfig.
    changes: texts by name that replace values of the run.

  Raises:
    FileNotFoundError: the folder is not the workdir of a run.
    ValueError: the flag file is damaged. The message names what is missing.
  """
  texts = {**read_texts(workdir), **(changes or {})}
  return _named(workdir, config_lib.read_part, kind, texts)


def _read_flags(workdir: str | os.PathLike) -> str:
  path = pathlib.Path(workdir).expanduser() / FLAGS_FILE
  if not path.exists():
    raise FileNotFoundError(
      f'{workdir} is not the workdir of a run: there is no {FLAGS_FILE}'
    )
  return _named(workdir, path.read_text)


def _named(workdir: str | os.PathLike, read, *args):
  """Returns `read(*args)`, naming the file in any ValueError."""
  try:
    return read(*args)
  except ValueError as error:
    raise ValueError(f'{FLAGS_FILE} of {workdir}: {error}') from error


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the rows of metrics.jsonl, or an empty list if it is missing."""
  path = workdir / METRICS_FILE
  if not path.exists():
    return []
  rows, damaged = [], 0
  for line in path.read_bytes().splitlines():
    try:
      row = json.loads(line)
    except ValueError:  # Such as the last line of a killed run.
      row = None
    if (
      isinstance(row, dict)
      and isinstance(row.get('step'), int)
      and isinstance(row.get('split'), str)
    ):
      rows.append(row)
    else:
      damaged += 1
  if damaged:
    logging.warning('ignored damaged lines of %s: %d', path, damaged)
  return rows


def build_model(
  config: Config | Run,
  num_classes: int,
  *,
  seed: int = 0,
  abstract: bool = False,
  factory: registry.Factory | None = None,
) -> nnx.Module:
  """Returns the network of a run.

  Args:
    config: an object with the parts `model` and `method`.
    num_classes: number of outputs of the head.
    seed: seed of the initialization.
    abstract: whether to return shapes and dtypes instead of initialized
      weights.
    factory: factory of the network, if not found by name.
  """
  network, method = config.model, config.method
  factory = factory or registry.load_factory(network.model)

  def create():
    return assemble(
      factory,
      network.options,
      method.record,
      method.options,
      num_classes=num_classes,
      width_multiplier=network.width_multiplier,
      dtype=jnp.dtype(network.compute_dtype),
      rngs=nnx.Rngs(seed),
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
class Network:
  """Configuration of a run's network.

  Attributes:
    model: the network without its gates.
    method: the gating method.
  """

  model: ModelConfig
  method: MethodConfig


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained network and the information needed to use it.

  Attributes:
    network: configuration of the network.
    model: evaluation view with the best or the latest weights.
    class_names: class names in label order.
    step: number of training steps done.
    resize_ratio: ratio of an image's resized short side to the network input.
    normalization: image normalization, one of `augment.NORMALIZATIONS`.
  """

  network: Network
  model: nnx.Module
  class_names: tuple[str, ...]
  step: int
  resize_ratio: float
  normalization: str

  @property
  def image_size(self) -> int:
    """Side of the network input in pixels."""
    return self.network.model.image_size


def load_run(
  workdir: str | os.PathLike,
  *,
  best: bool = True,
  factory: registry.Factory | None = None,
) -> Run:
  """Returns the trained network of a workdir.

  Args:
    workdir: the run's folder.
    best: whether to prefer the checkpoint with the best validation accuracy to
      the latest one. Runs without validation have only the latest.
    factory: factory of the network, if not found by name.

  Raises:
    FileNotFoundError: the folder is not the workdir of a run.
    ValueError: the flag file does not describe the network.
    CheckpointError: no checkpoint can be read, or it lacks weights.
  """
  workdir = pathlib.Path(workdir).expanduser()
  network = Network(
    read_part(workdir, ModelConfig), read_part(workdir, MethodConfig)
  )
  texts = read_texts(workdir)
  averaged = float(texts.get('ema_decay') or 0) > 0
  if not (workdir / 'checkpoints').is_dir():
    raise checkpoints.CheckpointError(f'no checkpoint in {workdir}')
  with checkpoints.open_manager(workdir, read_only=True) as manager:
    class_names = tuple(checkpoints.read_info(manager)['class_names'])
    model = build_model(
      network, len(class_names), abstract=True, factory=factory
    )
    graphdef, params, model_state = state_lib.split(model)
    if averaged:
      target = {'ema': (params, model_state)}
    else:
      target = {'params': params, 'model_state': model_state}
    restored, _, step = checkpoints.restore(
      manager, checkpoints.like(target), best=best
    )
  if averaged:
    params, model_state = restored['ema']
  else:
    params, model_state = restored['params'], restored['model_state']
  model = nnx.merge(graphdef, params, model_state)
  return Run(
    network,
    nnx.view(model, deterministic=True, use_running_average=True),
    class_names,
    step,
    resize_ratio_of(texts.get('crop', '')),
    _normalization(texts),
  )


def load_teacher(
  config: Config,
  class_names: tuple[str, ...],
  sharding: jax.sharding.Sharding,
) -> nnx.Module:
  """Returns the evaluation view of the network in `distill_from`.

  Args:
    config: configuration of the student.
    class_names: class names of the student, in label order.
    sharding: sharding of the teacher's weights.

  Raises:
    ValueError: the teacher was trained on other classes.
  """
  workdir = config.optimization.distill_from
  run = load_run(workdir)
  if run.class_names != class_names:
    raise ValueError(
      f'distill_from {workdir} was trained on the classes '
      f'{run.class_names}; this run has {class_names}'
    )
  graphdef, weights = nnx.split(run.model)
  return nnx.merge(graphdef, distributed.spread(weights, sharding))
