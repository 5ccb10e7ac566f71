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
  changes.

  Args:
    in_features: channels of the input.
    planes: channels of the 3x3 convolutions.
    strides: stride of the block.
    name: path in the model, such as 'layer2.0'.
    stage: the number of its stage.
    gate: decides where the branch is executed; None: everywhere.
    input_activated: whether a ReLU is before the block, which then leaves what
      it does not execute untouched. A ResNet's blocks follow each other so.
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
    input_activated: bool = False,
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    features = planes * self.expansion
    same = strides == 1 and in_features == features
    super().__init__(
      Branch(
        self.describe(in_features, planes, strides),
        shortcut='identity' if same else 'projection',
        input_activated=input_activated,
      ),
      name=name,
      stage=stage,
      gate=gate,
      dtype=dtype,
      rngs=rngs,
    )

  @classmethod
  def describe(
    cls, in_features: int, planes: int, strides: int
  ) -> tuple[Conv, ...]:
    """Returns the convolutions of the branch."""
    return (
      Conv('conv1', 'bn1', in_features, planes, 3, strides, 1, 'relu'),
      Conv('conv2', 'bn2', planes, planes, 3),
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
    return (
      Conv('conv1', 'bn1', in_features, planes, activation='relu'),
      Conv('conv2', 'bn2', planes, planes, 3, strides, 1, 'relu'),
      Conv('conv3', 'bn3', planes, features),
    )
