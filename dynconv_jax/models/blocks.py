"""Residual blocks whose branch is executed where a mask says so."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.layers.layers import BatchNorm, conv
from dynconv_jax.masks import ExecutionMask, MaskedLayer, dilate
from dynconv_jax.methods.gate import Decision, Gate


class Block(nnx.Module):
  """`relu(shortcut(x) + mask * branch(x))`; subclasses give the branch.

  The shortcut is always executed. The branch is computed densely and
  multiplied by the mask after its last batch norm, so batch statistics include
  the positions that are masked out (Verelst and Tuytelaars, CVPR 2020,
  section 3.3 and the authors' code).

  Args:
    in_features: channels of the input.
    planes: channels of the block's 3x3 convolutions.
    strides: stride of the block.
    name: path in the model, such as 'layer2.0'.
    gate: decides where the branch is executed; None: everywhere.
    dtype: compute dtype.
    rngs: stream `params`.
  """

  expansion: int

  def __init__(
    self,
    in_features: int,
    planes: int,
    strides: int,
    *,
    name: str,
    gate: Gate | None,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
  ):
    out_features = planes * self.expansion
    self.name = name
    self.strides = strides
    self.downsample = nnx.data(None)
    if strides != 1 or in_features != out_features:
      self.downsample = nnx.List(
        [
          conv(
            in_features,
            out_features,
            1,
            strides=strides,
            dtype=dtype,
            rngs=rngs,
          ),
          BatchNorm(out_features, rngs=rngs),
        ]
      )
    self.masker = nnx.data(gate)

  def branch(self, x: jax.Array) -> jax.Array:
    """Returns float[N, h, w, planes * expansion] before mask and shortcut."""
    raise NotImplementedError

  def execution_mask(self, decision: Decision, x: jax.Array) -> ExecutionMask:
    """Returns what a decision at output resolution means for the input x."""
    raise NotImplementedError

  def shortcut(self, x: jax.Array) -> jax.Array:
    """Returns the identity, or its projection, float[N, h, w, features]."""
    if self.downsample is None:
      return x
    projection, norm = self.downsample
    return norm(projection(x))

  def decide(
    self,
    x: jax.Array,
    carry: Any = None,
    hard: jax.Array | None = None,
    **gate_kwargs,
  ) -> tuple[ExecutionMask | None, Any]:
    """Returns where the branch is executed, None for everywhere.

    Args:
      x: float[N, H, W, in_features], the block's input.
      carry: what the gate before returned beside its decision.
      hard: float32[N, h, w] of {0, 1} to obey; the gate is not asked then.
      **gate_kwargs: passed to the gate.

    Returns:
      The execution mask, and what later gates need.

    Raises:
      ValueError: the given mask is not of the output's resolution.
    """
    shape = (x.shape[0], *(-(-n // self.strides) for n in x.shape[1:3]))
    if hard is not None:
      if hard.shape != shape:
        raise ValueError(
          f'the mask of {self.name} must be {shape}; got {hard.shape}'
        )
      return self.execution_mask(Decision(hard), x), carry
    if self.masker is None:
      return None, carry
    decision, carry = self.masker(x, carry, **gate_kwargs)
    decision = jax.tree.map(lambda v: jnp.broadcast_to(v, shape), decision)
    return self.execution_mask(decision, x), carry

  def __call__(
    self, x: jax.Array, mask: ExecutionMask | None = None
  ) -> jax.Array:
    """Returns the block's output, float[N, h, w, features].

    Args:
      x: float[N, H, W, in_features].
      mask: where the branch is executed; None: everywhere.
    """
    shortcut, branch = self.shortcut(x), self.branch(x)
    if mask is None:
      return nnx.relu(shortcut + branch)
    hard = mask.hard[..., None].astype(branch.dtype)
    if self.masker is not None and self.masker.interpolates:
      executed, skipped = nnx.relu(shortcut + branch), nnx.relu(shortcut)
      return hard * executed + (1 - hard) * skipped
    return nnx.relu(shortcut + hard * branch)


class BasicBlock(Block):
  """Two 3x3 convolutions; the first on the dilated mask at output resolution.

  He et al., CVPR 2016, figure 5 left.
  """

  expansion = 1

  def __init__(self, in_features, planes, strides, *, dtype, rngs, **kwargs):
    super().__init__(
      in_features, planes, strides, dtype=dtype, rngs=rngs, **kwargs
    )
    self.conv1 = conv(
      in_features, planes, 3, strides=strides, dtype=dtype, rngs=rngs
    )
    self.bn1 = BatchNorm(planes, rngs=rngs)
    self.conv2 = conv(planes, planes, 3, dtype=dtype, rngs=rngs)
    self.bn2 = BatchNorm(planes, rngs=rngs)

  def branch(self, x):
    x = nnx.relu(self.bn1(self.conv1(x)))
    return self.bn2(self.conv2(x))

  def execution_mask(self, decision, x):
    del x
    return ExecutionMask(
      hard=decision.hard,
      dilated=dilate(decision.hard),
      score=decision.score,
      name=self.name,
      layers=(
        _masked(self, 'conv1', dilated=True),
        _masked(self, 'conv2', dilated=False),
      ),
    )


class Bottleneck(Block):
  """1x1, 3x3 (strided) and 1x1 convolutions; the first on the dilated mask.

  He et al., CVPR 2016, figure 5 right, with the stride in the 3x3 convolution
  as in torchvision: the first convolution runs at input resolution.
  """

  expansion = 4

  def __init__(self, in_features, planes, strides, *, dtype, rngs, **kwargs):
    super().__init__(
      in_features, planes, strides, dtype=dtype, rngs=rngs, **kwargs
    )
    features = planes * self.expansion
    self.conv1 = conv(in_features, planes, 1, dtype=dtype, rngs=rngs)
    self.bn1 = BatchNorm(planes, rngs=rngs)
    self.conv2 = conv(
      planes, planes, 3, strides=strides, dtype=dtype, rngs=rngs
    )
    self.bn2 = BatchNorm(planes, rngs=rngs)
    self.conv3 = conv(planes, features, 1, dtype=dtype, rngs=rngs)
    self.bn3 = BatchNorm(features, rngs=rngs)

  def branch(self, x):
    x = nnx.relu(self.bn1(self.conv1(x)))
    x = nnx.relu(self.bn2(self.conv2(x)))
    return self.bn3(self.conv3(x))

  def execution_mask(self, decision, x):
    dilated = dilate(decision.hard, self.strides)
    return ExecutionMask(
      hard=decision.hard,
      score=decision.score,
      dilated=dilated[:, : x.shape[1], : x.shape[2]],
      name=self.name,
      layers=(
        _masked(self, 'conv1', dilated=True),
        _masked(self, 'conv2', dilated=False),
        _masked(self, 'conv3', dilated=False),
      ),
    )


def _masked(block: Block, layer: str, *, dilated: bool) -> MaskedLayer:
  kernel = getattr(block, layer).kernel
  return MaskedLayer(
    name=f'{block.name}.{layer}',
    macs_per_position=kernel.size,
    dilated=dilated,
  )
