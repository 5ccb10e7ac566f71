"""Results of a walk through a jaxpr: work, and arrays that may be weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dynconv_jax.macs import formulas


@dataclasses.dataclass(frozen=True)
class Weight:
  """An array passed in from outside, or a view of one; possibly weights."""

  key: Any
  parameters: int
  size: int


@dataclasses.dataclass(eq=False)
class Entry:
  """Work found in the walk; `work` is None if it cannot be counted."""

  layer: str
  operation: str
  work: formulas.Work | None
  shape: tuple[int, ...] = ()
  weights: tuple[Weight, ...] = ()
  reason: str = ''
  # Number of biases that the output can take; 0 once it has a bias.
  features: int = 0
  itemsize: int = 0


def repeated(entries: Sequence[Entry], times: int) -> list[Entry]:
  """Multiplies the work of entries; returns an empty list for zero times."""
  for entry in entries:
    if entry.work is not None:
      entry.work *= times
  return list(entries) if times else []


def weight(key: Any, array: Any) -> Weight | None:
  shape = getattr(array, 'shape', ())
  return Weight(key, math.prod(shape), math.prod(shape)) if shape else None


def constant(value: Any) -> Weight | int | None:
  """Returns what is known about a constant array or number of the program."""
  if getattr(value, 'shape', ()):
    return weight(id(value), value)
  dtype = getattr(value, 'dtype', type(value))
  return int(value) if jax.dtypes.issubdtype(dtype, np.integer) else None


def weights_operand(eqn, inputs) -> int:
  """Returns which operand of a product is the layer's weights, 0 or 1.

  It is the operand passed in from outside. If both are, it is the second, as in
  x @ w, unless only the first is a matrix, as in w @ x.
  """
  if eqn.primitive.name != 'dot_general':
    return 1
  lhs, rhs = (isinstance(known, Weight) for known in inputs[:2])
  ndims = [v.aval.ndim for v in eqn.invars[:2]]
  return 0 if lhs and (not rhs or ndims[0] == 2 != ndims[1]) else 1
