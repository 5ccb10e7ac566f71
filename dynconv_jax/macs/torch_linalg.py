"""The work of `torch.linalg`, by the operations that it dispatches."""

from __future__ import annotations

import math
from collections.abc import Callable

from dynconv_jax.macs import formulas, linalg


def _each(operand: str, formula: Callable[..., formulas.Work]):
  """Returns the formula of an operation on each matrix of a batch.

  Args:
    operand: name of the argument with the matrices.
    formula: takes (a, rows, columns) and returns the work for one matrix.
  """

  def of_batch(a) -> formulas.Work:
    *batch, rows, columns = getattr(a, operand).shape
    return formula(a, rows, columns) * math.prod(batch)

  return of_batch


def _solve(operand: str, factorize=None, times: int = 2):
  """Returns the formula of `times` triangular solves, after a factorization."""

  def formula(a) -> formulas.Work:
    *batch, size, _ = getattr(a, operand).shape
    # All right-hand sides: columns, rows or separate vectors.
    columns = a.output.numel() // max(size, 1)
    work = linalg.triangular_solve(size, columns) * times
    if factorize is not None:
      work += factorize(size, size) * math.prod(batch)
    return work

  return formula


def _qr(a, rows, columns) -> formulas.Work:
  least = min(rows, columns)
  work = linalg.qr(rows, columns)
  if a.mode == 'r':
    return work
  size = rows if a.mode == 'complete' else least
  return work + linalg.form_q(rows, size, least)


def _apply_q(a) -> formulas.Work:
  *batch, rows, columns = a.self.shape
  others = a.output.numel() // rows
  return linalg.apply_q(rows, others, columns)


def _least_squares(a) -> formulas.Work:
  *batch, rows, columns = a.self.shape
  sides, least = a.b.numel() // rows, min(rows, columns)
  return (
    linalg.qr(rows, columns) * math.prod(batch)
    + linalg.apply_q(rows, sides, least)
    + linalg.triangular_solve(least, sides)
  )


def _pseudo_inverse(a, rows, columns) -> formulas.Work:
  del a
  product = formulas.matmul(columns, min(rows, columns), rows)
  return linalg.svd(rows, columns) + product


_lu = _each('A', lambda a, rows, columns: linalg.lu(rows, columns))
_cholesky = _each('self', lambda a, rows, columns: linalg.cholesky(rows))

FORMULAS = {
  '_linalg_det': _lu,
  '_linalg_slogdet': _lu,
  'linalg_lu': _lu,
  'linalg_lu_factor_ex': _lu,
  'linalg_cholesky_ex': _cholesky,
  'cholesky': _cholesky,
  '_linalg_solve_ex': _solve('A', linalg.lu),
  'linalg_inv_ex': _solve('A', linalg.lu),
  'linalg_lu_solve': _solve('LU'),
  'cholesky_solve': _solve('input2'),
  '_cholesky_solve_helper': _solve('A'),
  'cholesky_inverse': _solve('self'),
  'linalg_solve_triangular': _solve('self', times=1),
  'triangular_solve': _solve('A', times=1),
  'linalg_qr': _each('A', _qr),
  'geqrf': _each('self', lambda a, *sizes: linalg.qr(*sizes)),
  'linalg_householder_product': _each(
    'input', lambda a, rows, columns: linalg.form_q(rows, columns, columns)
  ),
  'ormqr': _apply_q,
  '_linalg_svd': _each(
    'A', lambda a, *sizes: linalg.svd(*sizes, vectors=a.compute_uv)
  ),
  'linalg_svdvals': _each(
    'A', lambda a, *sizes: linalg.svd(*sizes, vectors=False)
  ),
  'linalg_eigvalsh': _each(
    'self', lambda a, rows, columns: linalg.eigh(rows, vectors=False)
  ),
  '_linalg_eigh': _each(
    'A', lambda a, rows, columns: linalg.eigh(rows, vectors=a.compute_v)
  ),
  'linalg_eig': _each('self', lambda a, rows, columns: linalg.eig(rows)),
  **dict.fromkeys(
    ('_linalg_eigvals', 'linalg_eigvals'),
    _each('self', lambda a, rows, columns: linalg.eig(rows, vectors=False)),
  ),
  'linalg_lstsq': _least_squares,
  'linalg_pinv': _each('self', _pseudo_inverse),
}
