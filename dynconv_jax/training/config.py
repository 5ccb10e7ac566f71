"""Everything that defines a run: data, model, method, optimization, run.

The names of all fields are unique, so that a configuration is also a flat
mapping of names to values: what flags give and what a workdir keeps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from absl import logging

from dynconv_jax import extras, interop
from dynconv_jax import options as options_lib
from dynconv_jax.data.augment import NORMALIZATIONS, Augmentation
from dynconv_jax.data.scenes import Scenes
from dynconv_jax.data.source import DataSource
from dynconv_jax.data.sources import DATASETS, load_source
from dynconv_jax.methods.method import METHODS, Method, load_method
from dynconv_jax.models import registry
from dynconv_jax.options import (
  BELOW_ONE,
  NOT_NEGATIVE,
  POSITIVE,
  RISING,
  SHARE,
  between,
  option,
)


class _Chosen:
  """A part with the options of something that is chosen by its name."""

  # The field that names it.
  choice: ClassVar[str]
  options: Any

  @staticmethod
  def options_type(name: str) -> type:
    """Returns the dataclass of the options of what is chosen by a name."""
    raise NotImplementedError

  def __post_init__(self):
    if self.options is None:
      # An unknown name is reported by `check`.
      if options_lib.errors([lambda: self.options_type(self._name)]):
        options = options_lib.NoOptions()
      else:
        options = self.options_type(self._name)()
      object.__setattr__(self, 'options', options)

  @property
  def _name(self) -> str:
    return getattr(self, self.choice)


@dataclasses.dataclass(frozen=True)
class DataConfig(_Chosen):
  """What a network is trained on, and how images are varied."""

  choice = 'dataset'

  dataset: str = option(
    'spots',
    f'One of {", ".join(DATASETS)}; or package.module:SOURCE.',
  )
  data_dir: str = option(
    '~/.cache/dynconv_jax',
    'Where prepared datasets are kept.',
    operational=True,
  )
  classes: tuple[str, ...] = option(
    (), 'Only these classes, numbered in this order; empty: all.'
  )
  train_split: str = option(
    'default', "In TFDS's notation; default: train[:90%]."
  )
  validation_split: str = option(
    'default', "In TFDS's notation, or none; default: train[90%:]."
  )
  test_split: str = option(
    'default', "In TFDS's notation; default: the dataset's test split."
  )
  cache: str = option(
    'none',
    'device: decode once into device memory and augment there; none: decode '
    'each time.',
    allowed=('none', 'device'),
  )
  cache_size: int = option(
    0,
    'Side of the cached images, pixels; 0: so large that no crop is enlarged.',
    allowed=NOT_NEGATIVE,
  )
  num_workers: int = option(
    0,
    'Processes that decode; 0: threads of this process.',
    operational=True,
    allowed=between(0, 1024),
  )
  skip_corrupt: bool = option(
    False, 'Count, log and skip images that cannot be decoded.'
  )
  scene_size: tuple[int, ...] = option(
    (),
    'Side of scenes, pixels, or its range: each image, shrunk, lies somewhere '
    'on a blurred other one; empty: none.',
  )
  object_size: tuple[int, ...] = option(
    (), "Side of the image in its scene, in the scene's pixels, or its range."
  )
  crop: str = option('resized', 'resized, pad or none.')
  crop_scale: tuple[float, ...] = option(
    (0.25, 1.0), "Range of a resized crop's share of the image's area."
  )
  crop_padding: int = option(4, 'Pixels around the image, for padded crops.')
  flip: bool = option(True, 'Mirror half of the images left to right.')
  randaugment: tuple[float, ...] = option(
    (),
    'RandAugment as N,M: N operations, each of strength M in [0, 10], on the '
    'host; such as 2,9. Empty: off.',
  )
  color_jitter: float = option(0.0, 'Strength of color jitter, in [0, 1].')
  mixup: float = option(0.0, 'Alpha of mixup; 0: off.')
  cutmix: float = option(0.0, 'Alpha of CutMix; 0: off.')
  random_erasing: float = option(0.0, 'Probability of random erasing.')
  label_smoothing: float = option(0.0, 'Label mass spread over all classes.')
  normalization: str = option(
    'auto',
    "Of images: imagenet, by ImageNet's mean and deviation; inception, (x - "
    "127) / 128, as TensorFlow's weights expect; auto: as the weights or the "
    'run to start from, else imagenet.',
    allowed=tuple(NORMALIZATIONS),
    before='imagenet',
  )
  options: Any = None

  @staticmethod
  @functools.cache
  def options_type(name):
    return load_source(name).options

  @property
  def source(self) -> DataSource:
    """The data source."""
    return load_source(self.dataset)

  def augmentation(self) -> Augmentation:
    """Returns how training images are varied."""
    names = [f.name for f in dataclasses.fields(Augmentation)]
    return Augmentation(
      **{n: getattr(self, n) for n in names if hasattr(self, n)}
    )

  def scenes(self) -> Scenes | None:
    """Returns the scenes that images are put into, if any."""
    if not (self.scene_size or self.object_size):
      return None
    return Scenes(self.scene_size, self.object_size)


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Chosen):
  """The network, but for its gates."""

  choice = 'model'

  model: str = option(
    'cifar_resnet8',
    'Such as cifar_resnet32 or resnet50; or package.module:factory.',
  )
  width_multiplier: float = option(
    1.0, 'Scales the channels.', allowed=between(0.001, 100)
  )
  image_size: int = option(
    32, 'Side of the square network input, pixels.', allowed=between(1, 8192)
  )
  compute_dtype: str = option(
    'float32',
    'float32 or bfloat16; parameters, masks, losses are float32.',
    allowed=('float32', 'bfloat16'),
  )
  options: Any = None

  @staticmethod
  def options_type(name):
    return registry.options_type(registry.load_factory(name))


@dataclasses.dataclass(frozen=True)
class MethodConfig(_Chosen):
  """Where the network computes."""

  choice = 'method'

  method: str = option(
    'dynconv', f'One of {", ".join(METHODS)}; or package.module:METHOD.'
  )
  options: Any = None

  @staticmethod
  def options_type(name):
    return load_method(name).options

  @property
  def record(self) -> Method:
    """The method itself."""
    return load_method(self.method)

  def target(self, progress: Any = 1.0) -> Any:
    """Returns the target executed fraction, or None where there is none.

    Args:
      progress: share of the training that is done, in [0, 1].
    """
    target = self.record.target
    return None if target is None else target(self.options, progress)


@dataclasses.dataclass(frozen=True)
class OptimizationConfig:
  """How weights start and how they change."""

  init_from: str = option(
    '', "Another run's workdir, whose weights to start from."
  )
  pretrained: str = option(
    '',
    'Weights to start from: hf:OWNER/NAME, such as hf:timm/resnet50.tv_in1k; '
    'zoo:NAME, of a network trained here; or a .safetensors, .pth or .pt file.',
  )
  loss: str = option(
    'cross_entropy',
    'Of the classes: cross_entropy, of their softmax; or bce, binary '
    'cross-entropy of each class against its share of the label, averaged over '
    'the classes (Wightman et al., ResNet strikes back, 2021).',
    allowed=('cross_entropy', 'bce'),
    before='cross_entropy',
  )
  distill_from: str = option('', 'Workdir of the run whose network teaches.')
  distill_temperature: float = option(
    4.0, 'Softens logits in distillation.', allowed=POSITIVE
  )
  distill_weight: float = option(
    0.5,
    "Share of distillation in the loss; that of the classes' is the rest.",
    allowed=SHARE,
  )
  frozen: tuple[str, ...] = option(
    (),
    'Parts of the network that stay as they are, weights and batch statistics: '
    'patterns of paths such as conv_stem, blocks.0 or *.conv_dw.',
  )
  frozen_statistics: tuple[str, ...] = option(
    (),
    'Batch norms that use their running statistics in training and keep them: '
    'patterns of paths such as *.bn1; * for all.',
  )
  learning_rate_factors: tuple[str, ...] = option(
    (),
    'Factors of the learning rate, PATTERN:FACTOR with patterns of paths, such '
    'as *.masker.*bias:20; the last that matches counts.',
  )
  optimizer: str = option(
    'sgd', 'sgd (with momentum) or adamw.', allowed=('sgd', 'adamw')
  )
  learning_rate: float = option(0.05, 'At its peak.', allowed=POSITIVE)
  momentum: float = option(0.9, 'Of SGD.', allowed=BELOW_ONE)
  weight_decay: float = option(
    1e-4, 'Not of norms and biases by default.', allowed=NOT_NEGATIVE
  )
  decay_all: bool = option(False, 'Decay norms and biases as well.')
  schedule: str = option(
    'cosine', 'cosine, or step.', allowed=('cosine', 'step')
  )
  milestones: tuple[float, ...] = option(
    (0.5, 0.75),
    'Where a step schedule decays, as shares of the training.',
    allowed=RISING,
  )
  step_decay: float = option(
    0.1, "Factor of a step schedule's decay.", allowed=SHARE
  )
  warmup_epochs: float = option(
    0.0, 'Linear warm-up from 0, epochs.', allowed=NOT_NEGATIVE
  )
  gradient_clip: float = option(
    0.0, 'Largest global gradient norm; 0: off.', allowed=NOT_NEGATIVE
  )
  ema_decay: float = option(
    0.0,
    'Of the moving average of weights that is evaluated; 0: off.',
    allowed=BELOW_ONE,
  )
  batch_size: int = option(
    64, 'Images a step, over all devices.', allowed=POSITIVE
  )
  grad_accum_steps: int = option(
    1,
    'Equal parts of a batch whose gradients are computed one after the other '
    'and averaged, to save memory; each has its own batch statistics.',
    allowed=POSITIVE,
    before=1,
  )
  epochs: int = option(
    20,
    'Passes over the training split; may change when a run is resumed.',
    allowed=POSITIVE,
  )

  @property
  def factors(self) -> dict[str, float]:
    """Factors of the learning rate by pattern, 0 where weights are frozen.

    Raises:
      ValueError: one is not PATTERN:FACTOR.
    """
    factors = {}
    for given in self.learning_rate_factors:
      pattern, _, factor = given.rpartition(':')
      try:
        factors[pattern] = float(factor)
      except ValueError:
        factors[pattern] = math.nan
      if not pattern or not 0 <= factors[pattern] < math.inf:
        raise ValueError(
          'learning_rate_factors must be PATTERN:FACTOR with a factor >= 0; '
          f'got {given}'
        )
    return factors | dict.fromkeys(self.frozen, 0.0)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Seed, evaluation and records."""

  seed: int = option(
    0,
    'Of initialization, order, augmentation and masks.',
    allowed=between(0, 2**32 - 1),
  )
  eval_batch_size: int = option(
    250,
    'Images a batch in evaluation.',
    operational=True,
    allowed=POSITIVE,
  )
  fsdp: int = option(
    1,
    'Devices that share one copy of weights and optimizer state, to save '
    'memory; the number of devices is a multiple of it.',
    operational=True,
    allowed=POSITIVE,
    before=1,
  )
  checkpoint_every_epochs: int = option(
    1, 'Epochs between checkpoints.', operational=True, allowed=POSITIVE
  )
  keep_checkpoints: int = option(
    2,
    'Latest checkpoints kept, beside the best.',
    operational=True,
    allowed=POSITIVE,
  )
  log_every_steps: int = option(
    10,
    'Steps between updates of the progress display.',
    operational=True,
    allowed=POSITIVE,
  )
  wandb: str = option(
    '',
    'Project of Weights and Biases that metrics and masks are sent to, beside '
    'the files; empty: none. Log in with `wandb login`.',
    operational=True,
    before='',
  )


