"""What changes as training goes on: learning rate, temperature, noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dynconv_jax.training.config import Config


def learning_rate(config: Config, steps_per_epoch: int) -> optax.Schedule:
  """Returns the learning rate by step: warm-up, then cosine or steps."""
  total = config.epochs * steps_per_epoch
  warmup = round(config.warmup_epochs * steps_per_epoch)
  if config.schedule == 'cosine':
    decay = optax.cosine_decay_schedule(
      config.learning_rate, max(total - warmup, 1)
    )
  else:
    boundaries = [round(m * total) - warmup for m in config.milestones]
    # Milestones of a short run may fall on one step: each decays.
    decay = optax.piecewise_constant_schedule(
      config.learning_rate,
      {b: config.step_decay ** boundaries.count(b) for b in boundaries},
    )
  if not warmup:
    return decay
  rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
  return optax.join_schedules([rise, decay], [warmup])


def optimizer(
  config: Config, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Returns SGD with momentum or AdamW, with clipping and weight decay.

  SGD adds the decay to the gradient, as PyTorch does; AdamW decouples it.
  """

  def decayed(params: nnx.State):
    # Norms and biases are vectors.
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
  return optax.chain(*parts)


def gumbel_temperature(config: Config, progress: jax.Array) -> jax.Array:
  """Returns the temperature at a share of the training, float32 scalar."""
  phase = jnp.sum(progress >= jnp.array(config.gumbel_milestones, jnp.float32))
  return jnp.array(config.gumbel_temperatures, jnp.float32)[
    phase.astype(jnp.int32)
  ]


def gumbel_noise(config: Config, progress: jax.Array) -> jax.Array:
  """Returns whether the gates add noise at a share of the training, bool."""
  return progress < config.gumbel_noise_until


def budget(config: Config, progress: jax.Array) -> jax.Array:
  """Returns the target executed fraction at a share of the training."""
  warm = 1.0
  if config.budget_warmup:
    warm = jnp.minimum(1.0, progress / config.budget_warmup)
  return 1.0 - (1.0 - config.budget) * warm


def skip_weight(config: Config, progress: jax.Array) -> float | jax.Array:
  """Returns SkipNet's alpha at a share of the training."""
  if not config.budget_warmup:
    return config.skip_weight
  return config.skip_weight * jnp.minimum(1.0, progress / config.budget_warmup)
