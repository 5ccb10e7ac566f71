"""Configuration of a run: data, model, method, optimization, and run.

Field names are unique across all parts. A configuration is therefore also a
flat mapping from names to values, as in flags and in a workdir's flag file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from dynconv_jax import extras, interop
from dynconv_jax import options as options_lib
from dynconv_jax.data.sources import DATASETS, load_source
from dynconv_jax.methods.method import METHODS, load_method
from dynconv_jax.models import registry
from dynconv_jax.training.parts import (
  PARTS,
  Chosen,
  DataConfig,
  MethodConfig,
  ModelConfig,
  OptimizationConfig,
  RunConfig,
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Configuration of a run.

  Operational options may change when a run resumes: they set file locations and
  display, not what is computed.
  """

  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  method: MethodConfig = dataclasses.field(default_factory=MethodConfig)
  optimization: OptimizationConfig = dataclasses.field(
    default_factory=OptimizationConfig
  )
  run: RunConfig = dataclasses.field(default_factory=RunConfig)

  @classmethod
  def make(cls, **values) -> Config:
    """Returns a configuration from flat values, with defaults for the rest.

    Args:
      **values: values of any options. Options of methods, datasets, and
        networks that are not selected are ignored.

    Raises:
      ValueError: an option does not exist.
    """
    config = cls(
      **{name: make_part(kind, values) for name, kind in PARTS.items()}
    )
    check_names(values, config)
    return config

  def replace(self, **changes) -> Config:
    """Returns a copy of the configuration with some flat values changed."""
    return Config.make(**{**self.flat(), **changes})

  def flat(self) -> dict[str, Any]:
    """Returns the values of all options by name."""
    values = {}
    for part in self._parts():
      values |= options_lib.values_of(part)
    return values

  def check(
    self,
    num_devices: int = 1,
    *,
    factory: registry.Factory | None = None,
    resumed: bool = False,
  ) -> None:
    """Raises ValueError naming every invalid option.

    Args:
      num_devices: number of devices of all processes, which share a batch.
      factory: factory of the network, if not found by name.
      resumed: whether the run resumes and needs no pretrained weights.
    """
    optimization = self.optimization
    errors = options_lib.errors(
      [
        lambda: load_source(self.data.dataset),
        lambda: factory or registry.load_factory(self.model.model),
        lambda: load_method(self.method.method),
      ]
    )
    chosen = not errors
    for part in self._parts():
      errors += options_lib.errors_of(part)
    errors += options_lib.errors(
      [
        self.data.augmentation,
        self.data.scenes,
        lambda: self.data.check_cache(self.model.image_size),
        lambda: optimization.factors,
      ]
    )
    if chosen and self.model.width_multiplier > 0:
      errors += options_lib.errors([lambda: self.check_network(factory)])
    start = optimization.init_from or optimization.pretrained
    if chosen and not start:
      option = self.method.record.needs_trained(self.method.options)
      if option:
        errors.append(f'{option} needs init_from or pretrained; both are empty')
    if optimization.pretrained:
      source, network = optimization.pretrained, self.model
      checks = [
        lambda: interop.check_pretrained(source),
        lambda: interop.check_source(source, network.model, network.options),
      ]
      if not resumed:
        checks.append(lambda: interop.check_found(source, self.data.data_dir))
      errors += options_lib.errors(checks)
      if optimization.init_from:
        errors.append(
          'init_from and pretrained are mutually exclusive; got '
          f'{optimization.init_from} and {optimization.pretrained}'
        )
    steps, fsdp = optimization.grad_accum_steps, self.run.fsdp
    if optimization.batch_size % (num_devices * max(steps, 1)):
      parts = f' times grad_accum_steps, {steps}' if steps > 1 else ''
      errors.append(
        f'batch_size must be divisible by the {num_devices} devices{parts}; '
        f'got {optimization.batch_size}'
      )
    if fsdp > 0 and num_devices % fsdp:
      errors.append(
        f'fsdp must divide the number of devices, {num_devices}; got {fsdp}'
      )
    if optimization.warmup_epochs > optimization.epochs > 0:
      errors.append(
        f'warmup_epochs must be at most epochs, {optimization.epochs}; got '
        f'{optimization.warmup_epochs}'
      )
    if self.run.wandb:
      try:
        extras.require('wandb', 'wandb')
      except ImportError as error:
        errors.append(f'wandb={self.run.wandb}: {error}')
    if errors:
      raise ValueError('; '.join(dict.fromkeys(errors)))

  def check_network(self, factory: registry.Factory | None = None) -> None:
    """Raises ValueError if the input size or the gates do not fit the network.

    Args:
      factory: factory of the network, if not found by name.
    """
    model, method = self.model, self.method
    factory = factory or registry.load_factory(model.model)
    errors = []
    least = getattr(factory, 'min_image_size', 1)
    if model.image_size < least:
      errors.append(
        f'image_size must be at least {least} for {model.model}, whose total '
        f'stride is {least // 2}; got {model.image_size}'
      )
    if method.record.gated:
      errors += options_lib.errors(
        [
          lambda: method.record.make_gates(
            method.options,
            registry.gate_sites(factory, model.options, model.width_multiplier),
            None,
          )
        ]
      )
    if errors:
      raise ValueError('; '.join(errors))

  def to_flags(self, *, places: bool = True) -> str:
    """Returns the configuration as a flag file, with one flag per line.

    Args:
      places: whether to include file locations, which may differ by machine.
    """
    left_out = () if places else places_of(self.data.dataset)
    return to_flags(
      {n: value for n, value in self.flat().items() if n not in left_out}
    )

  @classmethod
  def from_flags(cls, text: str) -> Config:
    """Returns the configuration from a text written by `to_flags`.

    Options that do not exist (anymore) are ignored with a warning.

    Raises:
      ValueError: a line is not --name=value, or options are missing or of the
        wrong type. The message names each.
    """
    texts = read_flags(text)
    parts, errors = {}, []
    for name, kind in PARTS.items():
      try:
        parts[name] = read_part(kind, texts)
      except ValueError as error:
        errors.append(str(error))
    if errors:
      raise ValueError('; '.join(errors))
    config = cls(**parts)
    try:
      check_names(texts, config)
    except ValueError as error:
      logging.warning('ignored: %s', error)
    return config

  def differing(self, other: Config) -> Sequence[str]:
    """Returns 'name: mine, not theirs' for each option that differs.

    Operational options are excluded. So are options that only one of the two
    has: the choice of method, dataset, or network then differs and is listed.
    """
    mine, theirs = self.flat(), other.flat()
    operational = operational_options(self) | operational_options(other)
    return [
      f'{name}: {value!r}, not {theirs[name]!r}'
      for name, value in mine.items()
      if name in theirs and name not in operational and value != theirs[name]
    ]

  def _parts(self) -> Iterator[Any]:
    for name in PARTS:
      part = getattr(self, name)
      yield part
      if isinstance(part, Chosen):
        yield part.options