_PARTS = {
  'data': DataConfig,
  'model': ModelConfig,
  'method': MethodConfig,
  'optimization': OptimizationConfig,
  'run': RunConfig,
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run.

  An option marked operational may change when a run is resumed: it says where
  things lie or what is shown, not what is computed.
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
    """Returns a configuration of flat values; the rest are defaults.

    Args:
      **values: of any option. Those of methods, data sets and networks that
        are not chosen play no part.

    Raises:
      ValueError: there is no such option.
    """
    config = cls(
      **{name: make_part(kind, values) for name, kind in _PARTS.items()}
    )
    check_names(values, config)
    return config

  def replace(self, **changes) -> Config:
    """Returns a configuration of which some values, given flat, differ."""
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
    """Raises ValueError naming every option that is out of range.

    Args:
      num_devices: devices of all processes, which share a batch.
      factory: of the network, where it is not found by name.
      resumed: whether the run goes on, and needs no pretrained weights.
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
        lambda: self.data.augmentation().check_cache(self.data.cache),
        self.data.scenes,
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
          'init_from and pretrained exclude each other; got '
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
    """Raises ValueError unless input and gates fit the network.

    Args:
      factory: of the network, where it is not found by name.
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
    """Returns a flag file that gives this configuration, a flag a line.

    Args:
      places: whether it says where things lie, which may differ by machine.
    """
    elsewhere = {
      name
      for part in self._parts()
      for name, known in options_lib.options_of(type(part)).items()
      if not places and known.operational and known.kind is str
    }
    return to_flags(
      {n: value for n, value in self.flat().items() if n not in elsewhere}
    )

  @classmethod
  def from_flags(cls, text: str) -> Config:
    """Returns the configuration of a text written by `to_flags`.

    Options that do not exist (any more) are left out with a warning.

    Raises:
      ValueError: a line is not --name=value, an option is missing, or its value
        is not of its type; names each.
    """
    texts = read_flags(text)
    parts, errors = {}, []
    for name, kind in _PARTS.items():
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
      logging.warning('left out: %s', error)
    return config

  def differing(self, other: Config) -> Sequence[str]:
    """Returns 'name: mine, not theirs' for all but operational options.

    Options that only one of them has follow from another method, data set or
    network, which is named.
    """
    mine, theirs = self.flat(), other.flat()
    operational = operational_options(self) | operational_options(other)
    return [
      f'{name}: {value!r}, not {theirs[name]!r}'
      for name, value in mine.items()
      if name in theirs and name not in operational and value != theirs[name]
    ]

  def _parts(self) -> Iterator[Any]:
    for name in _PARTS:
      part = getattr(self, name)
      yield part
      if isinstance(part, _Chosen):
        yield part.options


def make_part(kind: type, values: Mapping[str, Any]) -> Any:
  """Returns a part of a configuration of flat values; others are ignored."""
  part = options_lib.make(kind, values)
  if isinstance(part, _Chosen):
    options = options_lib.make(type(part.options), values)
    part = dataclasses.replace(part, options=options)
  return part


def read_part(kind: type, texts: Mapping[str, str]) -> Any:
  """Returns a part of a configuration of which the values are text.

  Args:
    kind: of the part, such as ModelConfig.
    texts: by name, see `read_flags`; others are ignored.

  Raises:
    ValueError: options are missing or not of their type; names each.
  """
  values = options_lib.parse(kind, texts)
  part = make_part(kind, values)
  if isinstance(part, _Chosen):
    kind.options_type(part._name)  # An unknown name is an error.
    values |= options_lib.parse(type(part.options), texts)
  return make_part(kind, values)


def to_flags(values: Mapping[str, Any]) -> str:
  """Returns a flag file of flat values, a flag a line; None is left out."""
  return ''.join(
    f'--{name}={options_lib.to_text(value)}\n'
    for name, value in values.items()
    if value is not None
  )


def read_flags(text: str) -> dict[str, str]:
  """Returns the text of each value in a flag file, by name.

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


def all_options(
  datasets: Sequence[str] = (),
  models: Sequence[str] = (),
  methods: Sequence[str] = (),
) -> dict[str, options_lib.Option]:
  """Returns the options of a run by name, those of every choice.

  Args:
    datasets: names beside those of this package.
    models: as `datasets`.
    methods: as `datasets`.

  Raises:
    ValueError: a name is unknown, or two options share a name.
  """
  chosen = {
    DataConfig: [*DATASETS, *datasets],
    ModelConfig: [*registry.architectures(), *models],
    MethodConfig: [*METHODS, *methods],
  }
  found = {}
  for kind in _PARTS.values():
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
    raise ValueError(f'two options are called {", ".join(same)}')


def check_names(values: Mapping[str, Any], config: Config) -> None:
  """Raises ValueError naming those names that no option has.

  Args:
    values: by name.
    config: whose choices have options, too.
  """
  known = config.flat()
  if all(name in known for name in values):
    return
  known |= all_options()
  if unknown := [name for name in values if name not in known]:
    raise ValueError(f'a run has no options called {", ".join(unknown)}')


def operational_options(config: Config) -> set[str]:
  """Returns the names of the options that do not change what is computed."""
  return {
    name
    for part in config._parts()
    for name, known in options_lib.options_of(type(part)).items()
    if known.operational
  }
