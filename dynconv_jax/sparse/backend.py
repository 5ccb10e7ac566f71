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

  A backend packs the folded weights of a block into a tree of arrays in the
  layout that it needs, and runs the block. Backend instances contain no arrays.

  Attributes:
    name: name of the backend, as in `BACKENDS`.
    calibrated: whether mode 'auto' of `SparseExecutor` times the backend
      against dense execution. False for backends that are at least as fast as
      XLA's dense form at any density.
    falls_back: whether a conditional can switch a batch to the dense fallback
      without waiting for the host.
    evaluates_given: whether gates are computed even if masks are given.
  """

  name: str
  calibrated = True
  falls_back = True
  evaluates_given = False

  def supports(self, branch: Branch, dtype: jnp.dtype, platform: str) -> bool:
    """Returns whether the backend can execute a branch.

    Args:
      branch: description of the branch.
      dtype: compute dtype.
      platform: JAX platform, 'cpu' or 'gpu'.
    """
    raise NotImplementedError

  def prefers(self, dtype: jnp.dtype, platform: str) -> bool:
    """Returns whether 'auto' uses the backend for branches that it supports.

    Args:
      dtype: compute dtype.
      platform: JAX platform.
    """
    return self.supports_platform(dtype, platform)

  def supports_platform(self, dtype: jnp.dtype, platform: str) -> bool:
    """Returns whether the backend works on this machine; see `prefers`."""
    return True

  def compiler_options(self, platform: str) -> dict[str, str]:
    """Returns XLA compiler options for networks that the backend executes.

    Args:
      platform: JAX platform.
    """
    return {}

  def pack(self, block: FoldedBlock) -> Any:
    """Returns the weights of a block for `run`, as a tree of arrays.

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
      mask: where to execute the branch; None for everywhere.
    """
    raise NotImplementedError

  def run_gated(
    self, block: Any, x: jax.Array, mask: ExecutionMask, gating: Gating
  ) -> jax.Array:
    """Returns the result of `run`, as part of a network's forward pass.

    Args:
      block: has `branch`, `name`, `stage`, and `masker`; `packed.tree()`
        returns the result of `pack`.
      x: float[N, H, W, in_features].
      mask: the mask returned by `decide`.
      gating: state of this forward pass.
    """
    return self.run(block.packed.tree(), x, mask)

  def decide(
    self, block: Any, x: jax.Array, gating: Gating
  ) -> ExecutionMask | None:
    """Returns where to execute a block, or None for everywhere.

    Args:
      block: has `branch`, `name`, `stage`, and `masker`.
      x: float[N, H, W, in_features], the block's input.
      gating: state of this forward pass.
    """
    return decide(block, x, gating)

  def convolution(self, conv: FoldedConv) -> nnx.Module | None:
    """Returns a module that computes a convolution outside gated blocks.

    Args:
      conv: the folded convolution, with its activation.

    Returns:
      A module called with float[N, H, W, in_features], or None to use XLA's
      convolution.
    """
    return None

  def replacement(self, module: nnx.Module) -> nnx.Module | None:
    """Returns a faster replacement for a module, or None if there is none.

    Args:
      module: any module except gated blocks and folded convolutions, such as
        pooling, parts of gates, and linear layers.
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
    """Optimizes the gates of a network's blocks in place, if that is faster.

    Args:
      chains: the blocks that the backend will execute. In each chain, a block's
        input is the output of the previous block.
    """


# In the order in which 'auto' tries them.
BACKENDS = {
  'cpu': 'dynconv_jax.sparse.backends.cpu:CpuBackend',
  'triton': 'dynconv_jax.sparse.backends.triton:TritonBackend',
  'gluon': 'dynconv_jax.sparse.backends.gluon:GluonBackend',
  'xla': 'dynconv_jax.sparse.backends.xla:XlaBackend',
  'dense': 'dynconv_jax.sparse.backends.dense:DenseBackend',
}


def get_backend(name: str | Backend) -> Backend:
  """Returns a backend by name.

  Args:
    name: a key of BACKENDS, `package.module:CLASS`, or a backend.

  Raises:
    ValueError: the backend does not exist.
    ImportError: a required package is missing; the message names the extra that
      installs it.
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
    raise ValueError(f'backend {name!r} not found: {error}') from error
  if not (isinstance(kind, type) and issubclass(kind, Backend)):
    raise ValueError(f'{name!r} is not a Backend; got {kind!r}')
  return kind()


def auto_backends(dtype: jnp.dtype, platform: str) -> list[Backend]:
  """Returns the backends that 'auto' may use, best first.

  Args:
    dtype: compute dtype.
    platform: JAX platform.
  """
  backends = []
  for name in BACKENDS:
    if name == 'dense':
      continue
    backend = get_backend(name)
    if backend.prefers(dtype, platform):
      backends.append(backend)
  return backends
