"""The kinds of gated residual blocks."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from dynconv_jax.branch import Branch, Conv
from dynconv_jax.methods.gate import Gate
from dynconv_jax.models.gated import GatedBlock


class BasicBlock(GatedBlock):
  """Two 3x3 convolutions.

  He et al., CVPR 2016, figure 5 left. The shortcut is projected where the shape
  changes, and the input is taken as rectified.

  Args:
    in_features: channels of the input.
    planes: channels of the 3x3 convolutions.
    strides: stride of the block.
    name: path in the model, such as 'layer2.0'.
    stage: the number of its stage.
    gate: decides where the branch is executed; None: everywhere.
    dtype: compute dtype.
    rngs: stream `params`.
  """

  expansion = 1

  def __init__(
    self,
    in_features: int,
    planes: int,
    strides: int = 1,
    *,
    name: str,
    stage: int = 0,
    gate: Gate | None = None,
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      self.describe(in_features, planes, strides),
      name=name,
      stage=stage,
      gate=gate,
      dtype=dtype,
      rngs=rngs,
    )

  @classmethod
  def describe(cls, in_features: int, planes: int, strides: int) -> Branch:
    """Returns the branch of a block."""
    return Branch(
      (
        Conv('conv1', 'bn1', in_features, planes, 3, strides, 1, 'relu'),
        Conv('conv2', 'bn2', planes, planes, 3),
      ),
      input_activated=True,
    )


class Bottleneck(BasicBlock):
  """1x1, 3x3 (strided) and 1x1 convolutions.

  He et al., CVPR 2016, figure 5 right, with the stride in the 3x3 convolution
  as in torchvision: the first convolution runs at input resolution. Arguments
  are those of BasicBlock; the output has four times as many channels.
  """

  expansion = 4

  @classmethod
  def describe(cls, in_features, planes, strides):
    features = planes * cls.expansion
    return Branch(
      (
        Conv('conv1', 'bn1', in_features, planes, activation='relu'),
        Conv('conv2', 'bn2', planes, planes, 3, strides, 1, 'relu'),
        Conv('conv3', 'bn3', planes, features),
      ),
      input_activated=True,
    )
