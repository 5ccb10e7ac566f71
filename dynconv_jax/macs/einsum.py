"""The work of an einsum, from its equation and shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dynconv_jax.macs import formulas

# A letter, or a negative number for a dimension that an ellipsis stands for.
_Label = str | int


def work(equation: str, shapes: Sequence[Sequence[int]]) -> formulas.Work:
  """Returns the work of an einsum whose operands meet from the left.

  Two operands are a matrix product: outputs times what is contracted, so an
  outer product is one multiply-accumulate an output. A label that one operand
  has alone, and that nothing needs later, is summed before.

  Args:
    equation: such as 'ij,jk->ik'; without '->' as in NumPy; '...' broadcasts.
    shapes: of the operands.
  """
  operands, kept, sizes = _parse(equation, shapes)

  def count(labels) -> int:
    return math.prod(sizes[label] for label in labels)

  def summed(labels, needed) -> formulas.Work:
    return formulas.reduction(count(labels), count(labels & needed))

  left, *others = operands
  if not others:
    return summed(left, kept)
  done = formulas.elementwise(0)
  for index, right in enumerate(others):
    needed = kept.union(*others[index + 1 :])
    done += summed(left, right | needed) + summed(right, left | needed)
    left, right = left & (right | needed), right & (left | needed)
    outputs = (left | right) & needed
    done += formulas.matmul(count(outputs), count((left & right) - needed), 1)
    left = outputs
  return done


def _parse(
  equation: str, shapes: Sequence[Sequence[int]]
) -> tuple[list[set[_Label]], set[_Label], dict[_Label, int]]:
  """Returns the labels of each operand and of the result, and their sizes."""
  terms, arrow, result = equation.replace(' ', '').partition('->')
  labels, sizes = [], {}
  for term, shape in zip(terms.split(','), shapes, strict=True):
    before, dots, after = term.partition('...')
    covered = len(shape) - len(before) - len(after) if dots else 0
    labels.append([*before, *range(-covered, 0), *after])
    for label, size in zip(labels[-1], shape, strict=True):
      sizes[label] = max(size, sizes.get(label, 1))
  # What is broadcast along a label does not have it.
  operands = [
    {k for k, size in zip(names, shape, strict=True) if size == sizes[k]}
    for names, shape in zip(labels, shapes, strict=True)
  ]
  covered = {label for label in sizes if isinstance(label, int)}
  if arrow:
    letters = set(result) - {'.'}
    return operands, letters | (covered if '...' in result else set()), sizes
  once = {x for x in set(terms) - set(',.') if terms.count(x) == 1}
  return operands, covered | once, sizes
