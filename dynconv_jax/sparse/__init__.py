"""Executing networks only where their masks are set."""

from dynconv_jax.sparse.executor import ExecutionStats as ExecutionStats
from dynconv_jax.sparse.executor import SparseExecutor as SparseExecutor
from dynconv_jax.sparse.plan import BlockPlan as BlockPlan

__all__ = ['BlockPlan', 'ExecutionStats', 'SparseExecutor']
