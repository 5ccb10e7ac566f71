"""Parts of a configuration: data, model, method, optimization, and run."""

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
  """A part with additional options that depend on a name."""

  # The field with the name.
  choice: ClassVar[str]
  options: Any

  @staticmethod
  def options_type(name: str) -> type:
    """Returns the options dataclass for a name."""
    raise NotImplementedError

  def __post_init__(self):
    if self.options is None:
      # `Config.check` reports unknown names.
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
  """The dataset and its augmentation."""

  choice = 'dataset'

  dataset: str = option(
    'spots',
    f'One of {", ".join(DATASETS)}, or package.module:SOURCE.',
  )
  data_dir: str = option(
    '~/.cache/dynconv_jax',
    'Folder of prepared datasets.',
    operational=True,
  )
  classes: tuple[str, ...] = option(
    (), 'Classes to use, numbered in this order; empty: all.'
  )
  train_split: str = option(
    'default',
    'In TFDS notation; default means train, or train[:90%] if the dataset has '
    'no validation split.',
  )
  validation_split: str = option(
    'default',
    "In TFDS notation, or none; default means the dataset's validation split, "
    'or train[90%:] if it has none.',
  )
  test_split: str = option(
    'default', "In TFDS notation; default means the dataset's test split."
  )
  cache: str = option(
    'none',
    'device: decode once into device memory and augment there; none: decode in '
    'each epoch.',
    allowed=('none', 'device'),
  )
  cache_size: int = option(
    0,
    'Side of the cached images in pixels; 0: large enough that no crop is '
    'upscaled.',
    allowed=NOT_NEGATIVE,
  )
  num_workers: int = option(
    0,
    'Number of decoding processes; 0: use threads of this process.',
    operational=True,
    allowed=between(0, 1024),
  )
  skip_corrupt: bool = option(
    False, 'Count, log, and skip images that cannot be decoded.'
  )
  scene_size: tuple[int, ...] = option(
    (),
    'Side of scenes in pixels, or its range. Each image is shrunk and placed '
    'at random on a blurred other image. Empty: no scenes.',
  )
  object_size: tuple[int, ...] = option(
    (), 'Side of the image within its scene in pixels, or its range.'
  )
  crop: str = option('resized', 'resized, pad, or none.')
  crop_scale: tuple[float, ...] = option(
    (0.25, 1.0), "Range of a resized crop's area as a fraction of the image."
  )
  crop_padding: int = option(4, 'Pixels of padding for crop=pad.')
  flip: bool = option(True, 'Flip images horizontally with probability 0.5.')
  randaugment: tuple[float, ...] = option(
    (),
    'RandAugment as N,M: N operations of strength M in [0, 10], such as 2,9. '
    'Runs on the host. Empty: off.',
  )
  color_jitter: float = option(0.0, 'Strength of color jitter, in [0, 1].')
  mixup: float = option(0.0, 'Alpha of mixup; 0: off.')
  cutmix: float = option(0.0, 'Alpha of CutMix; 0: off.')
  random_erasing: float = option(0.0, 'Probability of random erasing.')
  label_smoothing: float = option(
    0.0, 'Probability mass spread over all classes.'
  )
  normalization: str = option(
    'auto',
    'Image normalization. imagenet: ImageNet mean and standard deviation; '
    'inception: (x - 127) / 128, as weights from TensorFlow expect; auto: that '
    'of the weights or the run to start from, or else imagenet.',
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
    """Returns the augmentation of training images."""
    names = [f.name for f in dataclasses.fields(Augmentation)]
    return Augmentation(
      **{n: getattr(self, n) for n in names if hasattr(self, n)}
    )

  def scenes(self) -> Scenes | None:
    """Returns the scenes that images are placed in, or None."""
    if not (self.scene_size or self.object_size):
      return None
    return Scenes(self.scene_size, self.object_size)

  def check_cache(self, image_size: int) -> None:
    """Raises ValueError if augmentation, scenes, cache, or sizes do not fit.

    Args:
      image_size: side of the network input in pixels.
    """
    augmentation, scenes = self.augmentation(), self.scenes()
    name, size = 'image_size', image_size
    if scenes:
      name, size = 'object_size', scenes.crop_size
    augmentation.check_cache(self.cache, self.cache_size or None, size, name)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Chosen):
  """The network without its gates."""

  choice = 'model'

  model: str = option(
    'cifar_resnet8',
    'Network, such as cifar_resnet32 or resnet50, or package.module:factory.',
  )
  width_multiplier: float = option(
    1.0, 'Scale of the channel counts.', allowed=between(0.001, 100)
  )
  image_size: int = option(
    32, 'Side of the square network input in pixels.', allowed=between(1, 8192)
  )
  compute_dtype: str = option(
    'float32',
    'float32 or bfloat16; parameters, masks, and losses are always float32.',
    allowed=('float32', 'bfloat16'),
  )
  options: Any = None

  @staticmethod
  def options_type(name):
    return registry.options_type(registry.load_factory(name))


