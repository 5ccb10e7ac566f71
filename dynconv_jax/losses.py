"""Losses: classes, distillation, and the price of computing by method."""

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
  'classification_losses',
  'distillation_loss',
  'executed_fractions',
  'ponder_cost',
  'reinforce_loss',
  'skip_penalty',
  'skip_rewards',
  'sparsity_loss',
  'target_rate_loss',
]


def classification_losses(
  logits: jax.Array, labels: jax.Array, kind: str = 'cross_entropy'
) -> jax.Array:
  """Returns float32[N], the loss of each image.

  Args:
    logits: float32[N, classes].
    labels: float32[N, classes], shares of the classes, of sum 1.
    kind: 'cross_entropy', of the softmax; 'bce', the mean over the classes of
      the binary cross-entropy of sigmoid(logit) against the share (Wightman,
      Touvron and Jegou, ResNet strikes back, 2021, section 3.2).
  """
  if kind == 'cross_entropy':
    return optax.losses.softmax_cross_entropy(logits, labels)
  losses = optax.losses.sigmoid_binary_cross_entropy(logits, labels)
  return jnp.mean(losses, axis=-1)


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
