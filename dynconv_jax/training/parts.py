"""The parts of a configuration: data, model, method, optimization, run."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

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


class Chosen:
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
class DataConfig(Chosen):
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
class ModelConfig(Chosen):
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
class MethodConfig(Chosen):
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


PARTS = {
  'data': DataConfig,
  'model': ModelConfig,
  'method': MethodConfig,
  'optimization': OptimizationConfig,
  'run': RunConfig,
}