def make_part(kind: type, values: Mapping[str, Any]) -> Any:
  """Returns a part of a configuration from flat values; ignores the others."""
  part = options_lib.make(kind, values)
  if isinstance(part, Chosen):
    options = options_lib.make(type(part.options), values)
    part = dataclasses.replace(part, options=options)
  return part


def read_part(kind: type, texts: Mapping[str, str]) -> Any:
  """Returns a part of a configuration from values given as text.

  Args:
    kind: type of the part, such as ModelConfig.
    texts: values by name, see `read_flags`. Other names are ignored.

  Raises:
    ValueError: options are missing or of the wrong type. The message names
      each.
  """
  values = options_lib.parse(kind, texts)
  part = make_part(kind, values)
  if isinstance(part, Chosen):
    kind.options_type(part._name)  # Raises ValueError for an unknown name.
    values |= options_lib.parse(type(part.options), texts)
  return make_part(kind, values)


def to_flags(values: Mapping[str, Any]) -> str:
  """Returns flat values as a flag file, one per line, leaving out None."""
  return ''.join(
    f'--{name}={options_lib.to_text(value)}\n'
    for name, value in values.items()
    if value is not None
  )


def read_flags(text: str) -> dict[str, str]:
  """Returns the text of each value of a flag file by name.

  Raises:
    ValueError: a line is not --name=value.
  """
  texts = {}
  for line in filter(None, map(str.strip, text.splitlines())):
    name, equals, value = line.removeprefix('--').partition('=')
    if not line.startswith('--') or not equals:
      raise ValueError(f'not a flag of a training run: {line!r}')
    texts[name] = value
  return texts


def places_of(*datasets: str) -> list[str]:
  """Returns the names of the options that are locations of data.

  Args:
    *datasets: datasets whose own options are included.
  """
  kinds = (DataConfig, *map(DataConfig.options_type, datasets))
  return [
    name
    for kind in kinds
    for name, known in options_lib.options_of(kind).items()
    if known.operational and known.kind is str
  ]


def choices(
  datasets: Sequence[str] = (),
  models: Sequence[str] = (),
  methods: Sequence[str] = (),
) -> dict[type, list[str]]:
  """Returns the names that can be selected for each part that has a choice.

  Args:
    datasets: names in addition to those of this package.
    models: as `datasets`.
    methods: as `datasets`.
  """
  return {
    DataConfig: [*DATASETS, *datasets],
    ModelConfig: [*registry.architectures(), *models],
    MethodConfig: [*METHODS, *methods],
  }


def all_options(
  datasets: Sequence[str] = (),
  models: Sequence[str] = (),
  methods: Sequence[str] = (),
) -> dict[str, options_lib.Option]:
  """Returns all options of a run by name, including those of every choice.

  If choices disagree about the default of an option, its default is None.

  Args:
    datasets: names in addition to those of this package.
    models: as `datasets`.
    methods: as `datasets`.

  Raises:
    ValueError: a name is unknown, or two options share a name.
  """
  chosen = choices(datasets, models, methods)
  found = {}
  for kind in PARTS.values():
    own = options_lib.options_of(kind)
    _check_disjoint(found, own)
    found |= own
    others = {}
    for options in dict.fromkeys(
      kind.options_type(name) for name in chosen.get(kind, ())
    ):
      for name, value in options_lib.options_of(options).items():
        known = others.setdefault(name, value)
        if known.kind != value.kind:
          _check_disjoint({name: known}, {name: value})
        if known.default != value.default:
          others[name] = dataclasses.replace(known, default=None)
    _check_disjoint(found, others)
    found |= others
  return found


def _check_disjoint(found: Mapping[str, Any], more: Mapping[str, Any]) -> None:
  if same := sorted(found.keys() & more.keys()):
    raise ValueError(f'options defined twice: {", ".join(same)}')


def check_names(values: Mapping[str, Any], config: Config) -> None:
  """Raises ValueError listing the names that belong to no option.

  Args:
    values: values by name.
    config: configuration whose choices have options, too.
  """
  known = config.flat()
  if all(name in known for name in values):
    return
  known |= all_options()
  if unknown := [name for name in values if name not in known]:
    raise ValueError(f'unknown options: {", ".join(unknown)}')


def operational_options(config: Config) -> set[str]:
  """Returns the names of options that do not affect what is computed."""
  return {
    name
    for part in config._parts()
    for name, known in options_lib.options_of(type(part)).items()
    if known.operational
  }
