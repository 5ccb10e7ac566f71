"""Loops over as many rows as there are, in pieces of static size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

Carry = TypeVar('Carry')


def for_chunks(
  count: jax.Array,
  sizes: Sequence[int],
  body: Callable[[jax.Array, int, Carry], Carry],
  init: Carry,
) -> Carry:
  """Runs a body over [0, count) in chunks, with a dynamic number of them.

  As many of the first size as fit, then of the next; the last chunk may reach
  past `count` by less than the last size.

  Args:
    count: int32[], how many rows there are.
    sizes: of the chunks, decreasing.
    body: gives the new carry from (start, size, carry); start is traced.
    init: the first carry.

  Returns:
    The last carry.
  """
  start, carry = jnp.int32(0), init
  for size in sizes:
    rest = count - start
    if size == sizes[-1]:
      rest = rest + size - 1

    def step(i, carry, start=start, size=size):
      return body(start + i * size, size, carry)

    trips = rest // size
    carry = jax.lax.fori_loop(0, trips, step, carry)
    start = start + trips * size
  return carry


def padded_size(limit: int, sizes: Sequence[int]) -> int:
  """Returns how many rows a buffer needs for chunks over up to `limit` rows.

  A chunk of the first size has to fit even where it never runs.

  Args:
    limit: the largest count.
    sizes: of the chunks, decreasing.
  """
  return max(limit + sizes[-1] - 1, sizes[0])
