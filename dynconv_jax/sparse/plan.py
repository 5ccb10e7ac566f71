"""Execution plans of gated blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
from absl import logging

from dynconv_jax.models.gated import GatedBlock
from dynconv_jax.sparse.backend import Backend, auto_backends, get_backend


@dataclasses.dataclass(frozen=True)
class BlockPlan:
  """The execution plan of a gated block. All plans compute the same result.

  Attributes:
    backend: the backend that executes the block, see `get_backend`.
    limit: executed fraction of the branch's dense MACs, in (0, 1], above which
      a batch uses the dense fallback.

  Raises:
    ValueError: the backend is only a name, or the limit is out of range.
  """

  backend: Backend
  limit: float = 1.0

  def __post_init__(self):
    if not isinstance(self.backend, Backend):
      raise ValueError(
        'the backend of a plan must be a Backend, such as '
        f"sparse.get_backend('xla'); got {self.backend!r}"
      )
    if not 0 < self.limit <= 1:
      raise ValueError(
        f'the limit of a plan must be in (0, 1]; got {self.limit}'
      )


def choose_plans(
  blocks: Sequence[GatedBlock], backend: str | Backend
) -> dict[str, BlockPlan]:
  """Returns the plan of each block, by name.

  Args:
    blocks: gated blocks of a network.
    backend: see `sparsify`.

  Raises:
    ValueError: blocks share a name, or the backend supports no block.
  """
  names = [block.name for block in blocks]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise ValueError(
      'names of gated blocks must be unique; several are named '
      f'{", ".join(twice)}'
    )
  platform = jax.default_backend()
  dense = BlockPlan(get_backend('dense'))
  asked = None if backend == 'auto' else get_backend(backend)
  plans, refused = {}, []
  for block in blocks:
    if not block.describable:
      plans[block.name] = dense
      logging.info('%s has no description, so it runs densely', block.name)
      continue
    if asked is None:
      candidates = auto_backends(block.dtype, platform)
    else:
      candidates = [asked]
    for candidate in candidates:
      if candidate.supports(block.branch, block.dtype, platform):
        plans[block.name] = BlockPlan(candidate)
        break
    else:
      refused.append(block.name)
      plans[block.name] = BlockPlan(get_backend('xla'))
  if refused:
    if len(refused) == len(blocks):
      raise ValueError(
        f'backend {asked.name} cannot execute this network on {platform} in '
        f'{blocks[0].dtype}: it supports none of the gated blocks'
      )
    logging.warning(
      'backend %s does not support these blocks; using xla instead: %s',
      asked.name,
      ', '.join(refused),
    )
  return plans


def check_support(
  blocks: Sequence[GatedBlock], plans: Mapping[str, BlockPlan]
) -> None:
  """Raises ValueError if a plan's backend cannot execute its block."""
  platform = jax.default_backend()
  refused = [
    f'{plans[block.name].backend.name} for {block.name}'
    for block in blocks
    if block.name in plans
    and not plans[block.name].backend.supports(
      block.branch, block.dtype, platform
    )
  ]
  if refused:
    raise ValueError(
      f'plans name backends that cannot execute these blocks on {platform} in '
      f'{blocks[0].dtype}: {", ".join(refused)}'
    )