@dataclasses.dataclass(frozen=True)
class MethodConfig(Chosen):
  """The gating method."""

  choice = 'method'

  method: str = option(
    'dynconv', f'One of {", ".join(METHODS)}, or package.module:METHOD.'
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
    """Returns the target executed fraction, or None if the method has none.

    Args:
      progress: training progress, in [0, 1].
    """
    target = self.record.target
    return None if target is None else target(self.options, progress)


@dataclasses.dataclass(frozen=True)
class OptimizationConfig:
  """Initial weights, loss, and optimizer."""

  init_from: str = option(
    '', 'Workdir of another run whose weights to start from.'
  )
  pretrained: str = option(
    '',
    'Weights to start from: hf:OWNER/NAME, such as hf:timm/resnet50.tv_in1k; '
    'zoo:NAME for a network published by this project; or a .safetensors, '
    '.pth, or .pt file.',
  )
  loss: str = option(
    'cross_entropy',
    'Classification loss. cross_entropy: softmax cross-entropy; bce: binary '
    'cross-entropy averaged over classes (Wightman et al., ResNet strikes '
    'back, 2021).',
    allowed=('cross_entropy', 'bce'),
    before='cross_entropy',
  )
  distill_from: str = option(
    '', 'Workdir of the teacher network for distillation.'
  )
  distill_temperature: float = option(
    4.0, 'Softmax temperature of distillation.', allowed=POSITIVE
  )
  distill_weight: float = option(
    0.5,
    'Weight of the distillation loss; the classification loss has 1 minus this '
    'weight.',
    allowed=SHARE,
  )
  frozen: tuple[str, ...] = option(
    (),
    'Path patterns of parts whose weights and batch statistics are frozen, '
    'such as conv_stem, blocks.0, or *.conv_dw. Gates in frozen blocks are '
    'trained unless a pattern matches their path, such as *.masker.',
  )
  frozen_statistics: tuple[str, ...] = option(
    (),
    'Path patterns of batch norms that use their running statistics in '
    'training and do not update them, such as *.bn1; * for all.',
  )
  learning_rate_factors: tuple[str, ...] = option(
    (),
    'Learning rate factors as PATTERN:FACTOR, with path patterns such as '
    '*.masker.*bias:20. The last matching pattern wins.',
  )
  optimizer: str = option(
    'sgd', 'sgd (with momentum) or adamw.', allowed=('sgd', 'adamw')
  )
  learning_rate: float = option(0.05, 'Peak learning rate.', allowed=POSITIVE)
  momentum: float = option(0.9, 'Momentum of SGD.', allowed=BELOW_ONE)
  weight_decay: float = option(
    1e-4,
    'Weight decay. Excludes norms and biases unless decay_all is set.',
    allowed=NOT_NEGATIVE,
  )
  decay_all: bool = option(False, 'Also decay norms and biases.')
  schedule: str = option(
    'cosine',
    'Learning rate schedule: cosine or step.',
    allowed=('cosine', 'step'),
  )
  milestones: tuple[float, ...] = option(
    (0.5, 0.75),
    'Decay points of the step schedule, as fractions of training.',
    allowed=RISING,
  )
  step_decay: float = option(
    0.1, 'Decay factor of the step schedule.', allowed=SHARE
  )
  warmup_epochs: float = option(
    0.0, 'Epochs of linear warmup from 0.', allowed=NOT_NEGATIVE
  )
  gradient_clip: float = option(
    0.0, 'Maximum global gradient norm; 0: off.', allowed=NOT_NEGATIVE
  )
  ema_decay: float = option(
    0.0,
    'Decay of the exponential moving average of weights used for evaluation; '
    '0: off.',
    allowed=BELOW_ONE,
  )
  batch_size: int = option(
    64, 'Images per step, over all devices.', allowed=POSITIVE
  )
  grad_accum_steps: int = option(
    1,
    'Number of equal parts of a batch whose gradients are computed one by one '
    'and averaged, to save memory. Each part has its own batch statistics.',
    allowed=POSITIVE,
    before=1,
  )
  epochs: int = option(
    20,
    'Passes over the training split; may change when a run resumes.',
    allowed=POSITIVE,
  )

  @property
  def factors(self) -> dict[str, float]:
    """Learning rate factors by pattern; 0 for frozen weights.

    Raises:
      ValueError: a factor is not PATTERN:FACTOR.
    """
    pairs = []
    for entry in self.learning_rate_factors:
      pattern, _, text = entry.rpartition(':')
      try:
        factor = float(text)
      except ValueError:
        factor = math.nan
      if not pattern or not 0 <= factor < math.inf:
        raise ValueError(
          'learning_rate_factors must be PATTERN:FACTOR with a factor >= 0; '
          f'got {entry}'
        )
      pairs.append((pattern, factor))
    factors = {}
    for pattern, factor in [*pairs, *((p, 0.0) for p in self.frozen)]:
      factors.pop(pattern, None)  # A dict would keep the earlier place.
      factors[pattern] = factor
    return factors


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Seed, evaluation, checkpoints, and logging."""

  seed: int = option(
    0,
    'Seed of initialization, data order, augmentation, and masks.',
    allowed=between(0, 2**32 - 1),
  )
  eval_batch_size: int = option(
    250,
    'Images per batch in evaluation.',
    operational=True,
    allowed=POSITIVE,
  )
  fsdp: int = option(
    1,
    'Number of devices that share one copy of weights and optimizer state, to '
    'save memory. Must divide the number of devices.',
    operational=True,
    allowed=POSITIVE,
    before=1,
  )
  checkpoint_every_epochs: int = option(
    1, 'Epochs between checkpoints.', operational=True, allowed=POSITIVE
  )
  keep_checkpoints: int = option(
    2,
    'Number of latest checkpoints to keep, in addition to the best.',
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
    'Weights & Biases project to also log metrics and masks to; empty: none. '
    'Log in with `wandb login`.',
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
