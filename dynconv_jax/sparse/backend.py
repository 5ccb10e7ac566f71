"""The interface shared by all backends of sparse execution."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.branch import Branch
from dynconv_jax.masks import ExecutionMask
from dynconv_jax.models.gated import GatedBlock, Gating, decide
from dynconv_jax.sparse.fold import FoldedBlock, FoldedConv


class Backend:
  """Executes gated blocks at the active positions of their masks.

  A backend packs the folded weights of a block as it reads them, into a tree
  of arrays of its own, and runs the block. Its instances hold no arrays.

  Attributes:
    name: how it is asked for.
    calibrated: whether mode 'auto' of `SparseExecutor` times it against dense
      execution. A backend that is as fast as XLA's dense form at any density
      sets False.
    falls_back: whether a batch can be executed densely after all, by a
      conditional, without waiting for the host.
    evaluates_given: whether a gate is computed even where a mask is given.
  """

  name: str
  calibrated = True
  falls_back = True
  evaluates_given = False

  def supports(self, branch: Branch, dtype: jnp.dtype, platform: str) -> bool:
    """Returns whether the backend can execute a branch.

    Args:
      branch: its description.
      dtype: compute dtype.
      platform: of JAX: 'cpu' or 'gpu'.
    """
    raise NotImplementedError

  def prefers(self, dtype: jnp.dtype, platform: str) -> bool:
    """Returns whether 'auto' takes the backend where it supports a branch.

    Args:
      dtype: compute dtype.
      platform: of JAX.
    """
    return self.supports_platform(dtype, platform)

  def supports_platform(self, dtype: jnp.dtype, platform: str) -> bool:
    """Returns whether the backend can be used here at all; see `prefers`."""
    return True

  def compiler_options(self, platform: str) -> dict[str, str]:
    """Returns options of XLA for a network that the backend executes.

    Args:
      platform: of JAX.
    """
    return {}

  def pack(self, block: FoldedBlock) -> Any:
    """Returns a tree of arrays: the weights of a block as `run` reads them.

    Args:
      block: the folded block.
    """
    raise NotImplementedError

  def run(
    self, packed: Any, x: jax.Array, mask: ExecutionMask | None
  ) -> jax.Array:
    """Returns the block's output, float[N, h, w, features], in x's dtype.

    Args:
      packed: what `pack` returned.
      x: float[N, H, W, in_features].
      mask: where the branch is executed; None: everywhere.
    """
    raise NotImplementedError

  def run_gated(
    self, block: Any, x: jax.Array, mask: ExecutionMask, gating: Gating
  ) -> jax.Array:
    """Returns what `run` does, in a forward pass of a network.

    Args:
      block: has `branch`, `name`, `stage`, `masker`, and what `pack` returned
        as `packed.tree()`.
      x: float[N, H, W, in_features].
      mask: of `decide`.
      gating: of this forward pass.
    """
    return self.run(block.packed.tree(), x, mask)

  def decide(
    self, block: Any, x: jax.Array, gating: Gating
  ) -> ExecutionMask | None:
    """Returns where a block is executed, None for everywhere.

    Args:
      block: has `branch`, `name`, `stage` and `masker`.
      x: float[N, H, W, in_features], its input.
      gating: of this forward pass.
    """
    return decide(block, x, gating)

  def convolution(self, conv: FoldedConv) -> nnx.Module | None:
    """Returns a module that computes a convolution outside of gated blocks.

    Args:
      conv: folded, with its activation.

    Returns:
      A module called with float[N, H, W, in_features]; None: XLA's serves.
    """
    return None

  def replacement(self, module: nnx.Module) -> nnx.Module | None:
    """Returns a module that computes the same faster, None: there is none.

    Args:
      module: any but gated blocks and folded convolutions: pooling, the parts
        of gates, linear layers.
    """
    return None

  def stem(
    self, conv: nnx.Module, pool: nnx.Module | None, gate: nnx.Module | None
  ) -> nnx.Module | None:
    """Returns a module that pools a convolution at once, None: there is none.

    Args:
      conv: of `convolution`.
      pool: reads what it computes; None: the network has none.
      gate: of the block that reads the result, as `prepare` left it, if the
        backend executes that block.

    Returns:
      A module called with float[N, H, W, in_features] and the `Gating` of the
      forward pass, or None for it.
    """
    return None

  def prepare(self, chains: Sequence[Sequence[GatedBlock]]) -> None:
    """Changes the gates of a network's blocks in place, if it pays.

    Args:
      chains: the blocks that the backend will execute; in each chain a block
        reads what the one before it wrote.
    """


# In the order in which 'auto' asks them.
BACKENDS = {
  'cpu': 'dynconv_jax.sparse.backends.cpu:CpuBackend',
  'triton': 'dynconv_jax.sparse.backends.triton:TritonBackend',
  'gluon': 'dynconv_jax.sparse.backends.gluon:GluonBackend',
  'xla': 'dynconv_jax.sparse.backends.xla:XlaBackend',
  'dense': 'dynconv_jax.sparse.backends.dense:DenseBackend',
}


def get_backend(name: str | Backend) -> Backend:
  """Returns the backend of a name.

  Args:
    name: a key of BACKENDS, `package.module:CLASS`, or a backend.

  Raises:
    ValueError: there is no such backend.
    ImportError: a package that it needs is missing; says which extra has it.
  """
  return name if isinstance(name, Backend) else _make_backend(name)


@functools.cache
def _make_backend(name: str) -> Backend:
  module, colon, attribute = BACKENDS.get(name, name).partition(':')
  if not colon:
    raise ValueError(
      f'backend must be auto, {", ".join(BACKENDS)} or package.module:CLASS; '
      f'got {name!r}'
    )
  try:
    kind = getattr(importlib.import_module(module), attribute)
  except (ModuleNotFoundError, AttributeError) as error:
    if name in BACKENDS:
      raise
    raise ValueError(f'there is no backend {name!r}: {error}') from error
  if not (isinstance(kind, type) and issubclass(kind, Backend)):
    raise ValueError(f'{name!r} is not a Backend; got {kind!r}')
  return kind()


def auto_backends(dtype: jnp.dtype, platform: str) -> list[Backend]:
  """Returns the backends that 'auto' may take, the best one first.

  Args:
    dtype: compute dtype.
    platform: of JAX.
  """
  backends = []
  for name in BACKENDS:
    if name == 'dense':
      continue
    backend = get_backend(name)
    if backend.prefers(dtype, platform):
      backends.append(backend)
  return backends
