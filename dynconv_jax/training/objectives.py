"""What each method adds to the classification loss."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from dynconv_jax import losses
from dynconv_jax.masks import ExecutionMask
from dynconv_jax.training import schedules
from dynconv_jax.training.config import Config


def gating_loss(
  config: Config,
  masks: Sequence[ExecutionMask],
  cross_entropy: jax.Array,
  progress: float | jax.Array,
) -> tuple[float | jax.Array, jax.Array]:
  """Returns the weight and the value of the loss on where is computed.

  Args:
    config: of the run, of a gated method.
    masks: one a gated block, of a training batch.
    cross_entropy: float32[N], of each image.
    progress: share of the training that is done, in [0, 1].

  Returns:
    The weight, and the unweighted loss, a float32 scalar.
  """
  if config.method == 'dynconv':
    return config.sparsity_weight, losses.sparsity_loss(
      masks, budget=schedules.budget(config, progress), progress=progress
    )
  if config.method == 'convnet_aig':
    rates = [rate for rate in config.block_target_rates() if rate != 1]
    return config.target_rate_weight, losses.target_rate_loss(masks, rates)
  if config.method == 'skipnet':
    skip_weight = schedules.skip_weight(config, progress)
    if config.skip_training == 'supervised':
      return skip_weight, losses.skip_penalty(masks)
    return config.reinforce_weight, losses.reinforce_loss(
      masks, cross_entropy, skip_weight
    )
  if config.method in ('sact', 'act'):
    return config.ponder_weight, losses.ponder_cost(masks)
  raise ValueError(f'{config.method} has no gates to price')
