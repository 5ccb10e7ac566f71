"""Comparison of gated blocks with the descriptions that backends execute."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynconv_jax.masks import execution_mask
from dynconv_jax.models.gated import GatedBlock, Gating
from dynconv_jax.sparse.backends.dense import run_dense
from dynconv_jax.sparse.fold import describe_conv, fold_block

_ADVICE = (
  'Describe what the block computes (activation, kernel sizes, groups), or set '
  'describable = False in its class to run it densely'
)
# Tolerance relative to the largest value, by the number of bytes of the compute
# dtype.
_TOLERANCE = {2: 0.05, 4: 1e-3, 8: 1e-3}
_OWN = ('__call__', 'execute', 'run_branch', 'shortcut')


def check_descriptions(blocks: Sequence[GatedBlock]) -> None:
  """Raises ValueError if a block does not compute what its branch describes.

  A block that inherits all of its computation matches its description by
  construction. Other blocks are compared with it on random inputs. A block must
  also inherit `decide`.

  Args:
    blocks: gated blocks, in evaluation.
  """
  deciding = [
    f'{block.name} ({type(block).__name__})'
    for block in blocks
    if block.describable and type(block).decide is not GatedBlock.decide
  ]
  if deciding:
    raise ValueError(
      'the classes of these blocks override `decide`, which sparse execution '
      f'does not call: {", ".join(deciding)}. Decide in the gate, or set '
      'describable = False in the class to run it densely'
    )
  differing = []
  for block in blocks:
    if not block.describable or _inherits(block):
      continue
    try:
      difference = _difference(block)
    except (AttributeError, TypeError) as error:
      raise ValueError(
        f'{block.name} ({type(block).__name__}) does not match its branch: '
        f'{error}. {_ADVICE}'
      ) from error
    if difference > _TOLERANCE[jnp.dtype(block.dtype).itemsize]:
      differing.append(
        f'{block.name} ({type(block).__name__}, by {difference:.2g} relative '
        'to its largest value)'
      )
  if differing:
    raise ValueError(
      'these blocks do not compute what their branch describes: '
      f'{", ".join(differing)}. {_ADVICE}'
    )


def _inherits(block: GatedBlock) -> bool:
  kind = type(block)
  if any(getattr(kind, name) is not getattr(GatedBlock, name) for name in _OWN):
    return False
  pairs = [
    (getattr(block, c.name), getattr(block, c.norm), c)
    for c in block.branch.convs
  ]
  if block.downsample is not None:
    pairs.append((*block.downsample, block.branch.projection))
  return all(_is_described(*pair) for pair in pairs)


def _is_described(conv, norm, what) -> bool:
  found = describe_conv(conv, norm)
  return found == dataclasses.replace(what, name='conv', norm='norm')


def _difference(block: GatedBlock) -> float:
  """Returns the largest error of the description, relative to the output."""
  block = nnx.clone(block)
  block.masker = None  # A gate may need the carry of an earlier one.
  rng, branch = np.random.default_rng(0), block.branch
  size = (7, 7)
  x = rng.standard_normal((2, *size, branch.in_features)).astype(np.float32)
  if branch.input_activated:
    x = np.maximum(x, 0)
  x = jnp.asarray(x, block.dtype)
  hard = rng.integers(0, 2, (2, *branch.sizes(size)[-1]))
  mask = execution_mask(
    branch, jnp.asarray(hard, jnp.float32), size, name=block.name
  )
  ours = run_dense(fold_block(block), x, mask.hard)
  theirs = block(x, Gating(masks=[mask.hard]))
  if ours.shape != theirs.shape:
    return float('inf')
  ours, theirs = (np.asarray(y, np.float32) for y in (ours, theirs))
  difference = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-6)
  return float(np.nan_to_num(difference, nan=np.inf))
