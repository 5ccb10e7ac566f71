"""Losses: classification, distillation, and each method's computation loss."""

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
  """Returns the loss of each image, float32[N].

  Args:
    logits: float32[N, classes].
    labels: float32[N, classes], probabilities of the classes.
    kind: 'cross_entropy' for softmax cross-entropy; 'bce' for the mean over
      classes of the sigmoid binary cross-entropy (Wightman, Touvron, and Jegou,
      ResNet strikes back, 2021, section 3.2).
  """
  if kind == 'cross_entropy':
    return optax.losses.softmax_cross_entropy(logits, labels)
  losses = optax.losses.sigmoid_binary_cross_entropy(logits, labels)
  return jnp.mean(losses, axis=-1)


def distillation_loss(
  logits: jax.Array, teacher_logits: jax.Array, temperature: float
) -> jax.Array:
  """Returns the mean distillation loss of a batch.

  KL(teacher || student) of the softened probabilities, times the squared
  temperature (Hinton, Vinyals, and Dean, 2015, section 2).

  Args:
    logits: float32[N, classes], logits of the student.
    teacher_logits: float32[N, classes]; no gradient flows to the teacher.
    temperature: divides the logits of both, > 0.
  """
  targets = jax.nn.log_softmax(
    jax.lax.stop_gradient(teacher_logits) / temperature
  )
  divergence = optax.losses.kl_divergence_with_log_targets(
    jax.nn.log_softmax(logits / temperature), targets
  )
  return temperature**2 * jnp.mean(divergence)
