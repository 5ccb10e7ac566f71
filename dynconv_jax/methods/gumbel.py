"""Binary decisions with a hard forward pass and a soft gradient."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dynconv_jax.options import RISING, SHARE, Range, option


@dataclasses.dataclass(frozen=True)
class Gumbel:
  """Options of methods that sample from a Gumbel-softmax."""

  gumbel_temperatures: tuple[float, ...] = option(
    (1.0,),
    'Temperatures of the Gumbel sigmoid, one per phase.',
    allowed=Range(
      lambda values: bool(values) and all(t > 0 for t in values),
      'one or more values > 0',
    ),
  )
  gumbel_milestones: tuple[float, ...] = option(
    (),
    'Fractions of training at which the next temperature begins.',
    allowed=RISING,
  )
  gumbel_noise_until: float = option(
    0.8,
    'Fraction of training after which gates add no noise.',
    allowed=SHARE,
  )

  def anneal(
    self, progress: float | jax.Array
  ) -> tuple[jax.Array, bool | jax.Array]:
    """Returns the temperature, and whether gates add noise.

    Args:
      progress: fraction of training completed, in [0, 1].
    """
    starts = jnp.array(self.gumbel_milestones, jnp.float32)
    phase = jnp.sum(progress >= starts).astype(jnp.int32)
    temperatures = jnp.array(self.gumbel_temperatures, jnp.float32)
    return temperatures[phase], progress < self.gumbel_noise_until

  def check_phases(self) -> None:
    """Raises ValueError unless each later temperature has a milestone."""
    if len(self.gumbel_milestones) != len(self.gumbel_temperatures) - 1:
      raise ValueError(
        'gumbel_milestones must have one value fewer than '
        'gumbel_temperatures; got '
        f'{len(self.gumbel_milestones)} and {len(self.gumbel_temperatures)}'
      )


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
  """Returns hard, straight-through samples of a binary Gumbel-softmax.

  Verelst and Tuytelaars, CVPR 2020, section 3.1: adds the difference of two
  Gumbel samples to the logits and applies a sigmoid with a temperature. The
  rounded sigmoid is the value; its gradient is that of the sigmoid.

  Args:
    logits: float32[...]; values above 0 favor 1.
    key: PRNG key; may be None if `noise` is the constant False.
    temperature: temperature of the sigmoid, > 0; may be traced.
    noise: whether to add Gumbel noise. May be traced, to avoid recompiling the
      step when the schedule turns noise off.

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
