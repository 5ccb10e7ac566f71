"""Residual blocks whose branch is executed where a mask says so."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.gating.mask import ExecutionMask, MaskedLayer, dilate
from dynconv_jax.models.layers import BatchNorm, conv


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
    gate: makes the module that decides where the branch is executed, given
      (in_features, strides); None executes it everywhere.
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
    gate: Callable[[int, int], nnx.Module] | None,
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
    self.masker = nnx.data(None) if gate is None else gate(in_features, strides)

  def branch(self, x: jax.Array) -> jax.Array:
    """Returns float[N, h, w, planes * expansion] before mask and shortcut."""
    raise NotImplementedError

  def execution_mask(self, hard: jax.Array, x: jax.Array) -> ExecutionMask:
    """Returns what `hard`, float32[N, h, w], means for the input x."""
    raise NotImplementedError

  def shortcut(self, x: jax.Array) -> jax.Array:
    """Returns the identity, or its projection, float[N, h, w, features]."""
    if self.downsample is None:
      return x
    projection, norm = self.downsample
    return norm(projection(x))

  def __call__(
    self, x: jax.Array, mask: jax.Array | None = None, **gate_kwargs
  ) -> tuple[jax.Array, ExecutionMask | None]:
    """Returns the block's output and its execution mask.

    Args:
      x: float[N, H, W, in_features].
      mask: float32[N, h, w] of {0, 1} to obey instead of the gate's decision.
      **gate_kwargs: passed to the gate.

    Raises:
      ValueError: the given mask is not of the output's resolution.
    """
    branch = self.branch(x)
    if mask is not None and mask.shape != branch.shape[:3]:
      raise ValueError(
        f'the mask of {self.name} must be {branch.shape[:3]}; got {mask.shape}'
      )
    if mask is None and self.masker is not None:
      mask = self.masker(x, **gate_kwargs)
    if mask is None:
      return nnx.relu(self.shortcut(x) + branch), None
    branch = branch * mask[..., None].astype(branch.dtype)
    return nnx.relu(self.shortcut(x) + branch), self.execution_mask(mask, x)


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

  def execution_mask(self, hard, x):
    del x
    return ExecutionMask(
      hard=hard,
      dilated=dilate(hard),
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

  def execution_mask(self, hard, x):
    dilated = dilate(hard, self.strides)
    return ExecutionMask(
      hard=hard,
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
