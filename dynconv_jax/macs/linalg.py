"""The cost of linear algebra on dense matrices, computed from their sizes.

Multiply-accumulates have the kind 'matmul'. The estimates are from Golub and
Van Loan, Matrix Computations, 4th edition.
"""

from __future__ import annotations

from dynconv_jax.macs import formulas


def triangular_solve(size: int, columns: int) -> formulas.Work:
  """Returns the work of a triangular solve with `columns` right-hand sides."""
  return _factorized(
    columns * size * (size - 1) // 2, size * columns, divisions=size * columns
  )


def cholesky(size: int) -> formulas.Work:
  """Returns the work of a Cholesky factorization; roots count as divisions."""
  return _factorized(
    size * (size**2 - 1) // 6, size**2, divisions=size * (size + 1) // 2
  )


def lu(rows: int, columns: int) -> formulas.Work:
  """Returns the work of an LU factorization with partial pivoting."""
  steps = range(1, min(rows, columns) + 1)
  return _factorized(
    sum((rows - k) * (columns - k) for k in steps),
    rows * columns,
    divisions=sum(rows - k for k in steps),
  )


def qr(rows: int, columns: int) -> formulas.Work:
  """Returns the work of a Householder QR factorization, without forming Q.

  Reflector k takes the norm of a column and is applied to the columns after it.
  """
  steps = range(min(rows, columns))
  macs = sum((rows - k) * (2 * (columns - k - 1) + 1) for k in steps)
  return _factorized(macs, rows * columns)


def apply_q(rows: int, columns: int, reflectors: int) -> formulas.Work:
  """Returns the work of multiplying by the Q of a QR factorization."""
  macs = sum(2 * (rows - k) * columns for k in range(reflectors))
  return _factorized(macs, rows * columns)


def form_q(rows: int, columns: int, reflectors: int) -> formulas.Work:
  """Returns the work of forming Q; reflector k affects columns from k on."""
  macs = sum(2 * (rows - k) * (columns - k) for k in range(reflectors))
  return _factorized(macs, rows * columns)


def eigh(size: int, vectors: bool = True) -> formulas.Work:
  """Returns the usual estimate for a symmetric eigenproblem.

  9 n^3 operations, or 4/3 n^3 without vectors (Golub and Van Loan, section
  8.3); half as many multiply-accumulates.
  """
  return _factorized(
    (27 if vectors else 4) * size**3 // 6, size**2 if vectors else size
  )


def eig(size: int, vectors: bool = True) -> formulas.Work:
  """Returns the usual estimate for a general eigenproblem or Schur form.

  25 n^3 operations, or 10 n^3 without vectors (section 7.5).
  """
  return _factorized(
    (25 if vectors else 10) * size**3 // 2, size**2 if vectors else size
  )


def hessenberg(size: int) -> formulas.Work:
  """Returns the usual estimate for a reduction to Hessenberg form.

  10/3 n^3 operations (section 7.4).
  """
  return _factorized(5 * size**3 // 3, size**2)


def svd(rows: int, columns: int, vectors: bool = True) -> formulas.Work:
  """Returns the usual estimate for a singular value decomposition.

  4 m n^2 - 4/3 n^3 operations for the values alone, 14 m n^2 + 8 n^3 with
  thin vectors, m >= n (section 8.6, Golub-Reinsch).
  """
  m, n = max(rows, columns), min(rows, columns)
  twice = 14 * m * n**2 + 8 * n**3 if vectors else 4 * m * n**2 - 4 * n**3 // 3
  return _factorized(twice // 2, m * n if vectors else n)


def _factorized(macs: int, outputs: int, divisions: int = 0) -> formulas.Work:
  return formulas.Work(
    'matmul', macs, macs, operations=divisions, outputs=outputs
  )
