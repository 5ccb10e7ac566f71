"""ResNets for ImageNet and CIFAR, with gated residual blocks."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.layers import BatchNorm, MaxPool, conv
from dynconv_jax.masks import ExecutionMask
from dynconv_jax.methods.gate import GateSite, MakeGate
from dynconv_jax.models.blocks import BasicBlock, Bottleneck
from dynconv_jax.models.gated import (
  DropPath,
  GatedBlock,
  Gating,
  Masks,
  drop_rate,
)


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A ResNet, as data; calling it creates the network.

  Attributes:
    block: the residual block.
    depths: number of blocks of each stage.
    width: channels of the stem. Each stage after the first doubles the width.
    stem: 'imagenet' (7x7 with stride 2, max pooling) or 'cifar' (3x3).
  """

  block: type[BasicBlock]
  depths: tuple[int, ...]
  width: int = 64
  stem: str = 'imagenet'

  @property
  def total_stride(self) -> int:
    """Number of input pixels per position of the last map, along one side."""
    return 2 ** (len(self.depths) - 1) * (4 if self.stem == 'imagenet' else 1)

  @property
  def min_image_size(self) -> int:
    """Side of the smallest input; its last map is 2x2."""
    return 2 * self.total_stride

  def __call__(
    self,
    *,
    num_classes: int,
    gate: MakeGate,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    width_multiplier: float = 1.0,
    drop_path: DropPath = 0.0,
  ) -> ResNet:
    """Returns a freshly initialized network; see `ResNet`.

    Raises:
      ValueError: the width multiplier leaves no channels.
    """
    if int(self.width * width_multiplier) < 1:
      raise ValueError(
        'width_multiplier must leave the stem a channel, at least '
        f'{1 / self.width}; got {width_multiplier}'
      )
    return ResNet(
      self,
      num_classes=num_classes,
      width_multiplier=width_multiplier,
      gate=gate,
      dtype=dtype,
      rngs=rngs,
      drop_path=drop_path,
    )


def _cifar(depth: int) -> Architecture:
  return Architecture(BasicBlock, ((depth - 2) // 6,) * 3, 16, 'cifar')


# He et al., CVPR 2016, table 1 and section 4.2.
ARCHITECTURES = {
  'resnet18': Architecture(BasicBlock, (2, 2, 2, 2)),
  'resnet34': Architecture(BasicBlock, (3, 4, 6, 3)),
  'resnet50': Architecture(Bottleneck, (3, 4, 6, 3)),
  'resnet101': Architecture(Bottleneck, (3, 4, 23, 3)),
  'resnet152': Architecture(Bottleneck, (3, 8, 36, 3)),
  **{f'cifar_resnet{d}': _cifar(d) for d in (8, 14, 20, 26, 32, 44, 56, 110)},
}
TITLES = {'resnet': 'ResNet', 'cifar_resnet': 'CIFAR ResNet'}
TITLES |= {
  f'{family}{depth}': f'{TITLES[family]}-{depth}'
  for family, depth in (
    re.split(r'(?=\d)', n, maxsplit=1) for n in ARCHITECTURES
  )
}


class ResNet(nnx.Module):
  """A ResNet with optional gates.

  He et al., CVPR 2016, in torchvision's form. Modules have torchvision's names.

  Args:
    architecture: depths, width, block, and stem.
    num_classes: number of outputs.
    width_multiplier: scales the channels of stem and stages, rounded down.
    gate: returns the gate of a site, or None.
    dtype: compute dtype; parameters, masks, and logits are float32.
    rngs: random streams; uses `params`.
    drop_path: stochastic depth in training, see `drop_rate`.
  """

  # Pairs that a sparse network folds into one convolution.
  foldable = (('conv1', 'bn1'),)

  def __init__(
    self,
    architecture: Architecture,
    *,
    num_classes: int,
    width_multiplier: float,
    gate: MakeGate = lambda site: None,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    drop_path: float = 0.0,
  ):
    self.architecture = architecture
    self.dtype = dtype
    width = int(architecture.width * width_multiplier)
    if architecture.stem == 'imagenet':
      self.conv1 = conv(3, width, 7, strides=2, dtype=dtype, rngs=rngs)
    else:
      self.conv1 = conv(3, width, 3, dtype=dtype, rngs=rngs)
    self.bn1 = BatchNorm(width, activation='relu', rngs=rngs)
    self.maxpool = nnx.data(
      MaxPool() if architecture.stem == 'imagenet' else None
    )
    in_features, index, total = width, 0, sum(architecture.depths)
    for stage, depth in enumerate(architecture.depths):
      planes = int(architecture.width * 2**stage * width_multiplier)
      blocks = nnx.List([])
      for i in range(depth):
        strides = 2 if stage > 0 and i == 0 else 1
        features = planes * architecture.block.expansion
        site = GateSite(
          name=f'layer{stage + 1}.{i}',
          index=index,
          stage=stage,
          stage_index=i,
          in_features=in_features,
          strides=strides,
          identity=strides == 1 and in_features == features,
        )
        blocks.append(
          architecture.block(
            in_features,
            planes,
            strides,
            name=site.name,
            stage=stage,
            gate=gate(site),
            input_activated=True,
            drop_rate=drop_rate(drop_path, index, total),
            dtype=dtype,
            rngs=rngs,
          )
        )
        in_features, index = features, index + 1
      setattr(self, f'layer{stage + 1}', blocks)
    bound = in_features**-0.5  # PyTorch's default for linear layers.
    self.fc = nnx.Linear(
      in_features,
      num_classes,
      dtype=jnp.float32,
      kernel_init=nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform'),
      bias_init=lambda key, shape, dtype: jax.random.uniform(
        key, shape, dtype, -bound, bound
      ),
      rngs=rngs,
    )

  @property
  def stages(self) -> list[nnx.List]:
    """The residual blocks of each stage, in network order."""
    depths = self.architecture.depths
    return [getattr(self, f'layer{s + 1}') for s in range(len(depths))]

  @property
  def blocks(self) -> list[GatedBlock]:
    """The residual blocks in network order."""
    return [block for stage in self.stages for block in stage]

  def stem(self, images: jax.Array, gating: Gating | None = None) -> jax.Array:
    """Returns the input of the first block, float[N, H, W, width].

    Args:
      images: float[N, H, W, 3].
      gating: of this forward pass; that of a sparse network may use it.
    """
    del gating
    x = self.bn1(self.conv1(images.astype(self.dtype)))
    return x if self.maxpool is None else self.maxpool(x)

  # A foldable convolution and pooling, which is all that it computes.
  stem.layers = ('conv1', 'maxpool')

  def head(self, x: jax.Array) -> jax.Array:
    """Returns float32[N, num_classes] logits for the last block's output."""
    return self.fc(jnp.mean(x.astype(jnp.float32), axis=(1, 2)))

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
        training with stochastic depth.
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
    x = self.stem(images, gating)
    for stage in self.stages:
      for block in stage:
        x = block(x, gating)
      x = gating.end_stage(x)
    return self.head(x), gating.finish()
