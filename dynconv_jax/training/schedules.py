"""Learning rate schedule and optimizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dynconv_jax.training.config import OptimizationConfig
from dynconv_jax.training.selection import factors_of


def learning_rate(
  config: OptimizationConfig, steps_per_epoch: int
) -> optax.Schedule:
  """Returns the schedule: linear warmup, then cosine or step decay."""
  total = config.epochs * steps_per_epoch
  warmup = round(config.warmup_epochs * steps_per_epoch)
  if config.schedule == 'cosine':
    decay = optax.cosine_decay_schedule(
      config.learning_rate, max(total - warmup, 1)
    )
  else:
    boundaries = [round(m * total) - warmup for m in config.milestones]
    # In short runs, several milestones may fall on one step. Each one decays.
    decay = optax.piecewise_constant_schedule(
      config.learning_rate,
      {b: config.step_decay ** boundaries.count(b) for b in boundaries},
    )
  if not warmup:
    return decay
  rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
  return optax.join_schedules([rise, decay], [warmup])


def optimizer(
  config: OptimizationConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Returns SGD with momentum or AdamW, with clipping and weight decay.

  SGD adds weight decay to the gradient, as PyTorch does; AdamW decouples it.
  Updates are scaled by the weights' learning rate factors, `config.factors`.
  """

  def decayed(params: nnx.State):
    # Norm parameters and biases are vectors.
    return jax.tree.map(lambda p: config.decay_all or p.ndim > 1, params)

  parts = []
  if config.gradient_clip:
    parts.append(optax.clip_by_global_norm(config.gradient_clip))
  if config.optimizer == 'adamw':
    parts.append(
      optax.adamw(schedule, weight_decay=config.weight_decay, mask=decayed)
    )
  else:
    parts.append(optax.add_decayed_weights(config.weight_decay, decayed))
    parts.append(optax.sgd(schedule, momentum=config.momentum))
  if config.factors:
    parts.append(
      optax.stateless(
        lambda updates, _: jax.tree.map(
          jnp.multiply, updates, factors_of(updates, config.factors)
        )
      )
    )
  return optax.chain(*parts)
