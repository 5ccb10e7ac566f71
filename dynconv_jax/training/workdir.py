"""What lies in a workdir: flags, metrics, and the trained network."""

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
from dynconv_jax.interop.names import HEADS
from dynconv_jax.methods.gate import Gate
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
# What runs once: compiling it takes longer.
COMPILED_QUICKLY = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}


def resolve(
  config: Config, workdir: pathlib.Path, source: str | None = None
) -> Config:
  """Returns the configuration with `normalization` chosen where it is auto.

  It is that of the workdir, where a run has begun there; else that of the runs
  to start from, or what the weights expect, or ImageNet's.

  Args:
    config: of the run.
    workdir: of the run.
    source: of the weights; by default `pretrained` of the configuration.

  Raises:
    FileNotFoundError: there is no such run to start from.
    ValueError: a run to start from has another normalization; names each.
  """
  given, start = config.data.normalization, config.optimization
  if (workdir / FLAGS_FILE).exists():
    runs = {f'{workdir}': workdir} if given == 'auto' else {}
  else:
    names = ('init_from', 'distill_from')
    runs = {
      f'{name} {run}': run for name in names if (run := getattr(start, name))
    }
  runs = {name: _normalization(read_texts(run)) for name, run in runs.items()}
  source = start.pretrained if source is None else source
  weights = interop.source_normalization(source)
  if given == 'auto':
    given = next(iter(runs.values()), weights or 'imagenet')
  if any(found != given for found in runs.values()):
    found = ', '.join(f'{name} has {value}' for name, value in runs.items())
    raise ValueError(
      'normalization must be the same in a run and in those that it starts '
      f'from; got {given}, {found}'
    )
  if weights not in (None, given):
    logging.warning(
      '%s expects the normalization %s; got %s', source, weights, given
    )
  data = dataclasses.replace(config.data, normalization=given)
  return dataclasses.replace(config, data=data)


def _normalization(texts: Mapping[str, str]) -> str:
  """Returns the normalization of a run's images."""
  known = options_lib.options_of(DataConfig)['normalization']
  return texts.get(known.name, known.before)


def check_flags(workdir: pathlib.Path, config: Config) -> None:
  """Checks the configuration against that of an earlier start, if any.

  Another number of epochs is no difference: the run goes on from its step, on
  the schedules of the new total.

  Raises:
    ValueError: the workdir is of another configuration; names the options that
      differ. Or it has done more epochs, or holds imported weights, with no
      training to go on with.
  """
  if (workdir / IMPORT_FILE).exists():
    raise ValueError(
      f'{workdir} holds imported weights, no training to go on with. Choose '
      f'another workdir, and start from them by init_from={workdir}'
    )
  if not (workdir / FLAGS_FILE).exists():
    return
  there, config = read_config(workdir), resolve(config, workdir)
  before, epochs = there.optimization.epochs, config.optimization.epochs
  differing = config.differing(there.replace(epochs=epochs))
  if differing:
    raise ValueError(
      f'{workdir} is of another configuration; given, not there: '
      f'{"; ".join(differing)}. Choose another workdir, or the same options'
    )
  if epochs != before:
    if epochs < (done := _epochs_done(workdir)):
      raise ValueError(
        f'epochs must be at least {math.ceil(done)}, of which {workdir} has '
        f'done {done:.4g}; got {epochs}'
      )
    logging.info(
      '%s goes on with epochs=%d, before %d: schedules are those of the new '
      'total from here on',
      *(workdir, epochs, before),
    )


def _epochs_done(workdir: pathlib.Path) -> float:
  """Returns how many epochs the latest checkpoint of a run has seen."""
  rows = [row for row in read_metrics(workdir) if row.get('epoch')]
  steps = checkpoints.saved_steps(workdir)
  if not (rows and steps):
    return 0.0  # The first epoch is under way.
  return max(steps) * rows[0]['epoch'] / rows[0]['step']


def write_flags(workdir: pathlib.Path, config: Config) -> None:
  """Writes the full set of the run's flags, whole or not at all."""
  write_atomic(workdir / FLAGS_FILE, config.to_flags())


