"""The networks, images, and masks that dynconv_jax.cli.benchmark times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax import numpy as jnp

from dynconv_jax import create_model
from dynconv_jax.layers import BatchNorm
from dynconv_jax.models.gated import gated_blocks
from dynconv_jax.options import values_of
from dynconv_jax.sparse.calibrate import clustered_masks
from dynconv_jax.sparse.sparsify import trace_blocks
from dynconv_jax.training import inputs, workdir

_WEIGHTS = nnx.Any(nnx.Param, nnx.BatchStat)
# The same in every process.
_MASK_SEED, _NORM_SEED = 1, 2


class Networks:
  """Networks with random weights, or a trained one; equal in all processes.

  Attributes:
    settings: flags of dynconv_jax.cli.benchmark, updated from the trained run.
    trained: the trained run, or None.
    options: options of the network, such as `gated_blocks`, by name.
    method: method of the gated network; 'dense' if the trained one has no
      gates.
    budget: budget of the trained run, or None.
  """

  def __init__(self, settings: Mapping[str, Any]):
    self.settings = {**settings, 'width_multiplier': 1.0}
    self.trained = None
    self.options = dict(settings.get('options') or {})
    self.budget = None
    if settings['workdir']:
      self.trained = workdir.load_run(
        settings['workdir'], best=settings['checkpoint'] == 'best'
      )
      self.settings['num_classes'] = len(self.trained.class_names)
      network = self.trained.network
      self.settings['method'] = network.method.method
      self.budget = network.method.target() or None
      for name in ('model', 'image_size', 'compute_dtype', 'width_multiplier'):
        self.settings[name] = getattr(network.model, name)
      self.options = values_of(network.model.options)
    self.method = self.settings['method']
    self._models: dict[tuple[str, str], nnx.Module] = {}

  def model(self, method: str, mask_granularity: str = '1') -> nnx.Module:
    """Returns the evaluation view of a method's network.

    Networks with random weights have the same weights, except for gates.

    Args:
      method: name of the method. The trained run's method selects the trained
        network.
      mask_granularity: DynConv's granularity, in the flag's format.
    """
    if self.trained and method == self.method:
      return self.trained.model
    key = (method, mask_granularity)
    if key not in self._models:
      model = create_model(
        self.settings['model'],
        method=method,
        num_classes=self.settings['num_classes'],
        mask_granularity=parse_sides(mask_granularity),
        width_multiplier=self.settings['width_multiplier'],
        dtype=jnp.dtype(self.settings['compute_dtype']),
        rngs=nnx.Rngs(0),
        **self.options,
      )
      _randomize(model)
      if method != 'dense':  # Use the dense network's weights.
        nnx.update(model, nnx.state(self.model('dense'), _WEIGHTS))
      self._models[key] = nnx.view(
        model, deterministic=True, use_running_average=True
      )
    return self._models[key]

  def batches(self, batch_size: int) -> list[np.ndarray]:
    """Returns random batches or those of the run's split, [N, H, W, 3]."""
    if not self.trained:
      size = self.settings['image_size']
      images = np.random.default_rng(0).standard_normal(
        (batch_size, size, size, 3)
      )
      return [images.astype(np.float32)]
    config = workdir.read_config(self.settings['workdir'])
    if self.settings['food101_dir']:
      config = config.replace(food101_dir=self.settings['food101_dir'])
    source = inputs.open_split(config.data, self.settings['split'])
    batches = iter(
      inputs.eval_batches(
        config.data,
        source,
        image_size=self.settings['image_size'],
        batch_size=batch_size,
      )
    )
    count = min(self.settings['num_batches'], len(source) // batch_size)
    return [np.asarray(next(batches)['image']) for _ in range(max(1, count))]


def _randomize(model: nnx.Module) -> None:
  """Randomizes batch norms, to detect runtimes that fold them incorrectly."""
  rng = np.random.default_rng(_NORM_SEED)
  for _, module in nnx.iter_modules(model):
    if isinstance(module, BatchNorm):
      for variable, low, high in (
        *((module.scale, 0.5, 1.5), (module.var, 0.5, 1.5)),
        *((module.bias, -0.2, 0.2), (module.mean, -0.2, 0.2)),
      ):
        value = rng.uniform(low, high, variable.shape)
        variable[...] = jnp.asarray(value, jnp.float32)


def parse_sides(mask_granularity: str) -> tuple[int, ...]:
  """Returns the sides of patches: one value, or one per stage.

  Args:
    mask_granularity: value of the flag for one case; '' for a trained run.
  """
  return tuple(map(int, (mask_granularity or '1').split(',')))


def masks_of(
  model: nnx.Module, image_shape: Sequence[int], density: float
) -> dict[str, np.ndarray]:
  """Returns clustered masks by block name, float32[N, h, w].

  Args:
    model: the gated network. Blocks without a gate get full masks.
    image_shape: (N, H, W, C).
    density: fraction of active positions.
  """
  blocks = {block.name: block for block in gated_blocks(model)}
  rng, masks = np.random.default_rng(_MASK_SEED), {}
  for trace in trace_blocks(model, image_shape):
    block = blocks[trace.name]
    shape = (trace.shape[0], *block.branch.sizes(trace.shape[1:3])[-1])
    if block.masker is None:
      masks[trace.name] = np.ones(shape, np.float32)
      continue
    masks[trace.name] = clustered_masks(
      rng,
      shape,
      density,
      block.masker.per_image,
      side=getattr(block.masker, 'granularity', 1),
    )
  return masks
