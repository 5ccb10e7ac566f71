"""Selection of parts of a network by path patterns."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from dynconv_jax.layers import BatchNorm
from dynconv_jax.models.gated import GATE

Path = tuple[Any, ...]


def matches(pattern: str, path: Path) -> bool:
  """Returns whether a pattern matches a path or any of its parent modules.

  A gate belongs to no parent: only a pattern that matches the path of the gate
  or of something in it applies. So blocks.0 selects the block's layers, but not
  its gate, which is trained where pretrained layers are frozen.

  Args:
    pattern: `fnmatch` pattern. * matches any text, including dots.
    path: path of a module or weight, such as ('blocks', 0, 1, 'bn1').
  """
  names = [str(part) for part in path]
  first = names.index(GATE) + 1 if GATE in names else 1
  return any(
    fnmatch.fnmatchcase('.'.join(names[:end]), pattern)
    for end in range(first, len(names) + 1)
  )


def check_patterns(
  model: nnx.Module, patterns: Mapping[str, Sequence[str]]
) -> None:
  """Raises ValueError for patterns that match nothing in a network.

  Args:
    model: network of arrays, or of shapes and dtypes.
    patterns: patterns by the name of their option.
  """
  paths = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
  unknown = [
    f'{name}: {pattern}'
    for name, values in patterns.items()
    for pattern in values
    if not any(matches(pattern, path) for path in paths)
  ]
  if unknown:
    tops = dict.fromkeys(str(path[0]) for path in paths)
    raise ValueError(
      f'no part of the network matches {"; ".join(unknown)}. Its parts are '
      f'{", ".join(tops)} and their submodules and weights, such as '
      f'{".".join(map(str, paths[len(paths) // 2]))}'
    )


def freeze_statistics(model: nnx.Module, patterns: Sequence[str]) -> None:
  """Freezes batch norms: training uses and keeps their running statistics.

  Args:
    model: the network, modified in place.
    patterns: path patterns of the batch norms or their parent modules.
  """
  for path, module in nnx.iter_modules(model):
    if isinstance(module, BatchNorm) and any(
      matches(pattern, path) for pattern in patterns
    ):
      module.use_running_average = True


def factors_of(params: nnx.State, factors: Mapping[str, float]) -> nnx.State:
  """Returns each weight's learning rate factor: of the last match, or else 1.

  Args:
    params: unwrapped parameters of a network.
    factors: factors by pattern.
  """

  def factor(keys, _):
    path = tuple(getattr(key, 'key', getattr(key, 'idx', key)) for key in keys)
    matched = [f for pattern, f in factors.items() if matches(pattern, path)]
    return matched[-1] if matched else 1.0

  return jax.tree_util.tree_map_with_path(factor, params)
