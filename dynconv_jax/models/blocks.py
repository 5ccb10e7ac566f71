"""Gated residual blocks: basic, bottleneck, and inverted residual."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from dynconv_jax.branch import Branch, Conv
from dynconv_jax.layers import BatchNorm
from dynconv_jax.methods.gate import Gate
from dynconv_jax.models.gated import GatedBlock


class BasicBlock(GatedBlock):
  """Two 3x3 convolutions.

  He et al., CVPR 2016, figure 5 left. The shortcut is a projection if the shape
  changes.

  Args:
    in_features: channels of the input.
    planes: channels of the 3x3 convolutions.
    strides: stride of the block.
    name: path in the model, such as 'layer2.0'.
    stage: index of the block's stage.
    gate: decides where the branch runs; None for everywhere.
    input_activated: whether the block's input comes from a ReLU, as in ResNets.
      With an identity shortcut, inactive positions then keep their values.
    drop_rate: probability of dropping an image's branch in training.
    dtype: compute dtype.
    rngs: random streams; uses `params`.
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
    drop_rate: float = 0.0,
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
      drop_rate=drop_rate,
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
  """1x1, strided 3x3, and 1x1 convolutions.

  He et al., CVPR 2016, figure 5 right. As in torchvision, the 3x3 convolution
  has the stride, so the first convolution runs at input resolution. Takes the
  arguments of BasicBlock. The output has 4 * planes channels.
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


class InvertedResidual(GatedBlock):
  """1x1 expanding, k x k depthwise, and 1x1 linear convolutions.

  Sandler et al., CVPR 2018, figures 3 and 4. The first two are followed by
  ReLU6; the sum has no activation. The block has an identity shortcut if the
  shape does not change, and none otherwise. Modules have timm's names.

  Args:
    in_features: channels of the input.
    features: channels of the output.
    strides: stride of the depthwise convolution.
    expand_ratio: ratio of the depthwise convolution's channels to the input's.
      With 1, there is no expanding convolution.
    kernel_size: kernel size of the depthwise convolution, odd.
    padding: padding of the depthwise convolution, 'symmetric' or 'same'.
    name: path in the model, such as 'blocks.2.0'.
    stage: index of the block's stage.
    gate: decides where the branch runs; None for everywhere.
    norm: creates a batch norm.
    drop_rate: probability of dropping an image's branch in training; ignored if
      the block has no shortcut.
    dtype: compute dtype.
    rngs: random streams; uses `params`.
  """

  def __init__(
    self,
    in_features: int,
    features: int,
    strides: int = 1,
    *,
    expand_ratio: int = 6,
    kernel_size: int = 3,
    padding: str = 'symmetric',
    name: str,
    stage: int = 0,
    gate: Gate | None = None,
    norm: Callable[..., BatchNorm] = BatchNorm,
    drop_rate: float = 0.0,
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    width = in_features * expand_ratio
    depthwise = (width, width, kernel_size, strides, width, 'relu6', padding)
    if expand_ratio == 1:
      convs = (
        Conv('conv_dw', 'bn1', *depthwise),
        Conv('conv_pw', 'bn2', width, features),
      )
    else:
      convs = (
        Conv('conv_pw', 'bn1', in_features, width, activation='relu6'),
        Conv('conv_dw', 'bn2', *depthwise),
        Conv('conv_pwl', 'bn3', width, features),
      )
    same = strides == 1 and in_features == features
    super().__init__(
      Branch(convs, activation=None, shortcut='identity' if same else 'none'),
      name=name,
      stage=stage,
      gate=gate,
      norm=norm,
      drop_rate=drop_rate if same else 0.0,
      dtype=dtype,
      rngs=rngs,
    )
