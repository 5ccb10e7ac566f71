"""Execution plans of gated blocks."""

from __future__ import annotations

import dataclasses

from dynconv_jax.sparse.backend import Backend


@dataclasses.dataclass(frozen=True)
class BlockPlan:
  """The execution plan of a gated block. All plans compute the same result.

  Attributes:
    backend: the backend that executes the block.
    limit: executed fraction of the branch's dense MACs, in (0, 1], above which
      a batch uses the dense fallback.
  """

  backend: Backend
  limit: float = 1.0
