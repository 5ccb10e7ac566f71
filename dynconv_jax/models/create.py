"""Makes the network of an architecture and a method."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from dynconv_jax.layers import BatchNorm, conv, conv_general_dilated
from dynconv_jax.methods.convnet_aig import LayerGate
from dynconv_jax.methods.dynconv import MaskUnit
from dynconv_jax.methods.sact import HaltingUnit
from dynconv_jax.methods.skipnet import (
  SKIP_GATES,
  SKIP_TRAININGS,
  create_skip_gate,
)
from dynconv_jax.models.resnet import ARCHITECTURES, ResNet, check_choice

METHODS = ('dense', 'dynconv', 'convnet_aig', 'skipnet', 'sact', 'act')


def create_model(
  name: str,
  *,
  method: str = 'dense',
  num_classes: int = 1000,
  width_multiplier: float = 1.0,
  mask_kernel_size: int = 3,
  mask_granularity: Sequence[int] = (1,),
  target_rates: Sequence[float] | None = None,
  skip_gate: str = 'recurrent',
  skip_training: str = 'supervised',
  dtype: jnp.dtype = jnp.float32,
  rngs: nnx.Rngs,
) -> ResNet:
  """Returns a freshly initialised network.

  Args:
    name: a key of ARCHITECTURES, such as 'resnet50' or 'cifar_resnet32'.
    method: one of METHODS.
    num_classes: outputs of the head, at least 1.
    width_multiplier: scales the channels of stem and stages, > 0.
    mask_kernel_size: of DynConv's mask units, 3 or 1.
    mask_granularity: of DynConv's masks, the side of a patch in positions of
      the block's output: one for all stages, or one a stage.
    target_rates: of ConvNet-AIG, one a block; where it is 1 the block has no
      gate and is always executed. None: every block has one.
    skip_gate: of SkipNet, one of SKIP_GATES.
    skip_training: of SkipNet, one of SKIP_TRAININGS: how its gates decide in
      training.
    dtype: compute dtype, float32 or bfloat16.
    rngs: stream `params`.

  Raises:
    ValueError: an unknown name or method, a value out of range, or a gated
      method that gates no block.
  """
  check_choice('model', name, ARCHITECTURES)
  check_choice('method', method, METHODS)
  check_choice('skip_gate', skip_gate, SKIP_GATES)
  check_choice('skip_training', skip_training, SKIP_TRAININGS)
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
  mask_granularity = stage_granularities(name, mask_granularity)
  num_blocks = sum(architecture.depths)
  if target_rates is None:
    target_rates = (0.0,) * num_blocks
  if len(target_rates) != num_blocks:
    raise ValueError(
      f'target_rates must be one a block, {num_blocks}; got {len(target_rates)}'
    )
  check_gated(name, method, target_rates)

  def gate(site):
    number, in_features = site.index, site.in_features
    if method == 'dynconv':
      return MaskUnit(
        in_features,
        strides=site.strides,
        kernel_size=mask_kernel_size,
        granularity=mask_granularity[site.stage],
        conv_general_dilated=conv_general_dilated,
        rngs=rngs,
      )
    if method == 'convnet_aig':
      if target_rates[number] == 1:
        return None
      return LayerGate(in_features, norm=BatchNorm, rngs=rngs)
    if method == 'skipnet' and number > 0:
      return create_skip_gate(
        skip_gate,
        in_features,
        first=number == 1,
        training=skip_training,
        conv=conv,
        norm=BatchNorm,
        rngs=rngs,
      )
    if method in ('sact', 'act') and site.stage_index > 0:
      return HaltingUnit(
        in_features,
        spatial=method == 'sact',
        norm=BatchNorm,
        conv_general_dilated=conv_general_dilated,
        rngs=rngs,
      )
    return None

  return ResNet(
    architecture,
    num_classes=num_classes,
    width_multiplier=width_multiplier,
    gate=gate,
    dtype=dtype,
    rngs=rngs,
  )


def stage_granularities(name: str, given: Sequence[int]) -> tuple[int, ...]:
  """Returns the side of DynConv's patches in each stage.

  Args:
    name: a key of ARCHITECTURES.
    given: one for all stages, or one a stage.

  Raises:
    ValueError: there are not so many, or one is not positive.
  """
  stages = len(ARCHITECTURES[name].depths)
  if len(given) not in (1, stages) or any(side < 1 for side in given):
    raise ValueError(
      f'mask_granularity must be 1 or {stages} integers >= 1 for {name}; got '
      f'{",".join(map(str, given))}'
    )
  return tuple(given) * (stages if len(given) == 1 else 1)


def check_gated(name: str, method: str, target_rates: Sequence[float]) -> None:
  """Raises ValueError where a gated method would gate no block.

  Args:
    name: a key of ARCHITECTURES.
    method: one of METHODS.
    target_rates: of ConvNet-AIG, one a block.
  """
  if method in ('sact', 'act') and max(ARCHITECTURES[name].depths) < 2:
    raise ValueError(
      f'{method} needs a stage of two blocks or more, because the first of a '
      f'stage is always executed; {name} has one a stage'
    )
  if method == 'convnet_aig' and all(rate == 1 for rate in target_rates):
    raise ValueError(
      'convnet_aig needs a target rate below 1, because a block whose target '
      'is 1 has no gate; got 1 for every block'
    )
