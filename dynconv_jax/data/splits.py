"""Splits in TFDS's notation, and checks that they do not overlap."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Slices of the data set's own splits: (name, start, stop).
Slices = tuple[tuple[str, int, int], ...]


def is_none(expression: str | None) -> bool:
  """Returns whether an expression means no split."""
  return expression is None or expression.strip().lower() in ('', 'none')


def resolve_split(
  expression: str,
  sizes: Mapping[str, int],
  aliases: Mapping[str, str] | None = None,
) -> Slices:
  """Returns the slices of an expression in TFDS's notation.

  Args:
    expression: an expression such as 'train', 'train[:90%]', or
      'train[:50]+test[-10:]'.
    sizes: number of examples of each of the data set's own splits.
    aliases: other names of those splits, such as {'test': 'validation'}.

  Returns:
    (name, start, stop) for each non-empty term, in order.

  Raises:
    ValueError: the notation is wrong, or the split is unknown, out of range, or
      empty, or contains an example twice.
  """
  import tensorflow_datasets as tfds  # Slow, and most programs need no data.

  aliases = aliases or {}
  known = f'the dataset has {_describe(sizes, aliases)}'
  spec = re.sub(
    r'[A-Za-z_][\w-]*', lambda m: aliases.get(m[0], m[0]), expression
  )
  if 'shard' in spec:
    raise ValueError(
      f'split {expression!r}: slices by shard are not supported; use examples '
      'or percent'
    )
  # TFDS needs only the number of examples.
  infos = {
    name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
    for name, size in sizes.items()
  }
  try:
    terms = tfds.core.splits.AbstractSplit.from_spec(spec).to_absolute(infos)
  except (ValueError, AttributeError, NotImplementedError) as error:
    raise ValueError(f'split {expression!r}: {error} ({known})') from error
  slices = []
  for term in terms:
    stop = sizes[term.splitname] if term.to is None else term.to
    slices.append((term.splitname, term.from_ or 0, stop))
  slices = tuple(s for s in slices if s[1] < s[2])
  if not slices:
    raise ValueError(f'split {expression!r} is empty; {known}')
  for i, first in enumerate(slices):
    for second in slices[i + 1 :]:
      if _overlap(first, second):
        raise ValueError(
          f'split {expression!r} names {_overlap(first, second)} examples of '
          f'{first[0]!r} twice; {known}'
        )
  return slices


def check_splits(
  expressions: Mapping[str, str | None],
  sizes: Mapping[str, int],
  aliases: Mapping[str, str] | None = None,
) -> dict[str, Slices | None]:
  """Returns the slices of each split, and checks that no two overlap.

  Args:
    expressions: expression by role, such as {'train': 'train[:90%]',
      'validation': 'train[90%:]', 'test': ''}; '' and 'none' mean no split.
    sizes: number of examples of each of the data set's own splits.
    aliases: other names of those splits.

  Returns:
    Slices by role; None if there is no such split.

  Raises:
    ValueError: a split cannot be resolved or is empty, or two overlap.
  """
  resolved = {}
  for role, expression in expressions.items():
    try:
      resolved[role] = (
        None
        if is_none(expression)
        else resolve_split(expression, sizes, aliases)
      )
    except ValueError as error:
      raise ValueError(f'{role}_split: {error}') from error
  roles = [role for role, slices in resolved.items() if slices is not None]
  for i, first in enumerate(roles):
    for second in roles[i + 1 :]:
      shared = sum(
        _overlap(a, b) for a in resolved[first] for b in resolved[second]
      )
      if shared:
        raise ValueError(
          f'{first}_split={expressions[first]} and '
          f'{second}_split={expressions[second]} overlap in {shared} '
          f'examples; the dataset has {_describe(sizes, aliases or {})}'
        )
  return resolved


def _overlap(a: tuple[str, int, int], b: tuple[str, int, int]) -> int:
  if a[0] != b[0]:
    return 0
  return max(0, min(a[2], b[2]) - max(a[1], b[1]))


def _describe(sizes: Mapping[str, int], aliases: Mapping[str, str]) -> str:
  other = {target: alias for alias, target in aliases.items()}
  return ', '.join(
    f'{name}{f" (also called {other[name]})" if name in other else ""}: '
    f'{size} examples'
    for name, size in sizes.items()
  )
