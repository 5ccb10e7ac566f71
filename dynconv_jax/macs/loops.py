"""Trip counts of loops that count by a constant to a constant."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

# Comparisons, and their equivalents with the two sides swapped.
_FLIPPED = {'lt': 'gt', 'le': 'ge', 'gt': 'lt', 'ge': 'le', 'ne': 'ne'}


@dataclasses.dataclass(frozen=True)
class Count:
  """An integer carried by a loop, plus a constant."""

  carried: Any
  offset: int = 0


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A comparison of two integers."""

  name: str
  left: Any
  right: Any


def arithmetic(name: str, left: Any, right: Any) -> Any:
  """Evaluates a binary operation on integers as far as they are known.

  Args:
    name: 'add', 'sub', 'mul' or a comparison; other operations are unknown.
    left: an int, a `Count`, or anything else if unknown.
    right: likewise.

  Returns:
    an int, a `Count`, a `Comparison`, or None if unknown.
  """
  if not all(isinstance(number, int | Count) for number in (left, right)):
    return None
  if name in _FLIPPED:
    return Comparison(name, left, right)
  if isinstance(left, int) and isinstance(right, int):
    results = {'add': left + right, 'sub': left - right, 'mul': left * right}
    return results.get(name)
  if name == 'add' and isinstance(left, int):
    left, right = right, left
  if name in ('add', 'sub') and isinstance(right, int):
    step = right if name == 'add' else -right
    return dataclasses.replace(left, offset=left.offset + step)
  return None


def fixed_trips(
  condition: Any,
  start: Sequence[Any],
  carry: Sequence[Any],
  stop: Sequence[Any],
) -> int | None:
  """Returns the trip count of a loop that counts by a constant to a constant.

  Args:
    condition: what is known about the condition, in terms of `carry`.
    start: what is known about the initial carried values.
    carry: symbols for the carried values at the start of an iteration.
    stop: what is known about the carried values at the end of an iteration.

  Returns:
    the number of iterations, or None if unknown.
  """
  if not isinstance(condition, Comparison):
    return None

  def values(number):
    """Returns the initial value and the step of a number."""
    if isinstance(number, int):
      return number, 0
    for before, known, after in zip(start, carry, stop, strict=True):
      if isinstance(known, Count) and known.carried is number.carried:
        counts = getattr(after, 'carried', None) is known.carried
        if counts and isinstance(before, int):
          return before + number.offset, after.offset
    return None

  left, right = values(condition.left), values(condition.right)
  if left is None or right is None:
    return None
  name = condition.name
  distance, step = right[0] - left[0], left[1] - right[1]
  if name in ('gt', 'ge'):
    name, distance, step = _FLIPPED[name], -distance, -step
  # The loop runs while t * step < distance, for t = 0, 1, ...
  if name == 'ne':
    exact = step and not distance % step and distance // step >= 0
    return distance // step if exact else None
  if name == 'le':
    distance += 1
  if distance <= 0:
    return 0
  return -(-distance // step) if step > 0 else None
