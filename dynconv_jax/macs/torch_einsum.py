"""The work of `torch.einsum`: outputs times what is contracted, as in JAX."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dynconv_jax.macs import formulas

# A letter, or a negative number for a dimension that an ellipsis stands for.
_Label = str | int


def _parse(
  equation: str, tensors: Sequence[torch.Tensor]
) -> tuple[list[list[_Label]], list[_Label], dict[_Label, int]]:
  """Returns the labels of each operand and of the result, and their sizes."""
  terms, arrow, result = equation.replace(' ', '').partition('->')
  sizes: dict[_Label, int] = {}
  operands = []
  for term, tensor in zip(terms.split(','), tensors, strict=True):
    before, dots, after = term.partition('...')
    covered = tensor.dim() - len(before) - len(after) if dots else 0
    labels = [*before, *range(-covered, 0), *after]
    operands.append(labels)
    for label, size in zip(labels, tensor.shape, strict=True):
      sizes[label] = max(size, sizes.get(label, 1))
  covered = sorted(label for label in sizes if isinstance(label, int))
  if arrow:
    before, dots, after = result.partition('...')
    return operands, [*before, *(covered if dots else ()), *after], sizes
  letters = sorted(set(terms) - set(',.'))
  once = [letter for letter in letters if terms.count(letter) == 1]
  return operands, [*covered, *once], sizes


def _einsum(a) -> formulas.Work:
  """Operands are multiplied two by two, as its path says or from the left."""
  labels, result, sizes = _parse(a.equation, a.tensors)
  # What is broadcast along a label does not have it.
  operands = [
    {k for k, size in zip(names, x.shape, strict=True) if size == sizes[k]}
    for names, x in zip(labels, a.tensors, strict=True)
  ]
  kept = set(result)

  def count(labels):
    return math.prod(sizes[label] for label in labels)

  def summed(labels, needed):
    return formulas.reduction(count(labels), count(labels & needed))

  if len(operands) == 1:
    return summed(operands[0], kept)
  work = formulas.elementwise(0)
  path = list(a.path or ())
  while len(operands) > 1:
    first, second = sorted(path[:2]) if path else (0, 1)
    del path[:2]
    right, left = operands.pop(second), operands.pop(first)
    needed = kept.union(*operands)
    # A label that one operand has alone is summed before.
    work += summed(left, right | needed) + summed(right, left | needed)
    left, right = left & (right | needed), right & (left | needed)
    outputs = (left | right) & needed
    inner = (left & right) - needed
    work += formulas.matmul(count(outputs), count(inner), 1)
    # The result is last in a path, and first from the left.
    operands.insert(len(operands) if a.path else 0, outputs)
  return work


def einsum(equation: Any, *operands: Any) -> torch.Tensor:
  """Returns `torch.einsum`, an outer product by `matmul`.

  Where gradients are recorded, PyTorch would make products of elements of it,
  and of its gradients.
  """
  tensors = operands
  if len(operands) == 1 and isinstance(operands[0], list | tuple):
    (tensors,) = operands
  if isinstance(equation, str) and len(tensors) == 2:
    product = _outer_product(equation, *tensors)
    if product is not None:
      return product
  return torch.einsum(equation, *operands)


def _outer_product(equation: str, *tensors: torch.Tensor) -> Any:
  """Returns an outer product by `matmul`; None if the einsum is none."""
  operands, result, sizes = _parse(equation, tensors)
  sides = []
  for own, other, tensor in zip(
    operands, reversed(operands), tensors, strict=True
  ):
    is_broadcast = tensor.shape != tuple(sizes[label] for label in own)
    if is_broadcast or len(set(own)) < len(own):
      return None
    if set(own) & set(other) - set(result):
      return None
    alone = [i for i, x in enumerate(own) if x not in other + result]
    summed = tensor.sum(alone) if alone else tensor
    sides.append((summed, [label for label in own if label in other + result]))
  (left, rows), (right, columns) = sides
  shared = [label for label in rows if label in columns]
  only = [[x for x in labels if x not in shared] for labels in (rows, columns)]

  def matrices(tensor, labels, own, *shape):
    order = [labels.index(label) for label in shared + own]
    count = math.prod(sizes[label] for label in shared)
    return tensor.permute(order).reshape(count, *shape)

  product = matrices(left, rows, only[0], -1, 1) @ matrices(
    right, columns, only[1], 1, -1
  )
  labels = shared + only[0] + only[1]
  product = product.reshape([sizes[label] for label in labels])
  return product.permute([labels.index(label) for label in result])


FORMULAS = {'einsum': _einsum}
