"""The work of JAX's linear algebra primitives, dense and sparse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from dynconv_jax.macs import formulas, linalg


def _each(formula: Callable[[Any, tuple[int, ...]], formulas.Work]):
  """Turns the formula for one matrix into one for a batch of matrices.

  Args:
    formula: takes the equation and the matrix shape of the first operand.
  """

  def batched(eqn) -> formulas.Work:
    shape = eqn.invars[0].aval.shape
    return formula(eqn, shape[-2:]) * math.prod(shape[:-2])

  return batched


def _triangular_solve(eqn, shape) -> formulas.Work:
  columns = -1 if eqn.params['left_side'] else -2
  return linalg.triangular_solve(shape[0], eqn.invars[1].aval.shape[columns])


def _qr(eqn, shape) -> formulas.Work:
  rows, columns = shape
  q = eqn.outvars[0].aval.shape[-1]
  return linalg.qr(*shape) + linalg.form_q(rows, q, min(rows, columns))


def _householder_product(eqn, shape) -> formulas.Work:
  return linalg.form_q(*shape, eqn.invars[1].aval.shape[-1])


def _ormqr(eqn, shape) -> formulas.Work:
  rows, columns = eqn.invars[2].aval.shape[-2:]
  if not eqn.params['left']:
    rows, columns = columns, rows
  return linalg.apply_q(rows, columns, eqn.invars[1].aval.shape[-1])


def _eig(eqn, shape) -> formulas.Work:
  return linalg.eig(shape[0], len(eqn.outvars) > 1)


def _svd(eqn, shape) -> formulas.Work:
  return linalg.svd(*shape, len(eqn.outvars) > 1)


def _schur(eqn, shape) -> formulas.Work:
  return linalg.eig(shape[0], len(eqn.outvars) > 1)


def _tridiagonal_solve(eqn) -> formulas.Work:
  """Thomas' algorithm: a forward and a backward sweep over all columns."""
  *batch, size, columns = eqn.invars[3].aval.shape
  macs = max(size - 1, 0) * (1 + 2 * columns)
  divisions = size * (1 + columns)
  work = formulas.Work('matmul', macs, macs, operations=divisions)
  return work * math.prod(batch)


def _symmetric_product(eqn) -> formulas.Work:
  *batch, size, inner = eqn.invars[0].aval.shape
  return formulas.matmul(size, inner, size, batch=math.prod(batch))


def _sparse_dot(eqn) -> formulas.Work:
  """Multiplies each stored element by the free dimensions of the other side."""
  data, rhs = eqn.invars[0].aval, eqn.invars[-1].aval
  (_, contract), (_, batch) = eqn.params['dimension_numbers']
  used = {*contract, *batch}
  columns = math.prod(n for i, n in enumerate(rhs.shape) if i not in used)
  return formulas.matmul(data.size, 1, columns)


def _sampled_dot(eqn) -> formulas.Work:
  """Counts only the products at the given indices."""
  (contract, _), _ = eqn.params['dimension_numbers']
  shape = eqn.invars[0].aval.shape
  inner = math.prod(shape[i] for i in contract)
  return formulas.matmul(eqn.outvars[0].aval.size, inner, 1)


def _sparse_matrix(eqn) -> formulas.Work:
  """A COO or CSR matrix times a vector or a matrix."""
  columns = eqn.invars[3].aval.shape[1:]
  return formulas.matmul(eqn.invars[0].aval.size, 1, math.prod(columns))


# {primitive: formula that takes the equation}
WORK = {
  'cholesky': _each(lambda _, shape: linalg.cholesky(shape[0])),
  # One rotation per element of the triangle: two outputs, two products each.
  'cholesky_update': _each(
    lambda _, shape: formulas.matmul(shape[0], 2, shape[0] + 1)
  ),
  'lu': _each(lambda _, shape: linalg.lu(*shape)),
  **dict.fromkeys(
    ('geqrf', 'geqp3'), _each(lambda _, shape: linalg.qr(*shape))
  ),
  'qr': _each(_qr),
  'householder_product': _each(_householder_product),
  'ormqr': _each(_ormqr),
  'triangular_solve': _each(_triangular_solve),
  'eigh': _each(lambda _, shape: linalg.eigh(shape[0])),
  'eig': _each(_eig),
  'svd': _each(_svd),
  'schur': _each(_schur),
  'hessenberg': _each(lambda _, shape: linalg.hessenberg(shape[0])),
  'tridiagonal': _each(lambda _, shape: linalg.eigh(shape[0], vectors=False)),
  'tridiagonal_solve': _tridiagonal_solve,
  'symmetric_product': _symmetric_product,
  **dict.fromkeys(('bcoo_dot_general', 'bcsr_dot_general'), _sparse_dot),
  'bcoo_dot_general_sampled': _sampled_dot,
  **{
    f'{format}_{product}': _sparse_matrix
    for format in ('coo', 'csr')
    for product in ('matvec', 'matmat')
  },
}
