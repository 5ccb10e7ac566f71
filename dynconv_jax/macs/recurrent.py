"""The cost of a recurrent layer, computed from its sizes."""

from __future__ import annotations

import dataclasses

from dynconv_jax.macs import formulas


@dataclasses.dataclass(frozen=True)
class Cell:
  """A recurrent cell.

  Attributes:
    gates: outputs of each of its two matrix products per hidden unit.
    operations: element-wise operations per hidden unit and step.
    ptflops: how many operations ptflops 0.7.5 counts instead.
  """

  gates: int
  operations: int
  ptflops: int


# A sum of the two products, and an activation.
RNN = Cell(gates=1, operations=2, ptflops=1)
# Three sums of the two products, three activations, the product with the reset
# gate, and (h - n) * z + n: a difference, a product and a sum.
GRU = Cell(gates=3, operations=10, ptflops=7)
# Four sums of the two products, five activations, three products and the sum
# of the cell state.
LSTM = Cell(gates=4, operations=13, ptflops=10)


def layer(
  cell: Cell,
  rows: int,
  *,
  inputs: int,
  hidden: int,
  projection: int | None = None,
  bias: bool = True,
) -> formulas.Work:
  """Returns the work of one layer in one direction.

  Args:
    cell: RNN, GRU or LSTM.
    rows: steps times batch.
    inputs: features of the input.
    hidden: hidden units.
    projection: size of an LSTM's projected output; None without a projection.
    bias: whether each of the two products has a bias.
  """
  features = cell.gates * hidden
  fed_back = hidden if projection is None else projection
  work = formulas.matmul(rows, inputs, features, bias=bias)
  work += formulas.matmul(rows, fed_back, features, bias=bias)
  if projection is not None:
    work += formulas.matmul(rows, hidden, projection)
  units = formulas.elementwise(cell.operations * rows * hidden)
  return work + dataclasses.replace(units, ptflops=cell.ptflops * rows * hidden)
