"""Everything that defines a run, from data to evaluation: one flat record."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from dynconv_jax.data.augment import Augmentation
from dynconv_jax.data.sources import DATASETS
from dynconv_jax.interop.pretrained import check_pretrained
from dynconv_jax.methods.convnet_aig import target_rates
from dynconv_jax.methods.skipnet import SKIP_GATES, SKIP_TRAININGS
from dynconv_jax.models.create import (
  METHODS,
  check_gated,
  stage_granularities,
)
from dynconv_jax.models.resnet import (
  ARCHITECTURES,
  check_choice,
  check_image_size,
)

CACHES = ('none', 'device')
DTYPES = ('float32', 'bfloat16')
OPTIMIZERS = ('sgd', 'adamw')
SCHEDULES = ('cosine', 'step')


def _field(default: Any, help: str, *, operational: bool = False) -> Any:
  metadata = {'help': help, 'operational': operational}
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
  """The flags of a training run; the same names on the command line.

  A field marked operational may change when a run is resumed: it says where
  things lie or what is shown, not what is computed.
  """

  # Data.
  dataset: str = _field('spots', f'One of {", ".join(DATASETS)}.')
  data_dir: str = _field(
    '~/.cache/dynconv_jax',
    'Where prepared datasets are kept.',
    operational=True,
  )
  food101_dir: str = _field(
    '',
    'An unpacked Food-101 archive, or any folder of its layout; empty: '
    'download.',
    operational=True,
  )
  cifar10_dir: str = _field(
    '', "CIFAR-10's binary files; empty: download.", operational=True
  )
  image_folder_dir: str = _field(
    '',
    'Holds train/CLASS/*.jpg and test/CLASS/*.jpg.',
    operational=True,
  )
  spots_size: int = _field(32, 'Side of the drawn images, pixels.')
  spots_train: int = _field(3000, 'Number of drawn training images.')
  spots_test: int = _field(1000, 'Number of drawn test images.')
  spots_seed: int = _field(0, 'Seed of the drawn images.')
  classes: tuple[str, ...] = _field(
    (), 'Only these classes, numbered in this order; empty: all.'
  )
  train_split: str = _field(
    'default', "In TFDS's notation; default: train[:90%]."
  )
  validation_split: str = _field(
    'default', "In TFDS's notation, or none; default: train[90%:]."
  )
  test_split: str = _field(
    'default', "In TFDS's notation; default: the dataset's test split."
  )
  image_size: int = _field(32, 'Side of the square network input, pixels.')
  cache: str = _field(
    'none',
    'device: decode once into device memory and augment there; none: decode '
    'each time.',
  )
  cache_size: int = _field(
    0,
    'Side of the cached images, pixels; 0: so large that no crop is enlarged.',
  )
  num_workers: int = _field(
    0, 'Processes that decode; 0: threads of this process.', operational=True
  )
  skip_corrupt: bool = _field(
    False, 'Count, log and skip images that cannot be decoded.'
  )

  # Augmentation.
  crop: str = _field('resized', 'resized, pad or none.')
  crop_scale: tuple[float, ...] = _field(
    (0.25, 1.0), "Range of a resized crop's share of the image's area."
  )
  crop_padding: int = _field(4, 'Pixels around the image, for --crop=pad.')
  flip: bool = _field(True, 'Mirror half of the images left to right.')
  color_jitter: float = _field(0.0, 'Strength of colour jitter, in [0, 1].')
  mixup: float = _field(0.0, 'Alpha of mixup; 0: off.')
  cutmix: float = _field(0.0, 'Alpha of CutMix; 0: off.')
  random_erasing: float = _field(0.0, 'Probability of random erasing.')
  label_smoothing: float = _field(0.0, 'Label mass spread over all classes.')

  # Model.
  model: str = _field('cifar_resnet8', f'One of {", ".join(ARCHITECTURES)}.')
  method: str = _field('dynconv', f'One of {", ".join(METHODS)}.')
  width_multiplier: float = _field(1.0, 'Scales the channels.')
  mask_kernel_size: int = _field(3, "Kernel of DynConv's mask units: 3 or 1.")
  mask_granularity: tuple[int, ...] = _field(
    (1,),
    "Side of DynConv's patches, in positions of a block's output: one for all "
    'stages, or one a stage.',
  )
  compute_dtype: str = _field(
    'float32', 'float32 or bfloat16; parameters, masks, losses are float32.'
  )
  init_from: str = _field(
    '', "Another run's workdir, whose weights to start from."
  )
  pretrained: str = _field(
    '',
    'Weights of PyTorch to start from: hf:OWNER/NAME, such as '
    'hf:timm/resnet50.tv_in1k, or a .safetensors, .pth or .pt file.',
  )
  mask_bias: float | None = _field(
    None,
    "Opening logit of fresh mask units of DynConv's and gates of SkipNet's: "
    "weights of the squeeze branch, of a gate's last layer, start at 0 and the "
    'bias at this. Unset: their own initialisation.',
  )
  distill_from: str = _field('', 'Workdir of the run whose network teaches.')
  distill_temperature: float = _field(4.0, 'Softens logits in distillation.')
  distill_weight: float = _field(
    0.5, "Share of distillation in the loss; cross-entropy's is the rest."
  )

  # Gating.
  budget: float = _field(
    0.5,
    "DynConv: target share of the masked layers' MACs; ConvNet-AIG: target "
    'rate t of executing a block. In [0, 1].',
  )
  budget_warmup: float = _field(
    0.0,
    'Share of the training over which the target falls from 1 to the budget, '
    "SkipNet's skip_weight rises from 0 to its value; 0, as in the papers: "
    'they are so from the start.',
  )
  sparsity_weight: float = _field(10.0, "Weight of DynConv's sparsity loss.")
  target_rates: str = _field(
    'uniform',
    "ConvNet-AIG's target rate of each block: uniform, or the paper's list "
    'for resnet50 or resnet101, with the budget as t.',
  )
  target_rate_weight: float = _field(
    2.0, "Weight of ConvNet-AIG's target-rate loss."
  )
  ponder_weight: float = _field(
    0.01,
    'Weight of the ponder cost of SACT and ACT; on ImageNet the paper has '
    '0.005.',
  )
  skip_gate: str = _field(
    'recurrent', f"SkipNet's gates, one of {', '.join(SKIP_GATES)}."
  )
  skip_training: str = _field(
    'supervised',
    "SkipNet's stage: supervised, or reinforce, which starts from it.",
  )
  skip_temperature: float = _field(
    1.0,
    "Divides the logits of SkipNet's gates at the start: below 1, as in the "
    "authors' second stage (0.05), samples are nearly decisions.",
  )
  skip_weight: float = _field(
    0.1,
    "SkipNet's alpha: what executing every gated block costs, or what skipping "
    'every one earns.',
  )
  reinforce_weight: float = _field(
    0.01, "Weight of SkipNet's REINFORCE loss in the second stage."
  )
  gumbel_temperatures: tuple[float, ...] = _field(
    (1.0,), 'Temperature of the Gumbel sigmoid, one a phase.'
  )
  gumbel_milestones: tuple[float, ...] = _field(
    (), 'Where the next temperature begins, as shares of the training.'
  )
  gumbel_noise_until: float = _field(
    0.8, 'Share of the training after which the masks get no noise.'
  )

  # Optimisation.
  optimizer: str = _field('sgd', 'sgd (with momentum) or adamw.')
  learning_rate: float = _field(0.05, 'At its peak.')
  momentum: float = _field(0.9, 'Of SGD.')
  weight_decay: float = _field(1e-4, 'Not of norms and biases by default.')
  decay_all: bool = _field(False, 'Decay norms and biases as well.')
  schedule: str = _field('cosine', 'cosine, or step.')
  milestones: tuple[float, ...] = _field(
    (0.5, 0.75), 'Where a step schedule decays, as shares of the training.'
  )
  step_decay: float = _field(0.1, "Factor of a step schedule's decay.")
  warmup_epochs: float = _field(0.0, 'Linear warm-up from 0, epochs.')
  gradient_clip: float = _field(0.0, 'Largest global gradient norm; 0: off.')
  ema_decay: float = _field(
    0.0, 'Of the moving average of weights that is evaluated; 0: off.'
  )
  batch_size: int = _field(64, 'Images a step, over all devices.')
  epochs: int = _field(20, 'Passes over the training split.')
  seed: int = _field(0, 'Of initialisation, order, augmentation and masks.')

  # Evaluation and records.
  eval_batch_size: int = _field(
    250, 'Images a batch in evaluation.', operational=True
  )
  checkpoint_every_epochs: int = _field(
    1, 'Epochs between checkpoints.', operational=True
  )
  keep_checkpoints: int = _field(
    2, 'Latest checkpoints kept, beside the best.', operational=True
  )
  log_every_steps: int = _field(
    10, 'Steps between updates of the progress display.', operational=True
  )

  def augmentation(self) -> Augmentation:
    """Returns how training images are varied."""
    names = [f.name for f in dataclasses.fields(Augmentation)]
    return Augmentation(
      **{n: getattr(self, n) for n in names if hasattr(self, n)}
    )

  @property
  def target(self) -> float | None:
    """The budget, or None where the method has none to meet."""
    return self.budget if self.method in ('dynconv', 'convnet_aig') else None

  def block_target_rates(self) -> tuple[float, ...]:
    """Returns ConvNet-AIG's target rate of each block, in network order."""
    num_blocks = sum(ARCHITECTURES[self.model].depths)
    return target_rates(self.target_rates, self.budget, num_blocks)

  def check(self, num_devices: int = 1) -> None:
    """Raises ValueError naming every field that is out of range.

    Args:
      num_devices: local devices that share a batch.
    """
    errors = []

    def attempt(check, *args):
      try:
        check(*args)
      except ValueError as error:
        errors.append(str(error))

    for name, allowed in (
      ('dataset', DATASETS),
      ('cache', CACHES),
      ('model', ARCHITECTURES),
      ('method', METHODS),
      ('skip_gate', SKIP_GATES),
      ('skip_training', SKIP_TRAININGS),
      ('compute_dtype', DTYPES),
      ('optimizer', OPTIMIZERS),
      ('schedule', SCHEDULES),
    ):
      attempt(check_choice, name, getattr(self, name), allowed)
    attempt(self.augmentation)
    if self.pretrained:
      attempt(check_pretrained, self.pretrained)
      if self.init_from:
        errors.append(
          'init_from and pretrained exclude each other; got '
          f'{self.init_from} and {self.pretrained}'
        )
    if self.model in ARCHITECTURES:
      attempt(check_image_size, self.model, self.image_size)
      attempt(stage_granularities, self.model, self.mask_granularity)
      attempt(self._check_gated)
    for name, (holds, allowed) in self._ranges().items():
      if not holds:
        errors.append(f'{name} must be {allowed}; got {getattr(self, name)}')
    if self.batch_size > 0 and self.batch_size % num_devices:
      errors.append(
        f'batch_size must be divisible by the {num_devices} devices; got '
        f'{self.batch_size}'
      )
    if self.warmup_epochs > self.epochs > 0:
      errors.append(
        f'warmup_epochs must be at most epochs, {self.epochs}; got '
        f'{self.warmup_epochs}'
      )
    if len(self.gumbel_milestones) != len(self.gumbel_temperatures) - 1:
      errors.append(
        'gumbel_milestones must be one fewer than gumbel_temperatures; got '
        f'{len(self.gumbel_milestones)} and {len(self.gumbel_temperatures)}'
      )
    if errors:
      raise ValueError('; '.join(errors))

  def _check_gated(self) -> None:
    rates = ()
    if self.method == 'convnet_aig':
      rates = self.block_target_rates()
    check_gated(self.model, self.method, rates)

  def _ranges(self) -> Mapping[str, tuple[bool, str]]:
    def positive(*names):
      return {n: (getattr(self, n) > 0, '> 0') for n in names}

    def not_negative(*names):
      return {n: (getattr(self, n) >= 0, '>= 0') for n in names}

    def share(*names):
      return {n: (0 <= getattr(self, n) <= 1, 'in [0, 1]') for n in names}

    def rising(*names):
      return {
        n: (
          list(getattr(self, n)) == sorted(set(getattr(self, n)))
          and all(0 < m < 1 for m in getattr(self, n)),
          'rising shares in (0, 1)',
        )
        for n in names
      }

    return {
      **positive(
        'learning_rate',
        'distill_temperature',
        'batch_size',
        'eval_batch_size',
        'epochs',
        'checkpoint_every_epochs',
        'keep_checkpoints',
        'log_every_steps',
        'width_multiplier',
        'skip_temperature',
      ),
      **not_negative(
        'cache_size',
        'num_workers',
        'sparsity_weight',
        'target_rate_weight',
        'ponder_weight',
        'skip_weight',
        'reinforce_weight',
        'weight_decay',
        'warmup_epochs',
        'gradient_clip',
        'seed',
      ),
      **share(
        'budget',
        'budget_warmup',
        'distill_weight',
        'gumbel_noise_until',
        'step_decay',
      ),
      **rising('milestones', 'gumbel_milestones'),
      'mask_kernel_size': (self.mask_kernel_size in (1, 3), '1 or 3'),
      'momentum': (0 <= self.momentum < 1, 'in [0, 1)'),
      'ema_decay': (0 <= self.ema_decay < 1, 'in [0, 1)'),
      'gumbel_temperatures': (
        bool(self.gumbel_temperatures)
        and all(t > 0 for t in self.gumbel_temperatures),
        'one or more values > 0',
      ),
    }

  def to_flags(self) -> str:
    """Returns a flag file that gives this configuration, a flag a line."""
    lines = []
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value is None:
        continue
      if isinstance(value, tuple):
        value = ','.join(map(str, value))
      elif isinstance(value, bool):
        value = str(value).lower()
      lines.append(f'--{field.name}={value}\n')
    return ''.join(lines)

  @classmethod
  def from_flags(cls, text: str) -> Config:
    """Returns the configuration of a text written by `to_flags`.

    Raises:
      ValueError: a line is not --name=value, names no field, or its value is
        not one of the field's type.
    """
    types = typing.get_type_hints(cls)
    values = {}
    for line in filter(None, map(str.strip, text.splitlines())):
      name, equals, value = line.removeprefix('--').partition('=')
      try:
        if not line.startswith('--') or not equals:
          raise ValueError
        values[name] = parse_value(types[name], value)
      except (KeyError, ValueError):
        raise ValueError(f'not a flag of a training run: {line!r}') from None
    return cls(**values)

  def differing(self, other: Config) -> Sequence[str]:
    """Returns 'name: mine, not theirs' for all but operational fields."""
    return [
      f'{f.name}: {getattr(self, f.name)!r}, not {getattr(other, f.name)!r}'
      for f in dataclasses.fields(self)
      if not f.metadata['operational']
      and getattr(self, f.name) != getattr(other, f.name)
    ]


def parse_value(kind: Any, text: str) -> Any:
  """Returns the value of a field of the given type, written as in a flag."""
  if kind is bool:
    return {'true': True, 'false': False}[text]
  if kind == tuple[str, ...]:
    return tuple(filter(None, text.split(',')))
  if kind == tuple[float, ...]:
    return tuple(float(t) for t in text.split(',') if t)
  if kind == tuple[int, ...]:
    return tuple(int(t) for t in text.split(',') if t)
  if kind == float | None:
    return float(text) if text else None
  return kind(text)
