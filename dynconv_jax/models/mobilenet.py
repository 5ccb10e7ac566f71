"""MobileNetV2, and the base class of other inverted-residual networks."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.branch import PADDINGS
from dynconv_jax.checks import check_choice
from dynconv_jax.layers import BatchNorm, Dropout, conv
from dynconv_jax.masks import ExecutionMask
from dynconv_jax.methods.gate import GateSite, MakeGate
from dynconv_jax.models.blocks import InvertedResidual
from dynconv_jax.models.gated import DropPath, Gating, Masks, drop_rate

# Choices of the blocks that a method may gate.
GATED_BLOCKS = ('identity', 'all')
# Batch norm constants by padding: those of PyTorch, and those of TensorFlow's
# EfficientNets, which timm and other ports use too.
_NORMS = {
  'symmetric': {'epsilon': 1e-5, 'momentum': 0.9},
  'same': {'epsilon': 1e-3, 'momentum': 0.99},
}
_STEM, _HEAD = 32, 1280


class Stage(NamedTuple):
  """A sequence of blocks; only the first one is strided.

  Attributes:
    expand_ratio: expansion ratio of each block.
    features: channels of the output, before scaling.
    depth: number of blocks, before scaling.
    strides: stride of the first block.
    kernel_size: kernel size of the depthwise convolutions.
  """

  expand_ratio: int
  features: int
  depth: int
  strides: int
  kernel_size: int = 3


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A network of inverted residuals, as data; calling it creates the network.

  Attributes:
    stages: the stages, before scaling.
    width: scales the channels, which `make_divisible` rounds.
    depth: scales the number of blocks, rounded up.
    fixed_ends: whether scaling leaves unchanged the channels of stem and head
      and the depths of the first and last stages.
    image_size: side of the images that the network is designed for.
    dropout: dropout rate before the classifier, in training.
  """

  stages: tuple[Stage, ...]
  width: float = 1.0
  depth: float = 1.0
  fixed_ends: bool = False
  image_size: int = 224
  dropout: float = 0.2

  @property
  def depths(self) -> tuple[int, ...]:
    """Number of blocks of each stage."""
    last = len(self.stages) - 1
    return tuple(
      stage.depth
      if self.fixed_ends and i in (0, last)
      else math.ceil(self.depth * stage.depth)
      for i, stage in enumerate(self.stages)
    )

  @property
  def total_stride(self) -> int:
    """Number of input pixels per position of the last map, along one side."""
    return 2 * math.prod(stage.strides for stage in self.stages)

  @property
  def min_image_size(self) -> int:
    """Side of the smallest input; its last map is 2x2."""
    return 2 * self.total_stride

  def ends(self, width: float) -> tuple[int, int]:
    """Returns the channels of stem and head.

    Args:
      width: scale of the channels, ignored with `fixed_ends`.
    """
    if self.fixed_ends:
      return _STEM, _HEAD
    return make_divisible(_STEM * width), make_divisible(_HEAD * max(1, width))

  def __call__(
    self,
    *,
    num_classes: int,
    gate: MakeGate,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    width_multiplier: float = 1.0,
    gated_blocks: str = 'identity',
    padding: str = 'symmetric',
    drop_path: DropPath = 0.0,
  ) -> MobileNet:
    """Returns a freshly initialized network; see `MobileNet`."""
    return MobileNet(
      self,
      num_classes=num_classes,
      gate=gate,
      dtype=dtype,
      rngs=rngs,
      width_multiplier=width_multiplier,
      gated_blocks=gated_blocks,
      padding=padding,
      drop_path=drop_path,
    )


# Sandler et al., CVPR 2018, table 2.
mobilenet_v2 = Architecture(
  (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
  )
)
ARCHITECTURES = {'mobilenet_v2': mobilenet_v2}
TITLES = {'mobilenet_v2': 'MobileNetV2'}


