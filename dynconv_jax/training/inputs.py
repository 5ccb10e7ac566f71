"""Data sources and batches of a run, opened from its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from dynconv_jax.data import sources
from dynconv_jax.data.batches import EvalBatches, TrainBatches
from dynconv_jax.data.decode import resize_ratio_of
from dynconv_jax.data.source import Common, DataSource
from dynconv_jax.training.config import Config, DataConfig


def open_splits(
  data: DataConfig, source: DataSource | None = None
) -> sources.Splits:
  """Returns the sources of all splits, preparing the dataset if necessary.

  Args:
    data: the run's data configuration.
    source: the data source, if not found by name.

  Raises:
    ValueError, FileNotFoundError, ConnectionError, OSError: as
      `sources.open_splits`.
  """
  given = {
    role: getattr(data, f'{role}_split') for role in sources.Splits._fields
  }
  return sources.open_splits(
    *_source(data, source),
    **{
      role: None if split == 'default' else split
      for role, split in given.items()
    },
  )


def open_split(
  data: DataConfig, split: str, source: DataSource | None = None
) -> sources.ImageSource:
  """Returns the source of one split.

  Args:
    data: the run's data configuration.
    split: 'train', 'validation', or 'test' for the run's own split, or a split
      in TFDS notation.
    source: the data source, if not found by name.

  Raises:
    ValueError: the run has no such split.
    FileNotFoundError, ConnectionError, OSError: as `open_splits`.
  """
  if split not in sources.Splits._fields:
    source, options, common = _source(data, source)
    opened = sources.open_source(source, split, options, common)
    if opened is None:
      raise ValueError(
        f'split must be {", ".join(sources.Splits._fields)} or in TFDS '
        f'notation; got {split!r}'
      )
    return opened
  splits = open_splits(data, source)
  opened = getattr(splits, split)
  if opened is None:
    available = [name for name, s in splits._asdict().items() if s is not None]
    raise ValueError(
      f'this run has no {split} split; it has {" and ".join(available)}'
    )
  return opened


def _source(
  data: DataConfig, source: DataSource | None
) -> tuple[DataSource, Any, Common]:
  """Returns the data source, its own options, and the common options."""
  source = source or data.source
  options = data.options if isinstance(data.options, source.options) else None
  common = Common(
    data_dir=data.data_dir,
    classes=data.classes,
    skip_corrupt=data.skip_corrupt,
  )
  return source, options, common


def train_batches(
  config: Config,
  source: sources.ImageSource,
  sharding: jax.sharding.Sharding | None = None,
) -> TrainBatches:
  """Returns an endless iterator over the run's augmented batches."""
  data = config.data
  return TrainBatches(
    source,
    image_size=config.model.image_size,
    batch_size=config.optimization.batch_size,
    augmentation=data.augmentation(),
    scenes=data.scenes(),
    normalization=data.normalization,
    seed=config.run.seed,
    cache=data.cache,
    cache_size=data.cache_size or None,
    num_workers=data.num_workers,
    skip_corrupt=data.skip_corrupt,
    sharding=sharding,
  )


def eval_batches(
  data: DataConfig,
  source: sources.ImageSource,
  sharding: jax.sharding.Sharding | None = None,
  *,
  image_size: int,
  batch_size: int = 250,
  indices: Sequence[int] | None = None,
) -> EvalBatches:
  """Returns batches with every example once. The last batch is padded.

  Args:
    data: the run's data configuration.
    source: the examples.
    sharding: the sharding of a batch.
    image_size: side of the network input in pixels.
    batch_size: maximum number of images per batch, before it is rounded up to a
      multiple of the number of devices.
    indices: the examples to use; None: all.
  """
  devices = len(sharding.device_set) if sharding else 1
  batch_size = min(batch_size, len(source if indices is None else indices))
  return EvalBatches(
    source,
    image_size=image_size,
    resize_ratio=resize_ratio_of(data.crop),
    scenes=data.scenes(),
    indices=indices,
    normalization=data.normalization,
    batch_size=-(-batch_size // devices) * devices,
    cache=data.cache,
    num_workers=data.num_workers,
    skip_corrupt=data.skip_corrupt,
    sharding=sharding,
  )
