"""Binary decisions that are hard forward and soft backward."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dynconv_jax.options import RISING, SHARE, Range, option


@dataclasses.dataclass(frozen=True)
class Gumbel:
  """Options of methods that sample by a Gumbel-softmax."""

  gumbel_temperatures: tuple[float, ...] = option(
    (1.0,),
    'Temperature of the Gumbel sigmoid, one a phase.',
    allowed=Range(
      lambda values: bool(values) and all(t > 0 for t in values),
      'one or more values > 0',
    ),
  )
  gumbel_milestones: tuple[float, ...] = option(
    (),
    'Where the next temperature begins, as shares of the training.',
    allowed=RISING,
  )
  gumbel_noise_until: float = option(
    0.8,
    'Share of the training after which the masks get no noise.',
    allowed=SHARE,
  )

  def anneal(
    self, progress: float | jax.Array
  ) -> tuple[jax.Array, bool | jax.Array]:
    """Returns temperature and whether gates add noise.

    Args:
      progress: share of the training that is done, in [0, 1].
    """
    starts = jnp.array(self.gumbel_milestones, jnp.float32)
    phase = jnp.sum(progress >= starts).astype(jnp.int32)
    temperatures = jnp.array(self.gumbel_temperatures, jnp.float32)
    return temperatures[phase], progress < self.gumbel_noise_until

  def check_phases(self) -> None:
    """Raises ValueError unless each temperature but the first has a start."""
    if len(self.gumbel_milestones) != len(self.gumbel_temperatures) - 1:
      raise ValueError(
        'gumbel_milestones must be one fewer than gumbel_temperatures; got '
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
