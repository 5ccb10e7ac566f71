"""Binary decisions that are hard forward and soft backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def straight_through(hard: jax.Array, soft: jax.Array) -> jax.Array:
  """Returns the values of `hard` with the gradient of `soft`.

  Args:
    hard: float[...], exact values.
    soft: float[...], the differentiable relaxation of `hard`.
  """
  return jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))


def binary_gumbel(
  logits: jax.Array,
  key: jax.Array | None,
  temperature: float | jax.Array = 1.0,
  noise: bool | jax.Array = True,
) -> jax.Array:
  """Returns hard samples of a binary Gumbel-softmax, straight-through.

  Verelst and Tuytelaars, CVPR 2020, section 3.1: the difference of two Gumbel
  samples is added to the logits; the sigmoid at a temperature gives the
  gradient, its rounding the value.

  Args:
    logits: float32[...]; above zero favours 1.
    key: PRNG key of the noise; may be None where `noise` is the constant False.
    temperature: of the sigmoid, > 0; may be traced.
    noise: whether Gumbel noise is added; may be traced, so that the schedule
      that ends it does not recompile the step.

  Returns:
    float32[...] of {0, 1}, with the gradient of sigmoid((logits + g) / T).
  """
  if noise is not False:
    first, second = jax.random.split(key)
    sample = jax.random.gumbel(first, logits.shape, logits.dtype)
    sample -= jax.random.gumbel(second, logits.shape, logits.dtype)
    logits = logits + jnp.where(noise, sample, 0.0)
  soft = jax.nn.sigmoid(logits / temperature)
  return straight_through((soft >= 0.5).astype(soft.dtype), soft)
