"""The work of `torch.einsum`: outputs times contracted size, as in JAX."""

from __future__ import annotations

import math
from typing import Any

import torch

from dynconv_jax.macs import einsum as einsum_work
from dynconv_jax.macs import formulas


def _einsum(a) -> formulas.Work:
  return einsum_work.work(a.equation, [x.shape for x in a.tensors], a.path)


def einsum(equation: Any, *operands: Any) -> torch.Tensor:
  """Returns `torch.einsum`, with outer products computed by `matmul`.

  When it records gradients, PyTorch would turn an outer product and its
  gradients into element-wise products.
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
  """Returns an outer product by `matmul`; None for any other einsum."""
  shapes = [tensor.shape for tensor in tensors]
  operands, result, sizes = einsum_work.parse(equation, shapes)
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
