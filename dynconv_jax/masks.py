"""Execution masks: where each gated block's branch is executed."""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class MaskedLayer:
  """One convolution that is executed only at the active positions of a mask.

  Attributes:
    name: the layer's path in the model, such as 'layer2.0.conv2'.
    macs_per_position: multiply-accumulates of one output position, in the
      `conv` convention (a bias counts one an output).
    dilated: whether the layer runs on the dilated mask.
  """

  name: str
  macs_per_position: int
  dilated: bool


@flax.struct.dataclass
class ExecutionMask:
  """Where one residual block's branch is executed, per image and position.

  Attributes:
    hard: float32[N, h, w] of {0, 1} at the block's output resolution, 1 where
      the branch is executed. Carries the straight-through gradient in training.
    dilated: float32[N, H, W] of {0, 1}, where the branch's first convolution
      is executed: at input resolution in a bottleneck (H = h * stride), at
      output resolution in a basic block.
    name: the block's path in the model, such as 'layer2.0'.
    layers: the masked convolutions of the block, in order of execution.
    score: float32[N, h, w] that the decision was made from, where a loss needs
      it (see `gate.Decision`), or None.
  """

  hard: jax.Array
  dilated: jax.Array
  name: str = flax.struct.field(pytree_node=False)
  layers: tuple[MaskedLayer, ...] = flax.struct.field(pytree_node=False)
  score: jax.Array | None = None

  def executed_macs(self) -> jax.Array:
    """Returns float32[N]: MACs of the masked layers at active positions."""
    hard = jnp.sum(self.hard, axis=(1, 2))
    dilated = jnp.sum(self.dilated, axis=(1, 2))
    return sum(
      layer.macs_per_position * (dilated if layer.dilated else hard)
      for layer in self.layers
    )

  def dense_macs(self) -> int:
    """Returns the MACs of the masked layers for one image, mask all ones."""
    hard = int(np.prod(self.hard.shape[1:]))
    dilated = int(np.prod(self.dilated.shape[1:]))
    return sum(
      layer.macs_per_position * (dilated if layer.dilated else hard)
      for layer in self.layers
    )

  def density(self) -> jax.Array:
    """Returns float32[N]: share of active positions of `hard`."""
    return jnp.mean(self.hard, axis=(1, 2))


def dilate(mask: jax.Array, strides: int = 1) -> jax.Array:
  """Returns where a 3x3 convolution's inputs are needed, without gradient.

  A padded 3x3 convolution of stride s that is evaluated at the positions of
  `mask` reads its input at these positions (Verelst and Tuytelaars, CVPR 2020,
  section 3.3). As in the authors' code no gradient passes the dilation.

  Args:
    mask: float[N, h, w] of {0, 1} at the convolution's output resolution.
    strides: s of that convolution.

  Returns:
    float[N, h * s, w * s] of {0, 1}. Where the input is one row or column
    shorter (odd sizes), slice it.
  """
  # Zero-stuffing by s puts output position i at input position i * s, the
  # centre of its 3x3 window under padding 1. The maximum is taken by rows and
  # by columns: on a CPU several times faster than a reduce_window.
  around = (1, strides, strides - 1)
  mask = jax.lax.pad(
    jax.lax.stop_gradient(mask), 0.0, ((0, 0, 0), around, around)
  )
  height, width = (size - 2 for size in mask.shape[1:])
  rows = [mask[:, i : i + height] for i in range(3)]
  mask = functools.reduce(jnp.maximum, rows)
  columns = [mask[:, :, i : i + width] for i in range(3)]
  return functools.reduce(jnp.maximum, columns)


def resize_nearest(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Returns [..., H, W]: the nearest of [..., h, w] at each of H x W pixels.

  Pixel i of H takes the value whose cell holds its centre, (i + 1/2) h / H, in
  integers: sizes need not divide each other.

  Args:
    values: [..., h, w].
    shape: (H, W).
  """
  rows, columns = (
    (2 * np.arange(out) + 1) * size // (2 * out)
    for size, out in zip(values.shape[-2:], shape, strict=True)
  )
  return values[..., rows[:, None], columns]
