"""How a gated block is executed."""

from __future__ import annotations

import dataclasses

from dynconv_jax.sparse.backend import Backend


@dataclasses.dataclass(frozen=True)
class BlockPlan:
  """How a gated block is executed; every plan gives the same result.

  Attributes:
    backend: executes it.
    limit: share of the branch's dense MACs above which a batch is executed
      densely after all, in (0, 1].
  """

  backend: Backend
  limit: float = 1.0
