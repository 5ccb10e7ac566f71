"""ResNets for ImageNet-like and CIFAR images, with gated residual blocks."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dynconv_jax.gating.mask import ExecutionMask
from dynconv_jax.gating.mask_unit import MaskUnit
from dynconv_jax.models.blocks import BasicBlock, Block, Bottleneck
from dynconv_jax.models.layers import (
  BatchNorm,
  conv,
  conv_general_dilated,
  max_pool,
)


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What tells one ResNet from another.

  Attributes:
    block: the residual block.
    depths: blocks a stage.
    width: channels of the stem; a stage doubles them.
    stem: 'imagenet' (7x7 stride 2, max-pool) or 'cifar' (3x3).
  """

  block: type[Block]
  depths: tuple[int, ...]
  width: int = 64
  stem: str = 'imagenet'

  @property
  def total_stride(self) -> int:
    """Input pixels a position of the last map, along one side."""
    return 2 ** (len(self.depths) - 1) * (4 if self.stem == 'imagenet' else 1)


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
METHODS = ('dense', 'dynconv')


class ResNet(nnx.Module):
  """A ResNet; each block's gate, where it has one, gives an execution mask.

  He et al., CVPR 2016, in torchvision's form; modules bear torchvision's names.

  Args:
    architecture: depths, width, block and stem.
    num_classes: outputs of the head.
    width_multiplier: scales stem and stages, as int(width * multiplier).
    gate: makes a block's gate, given (in_features, strides); None: no gates.
    dtype: compute dtype; parameters, masks and logits are float32.
    rngs: stream `params`.
  """

  def __init__(
    self,
    architecture: Architecture,
    *,
    num_classes: int,
    width_multiplier: float,
    gate: Callable[[int, int], nnx.Module] | None,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
  ):
    self.architecture = architecture
    self.dtype = dtype
    width = int(architecture.width * width_multiplier)
    if architecture.stem == 'imagenet':
      self.conv1 = conv(3, width, 7, strides=2, dtype=dtype, rngs=rngs)
    else:
      self.conv1 = conv(3, width, 3, dtype=dtype, rngs=rngs)
    self.bn1 = BatchNorm(width, rngs=rngs)
    in_features = width
    for stage, depth in enumerate(architecture.depths):
      planes = int(architecture.width * 2**stage * width_multiplier)
      blocks = nnx.List([])
      for i in range(depth):
        blocks.append(
          architecture.block(
            in_features,
            planes,
            2 if stage > 0 and i == 0 else 1,
            name=f'layer{stage + 1}.{i}',
            gate=gate,
            dtype=dtype,
            rngs=rngs,
          )
        )
        in_features = planes * architecture.block.expansion
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
  def blocks(self) -> list[Block]:
    """The residual blocks in network order."""
    stages = range(1, len(self.architecture.depths) + 1)
    return [block for s in stages for block in getattr(self, f'layer{s}')]

  def __call__(
    self,
    images: jax.Array,
    *,
    rngs: nnx.Rngs | None = None,
    temperature: float | jax.Array = 1.0,
    gumbel_noise: bool | jax.Array = True,
    masks: Sequence[jax.Array] | None = None,
  ) -> tuple[jax.Array, list[ExecutionMask]]:
    """Returns logits and the execution masks of the gated blocks.

    Args:
      images: float[N, H, W, 3], normalised.
      rngs: stream `gumbel`, for gates that sample.
      temperature: of the gates' Gumbel-softmax, > 0.
      gumbel_noise: whether the gates add noise in training.
      masks: float32[N, h, w] of {0, 1}, one a block in network order, to obey
        instead of the gates' decisions.

    Returns:
      logits: float32[N, num_classes].
      masks: one ExecutionMask a gated block, in network order; none if dense.
    """
    blocks = self.blocks
    if masks is not None and len(masks) != len(blocks):
      raise ValueError(
        f'masks must be one a block, {len(blocks)}; got {len(masks)}'
      )
    x = images.astype(self.dtype)
    x = nnx.relu(self.bn1(self.conv1(x)))
    if self.architecture.stem == 'imagenet':
      x = max_pool(x)
    executed = []
    for block, mask in zip(blocks, masks or [None] * len(blocks), strict=True):
      x, execution_mask = block(
        x,
        mask,
        rngs=rngs,
        temperature=temperature,
        gumbel_noise=gumbel_noise,
      )
      if execution_mask is not None:
        executed.append(execution_mask)
    features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    return self.fc(features), executed

  def set_view(self, deterministic: bool | None = None):
    """Class method used by ``nnx.view``.

    A network without gates takes part too, so that one view serves all.

    Args:
      deterministic: passed on to the gates by ``nnx.view`` itself.
    """


def create_model(
  name: str,
  *,
  method: str = 'dense',
  num_classes: int = 1000,
  width_multiplier: float = 1.0,
  mask_kernel_size: int = 3,
  dtype: jnp.dtype = jnp.float32,
  rngs: nnx.Rngs,
) -> ResNet:
  """Returns a freshly initialised network.

  Args:
    name: a key of ARCHITECTURES, such as 'resnet50' or 'cifar_resnet32'.
    method: 'dense' or 'dynconv'.
    num_classes: outputs of the head, at least 1.
    width_multiplier: scales the channels of stem and stages, > 0.
    mask_kernel_size: of DynConv's mask units, 3 or 1.
    dtype: compute dtype, float32 or bfloat16.
    rngs: stream `params`.

  Raises:
    ValueError: an unknown name or method, or a value out of range.
  """
  check_choice('model', name, ARCHITECTURES)
  check_choice('method', method, METHODS)
  architecture = ARCHITECTURES[name]
  if num_classes < 1:
    raise ValueError(f'num_classes must be at least 1; got {num_classes}')
  if int(architecture.width * width_multiplier) < 1:
    raise ValueError(
      'width_multiplier must leave the stem a channel, at least '
      f'{1 / architecture.width}; got {width_multiplier}'
    )
  if mask_kernel_size not in (1, 3):
    raise ValueError(f'mask_kernel_size must be 1 or 3; got {mask_kernel_size}')
  gate = None
  if method == 'dynconv':

    def gate(in_features, strides):
      return MaskUnit(
        in_features,
        strides=strides,
        kernel_size=mask_kernel_size,
        conv_general_dilated=conv_general_dilated,
        rngs=rngs,
      )

  return ResNet(
    architecture,
    num_classes=num_classes,
    width_multiplier=width_multiplier,
    gate=gate,
    dtype=dtype,
    rngs=rngs,
  )


def check_image_size(name: str, image_size: int) -> None:
  """Raises ValueError where the last stage would have no 2x2 map."""
  least = 2 * ARCHITECTURES[name].total_stride
  if image_size < least:
    raise ValueError(
      f'image_size must be at least {least} for {name}, whose total stride is '
      f'{least // 2}; got {image_size}'
    )


def check_choice(what: str, given: str, allowed: Sequence[str]) -> None:
  """Raises ValueError naming what is allowed unless `given` is."""
  if given in allowed:
    return
  near = difflib.get_close_matches(str(given), allowed, n=1)
  hint = f' (did you mean {near[0]!r}?)' if near else ''
  raise ValueError(
    f'unknown {what} {given!r}{hint}; allowed: {", ".join(allowed)}'
  )
