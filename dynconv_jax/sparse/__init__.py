"""Sparse execution: running networks only where their masks are set."""

from dynconv_jax.sparse.backend import BACKENDS as BACKENDS
from dynconv_jax.sparse.backend import Backend as Backend
from dynconv_jax.sparse.backend import get_backend as get_backend
from dynconv_jax.sparse.executor import ExecutionStats as ExecutionStats
from dynconv_jax.sparse.executor import SparseExecutor as SparseExecutor
from dynconv_jax.sparse.plan import BlockPlan as BlockPlan
from dynconv_jax.sparse.sparsify import SparseBlock as SparseBlock
from dynconv_jax.sparse.sparsify import sparsify as sparsify

__all__ = [
  'BACKENDS',
  'Backend',
  'BlockPlan',
  'ExecutionStats',
  'SparseBlock',
  'SparseExecutor',
  'get_backend',
  'sparsify',
]
