"""Tests of the work of PyTorch's linear algebra."""

import pytest
from absl.testing import absltest, parameterized

torch = pytest.importorskip('torch', reason='PyTorch is not installed')
jax = pytest.importorskip('jax', reason='JAX is not installed')

from torch import nn  # noqa: E402

from dynconv_jax.macs import count_macs as count_jax_macs  # noqa: E402
from dynconv_jax.macs.torch import count_macs  # noqa: E402


class Functional(nn.Module):
  """Calls a function."""

  def __init__(self, function):
    super().__init__()
    self.function = function

  def forward(self, *args):
    return self.function(*args)


def eliminated(n):
  """Returns the multiply-accumulates of Gaussian elimination, one by one."""
  return sum(
    1 for k in range(n) for _ in range(k + 1, n) for _ in range(k + 1, n)
  )


def substituted(n):
  """Returns those of a triangular solve with one right-hand side."""
  return sum(1 for i in range(n) for _ in range(i))


class LinalgTest(parameterized.TestCase):
  @parameterized.parameters(
    ('solve', (2, 4, 4), (2, 4, 3)),
    ('inv', (2, 4, 4)),
    ('det', (4, 4)),
    ('slogdet', (4, 4)),
    ('cholesky', (3, 5, 5)),
    ('qr', (6, 4)),
    ('qr', (4, 6)),
    ('svd', (6, 4)),
    ('svdvals', (6, 4)),
    ('matrix_rank', (4, 4)),
    ('pinv', (6, 4)),
    ('eigh', (2, 4, 4)),
    ('eig', (4, 4)),
    ('eigvals', (4, 4)),
  )
  def test_equals_jax(self, name, *shapes):
    report = count_macs(Functional(getattr(torch.linalg, name)), *shapes)
    expected = count_jax_macs(
      getattr(jax.numpy.linalg, name),
      *(jax.ShapeDtypeStruct(shape, 'float32') for shape in shapes),
      convention='conv+linear',
    )
    self.assertGreater(report.total, 0)
    self.assertEqual(report.total, expected.total)
    self.assertEmpty(report.uncounted)

  @parameterized.parameters(
    (torch.linalg.det, [(3, 4, 4)], 3 * eliminated(4)),
    (torch.linalg.lu_factor, [(4, 4)], eliminated(4)),
    (
      torch.linalg.solve,
      [(3, 4, 4), (3, 4, 5)],
      3 * (eliminated(4) + 5 * 2 * substituted(4)),
    ),
    # One vector per matrix.
    (
      torch.linalg.solve,
      [(3, 4, 4), (3, 4)],
      3 * (eliminated(4) + 2 * substituted(4)),
    ),
    (
      lambda a, b: torch.linalg.solve(a, b, left=False),
      [(4, 4), (5, 4)],
      eliminated(4) + 5 * 2 * substituted(4),
    ),
    (torch.linalg.inv, [(4, 4)], eliminated(4) + 4 * 2 * substituted(4)),
    (
      lambda a, b: torch.linalg.solve_triangular(a, b, upper=True),
      [(2, 4, 4), (2, 4, 5)],
      2 * 5 * substituted(4),
    ),
    (torch.cholesky_solve, [(4, 5), (4, 4)], 5 * 2 * substituted(4)),
    (
      lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b),
      [(4, 4), (4, 5)],
      eliminated(4) + 5 * 2 * substituted(4),
    ),
  )
  def test_by_the_loops(self, function, shapes, macs):
    report = count_macs(Functional(function), *shapes)
    self.assertEqual(report.total, macs)
    self.assertEmpty(report.uncounted)

  @parameterized.parameters((6, 4), (4, 4))
  def test_reflections(self, rows, columns):
    # A reflector of rows - k elements: its product with a column, and the
    # update.
    def applied(n):
      return sum(2 * (rows - k) * n for k in range(columns))

    def run(function, *shapes):
      return count_macs(Functional(function), *shapes).total

    factors = run(lambda a: torch.linalg.qr(a, mode='r'), (rows, columns))
    shapes = (rows, columns), (columns,), (rows, 3)
    self.assertEqual(run(torch.ormqr, *shapes), applied(3))
    triangle = 3 * substituted(columns)
    self.assertEqual(
      run(torch.linalg.lstsq, (rows, columns), (rows, 3)),
      factors + applied(3) + triangle,
    )

  def test_complex_systems_are_four_times_real_ones(self):
    a = torch.eye(4, dtype=torch.complex64)
    module = Functional(torch.linalg.inv)
    self.assertEqual(
      count_macs(module, a).total, 4 * count_macs(module, (4, 4)).total
    )


if __name__ == '__main__':
  absltest.main()
