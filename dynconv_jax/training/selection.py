"""Parts of a network, selected by patterns of their paths."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from dynconv_jax.layers import BatchNorm

Path = tuple[Any, ...]


def matches(pattern: str, path: Path) -> bool:
  """Returns whether a pattern matches a path or a module above it.

  Args:
    pattern: of `fnmatch`; its * matches any text, dots included.
    path: of a module or a weight, such as ('blocks', 0, 1, 'bn1').
  """
  names = [str(part) for part in path]
  return any(
    fnmatch.fnmatchcase('.'.join(names[:end]), pattern)
    for end in range(1, len(names) + 1)
  )


def check_patterns(
  model: nnx.Module, patterns: Mapping[str, Sequence[str]]
) -> None:
  """Raises ValueError for patterns that match nothing in a network.

  Args:
    model: of arrays, or of shapes and dtypes.
    patterns: by the name of the option that they come from.
  """
  paths = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
  unknown = [
    f'{name}: {pattern}'
    for name, given in patterns.items()
    for pattern in given
    if not any(matches(pattern, path) for path in paths)
  ]
  if unknown:
    tops = dict.fromkeys(str(path[0]) for path in paths)
    raise ValueError(
      f'no part of the network matches {"; ".join(unknown)}. Its parts are '
      f'{", ".join(tops)} and what is in them, such as '
      f'{".".join(map(str, paths[len(paths) // 2]))}'
    )


def freeze_statistics(model: nnx.Module, patterns: Sequence[str]) -> None:
  """Has batch norms use their running statistics in training, and keep them.

  Args:
    model: is changed.
    patterns: of the batch norms, or of modules above them.
  """
  for path, module in nnx.iter_modules(model):
    if isinstance(module, BatchNorm) and any(
      matches(pattern, path) for pattern in patterns
    ):
      module.use_running_average = True


def factors_of(params: nnx.State, factors: Mapping[str, float]) -> nnx.State:
  """Returns the factor of each weight's learning rate: of the last match, or 1.

  Args:
    params: of a network, unwrapped.
    factors: by pattern.
  """

  def factor(keys, _):
    path = tuple(getattr(key, 'key', getattr(key, 'idx', key)) for key in keys)
    found = [f for pattern, f in factors.items() if matches(pattern, path)]
    return found[-1] if found else 1.0

  return jax.tree_util.tree_map_with_path(factor, params)
