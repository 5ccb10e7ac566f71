"""Counting conventions: which part of an operation's work counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dynconv_jax.macs import formulas


@dataclasses.dataclass(frozen=True)
class Convention:
  """A rule that turns work into one number.

  Attributes:
    name: the name to select it by.
    unit: 'MACs' or 'FLOPs'.
    formula: the rule in one line, as shown in tables and docs.
    price: returns the count for some work, given its number of
      multiply-accumulates.
  """

  name: str
  unit: str
  formula: str
  price: Callable[[formulas.Work, int], int]

  def __call__(self, work: formulas.Work, padding: bool = True) -> int:
    """Returns the count for `work`, with or without input padding."""
    return self.price(work, work.macs if padding else work.inside_macs)


def _conv(work: formulas.Work, macs: int) -> int:
  return macs + work.bias if work.kind == 'conv' else 0


def _conv_and_linear(work: formulas.Work, macs: int) -> int:
  del work
  return macs


def _ptflops(work: formulas.Work, macs: int) -> int:
  return macs + work.bias + work.ptflops


def _flops(work: formulas.Work, macs: int) -> int:
  return 2 * macs + work.bias + work.operations


CONVENTIONS = {
  convention.name: convention
  for convention in (
    Convention(
      'conv', 'MACs', 'convolutions: macs + bias; nothing else', _conv
    ),
    Convention(
      'conv+linear',
      'MACs',
      'convolutions and matrix products: macs; no bias',
      _conv_and_linear,
    ),
    Convention(
      'ptflops',
      'MACs',
      'macs + bias + 2 per element of a batch norm + 1 per element of an'
      ' activation or pooling input, as ptflops 0.7.5 counts modules',
      _ptflops,
    ),
    Convention(
      'flops',
      'FLOPs',
      '2 macs + bias + 1 for each other arithmetic operation',
      _flops,
    ),
  )
}


def get_convention(name: str | Convention) -> Convention:
  """Returns a convention by name; a `Convention` is returned unchanged.

  Raises:
    ValueError: if there is no convention with this name.
  """
  if isinstance(name, Convention):
    return name
  if name not in CONVENTIONS:
    raise ValueError(
      f'convention must be one of {sorted(CONVENTIONS)}; got {name!r}'
    )
  return CONVENTIONS[name]