def write_network(
  workdir: pathlib.Path,
  config: Config,
  model: nnx.Module,
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
    OSError: it cannot be written to, or another process works there.
  """
  with locked(workdir, 'import of weights'):
    _write_network(workdir, config, model, class_names, source)


def _write_network(workdir, config, model, class_names, source) -> None:
  if (workdir / FLAGS_FILE).exists() or checkpoints.exists(workdir):
    raise ValueError(f'{workdir} holds a run; choose another workdir')
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
    FileNotFoundError: the folder is not a run's.
    ValueError: the file of flags is damaged; names what is missing.
  """
  return _named(workdir, Config.from_flags, _read_flags(workdir))


def read_texts(workdir: str | os.PathLike) -> dict[str, str]:
  """Returns the text of each value of a run's configuration, by name.

  Raises:
    FileNotFoundError: the folder is not a run's.
    ValueError: the file of flags is damaged.
  """
  return _named(workdir, config_lib.read_flags, _read_flags(workdir))


def read_part(
  workdir: str | os.PathLike,
  kind: type,
  changes: Mapping[str, str] | None = None,
) -> Any:
  """Returns a part of a run's configuration, whatever the others hold.

  Args:
    workdir: of the run.
    kind: of the part, such as DataConfig.
    changes: texts of values in place of the run's, by name.

  Raises:
    FileNotFoundError: the folder is not a run's.
    ValueError: the file of flags is damaged; names what is missing.
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
  """Returns what `read` returns; its errors name the file."""
  try:
    return read(*args)
  except ValueError as error:
    raise ValueError(f'{FLAGS_FILE} of {workdir}: {error}') from error


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the rows of metrics.jsonl; none where there is no file."""
  path = workdir / METRICS_FILE
  if not path.exists():
    return []
  rows, damaged = [], 0
  for line in path.read_bytes().splitlines():
    try:
      row = json.loads(line)
    except ValueError:  # Such as the last line of a run that was killed.
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
    logging.warning('damaged lines left out of %s: %d', path, damaged)
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
    config: has the parts `model` and `method`.
    num_classes: outputs of the head.
    seed: of the initialization.
    abstract: whether shapes and dtypes stand in for the weights; otherwise
      they are freshly initialized, compiled in one go.
    factory: of the network, where it is not found by name.
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
  """What says which network a run has.

  Attributes:
    model: the network but for its gates.
    method: its gates.
  """

  model: ModelConfig
  method: MethodConfig


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained network and what is needed to use it.

  Attributes:
    network: which network it is.
    model: the evaluation view, with the best or the latest weights.
    class_names: in label order.
    step: steps that had been done.
    resize_ratio: short side of an image over the network's input.
    normalization: of its images, one of `augment.NORMALIZATIONS`.
  """

  network: Network
  model: nnx.Module
  class_names: tuple[str, ...]
  step: int
  resize_ratio: float
  normalization: str

  @property
  def image_size(self) -> int:
    """Side of the network's input, pixels."""
    return self.network.model.image_size


def load_run(
  workdir: str | os.PathLike,
  *,
  best: bool = True,
  factory: registry.Factory | None = None,
) -> Run:
  """Returns the trained network of a workdir.

  Args:
    workdir: of the run.
    best: whether the checkpoint of the best validation accuracy is preferred
      to the latest; a run without validation has only the latest.
    factory: of the network, where it is not found by name.

  Raises:
    FileNotFoundError: the folder is not a run's.
    ValueError: the workdir does not say which network it is of.
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
  """Returns the evaluation view of the network that `distill_from` names.

  Args:
    config: of the student.
    class_names: of the student, in label order.
    sharding: of the weights, where the student's are.

  Raises:
    ValueError: it was trained on other classes.
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


def initialize_from(model: nnx.Module, source: nnx.Module) -> list[str]:
  """Copies every weight and statistic that both networks have.

  Args:
    model: is changed; what the source lacks (mask units, a classifier of
      another size) stays as initialized.
    source: such as a dense network of the same architecture.

  Returns:
    The paths that stay as initialized.

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
    elif path[0] not in HEADS and not (
      'masker' in path and None in (mine, other)
    ):
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
    logging.info('initialized afresh: %s', ', '.join(fresh))
  return fresh


def open_gates(model: nnx.Module, config: MethodConfig) -> None:
  """Changes fresh gates as the method's options say.

  Args:
    model: is changed.
    config: of the run's method.
  """
  _change_gates(model, config.record.open_gate, config.options)


def start_gates(model: nnx.Module, config: MethodConfig) -> None:
  """Changes gates before training, after weights are loaded.

  Args:
    model: is changed.
    config: of the run's method.
  """
  _change_gates(model, config.record.start_gate, config.options)


def _change_gates(model: nnx.Module, change, options: Any) -> None:
  if change is not None:
    for _, gate in nnx.iter_modules(model):
      if isinstance(gate, Gate):
        change(options, gate)
