"""Tests of the work of `torch.einsum`, and that it equals JAX's."""

import pytest
from absl.testing import absltest, parameterized

torch = pytest.importorskip('torch', reason='PyTorch is not installed')
jax = pytest.importorskip('jax', reason='JAX is not installed')

from torch import nn  # noqa: E402

from dynconv_jax.macs import count_macs as count_jax_macs  # noqa: E402
from dynconv_jax.macs import torch_einsum  # noqa: E402
from dynconv_jax.macs.torch import count_macs  # noqa: E402


class Einsum(nn.Module):
  """Calls einsum."""

  def __init__(self, equation):
    super().__init__()
    self.equation = equation

  def forward(self, *args):
    return torch.einsum(self.equation, *args)


OUTER = (
  ('i,j->ij', [(4,), (5,)], 20),
  ('i,j->ji', [(4,), (5,)], 20),
  ('i,j', [(4,), (5,)], 20),
  ('ij,ij->ij', [(4, 5), (4, 5)], 20),
  ('i,->i', [(4,), ()], 4),
  ('ij,kl->il', [(3, 4), (5, 6)], 18),
  ('bhn,bhd->bhnd', [(2, 3, 4), (2, 3, 5)], 120),
  ('...i,...j->...ij', [(2, 3, 4), (2, 3, 5)], 120),
)

OTHERS = (
  ('ij,ij->', [(4, 5), (4, 5)], 20),
  ('bij,bjk->bik', [(2, 3, 4), (2, 4, 5)], 120),
  ('ij,jk', [(3, 4), (4, 5)], 60),
  ('...ij,...jk->...ik', [(2, 3, 4), (2, 4, 5)], 120),
  ('...i,...i', [(2, 3, 4), (2, 3, 4)], 24),
  ('ij->', [(4, 5)], 0),
  ('ij->ji', [(4, 5)], 0),
  ('ij,jk,kl->il', [(3, 4), (4, 5), (5, 6)], 150),
  ('a,b,ab->', [(3,), (4,), (3, 4)], 15),
)


class EinsumTest(parameterized.TestCase):
  @parameterized.parameters(*OUTER, *OTHERS)
  def test_equals_jax(self, equation, shapes, macs):
    for convention in ('conv+linear', 'flops'):
      report = count_macs(
        Einsum(equation), *map(torch.zeros, shapes), convention=convention
      )
      expected = count_jax_macs(
        lambda *x: jax.numpy.einsum(equation, *x),
        *(jax.ShapeDtypeStruct(shape, 'float32') for shape in shapes),
        convention=convention,
      )
      self.assertEqual(report.total, expected.total)
      if convention == 'conv+linear':
        self.assertEqual(report.total, macs)

  @parameterized.parameters(
    ('...ij,...jk->...ik', [(2, 3, 4), (1, 4, 5)], 120),
    # Broadcast along i, which is therefore summed, not contracted.
    ('ij,ij->j', [(3, 4), (1, 4)], 4),
    ('ii,i->i', [(4, 4), (4,)], 4),
    (' i j , j k -> i k ', [(3, 4), (4, 5)], 60),
  )
  def test_by_hand(self, equation, shapes, macs):
    report = count_macs(Einsum(equation), *map(torch.zeros, shapes))
    self.assertEqual(report.total, macs)

  @parameterized.parameters(*OUTER)
  def test_gradients_of_outer_products(self, equation, shapes, macs):
    inputs = [torch.rand(shape, requires_grad=True) for shape in shapes]
    report = count_macs(Einsum(equation), *inputs, backward=True)
    self.assertEqual(report.total, 3 * macs)
    # The replacement computes the same values.
    expected = torch.einsum(equation, *inputs)
    for operands in (inputs, [inputs]):
      product = torch_einsum.einsum(equation, *operands)
      self.assertIn(
        type(product.grad_fn).__name__, ('PermuteBackward0', 'ViewBackward0')
      )
      torch.testing.assert_close(product, expected)

  @parameterized.parameters(
    *OTHERS, ('ii,i->i', [(4, 4), (4,)], 0), ('ij,ij->ij', [(3, 4), (1, 4)], 0)
  )
  def test_others_run_as_written(self, equation, shapes, macs):
    del macs
    inputs = [torch.rand(shape) for shape in shapes]
    expected = torch.einsum(equation, *inputs)
    torch.testing.assert_close(torch_einsum.einsum(equation, *inputs), expected)


if __name__ == '__main__':
  absltest.main()
