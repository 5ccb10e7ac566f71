"""Options that methods share: a budget, and how training gets there."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dynconv_jax.options import SHARE, option


@dataclasses.dataclass(frozen=True)
class Budget:
  """How much is to be computed."""

  budget: float = option(
    0.5,
    "DynConv: target share of the masked layers' MACs; ConvNet-AIG: target "
    'rate t of executing a block. In [0, 1].',
    allowed=SHARE,
  )


@dataclasses.dataclass(frozen=True)
class Warmup:
  """How long the price of computing rises."""

  budget_warmup: float = option(
    0.0,
    'Share of the training over which the target falls from 1 to the budget, '
    "SkipNet's skip_weight rises from 0 to its value; 0, as in the papers: "
    'they are so from the start.',
    allowed=SHARE,
  )

  def warm(self, progress: float | jax.Array) -> float | jax.Array:
    """Returns the share of the warm-up that is done.

    Args:
      progress: share of the training that is done, in [0, 1].
    """
    if not self.budget_warmup:
      return 1.0
    minimum = jnp.minimum if isinstance(progress, jax.Array) else min
    return minimum(1.0, progress / self.budget_warmup)


@dataclasses.dataclass(frozen=True)
class Opening:
  """How gates start."""

  mask_bias: float | None = option(
    None,
    "Initial logit of fresh mask units of DynConv's and gates of SkipNet's: "
    "weights of the squeeze branch, of a gate's last layer, start at 0 and the "
    'bias at this. Unset: their own initialization.',
  )
