"""Execution masks: where each gated block's branch is executed."""

from __future__ import annotations

import dataclasses

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
  """

  hard: jax.Array
  dilated: jax.Array
  name: str = flax.struct.field(pytree_node=False)
  layers: tuple[MaskedLayer, ...] = flax.struct.field(pytree_node=False)

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
