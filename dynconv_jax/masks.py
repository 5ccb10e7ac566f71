"""Execution masks: where each gated block runs its branch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dynconv_jax.branch import Branch


@dataclasses.dataclass(frozen=True)
class MaskedLayer:
  """One layer that runs only at the active positions of a mask.

  Attributes:
    name: the layer's path in the model, such as 'layer2.0.conv2'.
    macs_per_position: multiply-accumulates per output position, in the `conv`
      convention (a bias counts one per output).
    level: index of the mask in `maps` that the layer runs on.
    kind: 'positions'; or 'pairs' for a product of attention, which costs MACs
      per pair of active positions.
  """

  name: str
  macs_per_position: int
  level: int = 0
  kind: str = 'positions'


@flax.struct.dataclass
class ExecutionMask:
  """Where one residual block runs its branch, per image and position.

  Attributes:
    maps: float32 of {0, 1}, the mask of each level of the branch, see
      `branch.Branch.levels`. The first is [N, h, w] at the block's output
      resolution, or [N, tokens]. The others contain the positions at which
      earlier convolutions must run.
    name: the block's path in the model, such as 'layer2.0'.
    layers: the masked layers of the block, in order of execution.
    stage: index of the block's stage.
    score: float32 in the shape of `hard`, the gate's score if a loss needs it
      (see `gate.Decision`); otherwise None.
    fallback: int32[], 1 if a sparse block used the dense fallback; None in a
      network that is not sparse.
  """

  maps: tuple[jax.Array, ...]
  name: str = flax.struct.field(pytree_node=False)
  layers: tuple[MaskedLayer, ...] = flax.struct.field(
    pytree_node=False, default=()
  )
  stage: int = flax.struct.field(pytree_node=False, default=0)
  score: jax.Array | None = None
  fallback: jax.Array | None = None

  @property
  def hard(self) -> jax.Array:
    """float32[N, h, w] of {0, 1}: where the branch's output is used.

    In training, has the straight-through gradient.
    """
    return self.maps[0]

  @property
  def dilated(self) -> jax.Array:
    """float32[N, H, W] of {0, 1}: where the first convolution runs."""
    return self.maps[-1]

  @property
  def counts(self) -> jax.Array:
    """int32[2]: active positions of `hard` and of `dilated`, over the batch."""
    maps = (self.hard, self.dilated)
    return jnp.stack([jnp.sum(m, dtype=jnp.int32) for m in maps])

  def executed_macs(self) -> jax.Array:
    """Returns the MACs of the masked layers at active positions, float32[N]."""
    counts = [jnp.sum(m, axis=tuple(range(1, m.ndim))) for m in self.maps]
    return sum(
      layer.macs_per_position
      * (counts[layer.level] ** (2 if layer.kind == 'pairs' else 1))
      for layer in self.layers
    )

  def dense_macs(self) -> int:
    """Returns the MACs of the masked layers per image with a full mask."""
    counts = [math.prod(m.shape[1:]) for m in self.maps]
    return sum(
      layer.macs_per_position
      * counts[layer.level] ** (2 if layer.kind == 'pairs' else 1)
      for layer in self.layers
    )

  def density(self) -> jax.Array:
    """Returns the fraction of active positions of `hard`, float32[N]."""
    return jnp.mean(self.hard, axis=tuple(range(1, self.hard.ndim)))

  def __repr__(self) -> str:
    maps = ', '.join(f'{m.dtype}{list(m.shape)}' for m in self.maps)
    text = f'ExecutionMask({self.name!r}, maps=({maps})'
    if has_values(self.hard):
      text += f', density={np.mean(self.hard):.3f}'
    return f'{text})'


def execution_mask(
  branch: Branch,
  hard: jax.Array,
  size: tuple[int, int],
  *,
  name: str,
  stage: int = 0,
  score: jax.Array | None = None,
) -> ExecutionMask:
  """Returns the execution mask of a decision.

  Args:
    branch: description of the block's branch.
    hard: float32[N, h, w] of {0, 1}, the decision at output resolution.
    size: (height, width) of the block's input.
    name: the block's path in the model.
    stage: index of the block's stage.
    score: the gate's score, or None.
  """
  maps = [hard]
  sizes = branch.level_sizes(size)
  for conv, (height, width) in zip(branch.reads, sizes[1:], strict=True):
    maps.append(
      dilate(
        maps[-1],
        conv.strides,
        kernel_size=conv.kernel_size,
        size=(height, width),
        low=(conv.pads(height)[0], conv.pads(width)[0]),
      )
    )
  return ExecutionMask(
    maps=tuple(maps),
    name=name,
    layers=masked_layers(branch, name),
    stage=stage,
    score=score,
  )


def masked_layers(branch: Branch, name: str) -> tuple[MaskedLayer, ...]:
  """Returns the masked layers of a block, in order of execution.

  Args:
    branch: description of the block's branch.
    name: the block's path in the model.
  """
  return tuple(
    MaskedLayer(f'{name}.{conv.name}', conv.macs_per_position, level)
    for conv, level in zip(branch.convs, branch.levels, strict=True)
  )


def dilate(
  mask: jax.Array,
  strides: int = 1,
  *,
  kernel_size: int = 3,
  size: tuple[int, int] | None = None,
  low: tuple[int, int] | None = None,
) -> jax.Array:
  """Returns the positions at which a convolution reads its input.

  A padded k x k convolution of stride s that runs at the positions of `mask`
  reads its input at the returned positions (Verelst and Tuytelaars, CVPR 2020,
  section 3.3). As in the authors' code, the dilation has no gradient.

  Args:
    mask: float[N, h, w] of {0, 1} at the convolution's output resolution.
    strides: stride s of the convolution.
    kernel_size: kernel size k, odd.
    size: (H, W) of the input; None for (h * s, w * s).
    low: low padding of each axis; None for k // 2.

  Returns:
    float[N, H, W] of {0, 1}.
  """
  k, s = kernel_size, strides
  size = size or tuple(n * s for n in mask.shape[1:])
  low = low or (k // 2, k // 2)
  mask = jax.lax.stop_gradient(mask)
  # Inserting zeros moves output position i to input position i * s - low, the
  # first of its window. On a CPU, the maximum over rows and then columns is
  # several times faster than reduce_window.
  mask = jax.lax.pad(
    mask,
    jnp.zeros((), mask.dtype),
    (
      (0, 0, 0),
      *(
        (k - 1 - p, n + p - (m - 1) * s - 1, s - 1)
        for n, m, p in zip(size, mask.shape[1:], low, strict=True)
      ),
    ),
  )
  if k == 1:
    return mask
  rows = [mask[:, i : i + size[0]] for i in range(k)]
  mask = functools.reduce(jnp.maximum, rows)
  columns = [mask[:, :, i : i + size[1]] for i in range(k)]
  return functools.reduce(jnp.maximum, columns)


def has_values(array: jax.Array) -> bool:
  """Returns whether an array is neither traced nor abstract."""
  known = isinstance(array, np.ndarray | jax.Array)
  return known and not isinstance(array, jax.core.Tracer)


def resize_nearest(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Resizes [..., h, w] to [..., H, W] by nearest neighbor.

  Pixel i of H takes the value of the cell that contains its center,
  (i + 1/2) h / H. Integer arithmetic keeps this exact for all sizes.

  Args:
    values: [..., h, w].
    shape: (H, W).
  """
  rows, columns = (
    (2 * np.arange(out) + 1) * size // (2 * out)
    for size, out in zip(values.shape[-2:], shape, strict=True)
  )
  return values[..., rows[:, None], columns]


def executed_fractions(
  masks: Sequence[ExecutionMask],
) -> tuple[jax.Array, jax.Array]:
  """Returns the executed fractions of the masked layers' dense MACs in a batch.

  Args:
    masks: one mask per gated block.

  Returns:
    network: float32 scalar, executed fraction of all masked layers.
    blocks: float32[blocks], executed fraction of each block.
  """
  executed = jnp.stack([jnp.mean(mask.executed_macs()) for mask in masks])
  dense = jnp.array([mask.dense_macs() for mask in masks], jnp.float32)
  return jnp.sum(executed) / jnp.sum(dense), executed / dense


def check_scores(masks: Sequence[ExecutionMask], need: str) -> None:
  """Raises ValueError unless there are masks and each has a score.

  Args:
    masks: one mask per gated block.
    need: start of the message, which says what needs the scores.
  """
  without = [mask.name for mask in masks if mask.score is None]
  if without or not masks:
    raise ValueError(f'{need}; got {without or "none"}')
