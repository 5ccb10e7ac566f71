"""The work of an einsum, computed from its equation and shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dynconv_jax.macs import formulas

# A letter, or a negative number for a dimension covered by an ellipsis.
Label = str | int


def work(
  equation: str,
  shapes: Sequence[Sequence[int]],
  path: Sequence[int] | None = None,
) -> formulas.Work:
  """Returns the work of an einsum that contracts two operands at a time.

  Each pair is a matrix product: the number of outputs times the size of the
  contracted dimensions. An outer product is one multiply-accumulate per output.
  A label that only one operand has, and that is not needed later, is summed
  first.

  Args:
    equation: such as 'ij,jk->ik'. '->' is optional, as in NumPy; '...'
      broadcasts.
    shapes: shapes of the operands.
    path: positions of the operands to contract, pair after pair, as PyTorch
      writes them; the result is appended. None: from left to right.
  """
  labels, result, sizes = parse(equation, shapes)
  # An operand that is broadcast along a label does not depend on it.
  operands = [
    {k for k, size in zip(names, shape, strict=True) if size == sizes[k]}
    for names, shape in zip(labels, shapes, strict=True)
  ]
  kept = set(result)

  def count(labels) -> int:
    return math.prod(sizes[label] for label in labels)

  def summed(labels, needed) -> formulas.Work:
    return formulas.reduction(count(labels), count(labels & needed))

  if len(operands) == 1:
    return summed(operands[0], kept)
  done, rest = formulas.elementwise(0), list(path or ())
  while len(operands) > 1:
    first, second = sorted(rest[:2]) if rest else (0, 1)
    del rest[:2]
    right, left = operands.pop(second), operands.pop(first)
    needed = kept.union(*operands)
    done += summed(left, right | needed) + summed(right, left | needed)
    left, right = left & (right | needed), right & (left | needed)
    outputs = (left | right) & needed
    done += formulas.matmul(count(outputs), count((left & right) - needed), 1)
    operands.insert(len(operands) if path else 0, outputs)
  return done


def parse(
  equation: str, shapes: Sequence[Sequence[int]]
) -> tuple[list[list[Label]], list[Label], dict[Label, int]]:
  """Returns the labels of each operand, those of the result, and all sizes."""
  terms, arrow, result = equation.replace(' ', '').partition('->')
  sizes: dict[Label, int] = {}
  operands = []
  for term, shape in zip(terms.split(','), shapes, strict=True):
    before, dots, after = term.partition('...')
    covered = len(shape) - len(before) - len(after) if dots else 0
    operands.append([*before, *range(-covered, 0), *after])
    for label, size in zip(operands[-1], shape, strict=True):
      sizes[label] = max(size, sizes.get(label, 1))
  covered = sorted(label for label in sizes if isinstance(label, int))
  if arrow:
    before, dots, after = result.partition('...')
    return operands, [*before, *(covered if dots else ()), *after], sizes
  letters = sorted(set(terms) - set(',.'))
  once = [letter for letter in letters if terms.count(letter) == 1]
  return operands, [*covered, *once], sizes
