"""The data of a run, opened as its configuration says."""

from __future__ import annotations

from typing import Any

import jax

from dynconv_jax.data import sources
from dynconv_jax.data.batches import EvalBatches, TrainBatches
from dynconv_jax.data.decode import RESIZE_RATIO
from dynconv_jax.data.source import Common, DataSource
from dynconv_jax.training.config import Config


def open_splits(config: Config) -> sources.Splits:
  """Returns the sources of the run, preparing the dataset where need be.

  Raises:
    ValueError, FileNotFoundError, ConnectionError, OSError: as
      `sources.open_splits`.
  """
  given = {
    role: getattr(config, f'{role}_split') for role in sources.Splits._fields
  }
  return sources.open_splits(
    *_source(config),
    **{
      role: None if split == 'default' else split
      for role, split in given.items()
    },
  )


def open_split(config: Config, split: str) -> sources.ImageSource:
  """Returns the source of one split.

  Args:
    config: of the run.
    split: 'train', 'validation' or 'test', by its role in the run; or in
      TFDS's notation.

  Raises:
    ValueError: the run has no such split; and as `open_splits`.
  """
  if split not in sources.Splits._fields:
    source, options, common = _source(config)
    source = sources.open_source(source, split, options, common)
    if source is None:
      raise ValueError(
        f'split must be {", ".join(sources.Splits._fields)} or in the notation '
        f'of TFDS; got {split!r}'
      )
    return source
  opened = open_splits(config)
  source = getattr(opened, split)
  if source is None:
    there = [name for name, s in opened._asdict().items() if s is not None]
    raise ValueError(
      f'this run has no {split} split; it has {" and ".join(there)}'
    )
  return source


def _source(config: Config) -> tuple[DataSource, Any, Common]:
  """Returns the data source, its options and those of all sources."""
  source = sources.load_source(config.dataset)
  common = Common(
    data_dir=config.data_dir,
    classes=config.classes,
    skip_corrupt=config.skip_corrupt,
  )
  return source, source.read_options(config), common


def train_batches(
  config: Config,
  source: sources.ImageSource,
  sharding: jax.sharding.Sharding | None = None,
) -> TrainBatches:
  """Returns the endless augmented batches of the run."""
  return TrainBatches(
    source,
    image_size=config.image_size,
    batch_size=config.batch_size,
    augmentation=config.augmentation(),
    seed=config.seed,
    cache=config.cache,
    cache_size=config.cache_size or None,
    num_workers=config.num_workers,
    skip_corrupt=config.skip_corrupt,
    sharding=sharding,
  )


def eval_batches(
  config: Config,
  source: sources.ImageSource,
  sharding: jax.sharding.Sharding | None = None,
) -> EvalBatches:
  """Returns every example once, in batches whose last one is padded."""
  devices = len(sharding.device_set) if sharding else 1
  batch_size = min(config.eval_batch_size, len(source))
  return EvalBatches(
    source,
    image_size=config.image_size,
    resize_ratio=resize_ratio(config),
    batch_size=-(-batch_size // devices) * devices,
    cache=config.cache,
    num_workers=config.num_workers,
    skip_corrupt=config.skip_corrupt,
    sharding=sharding,
  )


def resize_ratio(config: Config) -> float:
  """Returns the short side of an evaluated image over the network's input.

  Where training sees whole images, evaluation does too.
  """
  return RESIZE_RATIO if config.crop == 'resized' else 1.0
