"""How often a loop runs that counts by a constant to a constant."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

# Comparisons, and what they are with their sides exchanged.
_FLIPPED = {'lt': 'gt', 'le': 'ge', 'gt': 'lt', 'ge': 'le', 'ne': 'ne'}


@dataclasses.dataclass(frozen=True)
class Count:
  """A whole number that a loop carries, plus a constant."""

  carried: Any
  offset: int = 0


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Whether one whole number is smaller than another, say."""

  name: str
  left: Any
  right: Any


def arithmetic(name: str, left: Any, right: Any) -> Any:
  """Returns what is known of two whole numbers' sum, comparison or such.

  Args:
    name: 'add', 'sub', 'mul' or a comparison; nothing is known of others.
    left: an int, a `Count`, or something else, of which nothing is known.
    right: likewise.

  Returns:
    an int, a `Count`, a `Comparison` or None.
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
  """Returns how often a loop runs that counts by a constant to a constant.

  Args:
    condition: what is known of it, for the numbers of `carry`.
    start: what is known of what is carried in.
    carry: what stands for it in a pass.
    stop: what is known of what a pass hands on.
  """
  if not isinstance(condition, Comparison):
    return None

  def values(number):
    """Returns where a number starts, and its step."""
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
  # It runs while t * step < distance, in passes t = 0, 1, ...
  if name == 'ne':
    exact = step and not distance % step and distance // step >= 0
    return distance // step if exact else None
  if name == 'le':
    distance += 1
  if distance <= 0:
    return 0
  return -(-distance // step) if step > 0 else None
