"""What experiments.benchmark times: networks, images and masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from dynconv_jax import create_model
from dynconv_jax.models.resnet import ResNet
from dynconv_jax.sparse.cost import clustered_masks
from dynconv_jax.training import inputs, workdir

_MASK_SEED = 1  # The same masks in every process.


class Networks:
  """Networks of random weights, or a trained one; equal in every process.

  Attributes:
    settings: flags of experiments.benchmark, with those of the trained run.
    trained: the run, or None.
    method: of the gated network.
    dtype: compute dtype.
  """

  def __init__(self, settings: Mapping[str, Any]):
    self.settings = dict(settings)
    self.trained = None
    if settings['workdir']:
      self.trained = workdir.load_run(
        settings['workdir'], best=settings['checkpoint'] == 'best'
      )
      config = self.trained.config
      # A dense network is planned as a gated one of its shape would be.
      method = 'dynconv' if config.method == 'dense' else config.method
      self.settings |= {
        'model': config.model,
        'method': method,
        'num_classes': len(self.trained.class_names),
        'image_size': config.image_size,
        'compute_dtype': config.compute_dtype,
      }
    self.method = self.settings['method']
    self.dtype = jnp.dtype(self.settings['compute_dtype'])
    self._models: dict[tuple[str, str], ResNet] = {}

  @property
  def is_gated(self) -> bool:
    """Whether there is a gated network: the trained one may have no gates."""
    return not self.trained or self.trained.config.method != 'dense'

  def model(self, method: str, mask_granularity: str = '1') -> ResNet:
    """Returns the evaluation view of the network of a method.

    Args:
      method: a trained run's own gives the trained network.
      mask_granularity: of DynConv, as the flag.
    """
    if self.trained and method == self.trained.config.method:
      return self.trained.model
    key = (method, mask_granularity)
    if key not in self._models:
      self._models[key] = self._create(method, mask_granularity)
    return self._models[key]

  def _create(self, method, mask_granularity):
    model = create_model(
      self.settings['model'],
      method=method,
      num_classes=self.settings['num_classes'],
      mask_granularity=parse_sides(mask_granularity),
      width_multiplier=(
        self.trained.config.width_multiplier if self.trained else 1.0
      ),
      dtype=self.dtype,
      rngs=nnx.Rngs(0),
    )
    return nnx.view(model, deterministic=True, use_running_average=True)

  def batches(self, batch_size: int) -> list[np.ndarray]:
    """Returns float32[N, H, W, 3] batches: random, or of the run's split."""
    if not self.trained:
      return [random_images(self.settings, batch_size)]
    config = dataclasses.replace(
      self.trained.config, eval_batch_size=batch_size
    )
    if self.settings['food101_dir']:
      config = dataclasses.replace(
        config, food101_dir=self.settings['food101_dir']
      )
    source = inputs.open_split(config, self.settings['split'])
    batches = iter(inputs.eval_batches(config, source))
    count = min(self.settings['num_batches'], len(source) // batch_size)
    return [np.asarray(next(batches)['image']) for _ in range(max(1, count))]

  def masks(
    self, model: ResNet, images: np.ndarray, density: float
  ) -> list[np.ndarray]:
    """Returns a clustered mask float32[N, h, w] for each block of a network.

    Args:
      model: gated.
      images: float32[N, H, W, 3].
      density: share of active positions.
    """
    abstract = jax.eval_shape(model, images)[1]
    decided = {mask.name: mask.hard.shape for mask in abstract}
    rng = np.random.default_rng(_MASK_SEED)
    return [
      clustered_masks(
        rng,
        # A block without a gate is executed everywhere.
        decided[block.name],
        density,
        block.masker.per_image,
        side=getattr(block.masker, 'granularity', 1),
      )
      if block.name in decided
      else np.ones(shape, np.float32)
      for block, shape in zip(
        model.blocks, _output_shapes(model, images), strict=True
      )
    ]


def parse_sides(mask_granularity: str) -> tuple[int, ...]:
  """Returns the sides of patches, one or one a stage; '' is a trained run's.

  Args:
    mask_granularity: as the flag of one case.
  """
  return tuple(map(int, (mask_granularity or '1').split(',')))


def masks_of_sides(
  shapes: Sequence[tuple[int, int, int]], density: float, sides: Sequence[int]
) -> list[np.ndarray]:
  """Returns the masks of a DynConv network's blocks, as `Networks.masks`.

  Args:
    shapes: (N, h, w) of each block's output.
    density: share of active positions.
    sides: of each block's patches.
  """
  rng = np.random.default_rng(_MASK_SEED)
  return [
    clustered_masks(rng, shape, density, side=side)
    for shape, side in zip(shapes, sides, strict=True)
  ]


def random_images(settings: Mapping[str, Any], batch_size: int) -> np.ndarray:
  """Returns float32[N, H, W, 3], the same in every process."""
  size = settings['image_size']
  rng = np.random.default_rng(0)
  return rng.standard_normal((batch_size, size, size, 3)).astype(np.float32)


def _output_shapes(model, images):
  """(N, h, w) of the output of each block."""
  x, shapes = jax.eval_shape(model.stem, images), []
  for block in model.blocks:
    x = jax.eval_shape(block, x)
    shapes.append(x.shape[:3])
  return shapes
