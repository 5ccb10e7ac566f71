"""Options shared by methods: the budget, its warmup, and the initial bias."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dynconv_jax.options import SHARE, option


@dataclasses.dataclass(frozen=True)
class Budget:
  """The target amount of computation."""

  budget: float = option(
    0.5,
    "DynConv: target executed fraction of the masked layers' MACs. "
    'ConvNet-AIG: target execution rate t of a block. In [0, 1].',
    allowed=SHARE,
  )


@dataclasses.dataclass(frozen=True)
class Warmup:
  """The warmup of the budget or of the penalty on computation."""

  budget_warmup: float = option(
    0.0,
    'Fraction of training over which the target falls from 1 to the budget '
    "(DynConv) or SkipNet's skip_weight rises from 0 to its value. 0, as in "
    'the papers: no warmup.',
    allowed=SHARE,
  )

  def warm(self, progress: float | jax.Array) -> float | jax.Array:
    """Returns the completed fraction of the warmup, in [0, 1].

    Args:
      progress: fraction of training completed, in [0, 1].
    """
    if not self.budget_warmup:
      return 1.0
    minimum = jnp.minimum if isinstance(progress, jax.Array) else min
    return minimum(1.0, progress / self.budget_warmup)


@dataclasses.dataclass(frozen=True)
class Opening:
  """The initialization of gates."""

  mask_bias: float | None = option(
    None,
    "Initial logit of new DynConv mask units and SkipNet gates. SkipNet's last "
    "layer and DynConv's squeeze branch start with zero weights, and the bias "
    "starts at this value. Unset: the method's own initialization.",
  )