def make_divisible(features: float, divisor: int = 8) -> int:
  """Returns a number of channels, rounded as in torchvision and TensorFlow.

  Rounds to the nearest multiple of the divisor, or to the next one if that is
  below 90 % of `features`.

  Args:
    features: number of channels, > 0.
    divisor: divisor of the result.
  """
  rounded = max(divisor, int(features + divisor / 2) // divisor * divisor)
  return rounded + divisor if rounded < 0.9 * features else rounded


class MobileNet(nnx.Module):
  """A network of inverted residuals with optional gates.

  Modules have timm's names.

  Args:
    architecture: stages and scaling.
    num_classes: number of outputs of the classifier.
    gate: returns the gate of a site, or None.
    dtype: compute dtype; parameters, masks, and logits are float32.
    rngs: random streams; uses `params`.
    width_multiplier: additional scale of the channels.
    gated_blocks: the blocks that may have a gate: 'identity' for those with an
      identity shortcut, or 'all'. Without a shortcut, inactive positions are
      zero.
    padding: padding of convolutions, with the matching batch norm constants.
      'symmetric' is PyTorch's, with epsilon 1e-5; use it for the weights of
      torchvision and of timm's `mobilenetv2_*` and `efficientnet_lite0`. 'same'
      is TensorFlow's, with epsilon 1e-3; use it for the weights of timm's
      `tf_efficientnet_lite*` and of the package `efficientnet-lite-pytorch`.
    drop_path: stochastic depth in training, see `drop_rate`.

  Raises:
    ValueError: `padding` or `gated_blocks` is unknown.
  """

  # Pairs that a sparse network folds into one convolution.
  foldable = (('conv_stem', 'bn1'), ('conv_head', 'bn2'))

  def __init__(
    self,
    architecture: Architecture,
    *,
    num_classes: int,
    gate: MakeGate = lambda site: None,
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
    width_multiplier: float = 1.0,
    gated_blocks: str = 'identity',
    padding: str = 'symmetric',
    drop_path: float = 0.0,
  ):
    check_choice('gated_blocks', gated_blocks, GATED_BLOCKS)
    check_choice('padding', padding, PADDINGS)
    self.architecture = architecture
    self.padding = padding
    self.dtype = dtype
    norm = functools.partial(BatchNorm, **_NORMS[padding])
    width = architecture.width * width_multiplier
    stem, head = architecture.ends(width)
    self.conv_stem = conv(
      3, stem, 3, strides=2, padding=padding, dtype=dtype, rngs=rngs
    )
    self.bn1 = norm(stem, activation='relu6', rngs=rngs)
    total = sum(architecture.depths)
    in_features, index = stem, 0
    self.blocks = nnx.List([])
    for stage, depth in enumerate(architecture.depths):
      expand_ratio, planes, _, first_strides, k = architecture.stages[stage]
      features = make_divisible(planes * width)
      blocks = nnx.List([])
      for i in range(depth):
        strides = first_strides if i == 0 else 1
        site = GateSite(
          name=f'blocks.{stage}.{i}',
          index=index,
          stage=stage,
          stage_index=i,
          in_features=in_features,
          strides=strides,
          identity=strides == 1 and in_features == features,
        )
        offered = site.identity or gated_blocks == 'all'
        blocks.append(
          InvertedResidual(
            in_features,
            features,
            strides,
            expand_ratio=expand_ratio,
            kernel_size=k,
            padding=padding,
            name=site.name,
            stage=stage,
            gate=gate(site) if offered else None,
            norm=norm,
            drop_rate=drop_rate(drop_path, index, total),
            dtype=dtype,
            rngs=rngs,
          )
        )
        in_features, index = features, index + 1
      self.blocks.append(blocks)
    self.conv_head = conv(in_features, head, 1, dtype=dtype, rngs=rngs)
    self.bn2 = norm(head, activation='relu6', rngs=rngs)
    self.dropout = Dropout(architecture.dropout)
    self.classifier = nnx.Linear(
      head,
      num_classes,
      dtype=jnp.float32,
      kernel_init=nnx.initializers.normal(0.01),  # As in torchvision.
      rngs=rngs,
    )

  def __call__(
    self,
    images: jax.Array,
    *,
    rngs: nnx.Rngs | None = None,
    temperature: float | jax.Array = 1.0,
    gumbel_noise: bool | jax.Array = True,
    masks: Masks | None = None,
  ) -> tuple[jax.Array, list[ExecutionMask]]:
    """Returns logits and the execution masks of the gated blocks.

    Args:
      images: float[N, H, W, 3], normalized.
      rngs: random streams: `gumbel` for gates that sample, and `dropout` in
        training.
      temperature: temperature of the gates' Gumbel-softmax, > 0.
      gumbel_noise: whether gates add noise in training.
      masks: [N, h, w] of {0, 1}, one per block in network order or by block
        name, to use instead of the gates' decisions; see `Gating`.

    Returns:
      logits: float32[N, num_classes].
      masks: one ExecutionMask per gated block, in network order.
    """
    gating = Gating(
      rngs=rngs,
      temperature=temperature,
      gumbel_noise=gumbel_noise,
      masks=masks,
    )
    x = self.bn1(self.conv_stem(images.astype(self.dtype)))
    for stage in self.blocks:
      for block in stage:
        x = block(x, gating)
      x = gating.end_stage(x)
    x = self.bn2(self.conv_head(x))
    x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    return self.classifier(self.dropout(x, rngs=rngs)), gating.finish()
