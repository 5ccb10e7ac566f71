"""Losses: each method's price of computing, and distillation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from dynconv_jax.masks import executed_fractions
from dynconv_jax.methods.convnet_aig import target_rate_loss
from dynconv_jax.methods.dynconv import budget_bounds, sparsity_loss
from dynconv_jax.methods.sact import ponder_cost
from dynconv_jax.methods.skipnet import (
  reinforce_loss,
  skip_penalty,
  skip_rewards,
)

__all__ = [
  'budget_bounds',
  'distillation_loss',
  'executed_fractions',
  'ponder_cost',
  'reinforce_loss',
  'skip_penalty',
  'skip_rewards',
  'sparsity_loss',
  'target_rate_loss',
]


def distillation_loss(
  logits: jax.Array, teacher_logits: jax.Array, temperature: float
) -> jax.Array:
  """Returns the mean divergence of the student from its teacher.

  KL(teacher || student) of the softened probabilities, times the squared
  temperature (Hinton, Vinyals, and Dean, 2015, section 2).

  Args:
    logits: float32[N, classes] of the student.
    teacher_logits: float32[N, classes]; no gradient flows to them.
    temperature: softens both distributions, > 0.
  """
  targets = jax.nn.log_softmax(
    jax.lax.stop_gradient(teacher_logits) / temperature
  )
  divergence = optax.losses.kl_divergence_with_log_targets(
    jax.nn.log_softmax(logits / temperature), targets
  )
  return temperature**2 * jnp.mean(divergence)
